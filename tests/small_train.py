"""train.py, of which one of two processes is killed as a stage begins: `STAGE RANK ...`."""

import importlib.util
import io
import os
import signal
import sys
import threading
import time
from pathlib import Path

_SPEC = importlib.util.spec_from_file_location("train", Path(__file__).parents[1] / "train.py")
train = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(train)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class FatalMessages(io.TextIOBase):
    """Standard error of the first process, the one that says what it begins."""

    def write(self, text):
        if "DNR: SVMs on" in text:
            die()
        return sys.__stderr__.write(text)


def die_after_dnr(run):
    while not (run / "dnr.safetensors").exists():
        time.sleep(1e-3)
    die()


if __name__ == "__main__":
    stage, rank, *arguments = sys.argv[1:]
    if os.environ["RANK"] == rank and stage == "DNR":
        sys.stderr = FatalMessages()
    elif os.environ["RANK"] == rank:  # NR
        run = Path(arguments[arguments.index("--run") + 1])
        threading.Thread(target=die_after_dnr, args=[run], daemon=True).start()
    sys.exit(train.main(arguments))
