"""What the commands share: messages about their stages, and errors in one line."""

import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from torchdnr.resources import process_peak_mib

FAILED = 2
STOPPED = 130  # the shell's code for a command stopped by Ctrl-C


class Console:
    """Messages about the stages of a command, on stderr, and how long each took."""

    def __init__(self, quiet: bool = False) -> None:
        self.progress = not quiet  # whether messages and progress bars are shown
        self.status = 0  # exit code so far
        self.stages = 0  # how many there will be
        self.process = ""  # which of many this is; empty if it is the only one
        self.seconds: dict[str, float] = {}  # by stage
        self._began = time.perf_counter()

    def join(self, rank: int, count: int) -> None:
        """Note the number of this process among ``count``, of which only the first prints."""
        if rank > 0:
            self.process = f"process {rank + 1} of {count}: "
            self.progress = False

    @property
    def total_seconds(self) -> float:
        """Time since the command began."""
        return time.perf_counter() - self._began

    def say(self, text: str) -> None:
        """Print a message."""
        if self.progress:
            print(text, file=sys.stderr, flush=True)

    @contextmanager
    def stage(self, name: str, text: str) -> Iterator[None]:
        """Announce a stage, and say at its end how long it took."""
        number, began = len(self.seconds) + 1, time.perf_counter()
        self.say(f"{number}/{self.stages} {name}: {text}")
        yield
        self.seconds[name] = time.perf_counter() - began
        if self.seconds[name] >= 1:
            self.say(f"    {self.seconds[name]:.0f} s")


@contextmanager
def command(
    quiet: bool, packages: Sequence[str] = ("torchdnr",), *, resumes: bool = True
) -> Iterator[Console]:
    """Run the block as a command; print its time and memory, or its error in one line.

    An error that is not meant for the user is raised: its traceback is wanted. ``packages`` are
    those whose errors are. The console's ``status`` is the exit code afterwards.
    """
    console = Console(quiet)
    try:
        yield console
    except KeyboardInterrupt:
        what_then = "goes on from here" if resumes else "starts again"
        print(f"\n{console.process}stopped; the same command {what_then}", file=sys.stderr)
        console.status = STOPPED
    except Exception as error:
        if not is_for_user(error, packages):
            raise
        print(f"{console.process}error: {error}", file=sys.stderr)
        console.status = FAILED
    else:
        memory = process_peak_mib()
        used = "" if memory is None else f", peak memory {memory:,.0f} MiB"
        console.say(f"took {console.total_seconds:.0f} s{used}")


def is_for_user(error: Exception, packages: Sequence[str] = ("torchdnr",)) -> bool:
    """Return whether a message was written for the user: by us, or about a file or memory."""
    if isinstance(error, OSError | torch.OutOfMemoryError):
        return True
    *_, (innermost, _) = traceback.walk_tb(error.__traceback__)
    raised_here = innermost.f_globals.get("__name__", "").startswith(tuple(packages))
    kinds = ValueError, ImportError, RuntimeError, FloatingPointError
    return raised_here and isinstance(error, kinds)
