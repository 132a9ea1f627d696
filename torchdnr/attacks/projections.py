"""Where the points of an attack may lie: a ball and a box, and Euclidean projections on both."""

import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

Bounds = tuple[float | Tensor, float | Tensor]
"""Smallest and largest value: numbers, or tensors like the inputs with those of each coordinate."""

UNBOUNDED: Bounds = (-math.inf, math.inf)


class Region(NamedTuple):
    """Where the points of each row may lie: ball and box."""

    center: Tensor
    eps: Tensor
    norm: float
    bounds: Bounds

    def rows(self, rows: Tensor) -> "Region":
        """Return the regions of some rows."""
        bounds = rows_of(self.bounds, rows)
        return self._replace(center=self.center[rows], eps=self.eps[rows], bounds=bounds)

    def farthest(self) -> Tensor:
        """Return how far the box lets each coordinate move, ``(n, d)``."""
        low, high = self.bounds
        return torch.maximum(self.center - low, high - self.center).flatten(1)

    def within_reach(self) -> "Region":
        """Set each radius that holds all of the box to the distance of its farthest corner.

        A larger ball bounds nothing, and what is derived from its radius would only be coarser.
        """
        reach = torch.linalg.vector_norm(self.farthest(), self.norm, dim=1)
        # A little more, so that rounding keeps no corner out of the ball.
        beyond = reach * (1 + 16 * torch.finfo(reach.dtype).eps)
        return self._replace(eps=torch.where(self.eps >= reach, beyond, self.eps))


def rows_of(bounds: Bounds, rows: Tensor | slice) -> Bounds:
    """Return the bounds of some rows."""
    low, high = (bound[rows] if isinstance(bound, Tensor) else bound for bound in bounds)
    return low, high


def masked_bounds(inputs: Tensor, bounds: tuple[float, float], mask: Tensor | None) -> Bounds:
    """Narrow the box to the input itself wherever a mask, bool like the inputs, is false."""
    if mask is None:
        return bounds
    low, high = (torch.where(mask, bound, inputs) for bound in bounds)
    return low, high


def free_coordinates(bounds: Bounds) -> Tensor | None:
    """Tell which coordinates the box lets move, bool like the inputs; None: all of them."""
    low, high = bounds
    free = low < high
    return free if isinstance(free, Tensor) else None


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """View one value per row, ``(n,)``, so that it broadcasts to ``like``, ``(n, ...)``."""
    return values.view(-1, *[1] * (like.ndim - 1))


def reading_is_free(tensor: Tensor) -> bool:
    """Tell whether Python may branch on the values: on a CPU they are there, elsewhere it waits."""
    return tensor.device.type == "cpu"


NORMS = (1, 2, math.inf)
"""Norms of the perturbation that the attacks support."""

# Newton steps in project_l2. They end when no further coordinate reaches its bound, for images
# within 2; whatever is left after these is on the safe side, inside the ball.
_NEWTON_STEPS = 12


def project_box(points: Tensor, bounds: Bounds) -> Tensor:
    """Project points onto the box ``bounds[0] <= x <= bounds[1]``, coordinate by coordinate."""
    return points.clamp(*cast("tuple[float, float]", bounds))  # or two tensors


def _flat(bounds: Bounds) -> Bounds:
    """Return the bounds of flat inputs, ``(n, d)``."""
    low, high = (bound.flatten(1) if isinstance(bound, Tensor) else bound for bound in bounds)
    return low, high


def _largest(bounds: Bounds) -> float | Tensor:
    """Return the largest size of a value in the box, a number or ``(n, 1)``, of flat inputs."""
    sizes: Any = [abs(bound) for bound in bounds]
    if isinstance(sizes[0], Tensor):
        return torch.cat(sizes, dim=1).amax(dim=1, keepdim=True)
    return max(sizes)


def project(
    points: Tensor,
    center: Tensor,
    eps: float | Tensor,
    norm: float,
    bounds: Bounds,
) -> Tensor:
    """Project points onto the inputs within ``eps`` of ``center`` that lie in ``bounds``.

    Args:
        points: Points to project, ``(n, ...)``.
        center: Centre of each ball, inside ``bounds``, ``(n, ...)``.
        eps: Radius >= 0, a number or ``(n,)``; infinity leaves the box alone.
        norm: Norm of the ball; 1, 2 or infinity.
        bounds: Smallest and largest value of an input; or of each coordinate, ``(n, ...)``.

    Returns:
        Nearest feasible points in Euclidean distance, ``(n, ...)``.

    Raises:
        ValueError: If ``norm`` is not supported.
    """
    check_norm(norm)
    return _PROJECTIONS[norm](points, center, eps, bounds)


