"""Linear systems between the free samples of a working set, as Newton's method meets them.

Their factors are most of the work. From one Newton step to the next few samples leave the free
ones, so that the factor of an earlier step does, with a small system for those that left.

Source: Nocedal and Wright, "Numerical optimization", 2nd ed. (2006), Sec. 16.2, the Schur
complement of constraints that are added.
"""

import torch
from torch import Tensor

LEAST_DAMPING = {torch.float32: 1e-3, torch.float64: 0.0}
"""Damping that systems are factored with at least: what float32 rounds off is less."""
REFINEMENTS = {torch.float32: 2, torch.float64: 0}
"""Corrections of answers from such factors: a third one changed nothing."""
KEPT_WIDTH = 512
"""Samples from which a factor costs more than the calls that it takes to correct one."""
WHOLE_SHARE = 0.95
"""Share of a working set beyond which its whole kernel is factored: no copy of a part is made."""
LEFT_SHARE = 0.25
"""Share of the samples of a factor that may have left before another one is made."""


def multiply(kernels: Tensor, vectors: Tensor) -> Tensor:
    """Multiply symmetric matrices by vectors ``(p, k)``, from the left: on CPUs that is faster."""
    return torch.bmm(vectors.to(kernels.dtype).unsqueeze(1), kernels).squeeze(1).to(vectors.dtype)


class FreeSystems:
    """Systems ``(K_FF + damping) x = r`` of p problems, with kernels ``(p, k, k)`` on their sets.

    ``choose`` says which samples are free, before each ``solve``. Damping is ``(p,)``, >= 0.
    """

    def __init__(self, kernels: Tensor, damping: Tensor) -> None:
        self.kernels, self.damping = kernels, damping
        # What was factored, where it may be used again: samples, (p, w), which of these are not
        # padding, the matrices (p, w, w), their factors, and whether these broke down.
        self._made: tuple[Tensor, ...] = ()
        # For m samples that left: their unit vectors times the inverse of the factor, (p, w, m),
        # and factors of the products of these.
        self._left: tuple[Tensor, ...] = ()

    def keep(self, problems: Tensor) -> None:
        """Go on with these problems, ``(p,)``; one copy at a time, as they are large."""
        self.kernels, self.damping = self.kernels[problems], self.damping[problems]
        made, self._made = list(self._made), ()
        for place in range(len(made)):
            made[place] = made[place][problems]
        self._made = tuple(made)

    def choose(self, free: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Set up the systems between free samples, bool ``(p, k)``, at most ``width`` of them.

        Returns the samples ``(p, w)`` that systems are about, and which of these are free.
        """
        self._left = ()
        if self._made:
            index, real = self._made[:2]
            still = real & free.gather(1, index)
            gone = real & ~still
            new = (free.sum(dim=1) - still.sum(dim=1)).amax()
            some, count = torch.stack([new, gone.sum(dim=1).amax()]).tolist()  # a sync
            if some == 0 and count <= LEFT_SHARE * index.shape[1]:
                if count:
                    self._left = self._correction(gone, count)
                return index, still
            self._made = ()  # before the next are made
        size = free.shape[1]
        if width > WHOLE_SHARE * size:
            index, real = torch.arange(size, device=free.device).expand_as(free), free
            matrix = self.kernels * real.unsqueeze(1)
        else:
            index = free.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices
            index = index[:, :width]
            real = free.gather(1, index)
            matrix = _gather_square(self.kernels, index).mul_(real.unsqueeze(1))
        matrix.mul_(real.unsqueeze(2))
        added = self.damping.clamp_min(LEAST_DAMPING[matrix.dtype]).unsqueeze(1)
        matrix.diagonal(dim1=1, dim2=2).add_(torch.where(real, added, 1.0))
        self._made = (index, real, matrix, *torch.linalg.cholesky_ex(matrix))
        return index, real

    def _correction(self, gone: Tensor, count: int) -> tuple[Tensor, ...]:
        """Correct the factors for samples that are no longer free, at most ``count`` a problem."""
        factor = self._made[3]
        chosen = gone.to(torch.uint8).topk(count, dim=1)
        units = torch.zeros_like(factor[:, :, :count])
        units.scatter_(1, chosen.indices.unsqueeze(1), chosen.values.to(units).unsqueeze(1))
        half = torch.linalg.solve_triangular(factor, units, upper=False)
        small = half.mT @ half
        small.diagonal(dim1=1, dim2=2).add_(1 - chosen.values)  # padding
        return half, *torch.linalg.cholesky_ex(small)

    def solve(self, right: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
        """Solve in float64, by factors in the kernels' own dtype, for ``(p, w, 2)``.

        ``free`` is as ``choose`` returned it; other right sides and answers are 0. Also returns
        whether the factors broke down: 0 where they did not.
        """
        _, _, matrix, _, info = self._made
        weight, damping = free.to(right).unsqueeze(2), self.damping.unsqueeze(1)
        answer = self._solve_factored(right) * weight
        excess = (damping.clamp_min(LEAST_DAMPING[matrix.dtype]) - damping).unsqueeze(2)
        for _ in range(REFINEMENTS[matrix.dtype]):
            product = torch.bmm(answer.mT.to(matrix.dtype), matrix).mT * weight
            answer = answer + self._solve_factored(right - product + excess * answer) * weight
        if self._left:
            info = info + self._left[2]
        if matrix.shape[1] < KEPT_WIDTH:
            self._made = ()
        return answer, info

    def _solve_factored(self, right: Tensor) -> Tensor:
        # Twice as fast as cholesky_solve where there are but two right-hand sides.
        factor = self._made[3]
        half = torch.linalg.solve_triangular(factor, right.to(factor.dtype), upper=False)
        if self._left:
            units, small, _ = self._left
            half = half - units @ torch.cholesky_solve(units.mT @ half, small)
        return torch.linalg.solve_triangular(factor.mT, half, upper=True).to(right.dtype)


def _gather_square(kernels: Tensor, index: Tensor) -> Tensor:
    """Select the same rows and columns of each matrix; whole rows first is three times faster."""
    count, size, width = len(kernels), kernels.shape[1], index.shape[1]
    offset = size * torch.arange(count, device=kernels.device).unsqueeze(1)
    rows = kernels.reshape(count * size, size).index_select(0, (index + offset).flatten())
    columns = index.unsqueeze(1).expand(count, width, width)
    return rows.view(count, width, size).gather(2, columns)
