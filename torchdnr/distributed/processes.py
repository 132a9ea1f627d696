"""Work on several processes that torchrun started: who does what, and how all learn of it.

What is shared travels as plain tensors: gloo carries those on the CPU, NCCL those on a GPU.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
    """The processes of a job, as one of them sees them.

    Attributes:
        rank: Number of this process, from 0.
        count: How many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes the files and talks."""
        return self.rank == 0

    def owner(self, unit: int) -> int:
        """Return the rank that does the unit of work of this number: they are dealt in turn."""
        return unit % self.count

    def mine(self, unit: int) -> bool:
        """Tell whether this process does the unit of work of this number."""
        return self.owner(unit) == self.rank

    def wait(self) -> None:
        """Wait until all processes are here.

        Raises:
            PeerError: If one of them has ended.
        """
        if self.count > 1:
            with _peers_needed():
                _meet()

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Let the first process run the block, then the others: they find what it made."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    def share(self, tensor: Tensor, owner: int) -> Tensor:
        """Give every process the tensor of one of them.

        Args:
            tensor: The tensor on the owner; elsewhere any of the same shape, dtype and kind of
                device. It may be overwritten there.
            owner: Rank of the process that has it.

        Returns:
            The owner's tensor.

        Raises:
            PeerError: If another process has ended.
        """
        tensor = tensor.contiguous() if self.count > 1 else tensor
        self._together(lambda: dist.broadcast(tensor, src=owner), tensor)
        return tensor

    def agree(self, tensor: Tensor) -> Tensor:
        """Give every process the first one's tensor.

        Where all have computed the same, rounding and ties may still differ between machines: what
        decides on the way that the work takes has to be one process's.

        Args:
            tensor: Of one shape and dtype everywhere; it may be overwritten.

        Returns:
            The tensor of the first process.
        """
        return self.share(tensor, 0)

    def total(self, tensor: Tensor) -> Tensor:
        """Add up the tensors of all processes.

        Args:
            tensor: Of one shape and dtype everywhere; it may be overwritten.

        Returns:
            The sum, the same in every process.
        """
        tensor = tensor.contiguous() if self.count > 1 else tensor
        self._together(lambda: dist.all_reduce(tensor), tensor)
        return tensor

    def total_for(self, owner: int, tensor: Tensor) -> Tensor:
        """Add up the tensors of all processes for one of them.

        Args:
            owner: Rank of the process that wants the sum.
            tensor: Of one shape and dtype everywhere; it may be overwritten.

        Returns:
            The sum on the owner; elsewhere nothing of use.
        """
        tensor = tensor.contiguous() if self.count > 1 else tensor
        self._together(lambda: dist.reduce(tensor, dst=owner), tensor)
        return tensor

    def numbers(self, number: int) -> list[int]:
        """Collect a whole number of each process, in the order of the ranks."""
        found = torch.zeros(self.count, dtype=torch.int64)
        found[self.rank] = number
        return self.total(found).tolist()

    def all_agree(self, flag: bool) -> bool:
        """Tell whether something holds in every process."""
        return sum(self.numbers(int(flag))) == self.count

    def gather(self, part: Tensor, sizes: Sequence[int], dim: int = 0) -> Tensor:
        """Put together what each process has a part of.

        Args:
            part: This process's part; those of the others differ in dimension ``dim`` at most.
            sizes: Size of each process's part in that dimension.
            dim: Along which the parts follow each other.

        Returns:
            The whole, in every process.
        """
        if self.count == 1:
            return part
        shape = list(part.shape)
        shape[dim] = max(sizes)
        padded = part.new_zeros(shape)
        padded.narrow(dim, 0, sizes[self.rank]).copy_(part)
        parts = list(padded.new_empty(self.count, *shape).unbind())
        self._together(lambda: dist.all_gather(parts, padded), padded)
        whole = [p.narrow(dim, 0, size) for p, size in zip(parts, sizes, strict=True)]
        return torch.cat(whole, dim=dim)

    def share_text(self, text: str, owner: int) -> str:
        """Give every process the text of one of them; what the others pass does not count."""
        if self.count == 1:
            return text
        data = torch.tensor(list(text.encode()), dtype=torch.uint8)
        length = int(self.share(torch.tensor([len(data)]), owner))
        data = data if self.rank == owner else torch.empty(length, dtype=torch.uint8)
        return bytes(self.share(data, owner).tolist()).decode() if length else ""

    def _together(self, work: Callable[[], object], tensor: Tensor) -> None:
        if self.count > 1:
            with _peers_needed():
                if tensor.is_cuda:  # NCCL would wait for a process that is gone
                    _meet()
                work()


ALONE = Processes()


def default_processes() -> Processes:
    """Find the processes of torch.distributed's default group.

    Returns:
        Those of the group, which ``joined`` or the user's program has set up; without one, this
        process alone.

    Raises:
        ValueError: If the group cannot carry tensors on the CPU.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return ALONE
    if "cpu:" not in (backends := dist.get_backend_config()):
        raise ValueError(
            f"the default process group must carry tensors on the CPU too, got {backends}; set it "
            'up by init_process_group("cpu:gloo,cuda:nccl")'
        )
    return Processes(dist.get_rank(), dist.get_world_size())


def local_device(device: torch.device) -> torch.device:
    """Choose the device of this process: with several of them, one GPU for each.

    Args:
        device: What was asked for.

    Returns:
        The GPU whose number is this process's on its machine, or ``device`` if it is no GPU or
        there is one process only.

    Raises:
        ValueError: If there are more processes on this machine than GPUs, or one GPU was asked for.
    """
    if device.type != "cuda" or not _several():
        return device
    local, available = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if device.index is not None:
        raise ValueError(
            f"several processes need a GPU each, got the one device {device}; ask for cuda"
        )
    if local >= available:
        raise ValueError(
            f"several processes need a GPU each, got {available} for process {local}; lower "
            "--nproc-per-node, or run on --device cpu"
        )
    return torch.device("cuda", local)


@contextmanager
def joined(device: torch.device) -> Iterator[Processes]:
    """Join the processes that torchrun started; without torchrun there is this one alone.

    Args:
        device: Where this process works, from ``local_device``.

    Yields:
        The processes.
    """
    if not _several():
        yield ALONE
        return
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        found = Processes(dist.get_rank(), dist.get_world_size())
        found.wait()
        if device.type == "cuda":  # what does not work is to fail now, not after the attacks
            found.share(torch.zeros(1, device=device), 0)
        yield found
    finally:
        dist.destroy_process_group()


def _meet() -> None:
    dist.all_reduce(torch.zeros(1))  # on the CPU: gloo notices closed connections


@contextmanager
def _peers_needed() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:  # this process's own trouble, which has a message of its own
        raise
    except RuntimeError as error:
        raise PeerError(
            "another process of this job ended before its work was done, so this one ends too; its "
            "own message, or torchrun's summary, says why; the same command goes on from what is "
            f"finished ({str(error).splitlines()[0]})"
        ) from error


def _several() -> bool:
    return int(os.environ.get("WORLD_SIZE", 1)) > 1
