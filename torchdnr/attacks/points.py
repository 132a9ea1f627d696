"""Points under attack with what the model makes of them, and which of two is better."""

from typing import NamedTuple

import torch
from torch import Tensor

from torchdnr.attacks.target import Target, evaluate


class Region(NamedTuple):
    """Where the points of each row may lie: ball and box."""

    center: Tensor
    eps: Tensor
    norm: float
    bounds: tuple[float, float]

    def rows(self, rows: Tensor) -> "Region":
        """Return the regions of some rows."""
        return self._replace(center=self.center[rows], eps=self.eps[rows])


class Points(NamedTuple):
    """Points with their objective and success, one per row."""

    inputs: Tensor
    values: Tensor
    evading: Tensor

    def rows(self, rows: Tensor) -> "Points":
        """Return some rows."""
        return Points(*(field[rows] for field in self))


def better(new: Points, old: Points) -> Tensor:
    """Tell where ``new`` beats ``old``: evading first, then the lower objective, bool ``(n,)``."""
    lower = (new.evading == old.evading) & (new.values < old.values)
    return (new.evading > old.evading) | lower


def best_column(values: Tensor, evading: Tensor) -> Tensor:
    """Find the best of k points per row, in the order of ``better``, ``(n,)`` from ``(n, k)``."""
    ranked = torch.where(evading == evading.any(dim=1, keepdim=True), values, torch.inf)
    return ranked.argmin(dim=1)


def put(points: Points, rows: Tensor, new: Points, where: Tensor) -> None:
    """Overwrite ``points[rows]`` by ``new`` where told, in place."""
    for field, values in zip(points, new, strict=True):  # no row twice: nothing waits
        mask = where.view(-1, *[1] * (field.ndim - 1))
        field[rows] = torch.where(mask, values, field[rows])


def evaluated(target: Target, inputs: Tensor, labels: Tensor) -> Points:
    """Evaluate inputs ``(n, ...)`` for their true classes, or targets, ``(n,)``."""
    return Points(inputs, *evaluate(target, inputs, labels))


def keep_better(best: Points, new: Points) -> Points:
    """Take the better of two points in each row, without waiting for the device."""
    take = better(new, best)
    shape = (-1, *[1] * (new.inputs.ndim - 1))
    return Points(
        torch.where(take.view(shape), new.inputs, best.inputs),
        torch.where(take, new.values, best.values),
        torch.where(take, new.evading, best.evading),
    )
