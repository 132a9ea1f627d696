"""Ctrl-C for tests, pressed when a file appears."""

import os
import signal
import threading
from contextlib import contextmanager


@contextmanager
def stopping_at(path):
    """Press Ctrl-C, so to speak, as soon as a file is there."""
    ended = threading.Event()

    def watch():
        while not path.exists():
            if ended.wait(1e-3):
                return
        os.kill(os.getpid(), signal.SIGINT)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
