"""What work runs on and takes: devices, seconds and peak memory of its stages, progress bars.

PyTorch has many kinds of devices, and none is named here but the CPU.
"""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

_BATCH_VALUES = 256 * 3 * 64 * 64  # of a batch of inputs, for the memory
_CACHED_VALUES = 1 << 18  # of one that a CPU's cache holds


def has_float64(device: torch.device) -> bool:
    """Return whether a device computes in float64, which the SVMs' solver needs; Apple's do not."""
    try:
        torch.empty(0, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return False
    return True


def in_float64(values: Tensor) -> Tensor:
    """Convert to float64: on the CPU, where the device has none."""
    return (values if has_float64(values.device) else values.cpu()).double()


def default_device() -> torch.device:
    """Choose an accelerator if there is one that computes in float64, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or not has_float64(accelerator):
        return torch.device("cpu")
    return accelerator


def default_batch_size(inputs: Tensor, device: torch.device | None = None) -> int:
    """Choose how many inputs a forward takes with its gradient: 256, fewer of large ones.

    Memory bounds it, 256 colour images of 64 x 64 pixels or 20 of 224 x 224, and on a CPU its
    cache: there batches of 16 to 64 of such images were up to a third faster than larger ones.
    ``device`` is where they are taken; None: where they are.
    """
    values = max(1, inputs[:1].numel())
    most = _BATCH_VALUES // values
    if (device or inputs.device).type == "cpu":
        most = min(most, max(16, _CACHED_VALUES // values))
    return max(1, min(256, most))


def check_batch_size(batch_size: int | None) -> None:
    """Refuse a batch of less than one input: ValueError; None is left to be chosen."""
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")


def device_name(device: torch.device) -> str:
    """Return the name that the maker gave a device, where PyTorch knows it."""
    name = getattr(torch.get_device_module(device), "get_device_name", str)
    return name(device)


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was asked for; a CPU always has."""
    if device.type == "cpu":
        return
    try:
        torch.accelerator.synchronize(device)
    except RuntimeError:  # not all kinds have streams
        torch.get_device_module(device).synchronize()


def take_peak_memory_mib(device: torch.device) -> float | None:
    """Return the most memory allocated on a device since the last call; None if unknown."""
    if device.type == "cpu":
        return None
    try:
        peak = torch.accelerator.max_memory_allocated(device) / 2**20
        torch.accelerator.reset_peak_memory_stats(device)
    except (RuntimeError, NotImplementedError):  # not all kinds keep count
        return None
    return peak


@dataclass
class Cost:
    """What a stage has cost so far.

    Attributes:
        seconds: Time in it, waiting for the device included.
        peak_memory_mib: Largest memory while it ran, in MiB: on a GPU that of the tensors, on a CPU
            that of the whole process; None where it is unknown, as on a CPU where the process had
            needed more before.
        calls: How often it ran.
    """

    seconds: float = 0.0
    peak_memory_mib: float | None = None
    calls: int = 0

    def plus(self, other: "Cost") -> "Cost":
        """Add what the same stage has cost elsewhere; the peak is unknown if either is."""
        known = self.peak_memory_mib is not None and other.peak_memory_mib is not None
        peak = max(self.peak_memory_mib or 0, other.peak_memory_mib or 0) if known else None
        return Cost(self.seconds + other.seconds, peak, self.calls + other.calls)

    def to_dict(self) -> dict[str, float | int | None]:
        """Convert to JSON values."""
        return asdict(self)


def process_peak_mib() -> float | None:
    """Measure the largest memory of this process so far, in MiB; None where that is unknown."""
    try:
        import resource  # Unix only
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, KiB elsewhere


def progress_bar(
    progress: bool,
    items: Iterable[Any] | None = None,
    **options: Any,  # noqa: ANN401 - those of tqdm
) -> tqdm:
    """Make a progress bar on stderr, over ``items`` if any; it shows on a terminal only."""
    return tqdm(items, disable=None if progress else True, **options)


class _Recorder:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.costs: dict[str, Cost] = {}
        self.open: list[float] = []  # the largest GPU memory so far of each stage under way

    def measure(self) -> None:
        """Wait for a GPU, and count its largest memory since the last call for all open stages."""
        synchronize(self.device)
        peak = take_peak_memory_mib(self.device)
        if peak is not None:
            self.open = [max(earlier, peak) for earlier in self.open]


_RECORDER: ContextVar[_Recorder | None] = ContextVar("recorder", default=None)


@contextmanager
def record_costs(device: str | torch.device = "cpu") -> Iterator[dict[str, Cost]]:
    """Record what the stages cost that run inside: features, search, stacking, threshold, ...

    ``fit`` and ``calibrate`` of DNR and NR name their stages; others are named by ``stage``.

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
    recorder.measure()
    recorder.open.append(0.0)
    before, began = process_peak_mib(), time.perf_counter()
    try:
        yield
    finally:
        recorder.measure()
        cost = recorder.costs.setdefault(name, Cost())
        cost.seconds += time.perf_counter() - began
        cost.calls += 1
        peak, after = recorder.open.pop(), process_peak_mib()
        if recorder.device.type != "cpu":
            cost.peak_memory_mib = max(peak, cost.peak_memory_mib or 0)
        else:  # known only if it rose, as the system keeps that of earlier work
            cost.peak_memory_mib = None if after == before else after
