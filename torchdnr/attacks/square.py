"""Square attack: random search with square windows, from scores alone."""

import math
from collections.abc import Callable
from functools import partial
from typing import Unpack

import torch
from torch import Tensor

from torchdnr.attacks.checks import check_count
from torchdnr.attacks.fixed_eps import Run, best_within
from torchdnr.attacks.objectives import find_objective
from torchdnr.attacks.options import FixedEpsOptions, resolve
from torchdnr.attacks.problem import problem
from torchdnr.attacks.projections import Region, per_row, project, random_options
from torchdnr.attacks.target import Points, better, evaluate, keep_better, put, unsolved

# Queries, of 10,000, after which the windows cover half as much.
_HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
_PULL = 0.25  # share of the trials pulled towards the input, for a model that rejects
_LOCAL = 0.25  # share of the trials near the best point, for inputs that are no images
_GROWTH = 1.5  # of their length at a success; its fourth root at a failure: 1 in 5 succeeds
_SHORTEST = 1e-3  # of these steps, relative to the radius
_DROP_EVERY = 50  # queries between which rows that evade stay in the batch
_TILES = 5  # along each side of the first pattern of l2 and l1
_LEAST_SIDE = 3  # of a window of l2 and l1, where the image is larger


def square(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    labels: Tensor,
    eps: float | Tensor,
    *,
    objective: str = "decision",
    queries: int = 1000,
    coverage: float = 0.8,
    pull: float | None = None,
    **shared: Unpack[FixedEpsOptions],
) -> Tensor:
    """Change the values in a random window of each input, and keep what lowers the objective.

    For l-infinity a window takes +eps or -eps, one sign per channel; for l2 and l1 the perturbation
    is moved from one window to another. Windows shrink as queries are used up. Inputs of more than
    two dimensions are images, the last two of which are height and width, square or not; a window
    of an ``(n, d)`` input is a run of coordinates. Neighbours among these mean little, so a quarter
    of the trials there are steps from the best point: for l1 some way to a random corner of the
    ball, else in a random direction, as far as such steps succeed (Rechenberg's rule). The model
    need not be differentiable.

    All of this uses the whole radius, but a model that rejects may accept a nearer point only: some
    of the trials are pulled towards the input by a random factor.

    A row that evades leaves the batch after the fifty queries in which it did.

    Args:
        model: Maps inputs to scores ``(n, c)``, or ``(n, c + 1)`` with the threshold last.
        inputs: ``(n, ...)`` in ``bounds``, float32 or float64.
        labels: True classes, int64 ``(n,)``.
        eps: Largest perturbation >= 0, a number or ``(n,)``.
        objective: Name in ``OBJECTIVES``.
        queries: Forwards per input of each run.
        coverage: Share of the coordinates of a channel that the first windows cover, in (0, 1].
        pull: Share of the trials in windows that are pulled towards the input, in [0, 1]; None:
            a quarter if the model rejects, else none, as in the source.
        **shared: See ``FixedEpsOptions``.

    Returns:
        Adversarial inputs, like ``inputs``: the best point evaluated.

    Raises:
        ValueError: If an argument is out of range, or shapes, dtypes or devices disagree.
        TypeError: If there is no such option.

    Source: Andriushchenko et al., "Square attack: a query-efficient black-box adversarial attack
    via random search", ECCV 2020; l1: Croce and Hein, "Mind the box", ICML 2021. Local steps:
    Rechenberg, "Evolutionsstrategie", 1973.
    """
    options = resolve(square, shared)
    check_count("queries", queries, 1)
    if not 0 < coverage <= 1:
        raise ValueError(f"coverage must be in (0, 1], got {coverage}")
    if pull is not None and not 0 <= pull <= 1:
        raise ValueError(f"pull must be in [0, 1], got {pull}")
    with problem(model, inputs, labels, eps, options, find_objective(objective)) as attacked:
        if pull is None:
            pull = _PULL if attacked.target.reject else 0.0
        search = partial(_search, queries=queries, coverage=coverage, pull=pull)
        return best_within(attacked, search, steps=queries, name="square")


