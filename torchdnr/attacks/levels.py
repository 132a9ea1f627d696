"""Points as images store them: on the levels of a pixel, k / 255 for 8 bits.

Rounding undoes a perturbation by little, but an evasion at the boundary by enough. Here a rounded
point counts only if the model says so, and one that fell back goes on along its own direction.
"""

import torch
from torch import Tensor

from torchdnr.attacks.projections import Region, per_row, project_box
from torchdnr.attacks.target import Target, better, evaluate, put

_SCALES = (1.0, 1.003, 1.006, 1.01, 1.02, 1.03, 1.05, 1.08, 1.12, 1.2, 1.4)
"""Lengths of the perturbation that are rounded until the point evades, relative to its own."""
_HALVINGS = 12  # to find the longest perturbation whose rounding stays in the ball


def round_to_levels(
    points: Tensor, region: Region, bounds: tuple[float, float], levels: int
) -> Tensor:
    """Round points to levels of the box ``bounds``, within ball and box of the region.

    Where the nearest levels are outside the ball, those of a shorter perturbation are taken. The
    centres lie on levels; a coordinate that stays on its level keeps its value exactly.
    """
    center, eps, norm, _ = region
    step = (bounds[1] - bounds[0]) / (levels - 1)
    move = (project_box(points, region.bounds) - center) / step
    limit = eps / step * (1 + 1e-6)  # an eps of whole levels holds them, whatever it was rounded to
    low, high = torch.zeros_like(eps), torch.ones_like(eps)
    share = high
    for _ in range(_HALVINGS):
        size = (per_row(share, move) * move).round_().flatten(1)
        inside = torch.linalg.vector_norm(size, norm, dim=1) <= limit
        low, high = torch.where(inside, share, low), torch.where(inside, high, share)
        share = (low + high) / 2
    move = (per_row(low, move) * move).round_()
    level = ((center - bounds[0]) / step).round_() + move
    rounded = bounds[0] + (bounds[1] - bounds[0]) * (level / (levels - 1))
    return torch.where(move == 0, center, rounded)


def best_on_levels(
    target: Target,
    region: Region,
    labels: Tensor,
    points: Tensor,
    bounds: tuple[float, float],
    levels: int,
) -> Tensor:
    """Round points so that they evade if that is possible nearby; never worse than the centres.

    The nearest levels are tried first, then those of longer perturbations, as far as ball and box
    allow.
    """
    center = region.center
    if len(center) == 0:  # not all networks take an empty batch
        return points
    best = evaluate(target, center, labels).clone()
    rows = torch.arange(len(labels), device=labels.device)
    for scale in _SCALES:
        part, start = region.rows(rows), center[rows]
        longer = start + scale * (points[rows] - start)
        tried = evaluate(target, round_to_levels(longer, part, bounds, levels), labels[rows])
        put(best, rows, tried, better(tried, best.rows(rows)))
        # By more than rounding, where the objective has a margin for it. Waits, mostly once.
        rows = (~(best.evading & (best.values < 0))).nonzero()[:, 0]
        if len(rows) == 0:
            break
    return best.inputs
