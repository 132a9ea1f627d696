"""What a stage of the work costs: seconds and peak memory, recorded only where somebody asks."""

import sys
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
            that of the whole process, with what it held before; None where that is unknown.
        calls: How often it ran.
    """

    seconds: float = 0.0
    peak_memory_mib: float | None = None
    calls: int = 0

    def to_dict(self) -> dict[str, float | int | None]:
        """Convert to JSON values."""
        return asdict(self)


class _Recorder:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.costs: dict[str, Cost] = {}
        self.open: list[float | None] = []  # the largest memory seen by each stage under way

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak(self) -> float | None:
        """Read the largest memory since the last call, in MiB, and start to measure afresh."""
        if self.device.type == "cuda":
            found = torch.cuda.max_memory_allocated(self.device) / 2**20
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            found = _process_peak()
        # A stage within a stage: what the inner one needed counts for the outer one as well.
        self.open = [_larger(seen, found) for seen in self.open]
        return found


_RECORDER: ContextVar[_Recorder | None] = ContextVar("recorder", default=None)


_LARGEST = [0.0]


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
    recorder.peak()
    recorder.open.append(None)
    began = time.perf_counter()
    try:
        yield
    finally:
        recorder.synchronise()
        spent = time.perf_counter() - began
        recorder.peak()
        cost = recorder.costs.setdefault(name, Cost())
        cost.seconds += spent
        cost.peak_memory_mib = _larger(cost.peak_memory_mib, recorder.open.pop())
        cost.calls += 1


def _larger(one: float | None, two: float | None) -> float | None:
    known = [value for value in (one, two) if value is not None]
    return max(known, default=None)


def _process_peak() -> float | None:
    """Read and reset the peak of this process, in MiB; Linux only, None elsewhere."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak alone
    except OSError:
        return None
    found = [line.split() for line in lines if line.startswith("VmHWM:")]
    if not found:
        return None
    peak = float(found[0][1]) / 2**10  # given in KiB
    _LARGEST.append(max(peak, _LARGEST.pop()))
    return peak


def largest_before_reset() -> float:
    """Tell the largest memory of this process that recording made the system forget, in MiB."""
    return _LARGEST[0]
