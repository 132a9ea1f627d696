"""A cheap approximate inverse of a kernel matrix between any samples, to precondition with.

Source: Frangella, Tropp and Udell, "Randomized Nystroem preconditioning", SIAM J. Matrix Anal.
Appl. 44 (2023); here with samples as landmarks, and one low-rank part for all sets of samples.
"""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from torchdnr.kernels.rbf import full_precision
from torchdnr.svm.kernel_rows import KernelRows
from torchdnr.svm.memory_plan import EVALUATE_ELEMENTS
from torchdnr.svm.working_set import common_sample

LEAST_RANK, MOST_RANK, PER_RANK = 32, 128, 64
"""Rank: the samples over ``PER_RANK``, within these. More cost more than they save: on 2,000 raw
digits 128 took 1.6 times as long as 32, on 10,000 CIFAR-10 pixels 128 was the best."""
LANDMARKS_PER_RANK = 4
LEAST_VALUE = 1e-6
"""Share of the largest eigenvalue below which others are rounding."""
LEAST_REST = 1e-3
"""Least diagonal beside the low-rank part, as a share of the kernel's: singular kernels have 0."""


@dataclass(frozen=True)
class LowRank:
    """A kernel matrix as ``B B' + rest I``, nearly.

    Attributes:
        basis: B, ``(n, r)``, in the dtype of the kernel.
        rest: What the low-rank part lacks on the diagonal, on average, ``()``.
        diagonal: The kernel of a sample with itself, on average, ``()``.
    """

    basis: Tensor
    rest: Tensor
    diagonal: Tensor

    @classmethod
    def of(cls, rows: KernelRows) -> "LowRank":
        """Take the largest eigenpairs of the kernel between random samples as the low-rank part.

        It is made once per kernel.
        """
        if rows in _MADE:
            return _MADE[rows]
        rank, size = _rank_and_landmarks(rows.n)
        landmarks = common_sample(rows.n, rows.store.device, size)
        across = rows.whole_rows(landmarks)
        between = across[:, landmarks]
        values, vectors = (t[..., -rank:] for t in torch.linalg.eigh(between.double()))
        sound = values > LEAST_VALUE * values[-1]
        scaled = vectors * torch.where(sound, values, 1.0).rsqrt() * sound
        with full_precision(across.device):
            basis = across.T @ scaled.to(across.dtype)
        diagonal = between.diagonal().mean()
        rest = (diagonal - basis.square().sum(dim=1).mean()).clamp_min(LEAST_REST * diagonal)
        made = cls(*(rows.replicate(t) for t in (basis, rest, diagonal)))
        _MADE[rows] = made
        return made

    def inverse_between(self, free: Tensor) -> "FreeInverse":
        """Invert the kernels between the free samples, bool ``(P, n)``, nearly."""
        n, rank = self.basis.shape
        some = free.split(max(1, EVALUATE_ELEMENTS // (n * rank)))
        with full_precision(free.device):
            inner = torch.cat([(self.basis * f.unsqueeze(2)).mT @ self.basis for f in some])
        exact = inner.double()  # the condition is beyond what float32 inverts
        exact.diagonal(dim1=1, dim2=2).add_(self.rest)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky_ex(exact)[0]).to(inner)
        return FreeInverse(self.basis, self.rest, free.to(inner), inverse)

    @staticmethod
    def needed_bytes(n: int, problems: int, itemsize: int) -> int:
        """Bound the bytes that all this takes at once."""
        rank, landmarks = _rank_and_landmarks(n)
        masked = min(EVALUATE_ELEMENTS, problems * n * rank)
        shared = itemsize * (n * (2 * landmarks + rank) + masked) + 64 * landmarks**2
        return shared + 32 * problems * rank**2


def _rank_and_landmarks(n: int) -> tuple[int, int]:
    rank = min(max(LEAST_RANK, n // PER_RANK), MOST_RANK)
    return rank, min(LANDMARKS_PER_RANK * rank, n)


_MADE: WeakKeyDictionary[KernelRows, LowRank] = WeakKeyDictionary()


@dataclass(frozen=True)
class FreeInverse:
    """Inverses of P matrices ``B_F B_F' + rest I`` between free samples, by Woodbury's formula."""

    basis: Tensor
    rest: Tensor  # ()
    free: Tensor  # (P, n), 1 or 0
    inner: Tensor  # inverse of B_F' B_F + rest I, (P, r, r)

    def times(self, vectors: Tensor) -> Tensor:
        """Multiply vectors ``(P, n)`` that are 0 but for free samples; so is the result."""
        with full_precision(vectors.device):
            low = torch.bmm((vectors @ self.basis).unsqueeze(1), self.inner).squeeze(1)
            return (vectors - low @ self.basis.T).div_(self.rest).mul_(self.free)
