"""Euclidean projections onto the inputs that an attack may use."""

import torch
from torch import Tensor

NORMS = (2,)
"""Norms of the perturbation that the attacks support."""

# Newton steps in project_l2. They end when no further coordinate reaches its bound, for images
# within 5; whatever is left is on the safe side, inside the ball.
_NEWTON_STEPS = 10


def project_box(points: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Project points onto the box ``bounds[0] <= x <= bounds[1]``, coordinate by coordinate."""
    return points.clamp(*bounds)


def project(
    points: Tensor,
    center: Tensor,
    eps: float | Tensor,
    norm: float,
    bounds: tuple[float, float],
) -> Tensor:
    """Project points onto the inputs within ``eps`` of ``center`` that lie in ``bounds``.

    Args:
        points: Points to project, ``(n, ...)``.
        center: Centre of each ball, inside ``bounds``, ``(n, ...)``.
        eps: Radius >= 0, a number or ``(n,)``; infinity leaves the box alone.
        norm: Norm of the ball; 2.
        bounds: Smallest and largest value of an input.

    Returns:
        Nearest feasible points in Euclidean distance, ``(n, ...)``.

    Raises:
        ValueError: If ``norm`` is not supported.
    """
    check_norm(norm)
    return project_l2(points, center, eps, bounds)


def check_norm(norm: float) -> None:
    """Refuse a norm that the attacks do not support.

    Raises:
        ValueError: If ``norm`` is not in ``NORMS``.
    """
    if norm not in NORMS:
        raise ValueError(f"no norm {norm!r}; choose from: {', '.join(map(str, NORMS))}")


def project_l2(
    points: Tensor, center: Tensor, eps: float | Tensor, bounds: tuple[float, float]
) -> Tensor:
    """Project points onto the intersection of an l2 ball and a box.

    The nearest point is ``center + clip(mu * (points - center))`` where the clip is to the box. If
    ``mu = 1`` is inside the ball that is it; else ``mu`` solves ``||clip(mu * p)|| = eps``. The
    squared norm is concave and piecewise linear in ``mu^2``, so Newton's method from below reaches
    the root exactly, in as many steps as the set of clipped coordinates changes.

    The result aims a few roundings inside the ball, so that the norm measured afterwards does not
    exceed ``eps``; points in the ball and the box are returned unchanged.

    Args:
        points: Points to project, ``(n, ...)``.
        center: Centre of each ball, inside ``bounds``, ``(n, ...)``.
        eps: Radius >= 0, a number or ``(n,)``; infinity leaves the box alone.
        bounds: Smallest and largest value of an input.

    Returns:
        Projected points, ``(n, ...)``.
    """
    boxed = project_box(points, bounds)
    origin = center.flatten(1)
    step = points.flatten(1) - origin
    room = torch.where(step > 0, bounds[1] - origin, origin - bounds[0]).clamp_min(0)
    eps = torch.as_tensor(eps, dtype=points.dtype, device=points.device)
    eps = eps.expand(len(points))[:, None]
    length = torch.minimum(step.abs(), room).square().sum(dim=1, keepdim=True).sqrt()
    inside = length <= eps
    # Rows inside the ball get a radius that keeps the arithmetic below finite; it is not used.
    radius = torch.where(inside, 0, eps * (1 - 8 * torch.finfo(points.dtype).eps))
    moved = _shrink_to_radius(step, room, radius)
    projected = project_box(origin + moved, bounds).reshape(points.shape)
    return torch.where(inside.reshape(-1, *[1] * (points.ndim - 1)), boxed, projected)


def _shrink_to_radius(step: Tensor, room: Tensor, radius: Tensor) -> Tensor:
    """Find ``clip(mu * step, -room, room)`` of norm ``radius``, which is at most its norm at 1."""
    size = step.abs()
    scale = size.amax(dim=1, keepdim=True)
    size = size / torch.where(scale > 0, scale, 1)  # at most 1: squares neither overflow nor vanish
    square = size.square()
    reach = room / torch.where(size > 0, size, 1)  # the mu at which a coordinate meets the box
    reach = torch.where(size > 0, reach, torch.inf)
    total = square.sum(dim=1, keepdim=True)
    mu = radius / torch.where(total > 0, total, 1).sqrt()
    for _ in range(_NEWTON_STEPS):
        clipped = reach <= mu
        spent = torch.where(clipped, room, 0).square().sum(dim=1, keepdim=True)
        free = torch.where(clipped, 0, square).sum(dim=1, keepdim=True)
        left = (radius.square() - spent).clamp_min(0)
        mu = torch.maximum(mu, (left / torch.where(free > 0, free, 1)).sqrt())
    moved = torch.minimum(size * mu, room)
    norm = moved.square().sum(dim=1, keepdim=True).sqrt()
    return moved.copysign(step) * (radius / torch.where(norm > 0, norm, 1)).clamp_max(1)
