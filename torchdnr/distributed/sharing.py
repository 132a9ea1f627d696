"""How images and their features are divided among processes: each has a contiguous part."""

from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn

from torchdnr.arrays import as_images, as_labels
from torchdnr.decisions import check_images
from torchdnr.distributed.processes import ALONE, Processes
from torchdnr.files import digest
from torchdnr.kernels.row_blocks import column_means, entry_moments, joint_moments
from torchdnr.resources import default_batch_size


@dataclass(frozen=True)
class Partition:
    """Which of n samples belong to which process: blocks of these sizes, by rank."""

    sizes: tuple[int, ...]
    processes: Processes = ALONE

    @classmethod
    def even(cls, n: int, processes: Processes) -> "Partition":
        """Divide n samples as evenly as possible; where there are fewer, some get none."""
        count = processes.count
        return cls(tuple(n // count + (rank < n % count) for rank in range(count)), processes)

    @property
    def n(self) -> int:
        """Number of samples."""
        return sum(self.sizes)

    @property
    def largest(self) -> int:
        """Samples of the process that has most."""
        return max(self.sizes)

    @property
    def local(self) -> slice:
        """Samples of this process."""
        start = sum(self.sizes[: self.processes.rank])
        return slice(start, start + self.sizes[self.processes.rank])

    def locate(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return positions of samples among this process's, and which are here at all."""
        local = self.local
        is_local = (index >= local.start) & (index < local.stop)
        return (index - local.start).clamp(0, local.stop - local.start - 1), is_local

    def gather(self, part: Tensor, dim: int = 0) -> Tensor:
        """Concatenate what each process computed for its samples, along ``dim``."""
        return self.processes.gather(part, self.sizes, dim)


@dataclass(frozen=True)
class ShardedFeatures:
    """Features ``(n, d)``, of which this process holds the rows of its samples, ``local``."""

    local: Tensor
    partition: Partition

    @classmethod
    def of(cls, features: "Tensor | ShardedFeatures") -> "ShardedFeatures":
        """Wrap features that one process has all by itself; return wrapped ones as they are."""
        if isinstance(features, ShardedFeatures):
            return features
        return cls(features, Partition((len(features),)))

    @classmethod
    def from_local(cls, local: Tensor, processes: Processes) -> "ShardedFeatures":
        """Wrap the rows of this process, which follow those of lower ranks; all call this."""
        return cls(local, Partition(tuple(processes.numbers(len(local))), processes))

    def __len__(self) -> int:
        """Return n."""
        return self.partition.n

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (n, d) of the features of all processes."""
        return self.partition.n, self.local.shape[1]

    def rows(self, index: Tensor | slice) -> Tensor:
        """Give every process a copy of the rows of some samples, the same in every process."""
        if isinstance(index, slice):
            index = torch.arange(index.start, index.stop, device=self.local.device)
        if self.partition.processes.count == 1:
            return self.local[index]
        positions, is_local = self.partition.locate(index)
        rows = self.local.new_zeros(len(index), self.local.shape[1])
        rows[is_local] = self.local[positions[is_local]]
        return self.partition.processes.all_reduce(rows)  # all but one add 0

    def select(self, kept: Tensor) -> "ShardedFeatures":
        """Select samples, int64 ``(m,)``, ascending and some of every process."""
        bounds = torch.tensor([0, *accumulate(self.partition.sizes)], device=kept.device)
        sizes = tuple(torch.searchsorted(kept, bounds).diff().tolist())
        positions, is_local = self.partition.locate(kept)
        return ShardedFeatures(
            self.local[positions[is_local]], replace(self.partition, sizes=sizes)
        )

    def times(self, factors: Tensor) -> "ShardedFeatures":
        """Multiply every row by the same factors, ``(d,)``."""
        return replace(self, local=self.local * factors.to(self.local))

    def means(self) -> Tensor:
        """Compute the mean of all rows, ``(d,)``."""
        means, processes = column_means(self.local), self.partition.processes
        if processes.count == 1:
            return means
        weighted = means.double() * (len(self.local) / len(self))
        return processes.all_reduce(weighted).to(means.dtype)

    def variance(self) -> float:
        """Compute the variance of all entries together."""
        moments, processes = entry_moments(self.local), self.partition.processes
        parts = moments.new_zeros(processes.count, 2)
        parts[processes.rank] = moments
        joint = joint_moments(processes.all_reduce(parts), self.partition.sizes)
        return processes.broadcast(joint)[0].item()


Batch = tuple[Tensor, Tensor | None]


def local_images(images: Tensor, processes: Processes) -> Tensor:
    """Return this process's contiguous part of the images ``(n, ...)``, a view."""
    partition = Partition.even(len(images), processes)
    _check_enough(partition, "images")
    return images[partition.local]


def local_batches(
    data: Iterable[Any], batches: Iterator[Batch], labels: list[Tensor | None], processes: Processes
) -> Iterator[Batch]:
    """Go through all batches of a loader, and yield this process's contiguous part of them.

    The length of ``data``, the loader, is asked for where there is more than one process.
    ``labels`` gets the labels of all batches, in their order.
    """
    local = range(0)
    if processes.count > 1:
        try:
            count = len(cast(Sized, data))
        except TypeError as error:
            raise ValueError(
                f"a loader for {processes.count} processes must tell its number of batches, got a "
                f"{type(data).__name__} without len(); pass a DataLoader, or images and labels"
            ) from error
        partition = Partition.even(count, processes)
        _check_enough(partition, "batches")
        local = range(partition.local.start, partition.local.stop)
    for number, (images, batch_labels) in enumerate(batches):
        labels.append(batch_labels)
        if processes.count == 1 or number in local:
            yield images, batch_labels


def check_same(
    processes: Processes, net: nn.Module, labels: Iterable[Tensor | None], images: Tensor
) -> None:
    """Refuse a network, labels or first images that are not the same in all processes."""
    if processes.count == 1:
        return
    tensors = {str(i): t for i, t in enumerate([*labels, images]) if t is not None}
    digests = {
        "images and labels in the same order": digest(tensors),
        "network": digest(net.state_dict()),
    }
    for what, value in digests.items():
        if not processes.all(processes.broadcast_text(value) == value):
            raise ValueError(
                f"all processes must be given the same {what}, got others: load the network from "
                "one file, take a loader that neither shuffles nor samples by process, or let each "
                "process work by itself with torchdnr.distributed.alone()"
            )


def _check_enough(partition: Partition, what: str) -> None:
    if min(partition.sizes) == 0:
        raise ValueError(
            f"{len(partition.sizes)} processes need as many {what} at least, got {partition.n}; "
            "start fewer of them"
        )


def checked_batches(
    data: Tensor | Iterable[Any], batch_size: int | None, device: torch.device | None = None
) -> Iterator[Batch]:
    """Yield checked batches of images in [0, 1], with labels or None, from a tensor or a loader.

    Without a batch size those of a tensor are as large as suits the ``device`` that takes them.
    """
    if isinstance(data, Tensor):
        check_images("inputs", data)
        size = default_batch_size(data, device) if batch_size is None else batch_size
        yield from ((batch, None) for batch in data.split(size))
        return
    count = 0
    for batch in data:
        images, *rest = batch if isinstance(batch, Sequence) and batch else (batch,)
        if hasattr(images, "__array__"):
            images = as_images("inputs", images)
        if not isinstance(images, Tensor):
            raise ValueError(
                "each batch of the loader must be images, or (images, labels), as tensors; got "
                f"{type(images).__name__}"
            )
        check_images("inputs", images)
        count += 1
        yield images, as_labels("labels", rest[0]) if rest else None
    if count == 0:
        raise ValueError("the loader yielded no batch: expected at least one image")
