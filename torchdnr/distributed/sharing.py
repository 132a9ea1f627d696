"""Features of which each of several processes holds a contiguous block of rows."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from torchdnr.decisions import check_images
from torchdnr.distributed.processes import ALONE, Processes
from torchdnr.files import digest

BLOCK_BYTES = 2**26
"""Bytes of a block that is only read."""
COPIED_BYTES = 2**22
"""Bytes of a block of which copies are made."""


def row_blocks(features: Tensor, block_bytes: int) -> tuple[Tensor, ...]:
    """Cut features into blocks of rows, as views.

    Args:
        features: ``(n, d)``, n >= 1.
        block_bytes: Bytes of a block at the most, but one row at the least.

    Returns:
        The blocks in order.
    """
    row = features.element_size() * features.shape[1]
    return features.split(max(1, block_bytes // max(1, row)))


def all_finite(features: Tensor) -> bool:
    """Tell whether there is neither NaN nor infinity among the features, ``(n, d)``."""
    return bool(
        torch.stack([torch.isfinite(b).all() for b in row_blocks(features, COPIED_BYTES)]).all()
    )


def column_means(features: Tensor) -> Tensor:
    """Compute the mean of the rows.

    Args:
        features: ``(n, d)``.

    Returns:
        The mean, ``(d,)``.
    """
    blocks = row_blocks(features, BLOCK_BYTES)
    if len(blocks) == 1:
        return features.mean(dim=0)
    total = torch.zeros(features.shape[1], dtype=torch.float64, device=features.device)
    for block in blocks:
        total += block.mean(dim=0).double() * (len(block) / len(features))
    return total.to(features.dtype)


def entry_variance(features: Tensor) -> float:
    """Compute the variance of all entries together, in float64.

    Args:
        features: ``(n, d)``.

    Returns:
        Mean of the squared deviations from the mean.
    """
    return entry_moments(features)[0].item()


def entry_moments(features: Tensor) -> Tensor:
    """Compute variance and mean of all entries together, float64 ``(2,)``."""
    blocks = row_blocks(features, COPIED_BYTES)
    parts = [torch.stack(torch.var_mean(block.double(), correction=0)) for block in blocks]
    return joint_moments(torch.stack(parts), [len(block) for block in blocks])


def joint_moments(parts: Tensor, sizes: Sequence[int]) -> Tensor:
    """Compute the variance and the mean of a whole from those of its parts.

    Args:
        parts: Variance and mean of each part, ``(p, 2)``.
        sizes: How much of the whole each part is, in any unit.

    Returns:
        Variance and mean, ``(2,)``.
    """
    share = torch.tensor([size / sum(sizes) for size in sizes], dtype=torch.float64)
    share = share.to(parts.device)
    variances, means = parts.unbind(dim=1)
    mean = (share * means).sum()
    return torch.stack([(share * (variances + (means - mean).square())).sum(), mean])


@dataclass(frozen=True)
class Shares:
    """Which of n samples belong to which process.

    Attributes:
        sizes: Samples of each process, in the order of the ranks: blocks that follow each other.
        processes: The processes.
    """

    sizes: tuple[int, ...]
    processes: Processes = ALONE

    @classmethod
    def even(cls, n: int, processes: Processes) -> "Shares":
        """Divide n samples as evenly as they go; where there are fewer, some get none."""
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
    def own(self) -> slice:
        """Samples of this process."""
        bounds = [0, *accumulate(self.sizes)]
        return slice(*list(pairwise(bounds))[self.processes.rank])

    def places(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Find samples among those of this process.

        Args:
            index: Samples, int64 of any shape.

        Returns:
            Places from 0, and whether a sample is here; of one that is not the place means nothing.
        """
        own = self.own
        here = (index >= own.start) & (index < own.stop)
        return (index - own.start).clamp(0, own.stop - own.start - 1), here

    def gather(self, part: Tensor, dim: int = 0) -> Tensor:
        """Put together what each process computed for its samples.

        Args:
            part: Entries for this process's samples along dimension ``dim``.
            dim: The dimension.

        Returns:
            Entries for all n, in every process.
        """
        return self.processes.gather(part, self.sizes, dim)


