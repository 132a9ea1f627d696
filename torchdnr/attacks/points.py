"""Points with their objective and success: which of two is better, and how the best are kept."""

from typing import NamedTuple

import torch
from torch import Tensor

from torchdnr.attacks.projections import per_row
from torchdnr.attacks.target import Target, evaluate


class Points(NamedTuple):
    """Points with their objective and success, one per row."""

    inputs: Tensor
    values: Tensor
    evading: Tensor

    def rows(self, rows: Tensor) -> "Points":
        """Return some rows."""
        return Points(*(field[rows] for field in self))

    def clone(self) -> "Points":
        """Return a copy that ``put`` can write into."""
        return Points(*(field.clone() for field in self))


def evaluated(target: Target, inputs: Tensor, labels: Tensor) -> Points:
    """Evaluate inputs ``(n, ...)`` for their true classes, or targets, ``(n,)``."""
    return Points(inputs, *evaluate(target, inputs, labels))


def better(new: Points, old: Points) -> Tensor:
    """Compare points: evading comes first, then the lower objective; True where ``new`` wins."""
    lower = (new.evading == old.evading) & (new.values < old.values)
    return (new.evading > old.evading) | lower


def best_column(values: Tensor, evading: Tensor) -> Tensor:
    """Find the best of k points per row, in the order of ``better``, ``(n,)`` from ``(n, k)``."""
    ranked = torch.where(evading == evading.any(dim=1, keepdim=True), values, torch.inf)
    return ranked.argmin(dim=1)


def choose(where: Tensor, new: Points, old: Points) -> Points:
    """Combine points: ``new`` where a mask ``(n,)`` is true, else ``old``."""
    return Points(
        torch.where(per_row(where, new.inputs), new.inputs, old.inputs),
        torch.where(where, new.values, old.values),
        torch.where(where, new.evading, old.evading),
    )


def keep_better(best: Points, new: Points) -> Points:
    """Keep the better of two points in each row, without waiting for the device."""
    return choose(better(new, best), new, best)


def put(points: Points, rows: Tensor, new: Points, where: Tensor) -> None:
    """Overwrite ``points[rows]`` by ``new`` where a mask is true, in place."""
    for field, values in zip(points, new, strict=True):  # no row twice: nothing waits
        field[rows] = torch.where(per_row(where, field), values, field[rows])


def unsolved(best: Points) -> Tensor:
    """Return the rows that do not evade; waits for the device."""
    return (~best.evading).nonzero()[:, 0]