def _search(run: Run, *, queries: int, coverage: float, pull: float) -> Points:
    """Try one change per query; return the best points."""
    best = run.first.clone()
    lengths = run.region.eps / 4  # of the local steps
    for begin in range(0, queries, _DROP_EVERY):
        # Waits for the device once in fifty queries, and saves those of the rows that evade.
        rows = unsolved(best)
        if len(rows) == 0:
            break
        region, labels, current = run.region.rows(rows), run.labels[rows], best.rows(rows)
        length = lengths[rows]
        for query in range(begin, min(begin + _DROP_EVERY, queries)):
            local = None
            if query == 0:
                points = first_pattern(region, run.generator)
            else:
                share = coverage / 2 ** sum(query * 10_000 > t * queries for t in _HALVED_AFTER)
                points = changed_window(current.inputs, region, share, run.generator)
                points = _pulled(points, region, pull, run.generator)
                if points.ndim == 2:
                    points, local = _some_local(
                        points, current.inputs, length, region, run.generator
                    )
            trial = evaluate(run.target, project(points, *region), labels)
            if local is not None:
                length = _next_length(length, local, better(trial, current), region.eps)
            current = keep_better(current, trial)
            run.bar.update()
        put(best, rows, current, torch.ones_like(current.evading))
        lengths[rows] = length
    return best