@dataclass(frozen=True)
class SharedFeatures:
    """Features ``(n, d)``, of which this process holds the rows of its own samples.

    Attributes:
        own: Those rows, ``(k, d)``.
        shares: Which samples they are.
    """

    own: Tensor
    shares: Shares

    @classmethod
    def of(cls, features: "Tensor | SharedFeatures") -> "SharedFeatures":
        """Take features that one process has all by itself as they are."""
        if isinstance(features, SharedFeatures):
            return features
        return cls(features, Shares((len(features),)))

    @classmethod
    def from_own(cls, own: Tensor, processes: Processes) -> "SharedFeatures":
        """Learn from the other processes how many rows they have.

        Args:
            own: Rows of this process, ``(k, d)``, k >= 1; they follow those of lower ranks.
            processes: All of them; they must call this together.

        Returns:
            The features of all.
        """
        return cls(own, Shares(tuple(processes.numbers(len(own))), processes))

    def __len__(self) -> int:
        """Return n."""
        return self.shares.n

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (n, d) of the features of all processes."""
        return self.shares.n, self.own.shape[1]

    def take(self, index: Tensor | slice) -> Tensor:
        """Give every process the rows of some samples.

        Args:
            index: Samples, int64 ``(m,)`` or a slice, the same in every process.

        Returns:
            Their rows, ``(m, d)``; a copy.
        """
        if isinstance(index, slice):
            index = torch.arange(index.start, index.stop, device=self.own.device)
        if self.shares.processes.count == 1:
            return self.own[index]
        places, here = self.shares.places(index)
        rows = self.own.new_zeros(len(index), self.own.shape[1])
        rows[here] = self.own[places[here]]
        return self.shares.processes.total(rows)  # all but one add 0

    def select(self, kept: Tensor) -> "SharedFeatures":
        """Leave out samples.

        Args:
            kept: Those that stay, int64 ``(m,)``, ascending; some of every process.

        Returns:
            Their features; each process keeps what it has of them.
        """
        bounds = torch.tensor([0, *accumulate(self.shares.sizes)], device=kept.device)
        sizes = torch.searchsorted(kept, bounds).diff().tolist()
        places, here = self.shares.places(kept)
        return SharedFeatures(self.own[places[here]], replace(self.shares, sizes=tuple(sizes)))

    def are_finite(self) -> bool:
        """Tell whether there is neither NaN nor infinity among them, in any process."""
        return self.shares.processes.all_agree(all_finite(self.own))

    def means(self) -> Tensor:
        """Compute the mean of all rows, ``(d,)``."""
        means, processes = column_means(self.own), self.shares.processes
        if processes.count == 1:
            return means
        return processes.total(means.double() * (len(self.own) / len(self))).to(means.dtype)

    def variance(self) -> float:
        """Compute the variance of all entries together."""
        moments, processes = entry_moments(self.own), self.shares.processes
        parts = moments.new_zeros(processes.count, 2)
        parts[processes.rank] = moments
        joint = joint_moments(processes.total(parts), self.shares.sizes)
        return processes.agree(joint)[0].item()


Batch = tuple[Tensor, Tensor | None]


def own_images(images: Tensor, processes: Processes) -> Tensor:
    """Take this process's contiguous share of the images.

    Args:
        images: All of them, ``(n, ...)``, the same in every process.
        processes: Those that share them.

    Returns:
        Some images, ``(k, ...)``, a view.

    Raises:
        ValueError: If there are fewer images than processes.
    """
    shares = Shares.even(len(images), processes)
    _check_enough(min(shares.sizes), "images", len(images), processes)
    return images[shares.own]


def own_batches(
    data: Iterable[Any], batches: Iterator[Batch], labels: list[Tensor | None], processes: Processes
) -> Iterator[Batch]:
    """Go through all batches of a loader, and yield this process's contiguous share of them.

    Args:
        data: The loader: its length is asked for where there are several processes.
        batches: What it yields, images and labels or None.
        labels: Gets the labels of all batches, in their order.
        processes: Those that share them.

    Yields:
        Images, and labels or None.

    Raises:
        ValueError: If the loader does not tell its length, or has fewer batches than there are
            processes.
    """
    own = range(0)
    if processes.count > 1:
        try:
            count = len(data)
        except TypeError as error:
            raise ValueError(
                f"a loader for {processes.count} processes must tell its number of batches, got a "
                f"{type(data).__name__} without len(); pass a DataLoader, or images and labels"
            ) from error
        shares = Shares.even(count, processes)
        _check_enough(min(shares.sizes), "batches", count, processes)
        own = range(shares.own.start, shares.own.stop)
    for number, (images, given) in enumerate(batches):
        labels.append(given)
        if processes.count == 1 or number in own:
            yield images, given


def check_same(
    processes: Processes, net: nn.Module, labels: Iterable[Tensor | None], images: Tensor
) -> None:
    """Refuse a network or images that are not the same, in the same order, in all processes.

    Args:
        processes: Those that share the work.
        net: What the images are given to.
        labels: Of all images, None where there are none.
        images: The first ones.

    Raises:
        ValueError: In every process, if the weights, the labels or the first images differ.
    """
    if processes.count == 1:
        return
    tensors = {str(i): t for i, t in enumerate([*labels, images]) if t is not None}
    weights = {k: v for k, v in net.state_dict().items() if isinstance(v, Tensor)}
    for what, found in {
        "images and labels in the same order": digest(tensors),
        "network": digest(weights),
    }.items():
        if not processes.all_agree(processes.share_text(found, 0) == found):
            raise ValueError(
                f"all processes must be given the same {what}, got others: load the network from "
                "one file, take a loader that neither shuffles nor samples by process, or let one "
                "process work by itself with processes=ALONE"
            )


def _check_enough(smallest: int, what: str, count: int, processes: Processes) -> None:
    if smallest == 0:
        raise ValueError(
            f"{processes.count} processes need as many {what} at least, got {count}; start fewer "
            "of them"
        )


def checked_batches(
    data: Tensor | Iterable[Any], batch_size: int
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield checked batches of images, with their labels where there are any.

    Args:
        data: Images ``(n, ...)``, or an iterable such as a ``DataLoader`` that yields images or
            ``(images, labels)``.
        batch_size: Images per batch where ``data`` is a tensor.

    Yields:
        Images in [0, 1], and labels or None.

    Raises:
        ValueError: If a batch is not as said above, or there is none.
    """
    if isinstance(data, Tensor):
        check_images("inputs", data)
        yield from ((batch, None) for batch in data.split(batch_size))
        return
    count = 0
    for batch in data:
        images, *rest = batch if isinstance(batch, Sequence) and batch else (batch,)
        if not isinstance(images, Tensor):
            raise ValueError(
                "each batch of the loader must be images, or (images, labels), as tensors; got "
                f"{type(images).__name__}"
            )
        check_images("inputs", images)
        count += 1
        yield images, torch.as_tensor(rest[0]) if rest else None
    if count == 0:
        raise ValueError("the loader yielded no batch: expected at least one image")