def check_norm(norm: float) -> None:
    """Refuse a norm that is not in ``NORMS``: ValueError."""
    if norm not in NORMS:
        raise ValueError(f"no norm {norm!r}; choose from: {', '.join(map(str, NORMS))}")


def project_l2(points: Tensor, center: Tensor, eps: float | Tensor, bounds: Bounds) -> Tensor:
    """Project points onto the intersection of an l2 ball and a box.

    The nearest point is ``center + clip(mu * (points - center))`` where the clip is to the box. If
    ``mu = 1`` is inside the ball that is it; else ``mu`` solves ``||clip(mu * p)|| = eps``. The
    squared norm is concave and piecewise linear in ``mu^2``: its tangent at any ``mu`` crosses
    ``eps^2`` at or below the root, so Newton's method, from 1 first down and then up, reaches the
    root in as many steps as the set of clipped coordinates changes. There are twelve at the most:
    sizes that span many powers of two may end inside the ball.

    The result aims a few roundings inside the ball, so that the norm measured afterwards does not
    exceed ``eps``; points in the ball and the box are returned unchanged. Arguments and result are
    those of ``project``.
    """
    boxed = project_box(points, bounds)
    origin = center.flatten(1)
    # What the box leaves of the step limits every shorter step too.
    limit = (boxed.flatten(1) - origin).abs_()
    eps = _radii(eps, points).flatten(1)
    inside = torch.linalg.vector_norm(limit, dim=1, keepdim=True) <= eps
    # Adding the centre rounds every coordinate; along the perturbation that hardly adds up. Rows
    # inside the ball get a radius that keeps the arithmetic below finite; it is not used.
    rounding = torch.finfo(points.dtype).eps
    flat = _flat(bounds)
    radius = (eps * (1 - 8 * rounding) - rounding * _largest(flat)).clamp_min_(0)
    radius.masked_fill_(inside, 0)
    if not reading_is_free(points):
        shorter = _shorten(points.flatten(1), origin, limit, radius, flat).view_as(points)
        return torch.where(per_row(inside, points), boxed, shorter)
    rows = (~inside[:, 0]).nonzero()[:, 0]
    if len(rows) > 0:
        part = points.flatten(1)[rows], origin[rows], limit[rows], radius[rows]
        shorter = _shorten(*part, rows_of(flat, rows))
        boxed[rows] = shorter.view(-1, *points.shape[1:])
    return boxed


def _shorten(
    points: Tensor, origin: Tensor, limit: Tensor, radius: Tensor, bounds: Bounds
) -> Tensor:
    """Project rows that are outside their ball, all ``(n, d)``, radius ``(n, 1)``."""
    step = points - origin
    moved = _shrink_to_radius(step.abs(), limit, radius)
    norm = torch.linalg.vector_norm(moved, dim=1, keepdim=True)
    moved *= (radius / norm.masked_fill_(norm == 0, 1)).clamp_max_(1)
    return moved.copysign_(step).add_(origin).clamp_(*cast("tuple[float, float]", bounds))


def _shrink_to_radius(size: Tensor, limit: Tensor, radius: Tensor) -> Tensor:
    """Find ``min(mu * size, limit)`` of norm ``radius``, at most its norm at ``mu = 1``."""
    largest = torch.linalg.vector_norm(size, torch.inf, dim=1, keepdim=True)
    largest.masked_fill_(largest == 0, 1)
    mu = torch.ones_like(radius)
    # No root lies below: without the box, and were every coordinate as large as the largest.
    least = radius / (size.shape[1] ** 0.5 * largest)
    goal, close = radius.square(), 4 * torch.finfo(size.dtype).eps * radius
    reach, moved = size, torch.minimum(size, limit)
    for _ in range(_NEWTON_STEPS):
        norm = torch.linalg.vector_norm(moved, dim=1, keepdim=True)
        done = (norm - radius).abs_() <= close
        if reading_is_free(done) and done.all():
            break
        free = torch.linalg.vector_norm(moved.masked_fill(reach > limit, 0), dim=1, keepdim=True)
        left = goal - (norm.square() - free.square())
        root = mu * left.clamp_min_(0).sqrt_() / free.masked_fill_(free == 0, 1)
        mu = torch.where(done, mu, torch.maximum(root, least))
        reach = size * mu
        moved = torch.minimum(reach, limit)
    return moved


