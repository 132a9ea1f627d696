"""Features of which each of several processes holds a contiguous block of rows."""

from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from torchdnr.distributed.processes import ALONE, Processes
from torchdnr.row_blocks import all_finite, column_means, entry_moments, joint_moments


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
