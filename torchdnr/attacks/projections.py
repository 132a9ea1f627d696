"""Euclidean projections onto the inputs that an attack may use."""

import math

import torch
from torch import Tensor

NORMS = (1, 2, math.inf)
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
        norm: Norm of the ball; 1, 2 or infinity.
        bounds: Smallest and largest value of an input.

    Returns:
        Nearest feasible points in Euclidean distance, ``(n, ...)``.

    Raises:
        ValueError: If ``norm`` is not supported.
    """
    check_norm(norm)
    return _PROJECTIONS[norm](points, center, eps, bounds)


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
    # What the box leaves of the step is all the room that a shorter step can meet.
    room = (boxed.flatten(1) - origin).abs()
    eps = _per_row(eps, points).flatten(1)
    inside = torch.linalg.vector_norm(room, dim=1, keepdim=True) <= eps
    # Rows inside the ball get a radius that keeps the arithmetic below finite; it is not used.
    radius = torch.where(inside, 0, eps * (1 - 8 * torch.finfo(points.dtype).eps))
    moved = _shrink_to_radius(step, room, radius)
    projected = project_box(origin + moved, bounds).reshape(points.shape)
    return torch.where(inside.reshape(-1, *[1] * (points.ndim - 1)), boxed, projected)


def _shrink_to_radius(step: Tensor, room: Tensor, radius: Tensor) -> Tensor:
    """Find ``clip(mu * step, -room, room)`` of norm ``radius``, which is at most its norm at 1."""
    size = step.abs()
    scale = torch.linalg.vector_norm(size, torch.inf, dim=1, keepdim=True)
    size = size / torch.where(scale > 0, scale, 1)  # at most 1: squares neither overflow nor vanish
    square = size.square()
    reach = room / size  # the mu at which a coordinate meets the box; NaN where it does not move
    total = square.sum(dim=1, keepdim=True)
    mu = radius / torch.where(total > 0, total, 1).sqrt()
    limit, target = room.square(), radius.square()
    for _ in range(_NEWTON_STEPS):
        clipped = reach <= mu
        spent = torch.where(clipped, limit, 0).sum(dim=1, keepdim=True)
        free = torch.where(clipped, 0, square).sum(dim=1, keepdim=True)
        left = (target - spent).clamp_min(0)
        before, mu = mu, torch.maximum(mu, (left / torch.where(free > 0, free, 1)).sqrt())
        if mu.device.type == "cpu" and torch.equal(mu, before):
            break  # on a CPU to look costs nothing; elsewhere it would wait for the device
    moved = torch.minimum(size * mu, room)
    norm = torch.linalg.vector_norm(moved, dim=1, keepdim=True)
    return moved.copysign(step) * (radius / torch.where(norm > 0, norm, 1)).clamp_max(1)


def project_linf(
    points: Tensor, center: Tensor, eps: float | Tensor, bounds: tuple[float, float]
) -> Tensor:
    """Project points onto the intersection of an l-infinity ball and a box.

    Args:
        points: Points to project, ``(n, ...)``.
        center: Centre of each ball, inside ``bounds``, ``(n, ...)``.
        eps: Radius >= 0, a number or ``(n,)``; infinity leaves the box alone.
        bounds: Smallest and largest value of an input.

    Returns:
        Projected points, ``(n, ...)``. Where ``center + eps`` is rounded away from the centre the
        value below it is taken, so that no difference exceeds ``eps``.
    """
    eps = _per_row(eps, points)
    low, high = center - eps, center + eps
    low = torch.where(center - low > eps, torch.nextafter(low, center), low)
    high = torch.where(high - center > eps, torch.nextafter(high, center), high)
    return project_box(torch.minimum(torch.maximum(points, low), high), bounds)


def project_l1(
    points: Tensor, center: Tensor, eps: float | Tensor, bounds: tuple[float, float]
) -> Tensor:
    """Project points onto the intersection of an l1 ball and a box.

    The nearest point moves coordinate i by ``clip(|p_i| - lambda, 0, r_i)``, where r_i is the room
    to the box. The sum of these falls piecewise linearly in lambda; sorting the 2 d kinks finds the
    piece on which it is ``eps``, and on it lambda is a quotient. Points in the ball and the box
    are returned unchanged, others aim a few roundings inside.

    Args:
        points: Points to project, ``(n, ...)``.
        center: Centre of each ball, inside ``bounds``, ``(n, ...)``.
        eps: Radius >= 0, a number or ``(n,)``; infinity leaves the box alone.
        bounds: Smallest and largest value of an input.

    Returns:
        Projected points, ``(n, ...)``.

    Source: Duchi et al., "Efficient projections onto the l1-ball for learning in high dimensions",
    ICML 2008, for the ball alone; with the box as in Croce and Hein, "Mind the box", ICML 2021.
    """
    boxed = project_box(points, bounds)
    origin = center.flatten(1)
    step = points.flatten(1) - origin
    room = torch.where(step > 0, bounds[1] - origin, origin - bounds[0]).clamp_min(0)
    eps = _per_row(eps, points).flatten(1)
    size = step.abs()
    reach = torch.minimum(size, room)
    inside = reach.sum(dim=1, keepdim=True) <= eps
    # Adding the centre rounds every coordinate, and the errors of d of them add up like noise.
    rounding = torch.finfo(points.dtype).eps
    noise = 2 * rounding * max(map(abs, bounds)) * size.shape[1] ** 0.5
    radius = (eps * (1 - 8 * rounding) - noise).clamp_min(0)
    radius = torch.where(inside, 0, radius)  # finite; not used where inside
    shift = _soft_threshold(size, reach, radius)
    moved = torch.minimum((size - shift).clamp_min(0), room)
    total = moved.sum(dim=1, keepdim=True)
    moved = moved * (radius / torch.where(total > 0, total, 1)).clamp_max(1)
    projected = project_box(origin + moved.copysign(step), bounds).reshape(points.shape)
    return torch.where(inside.reshape(-1, *[1] * (points.ndim - 1)), boxed, projected)


def _soft_threshold(size: Tensor, reach: Tensor, radius: Tensor) -> Tensor:
    """Find lambda with ``sum_i clip(size_i - lambda, 0, reach_i) = radius``, ``(n, 1)``."""
    start = size - reach  # from here on a coordinate shrinks, until lambda is its size
    kinks, order = torch.cat([start, size], dim=1).sort(dim=1)
    change = torch.cat([torch.ones_like(size), -torch.ones_like(size)], dim=1)
    shrinking = change.gather(1, order).cumsum(dim=1)  # coordinates, after each kink
    gap = kinks.diff(dim=1)
    lost = torch.cat([torch.zeros_like(radius), (shrinking[:, :-1] * gap).cumsum(dim=1)], dim=1)
    target = reach.sum(dim=1, keepdim=True) - radius
    piece = (torch.searchsorted(lost, target, right=True) - 1).clamp(0, kinks.shape[1] - 1)
    shift = kinks.gather(1, piece)
    # Once more from the pieces' own sums, which the rounding of the long sum above does not enter.
    middle = (start <= shift) & (size > shift)
    full = torch.where(start > shift, reach, 0).sum(dim=1, keepdim=True)
    count = middle.sum(dim=1, keepdim=True)
    exact = (torch.where(middle, size, 0).sum(dim=1, keepdim=True) + full - radius) / count
    return torch.where(count > 0, torch.maximum(exact, shift), shift)


def _per_row(eps: float | Tensor, points: Tensor) -> Tensor:
    """Return the radii, broadcastable to the points."""
    eps = torch.as_tensor(eps, dtype=points.dtype, device=points.device)
    return eps.expand(len(points)).reshape(-1, *[1] * (points.ndim - 1))


_PROJECTIONS = {1: project_l1, 2: project_l2, math.inf: project_linf}