def project_linf(points: Tensor, center: Tensor, eps: float | Tensor, bounds: Bounds) -> Tensor:
    """Project points onto the intersection of an l-infinity ball and a box.

    Where ``center + eps`` is rounded away from the centre the value below it is used, so that no
    difference exceeds ``eps``. Arguments and result are those of ``project``.
    """
    eps = _radii(eps, points)
    low, high = center - eps, center + eps
    low = torch.where(center - low > eps, torch.nextafter(low, center), low)
    high = torch.where(high - center > eps, torch.nextafter(high, center), high)
    return project_box(torch.minimum(torch.maximum(points, low), high), bounds)


def project_l1(points: Tensor, center: Tensor, eps: float | Tensor, bounds: Bounds) -> Tensor:
    """Project points onto the intersection of an l1 ball and a box.

    The nearest point moves coordinate i by ``clip(|p_i| - lambda, 0, r_i)``, where r_i is how far
    the box lets it move. The sum of these falls piecewise linearly in lambda; sorting the 2 d kinks
    finds the piece on which it is ``eps``, and on it lambda is a quotient. Points in the ball and
    the box are returned unchanged, others aim a few roundings inside. Arguments and result are
    those of ``project``.

    Source: Duchi et al., "Efficient projections onto the l1-ball for learning in high dimensions",
    ICML 2008, for the ball alone; with the box as in Croce and Hein, "Mind the box", ICML 2021.
    """
    boxed = project_box(points, bounds)
    origin = center.flatten(1)
    step = points.flatten(1) - origin
    low, high = _flat(bounds)
    limit = torch.where(step > 0, high - origin, origin - low).clamp_min(0)
    eps = _radii(eps, points).flatten(1)
    size = step.abs()
    reach = torch.minimum(size, limit)
    inside = reach.sum(dim=1, keepdim=True) <= eps
    # Adding the centre rounds every coordinate, and the errors of d of them add up like noise.
    rounding = torch.finfo(points.dtype).eps
    noise = 2 * rounding * _largest((low, high)) * size.shape[1] ** 0.5
    radius = (eps * (1 - 8 * rounding) - noise).clamp_min(0)
    radius = torch.where(inside, 0, radius)  # finite; not used where inside
    shift = _soft_threshold(size, reach, radius)
    moved = torch.minimum((size - shift).clamp_min(0), limit)
    total = moved.sum(dim=1, keepdim=True)
    moved = moved * (radius / torch.where(total > 0, total, 1)).clamp_max(1)
    projected = project_box(origin + moved.copysign(step), (low, high)).reshape(points.shape)
    return torch.where(per_row(inside, points), boxed, projected)


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


def _radii(eps: float | Tensor, points: Tensor) -> Tensor:
    """Return the radii, broadcastable to the points."""
    eps = torch.as_tensor(eps, dtype=points.dtype, device=points.device)
    return per_row(eps.expand(len(points)), points)


_PROJECTIONS = {1: project_l1, 2: project_l2, math.inf: project_linf}


def random_options(generator: torch.Generator | None, like: Tensor) -> dict[str, Any]:
    """Return the options with which torch draws numbers of the dtype and device of a tensor."""
    return {"generator": generator, "dtype": like.dtype, "device": like.device}


def random_points(region: Region, generator: torch.Generator | None) -> Tensor:
    """Draw a point of each ball, or of the box if it is infinite, and project it on the box."""
    center, eps, norm, bounds = region
    flat = center.flatten(1)
    low, high = _flat(bounds)
    options = random_options(generator, flat)
    boxed = low + (high - low) * torch.rand(flat.shape, **options)
    if norm == math.inf:
        move = 2 * torch.rand(flat.shape, **options) - 1
    else:
        # Gaussian for l2 and Laplace for l1 directions, lengths by the volume of the ball.
        move = torch.randn(flat.shape, **options)
        if norm == 1:
            move = torch.empty_like(flat).exponential_(generator=generator) * move.sign()
        free = free_coordinates((low, high))
        d: int | Tensor = flat.shape[1]
        if free is not None:  # the ball of the coordinates that may change
            move, d = torch.where(free, move, 0), free.sum(dim=1, keepdim=True).clamp_min(1)
        length = torch.linalg.vector_norm(move, norm, dim=1, keepdim=True)
        share = torch.rand((len(flat), 1), **options) ** (1 / d)
        move = move * (share / length.clamp_min(torch.finfo(flat.dtype).tiny))
    finite = eps.isfinite()[:, None]
    points = torch.where(finite, flat + torch.where(finite, eps[:, None], 0) * move, boxed)
    return project(points.view_as(center), center, eps, norm, bounds)
