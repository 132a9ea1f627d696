"""Directions of steepest descent in the norm of the attack, and random points of a ball."""

import math

import torch
from torch import Tensor

from torchdnr.attacks.points import Region
from torchdnr.attacks.projections import project

L1_SHARE = 0.05
"""Share of the coordinates that a step in the l1 norm moves, unless told otherwise."""


def steepest(
    direction: Tensor,
    points: Tensor,
    norm: float,
    bounds: tuple[float, float],
    share: float | Tensor = L1_SHARE,
) -> Tensor:
    """Turn a direction of unit l2 norm into one of unit length in the norm of the attack.

    Args:
        direction: Of steepest descent in the l2 norm, ``(n, ...)``.
        points: Where it starts, ``(n, ...)``: for the l1 norm coordinates that would leave the box
            at once do not count.
        norm: 1, 2 or infinity.
        bounds: Smallest and largest value of an input.
        share: Share of the coordinates that move in the l1 norm, a number or ``(n,)``.

    Returns:
        The direction itself for l2; its signs for l-infinity; for l1 the signs of its largest
        coordinates, divided by their number.

    Source: l1: Tramer and Boneh, "Adversarial training and robustness for multiple perturbations",
    NeurIPS 2019; the box: Croce and Hein, "Mind the box", ICML 2021.
    """
    if norm == 2:
        return direction
    if norm == math.inf:
        return direction.sign()
    blocked = (direction > 0) & (points >= bounds[1]) | (direction < 0) & (points <= bounds[0])
    size = torch.where(blocked, 0, direction).flatten(1).abs()
    d = size.shape[1]
    count = (torch.as_tensor(share, dtype=size.dtype, device=size.device) * d).long().clamp(1, d)
    ordered = size.sort(dim=1, descending=True).values
    least = ordered.gather(1, (count.expand(len(size)) - 1)[:, None])
    chosen = (size >= least) & (size > 0)
    signs = torch.where(chosen, direction.flatten(1).sign(), 0)
    return (signs / chosen.sum(dim=1, keepdim=True).clamp_min(1)).view_as(direction)


def unit_step(direction: Tensor, norm: float) -> Tensor:
    """Scale a direction of unit l2 norm to unit length in another norm; signs for l-infinity.

    Unlike `steepest` it keeps all coordinates in the l1 norm: the projection that follows selects.
    """
    if norm == math.inf:
        return direction.sign()
    if norm == 2:
        return direction
    length = direction.flatten(1).abs().sum(dim=1).view(-1, *[1] * (direction.ndim - 1))
    return direction / torch.where(length > 0, length, 1)


def random_points(region: Region, generator: torch.Generator) -> Tensor:
    """Draw a point of each ball, uniformly, and project it on the box.

    Args:
        region: Ball and box of each row; a radius of infinity draws from the box.
        generator: On the device of the region.

    Returns:
        Points, ``(n, ...)``.
    """
    center, eps, norm, bounds = region
    flat = center.flatten(1)
    options = {"generator": generator, "dtype": flat.dtype, "device": flat.device}
    boxed = bounds[0] + (bounds[1] - bounds[0]) * torch.rand(flat.shape, **options)
    if norm == math.inf:
        move = 2 * torch.rand(flat.shape, **options) - 1
    else:
        # Gaussian for l2 and Laplace for l1 directions, lengths by the volume of the ball.
        move = torch.randn(flat.shape, **options)
        if norm == 1:
            move = torch.empty_like(flat).exponential_(generator=generator) * move.sign()
        length = torch.linalg.vector_norm(move, norm, dim=1, keepdim=True)
        share = torch.rand((len(flat), 1), **options) ** (1 / flat.shape[1])
        move = move * (share / length)
    finite = eps.isfinite()[:, None]
    points = torch.where(finite, flat + torch.where(finite, eps[:, None], 0) * move, boxed)
    return project(points.view_as(center), center, eps, norm, bounds)
