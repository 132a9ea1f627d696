"""What a stage of the work costs: seconds and peak memory, recorded only where somebody asks."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path

import torch


@dataclass
class Cost:
    """What a stage has cost so far.

    Attributes:
        seconds: Time in it, waiting for the device included.
        peak_memory_mib: Largest memory while it ran, in MiB: on a GPU that of the tensors, on a CPU
            that of the whole process, with what it held before; None where that is unknown: not on
            Linux, or the system kept the peak of earlier work and the stage stayed below it.
        calls: How often it ran.
    """

    seconds: float = 0.0
    peak_memory_mib: float | None = None
    calls: int = 0

    def add_peak(self, peak: float | None, most: float | None) -> None:
        """Take the peak of one more run, in MiB, of which only ``most`` may be known."""
        if peak is not None:
            self.peak_memory_mib = _larger(self.peak_memory_mib, peak)
        elif most is None or self.peak_memory_mib is None or most > self.peak_memory_mib:
            self.peak_memory_mib = None  # this run may have been the largest

    def plus(self, other: "Cost") -> "Cost":
        """Add what the same stage has cost elsewhere; the peak is unknown if either is."""
        peaks = self.peak_memory_mib, other.peak_memory_mib
        return Cost(
            self.seconds + other.seconds,
            None if None in peaks else max(peaks),
            self.calls + other.calls,
        )

    def to_dict(self) -> dict[str, float | int | None]:
        """Convert to JSON values."""
        return asdict(self)


class _Recorder:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.costs: dict[str, Cost] = {}
        self.open: list[float | None] = []  # the largest memory seen by each stage under way
        self.kept: float | None = None  # peak of earlier work that the system did not forget

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def note_peak(self) -> None:
        """Count the largest memory since the last call for all open stages; measure afresh."""
        if self.device.type == "cuda":
            found = torch.cuda.max_memory_allocated(self.device) / 2**20
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            memory = _process_memory()
            # A peak that the system would not forget says nothing of what came after it.
            news = memory is not None and (self.kept is None or memory[0] > self.kept)
            found = memory[0] if memory and news else None
            self.kept = _forget_process_peak()
        # A stage within a stage: what the inner one needed counts for the outer one as well.
        self.open = [_larger(seen, found) for seen in self.open]


_RECORDER: ContextVar[_Recorder | None] = ContextVar("recorder", default=None)


_PROCESS = Path("/proc/self")  # what Linux tells of this process
_LARGEST = [0.0]  # peak of this process, which the system forgets
_SLACK_MIB = 8.0  # threads count their pages late


@contextmanager
def record_costs(device: str | torch.device = "cpu") -> Iterator[dict[str, Cost]]:
    """Record what the stages cost that run inside: features, search, stacking, threshold, ...

    ``fit`` and ``calibrate`` of DNR and NR tell their stages; others are told by ``stage``.

    Args:
        device: Where the work runs; the clock waits for a GPU at both ends of a stage.

    Yields:
        Stage name to its cost; grows as stages end. One name is one entry, however often it runs.
    """
    recorder = _Recorder(torch.device(device))
    token = _RECORDER.set(recorder)
    try:
        yield recorder.costs
    finally:
        _RECORDER.reset(token)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Name a stage of the work. Free of cost unless ``record_costs`` is around it."""
    recorder = _RECORDER.get()
    if recorder is None:
        yield
        return
    recorder.synchronise()
    recorder.note_peak()
    recorder.open.append(None)
    began = time.perf_counter()
    try:
        yield
    finally:
        recorder.synchronise()
        spent = time.perf_counter() - began
        recorder.note_peak()
        cost = recorder.costs.setdefault(name, Cost())
        cost.seconds += spent
        cost.add_peak(recorder.open.pop(), recorder.kept)
        cost.calls += 1


def _larger(one: float | None, two: float | None) -> float | None:
    known = [value for value in (one, two) if value is not None]
    return max(known, default=None)


def _process_memory() -> tuple[float, float] | None:
    """Read the peak of this process and its memory now, in MiB; Linux only, None elsewhere."""
    try:
        lines = (_PROCESS / "status").read_text().splitlines()
    except OSError:
        return None
    fields = {line.split(":")[0]: line.split() for line in lines}
    if not {"VmHWM", "VmRSS"} <= fields.keys():
        return None
    peak, now = (float(fields[key][1]) / 2**10 for key in ("VmHWM", "VmRSS"))  # given in KiB
    _LARGEST[0] = max(peak, _LARGEST[0])
    return peak, now


def _forget_process_peak() -> float | None:
    """Ask the system to measure the peak afresh; tell an older one that it kept, in MiB."""
    try:
        (_PROCESS / "clear_refs").write_text("5")  # resets the peak alone
    except OSError:
        pass  # seen below: the old peak is still there
    memory = _process_memory()
    # Some sandboxes accept the request and keep the peak.
    return memory[0] if memory and memory[0] > memory[1] + _SLACK_MIB else None


def largest_before_reset() -> float:
    """Tell the largest memory of this process that recording made the system forget, in MiB."""
    return _LARGEST[0]
