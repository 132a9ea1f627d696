"""The processes that work together, as torchrun starts them, and how they exchange tensors.

What is exchanged are plain tensors: gloo carries those on the CPU, NCCL those on a GPU.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

# Longer than any training or attack: a process that dies is noticed by its closed connection.
TIMEOUT = timedelta(days=30)


class PeerError(RuntimeError):
    """Another process of the job has ended before its work was done."""


@dataclass(frozen=True)
class Processes:
    """The processes of a job, as one of them sees them: its rank, and how many there are."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes the files and talks."""
        return self.rank == 0

    def owner(self, unit: int) -> int:
        """Return the rank that does the unit of work of this number: they are assigned in turn."""
        return unit % self.count

    def mine(self, unit: int) -> bool:
        """Return whether this process does the unit of work of this number."""
        return self.owner(unit) == self.rank

    def wait(self) -> None:
        """Wait until all processes are here; raise ``PeerError`` if one of them has ended."""
        self.all_reduce(torch.zeros(1))

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Run the block in the first process, then in the others, which can read its files.

        Meanwhile the first has the cores of all on its machine.
        """
        if not self.first:
            self.wait()
        threads = torch.get_num_threads()
        if self.first:
            waiting = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            torch.set_num_threads(min(threads * waiting, max(threads, os.cpu_count() or 1)))
        try:
            yield
        finally:
            torch.set_num_threads(threads)
        if self.first:
            self.wait()

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Give every process the tensor of one of them.

        The others pass any of the same shape, dtype and kind of device, which may be overwritten.
        Where all have computed the same, rounding and ties may still differ between machines: what
        decides on the way that the work takes has to be one process's.
        """
        return self._exchange(tensor, lambda t: dist.broadcast(t, src=source))

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Add up the tensors of all processes, which may be overwritten."""
        return self._exchange(tensor, dist.all_reduce)

    def reduce(self, tensor: Tensor, target: int) -> Tensor:
        """Add up the tensors of all processes for one; elsewhere the result is of no use."""
        return self._exchange(tensor, lambda t: dist.reduce(t, dst=target))

    def numbers(self, number: int) -> list[int]:
        """Collect a whole number of each process, in the order of the ranks."""
        numbers = torch.zeros(self.count, dtype=torch.int64)
        numbers[self.rank] = number
        return self.all_reduce(numbers).tolist()

    def all(self, flag: bool) -> bool:
        """Return whether something holds in every process."""
        return sum(self.numbers(int(flag))) == self.count

    def gather(self, part: Tensor, sizes: Sequence[int], dim: int = 0) -> Tensor:
        """Concatenate the parts of all processes, of these sizes in dimension ``dim``."""
        if self.count == 1:
            return part
        shape = list(part.shape)
        shape[dim] = max(sizes)
        padded = part.new_zeros(shape)
        padded.narrow(dim, 0, sizes[self.rank]).copy_(part)
        parts = list(padded.new_empty(self.count, *shape).unbind())
        self._exchange(padded, lambda t: dist.all_gather(parts, t))
        whole = [p.narrow(dim, 0, size) for p, size in zip(parts, sizes, strict=True)]
        return torch.cat(whole, dim=dim)

    def broadcast_text(self, text: str, source: int = 0) -> str:
        """Give every process the text of one of them; what the others pass does not count."""
        if self.count == 1:
            return text
        data = torch.tensor(list(text.encode()), dtype=torch.uint8)
        length = int(self.broadcast(torch.tensor([len(data)]), source))
        data = data if self.rank == source else torch.empty(length, dtype=torch.uint8)
        return bytes(self.broadcast(data, source).tolist()).decode() if length else ""

    def _exchange(self, tensor: Tensor, collective: Callable[[Tensor], object]) -> Tensor:
        if self.count == 1:
            return tensor
        tensor = tensor.contiguous()
        with _peers_needed():
            if (
                tensor.device.type != "cpu"
            ):  # NCCL would wait for a process that is gone, gloo notices it
                dist.all_reduce(torch.zeros(1))
            collective(tensor)
        return tensor


ALONE = Processes()
_IS_ALONE: ContextVar[bool] = ContextVar("is_alone", default=False)


def current() -> Processes:
    """Return the processes that share the work: those of torch.distributed's default group.

    ``joined`` or the user's program has initialised it; without a group, and inside ``alone``, it
    is this process alone.
    """
    if _IS_ALONE.get() or not (dist.is_available() and dist.is_initialized()):
        return ALONE
    if "cpu:" not in (backends := dist.get_backend_config()):
        raise ValueError(
            f"the default process group must carry tensors on the CPU too, got {backends}; set it "
            'up by init_process_group("cpu:gloo,cuda:nccl")'
        )
    return Processes(dist.get_rank(), dist.get_world_size())


@contextmanager
def alone() -> Iterator[None]:
    """Let this process do all the work of the block by itself, whatever group there is."""
    token = _IS_ALONE.set(True)
    try:
        yield
    finally:
        _IS_ALONE.reset(token)


def warn_once(message: str, category: type[Warning] = UserWarning, *, stacklevel: int) -> None:
    """Warn of what all processes see alike: of those that share the work, only the first does."""
    if (
        _IS_ALONE.get()
        or not (dist.is_available() and dist.is_initialized())
        or not dist.get_rank()
    ):
        warnings.warn(message, category, stacklevel=stacklevel + 1)


def local_device(device: torch.device) -> torch.device:
    """Choose the device of this process: with more than one of them, a GPU for each.

    Raises ``ValueError`` if this machine has more processes than GPUs, or one GPU was asked for.
    """
    if device.type == "cpu" or not _is_distributed():
        return device
    local = int(os.environ.get("LOCAL_RANK", 0))
    available = torch.get_device_module(device).device_count()
    if device.index is not None:
        raise ValueError(
            f"several processes need a GPU each, got the one device {device}; ask for {device.type}"
        )
    if local >= available:
        raise ValueError(
            f"several processes need a GPU each, got {available} for process {local}; lower "
            "--nproc-per-node or --processes, or run on --device cpu"
        )
    return torch.device(device.type, local)


@contextmanager
def joined(device: torch.device) -> Iterator[Processes]:
    """Join the processes that torchrun started; without torchrun there is this one alone."""
    if not _is_distributed():
        yield ALONE
        return
    backend = "gloo"
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)
        backend = f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"
    dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        processes = current()
        processes.wait()
        if device.type != "cpu":  # what does not work is to fail now, not after the attacks
            processes.broadcast(torch.zeros(1, device=device))
        yield processes
    finally:
        dist.destroy_process_group()


@contextmanager
def _peers_needed() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:  # it has a message of its own, and no peer has ended
        raise
    except RuntimeError as error:
        raise PeerError(
            "another process of this job ended before its work was done, so this one ends too; its "
            "own message, or torchrun's summary, says why; the same command goes on from what is "
            f"finished ({str(error).splitlines()[0]})"
        ) from error


def _is_distributed() -> bool:
    """Return whether torchrun started more than one process."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1
