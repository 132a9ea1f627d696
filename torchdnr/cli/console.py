"""What the scripts share: messages about their stages, and errors in one line."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from torchdnr.costs import largest_before_reset

STOPPED = 130  # the shell's code for a command stopped by Ctrl-C


class Console:
    """Messages about the stages of a job, on stderr, and how long each took.

    Args:
        quiet: Whether to say nothing and show no progress bars.

    Attributes:
        stages: Number of stages announced.
        seconds: Stage name to its duration.
        process: Which of several processes this is; empty if it is the only one.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.progress = not quiet
        self.stages = 0
        self.process = ""
        self.seconds: dict[str, float] = {}
        self._began = time.perf_counter()

    def join(self, rank: int, count: int) -> None:
        """Take note of the other processes of the job: only the first one talks."""
        if count > 1:
            self.process = f"process {rank + 1} of {count}: "
            self.progress = self.progress and rank == 0

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
        """Announce a stage, and tell in the end how long it took."""
        number, began = len(self.seconds) + 1, time.perf_counter()
        self.say(f"{number}/{self.stages} {name}: {text}")
        yield
        self.seconds[name] = time.perf_counter() - began
        if self.seconds[name] >= 1:
            self.say(f"    {self.seconds[name]:.0f} s")


def run_command(
    options: argparse.Namespace,
    job: Callable[[Console], None],
    packages: Sequence[str] = ("torchdnr",),
    *,
    resumes: bool = True,
) -> int:
    """Run a job; print its time and memory, or its error in one line.

    Args:
        options: Parsed options; ``quiet`` counts here.
        job: What to run.
        packages: Beginnings of the names of the modules whose errors are written for users.
        resumes: Whether a stopped job goes on where it was.

    Returns:
        Exit code: 0, 2 after an error, 130 if stopped by Ctrl-C. An error that nobody foresaw
        is raised: its traceback is wanted.
    """
    console = Console(options.quiet)
    try:
        job(console)
    except KeyboardInterrupt:
        what_then = "goes on from here" if resumes else "starts again"
        print(f"\n{console.process}stopped; the same command {what_then}", file=sys.stderr)
        return STOPPED
    except Exception as error:
        if not _foreseen(error, packages):
            raise
        print(f"{console.process}error: {error}", file=sys.stderr)
        return 2
    memory = peak_memory_mib()
    used = "" if memory is None else f", peak memory {memory:,.0f} MiB"
    console.say(f"took {console.total_seconds:.0f} s{used}")
    return 0


def _foreseen(error: Exception, packages: Sequence[str]) -> bool:
    """Tell whether a message was written for the user: by us, or about a file or memory."""
    if isinstance(error, OSError | torch.OutOfMemoryError):
        return True
    frame = error.__traceback__
    while frame.tb_next:
        frame = frame.tb_next
    raised_here = frame.tb_frame.f_globals.get("__name__", "").startswith(tuple(packages))
    kinds = ValueError, ImportError, RuntimeError, FloatingPointError
    return raised_here and isinstance(error, kinds)


def peak_memory_mib() -> float | None:
    """Measure the largest memory of this process so far, in MiB; None where that is unknown."""
    try:
        import resource  # Unix only
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak /= 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return max(peak, largest_before_reset())
