"""Euclidean projections onto the inputs that an attack may use."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Region(NamedTuple):
    """Where the points of each row may lie: ball and box."""

    center: Tensor
    eps: Tensor
    norm: float
    bounds: tuple[float, float]

    def rows(self, rows: Tensor) -> "Region":
        """Return the regions of some rows."""
        return self._replace(center=self.center[rows], eps=self.eps[rows])


def free_to_look(tensor: Tensor) -> bool:
    """Tell whether Python may branch on the values: on a CPU they are there, elsewhere it waits."""
    return tensor.device.type == "cpu"


NORMS = (1, 2, math.inf)
"""Norms of the perturbation that the attacks support."""

# Newton steps in project_l2. They end when no further coordinate reaches its bound, for images
# within 2; whatever is left after these is on the safe side, inside the ball.
_NEWTON_STEPS = 12


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
    squared norm is concave and piecewise linear in ``mu^2``: its tangent at any ``mu`` crosses
    ``eps^2`` at or below the root, so Newton's method, from 1 first down and then up, reaches the
    root in as many steps as the set of clipped coordinates changes. Twelve are taken at the most:
    sizes that span many powers of two may end inside the ball.

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
    # What the box leaves of the step is all the room that a shorter step can meet.
    room = (boxed.flatten(1) - origin).abs_()
    eps = _per_row(eps, points).flatten(1)
    inside = torch.linalg.vector_norm(room, dim=1, keepdim=True) <= eps
    # Adding the centre rounds every coordinate; along the perturbation that hardly adds up. Rows
    # inside the ball get a radius that keeps the arithmetic below finite; it is not used.
    rounding = torch.finfo(points.dtype).eps
    radius = (eps * (1 - 8 * rounding) - rounding * max(map(abs, bounds))).clamp_min_(0)
    radius.masked_fill_(inside, 0)
    if not free_to_look(points):
        shorter = _shorten(points.flatten(1), origin, room, radius, bounds).view_as(points)
        return torch.where(inside.view(-1, *[1] * (points.ndim - 1)), boxed, shorter)
    rows = (~inside[:, 0]).nonzero()[:, 0]
    if len(rows) > 0:
        parts = (part[rows] for part in (points.flatten(1), origin, room, radius))
        boxed[rows] = _shorten(*parts, bounds).view(-1, *points.shape[1:])
    return boxed


def _shorten(
    points: Tensor, origin: Tensor, room: Tensor, radius: Tensor, bounds: tuple[float, float]
) -> Tensor:
    """Project rows that are outside their ball, all ``(n, d)``, radius ``(n, 1)``."""
    step = points - origin
    moved = _shrink_to_radius(step.abs(), room, radius)
    norm = torch.linalg.vector_norm(moved, dim=1, keepdim=True)
    moved *= (radius / norm.masked_fill_(norm == 0, 1)).clamp_max_(1)
    return moved.copysign_(step).add_(origin).clamp_(*bounds)


def _shrink_to_radius(size: Tensor, room: Tensor, radius: Tensor) -> Tensor:
    """Find ``min(mu * size, room)`` of norm ``radius``, which is at most its norm at ``mu = 1``."""
    largest = torch.linalg.vector_norm(size, torch.inf, dim=1, keepdim=True)
    largest.masked_fill_(largest == 0, 1)
    mu = torch.ones_like(radius)
    # No root lies below: without the box, and were every coordinate as large as the largest.
    least = radius / (size.shape[1] ** 0.5 * largest)
    goal, close = radius.square(), 4 * torch.finfo(size.dtype).eps * radius
    reach, moved = size, torch.minimum(size, room)
    for _ in range(_NEWTON_STEPS):
        norm = torch.linalg.vector_norm(moved, dim=1, keepdim=True)
        done = (norm - radius).abs_() <= close
        if free_to_look(done) and done.all():
            break
        free = torch.linalg.vector_norm(moved.masked_fill(reach > room, 0), dim=1, keepdim=True)
        left = goal - (norm.square() - free.square())
        root = mu * left.clamp_min_(0).sqrt_() / free.masked_fill_(free == 0, 1)
        mu = torch.where(done, mu, torch.maximum(root, least))
        reach = size * mu
        moved = torch.minimum(reach, room)
    return moved


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


def unit(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Scale each row to unit l2 norm; zero, NaN and infinite entries do no harm.

    Returns:
        Unit rows ``(n, ...)``, and the norms they had ``(n,)``.
    """
    flat = vectors.flatten(1)
    if not free_to_look(flat):
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
    flat = flat.nan_to_num()
    largest = torch.linalg.vector_norm(flat, torch.inf, dim=1, keepdim=True)
    flat = flat / torch.where(largest > 0, largest, 1)
    length = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
    return flat / torch.where(length > 0, length, 1), length * largest
