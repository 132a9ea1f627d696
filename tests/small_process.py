"""Python that is run in a process of its own, to measure its memory."""

import subprocess
import sys

_BETWEEN = "import subprocess, sys; subprocess.run(sys.argv[1:], check=True)"


def run_apart(code: str) -> str:
    """Run code in a process that does not inherit the peak memory of this one; what it prints.

    A process inherits the peak of the one that starts it: a small one has to stand between.
    """
    command = [sys.executable, "-c", _BETWEEN, sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
