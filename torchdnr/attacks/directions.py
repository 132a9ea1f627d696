"""Directions of descent: of unit length in l2, and of unit length in the norm of the attack."""

import math

import torch
from torch import Tensor

from torchdnr.attacks.projections import Bounds, Region, per_row, reading_is_free

L1_SHARE = 0.05
"""Share of the coordinates that a step in the l1 norm moves by default."""

_L1_LARGEST = 0.1  # step in the l1 norm, relative to how far its coordinates can move

STEP_FADE = 0.01
"""Last step relative to the first, where steps shrink along ``cosine``."""


def unit(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Scale each row to unit l2 norm; return the norms ``(n,)`` too. NaN and infinity are safe."""
    flat = vectors.flatten(1)
    if not reading_is_free(flat):
        scaled, length = _unit_of_any(flat)
        return scaled.view_as(vectors), length[:, 0]
    # Nearly all rows allow the short way.
    length = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
    limits = torch.finfo(flat.dtype)
    usual = (length > limits.tiny**0.25) & (length < limits.max**0.25)  # not where it is NaN
    scaled = flat / length
    if not usual.all():
        odd = (~usual[:, 0]).nonzero()[:, 0]
        scaled[odd], length[odd] = _unit_of_any(flat[odd])
    return scaled.view_as(vectors), length[:, 0]


def _unit_of_any(flat: Tensor) -> tuple[Tensor, Tensor]:
    """Scale rows to unit l2 norm, by way of their largest entries, which do not overflow."""
    flat = flat.nan_to_num()
    largest = torch.linalg.vector_norm(flat, torch.inf, dim=1, keepdim=True)
    flat = flat / torch.where(largest > 0, largest, 1)
    length = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
    return flat / torch.where(length > 0, length, 1), length * largest


def without_blocked(direction: Tensor, points: Tensor, bounds: Bounds) -> Tensor:
    """Set the coordinates to zero that point out of the box where a point is at its edge."""
    low, high = bounds
    blocked = (direction > 0) & (points >= high) | (direction < 0) & (points <= low)
    return torch.where(blocked, 0, direction)


def steepest(
    direction: Tensor,
    points: Tensor,
    norm: float,
    bounds: Bounds,
    share: float | Tensor = L1_SHARE,
) -> Tensor:
    """Turn a direction of unit l2 norm into one of unit length in the norm of the attack.

    It is the direction itself for l2 and its signs for l-infinity. For l1 it is the signs of its
    largest coordinates, a share of all (a number or ``(n,)``), divided by their number; coordinates
    that would leave the box at once do not count.

    Source: l1: Tramer and Boneh, "Adversarial training and robustness for multiple perturbations",
    NeurIPS 2019; the box: Croce and Hein, "Mind the box", ICML 2021.
    """
    if norm == 2:
        return direction
    if norm == math.inf:
        return direction.sign()
    size = without_blocked(direction, points, bounds).flatten(1).abs()
    d = size.shape[1]
    count = (torch.as_tensor(share, dtype=size.dtype, device=size.device) * d).long().clamp(1, d)
    ordered = size.sort(dim=1, descending=True).values
    least = ordered.gather(1, (count.expand(len(size)) - 1)[:, None])
    chosen = (size >= least) & (size > 0)
    signs = torch.where(chosen, direction.flatten(1).sign(), 0)
    return (signs / chosen.sum(dim=1, keepdim=True).clamp_min(1)).view_as(direction)


def unit_step(direction: Tensor, norm: float) -> Tensor:
    """Scale a direction of unit l2 norm to unit length in another norm; signs for l-infinity.

    Unlike ``steepest`` it keeps all coordinates in the l1 norm: the projection after it selects.
    """
    if norm == math.inf:
        return direction.sign()
    if norm == 2:
        return direction
    length = per_row(direction.flatten(1).abs().sum(dim=1), direction)
    return direction / torch.where(length > 0, length, 1)


def step_sizes(step_size: float | None, steps: int, region: Region) -> Tensor:
    """Return the step of each row, ``(n,)``; by default 2.5 eps / steps.

    In the l1 norm eps is at most how far the coordinates of one step can move: in a larger ball
    each of them would jump to its bound.
    """
    if step_size is not None:
        return torch.full_like(region.eps, step_size)
    size = 2.5 / steps * region.eps
    if region.norm == 1:
        farthest = region.farthest()
        count = max(1, int(L1_SHARE * farthest.shape[1]))
        size = size.minimum(_L1_LARGEST * farthest.topk(count, dim=1).values.sum(dim=1))
    return size


def cosine(step: int, steps: int, first: float, last: float) -> float:
    """Fall, or rise, from the first to the last value along half a cosine."""
    fade = (1 + math.cos(math.pi * step / max(1, steps - 1))) / 2
    return last + (first - last) * fade