def _some_local(
    trial: Tensor, points: Tensor, length: Tensor, region: Region, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Replace a share of the trials, ``(n, d)``, by steps from the points; mark those, ``(n,)``."""
    options = random_options(generator, points)
    local = torch.rand(len(points), **options) < _LOCAL
    if region.norm == 1:
        step = _towards_corner(points, region, generator)
    else:
        scale = 1 if region.norm == math.inf else points.shape[1] ** 0.5
        step = length[:, None] / scale * torch.randn(points.shape, **options)
    return torch.where(local[:, None], points + step, trial), local


def _next_length(length: Tensor, local: Tensor, success: Tensor, eps: Tensor) -> Tensor:
    """Lengthen the steps that succeeded and shorten the others, within bounds, ``(n,)``."""
    change = torch.where(success, _GROWTH, _GROWTH**-0.25).to(length)
    changed = torch.minimum(torch.maximum(length * change, _SHORTEST * eps), eps)
    return torch.where(local, changed, length)


def _towards_corner(points: Tensor, region: Region, generator: torch.Generator) -> Tensor:
    """Step some way towards a random corner of each l1 ball: there its best points are."""
    n, d = points.shape
    corner = torch.randint(2 * d, (n, 1), generator=generator, device=points.device)
    size = region.eps[:, None] * (1 - 2 * (corner % 2))
    corner = region.center.scatter_add(1, corner // 2, size.to(points.dtype))
    share = torch.rand((n, 1), **random_options(generator, points)) ** 3  # mostly short
    return share * (corner - points)


def _pulled(points: Tensor, region: Region, share: float, generator: torch.Generator) -> Tensor:
    """Move a share of the points towards the centre, each by a random factor."""
    if share == 0:
        return points
    options = random_options(generator, points)
    chosen, factor = torch.rand((2, len(points)), **options)
    factor = per_row(torch.where(chosen < share, factor, 1), points)
    return region.center + factor * (points - region.center)


def first_pattern(region: Region, generator: torch.Generator) -> Tensor:
    """Draw a point at the surface of each ball: vertical stripes, or for l2 and l1 a grid of tiles.

    The points are not projected on the box.
    """
    images, _ = _as_images(region.center, region)
    n, c, _, width = images.shape
    if region.norm == math.inf:
        move = _signs((n, c, 1, width), images, generator).expand_as(images)
    else:
        move = _scaled(_tiles(images, generator), region.norm, (1, 2, 3))
    return region.center + per_row(region.eps, region.center) * move.reshape(region.center.shape)


def changed_window(
    points: Tensor, region: Region, share: float, generator: torch.Generator
) -> Tensor:
    """Change each point in a random window that covers a share of each channel.

    The points stay within the balls and are not projected on the box.
    """
    images, center = _as_images(points, region)
    n, c, height, width = images.shape
    linf = region.norm == math.inf
    sides = _window_sides(share, height, width, 1 if linf else _LEAST_SIDE)
    eps = region.eps.view(-1, 1, 1, 1)
    if linf:
        window, _ = _window(images, sides, generator)
        moved = center + eps * _signs((n, c, 1, 1), images, generator)
        changed = torch.where(window, moved, images)
    else:
        changed = center + _moved_mass(images - center, eps, region.norm, sides, generator)
    return changed.reshape(points.shape)


def _as_images(points: Tensor, region: Region) -> tuple[Tensor, Tensor]:
    """View points and centres as images; flat ones have one channel and one row of pixels."""
    shape = (1, *points.shape[1:]) if points.ndim == 2 else points.shape[-2:]
    images, center = (t.reshape(len(t), -1, *shape) for t in (points, region.center))
    return images, center


def _window_sides(share: float, height: int, width: int, least: int) -> tuple[int, int]:
    """Choose a window that covers a share of the image: a square, or wider where that is too high.

    It is smaller than the image, so that there is a choice of places.
    """
    most = max(1, height - 1), max(1, width - 1)
    side = max(least, round(math.sqrt(share * height * width)))
    if side > most[0]:
        return most[0], min(most[1], max(least, round(share * height * width / most[0])))
    if side > most[1]:
        return min(most[0], max(least, round(share * height * width / most[1]))), most[1]
    return side, side


def _window(
    images: Tensor, sides: tuple[int, int], generator: torch.Generator
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Place a window in each row; return it, bool ``(n, 1, h, w)``, and coordinates in it."""
    inside, coordinates = [], []
    for length, side in zip(images.shape[-2:], sides, strict=True):
        offset = torch.randint(
            length - side + 1, (len(images), 1), generator=generator, device=images.device
        )
        coordinate = torch.arange(length, device=images.device) - offset
        inside.append((coordinate >= 0) & (coordinate < side))
        coordinates.append(coordinate.clamp(0, side - 1))
    window = inside[0][:, :, None] & inside[1][:, None, :]
    return window[:, None], (coordinates[0], coordinates[1])


def _moved_mass(
    move: Tensor, eps: Tensor, norm: float, sides: tuple[int, int], generator: torch.Generator
) -> Tensor:
    """Remove the perturbation from two windows, and put it, as a new pattern, into one of them.

    What the whole perturbation leaves of its radius is spent as well.
    """
    n, c = move.shape[:2]
    window, (i, j) = _window(move, sides, generator)
    emptied = _window(move, sides, generator)[0] | window
    variant = torch.randint(2, (n, 1, 1), generator=generator, device=move.device)
    pattern = _patterns(*sides, like=move)[variant, i[:, :, None], j[:, None, :]][:, None]
    pattern = _scaled(torch.where(window, pattern, 0), norm, (2, 3))
    there = _scaled(torch.where(window, move, 0), norm, (2, 3))
    fresh = _scaled(_signs((n, c, 1, 1), move, generator) * pattern + there, norm, (2, 3))
    powers = move.abs() ** norm
    unused = (eps**norm - powers.sum(dim=(1, 2, 3), keepdim=True)).clamp_min(0)
    removed = torch.where(emptied, powers, 0).sum(dim=(2, 3), keepdim=True)
    available = (removed + unused / c) ** (1 / norm)
    return torch.where(emptied, 0, move) + available * fresh


def _tiles(images: Tensor, generator: torch.Generator) -> Tensor:
    """Cover images with a grid of patterns, each with its random sign in each channel."""
    inside, tile, coordinates, sides = [], [], [], []
    for length in images.shape[-2:]:
        side = max(1, length // _TILES)
        count = min(_TILES, length)
        place = torch.arange(length, device=images.device) - (length - side * count) // 2
        inside.append((place >= 0) & (place < side * count))
        tile.append((place // side).clamp(0, count - 1))
        coordinates.append(place % side)
        sides.append(side)
    n, c = images.shape[:2]
    signs = _signs((n, c, _TILES, _TILES), images, generator)[:, :, tile[0][:, None], tile[1]]
    variant = torch.randint(2, (n, 1, 1), generator=generator, device=images.device)
    patterns = _patterns(*sides, like=images)[variant, coordinates[0][:, None], coordinates[1]]
    return torch.where(inside[0][:, None] & inside[1], signs * patterns[:, None], 0)


def _patterns(height: int, width: int, *, like: Tensor) -> Tensor:
    """Return two peaks of opposite signs, one above and one beside the other, ``(2, h, w)``."""
    half, other = height // 2, width // 2
    above = [_peak(half, width, like), -_peak(height - half, width, like)]
    beside = [_peak(height, other, like), -_peak(height, width - other, like)]
    return torch.stack([torch.cat(above, dim=0), torch.cat(beside, dim=1)])


def _peak(height: int, width: int, like: Tensor) -> Tensor:
    """Return values that fall off in square rings: at distance r, the sum of 1 / k^2 for k > r."""
    rows = (torch.arange(height, device=like.device) - height // 2).abs()
    columns = (torch.arange(width, device=like.device) - width // 2).abs()
    ring = torch.maximum(rows[:, None], columns)
    terms = 1 / torch.arange(max(height, width) // 2 + 1, 0, -1, device=like.device).square()
    return terms.to(like.dtype).cumsum(dim=0).flip(0)[ring]


def _signs(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    signs = torch.randint(2, shape, generator=generator, device=like.device)
    return (2 * signs - 1).to(like.dtype)


def _scaled(values: Tensor, norm: float, dims: tuple[int, ...]) -> Tensor:
    """Scale values to norm 1 over some dimensions; zeros stay zeros."""
    length = torch.linalg.vector_norm(values, norm, dim=dims, keepdim=True)
    return values / torch.where(length > 0, length, 1)
