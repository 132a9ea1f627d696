"""Square attack: random search with square windows, from scores alone."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from torchdnr.attacks.checks import check_count
from torchdnr.attacks.fixed_eps import FixedEps, Run
from torchdnr.attacks.points import Points, Region, better, evaluated, keep_better, put
from torchdnr.attacks.projections import project
from torchdnr.attacks.windows import changed_window, first_pattern

# Queries, of 10,000, after which the windows cover half as much.
_HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
_PULL = 0.25  # share of the trials pulled towards the input, for a model that rejects
_LOCAL = 0.25  # share of the trials near the best point, for inputs that are no images
_GROWTH = 1.5  # of their length at a success; its fourth root at a failure: 1 in 5 succeeds
_SHORTEST = 1e-3  # of these steps, relative to the radius
_DROP_EVERY = 50  # queries between which rows that evade stay in the batch


def square(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    labels: Tensor,
    eps: float | Tensor,
    *,
    norm: float = 2,
    objective: str = "decision",
    targets: Tensor | None = None,
    queries: int = 1000,
    coverage: float = 0.8,
    pull: float | None = None,
    start: Tensor | None = None,
    init_inputs: Tensor | None = None,
    init_labels: Tensor | None = None,
    restarts: int = 0,
    bounds: tuple[float, float] = (0.0, 1.0),
    batch_size: int = 256,
    reject: bool | None = None,
    seed: int = 0,
    progress: bool = False,
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
        model: Maps inputs to scores ``(n, c)``, or ``(n, c + 1)`` with the rejection threshold in
            the last column. Left as found; evaluated in evaluation mode.
        inputs: ``(n, ...)`` in ``bounds``, float32 or float64.
        labels: True classes, int64 ``(n,)``.
        eps: Largest perturbation >= 0, a number or ``(n,)``.
        norm: Norm of the perturbation; 1, 2 or infinity.
        objective: Name in ``OBJECTIVES``.
        targets: Class wanted for each input, int64 ``(n,)``; ``None``: any but the true one.
        queries: Forwards per input of each run.
        coverage: Share of the coordinates of a channel that the first windows cover, in (0, 1].
        pull: Share of the trials in windows that are pulled towards the input, in [0, 1]; ``None``:
            a quarter if the model rejects, else none, as in the source.
        start: Where to start, ``(n, ...)``; projected, and used where it is better than the input
            and the random pattern that is tried first.
        init_inputs: Samples of any class, ``(m, ...)``: the best one that is accepted as another
            class starts a second run of those that did not evade.
        init_labels: Class that the model assigns to each of them, -1 where it rejects, ``(m,)``.
        restarts: Further runs, from random points of the ball, of those that did not evade.
        bounds: Smallest and largest value of an input.
        batch_size: Rows in one forward, and inputs attacked at a time.
        reject: Whether the last column of the output is the threshold; ``None`` asks whether
            ``model.reject_index`` is set.
        seed: Of the random numbers.
        progress: Whether to show a progress bar.

    Returns:
        Adversarial inputs, like ``inputs``: the best point evaluated.

    Raises:
        ValueError: If an argument is out of range, or shapes, dtypes or devices disagree.

    Source: Andriushchenko et al., "Square attack: a query-efficient black-box adversarial attack
    via random search", ECCV 2020; l1: Croce and Hein, "Mind the box", ICML 2021. Local steps:
    Rechenberg, "Evolutionsstrategie", 1973.
    """
    check_count("queries", queries, 1)
    if not 0 < coverage <= 1:
        raise ValueError(f"coverage must be in (0, 1], got {coverage}")
    if pull is not None and not 0 <= pull <= 1:
        raise ValueError(f"pull must be in [0, 1], got {pull}")
    common = FixedEps(
        model=model,
        inputs=inputs,
        labels=labels,
        eps=eps,
        norm=norm,
        objective=objective,
        targets=targets,
        start=start,
        init_inputs=init_inputs,
        init_labels=init_labels,
        restarts=restarts,
        bounds=bounds,
        batch_size=batch_size,
        reject=reject,
        seed=seed,
        progress=progress,
    )

    def loop(run: Run) -> Points:
        share = (_PULL if run.target.reject else 0.0) if pull is None else pull
        return _search(run, queries, coverage, share)

    return common.run(loop, steps=queries, name="square")


def _search(run: Run, queries: int, coverage: float, pull: float) -> Points:
    """Try one change per query; return the best points."""
    best = Points(*(field.clone() for field in run.first))
    lengths = _finite(run.region).eps / 4  # of the local steps
    for begin in range(0, queries, _DROP_EVERY):
        # Waits for the device once in fifty queries, and saves those of the rows that evade.
        rows = (~best.evading).nonzero()[:, 0]
        if len(rows) == 0:
            break
        region, labels, current = _finite(run.region.rows(rows)), run.labels[rows], best.rows(rows)
        length = lengths[rows]
        for query in range(begin, min(begin + _DROP_EVERY, queries)):
            local = None
            if query == 0:
                trial = first_pattern(region, run.generator)
            else:
                share = coverage / 2 ** sum(query * 10_000 > t * queries for t in _HALVED_AFTER)
                trial = changed_window(current.inputs, region, share, run.generator)
                trial = _pulled(trial, region, pull, run.generator)
                if trial.ndim == 2:
                    trial, local = _some_local(trial, current.inputs, length, region, run.generator)
            trial = evaluated(run.target, project(trial, *region), labels)
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
    """Replace a share of the trials, ``(n, d)``, by steps from the points; tell which, ``(n,)``."""
    options = {"generator": generator, "dtype": points.dtype, "device": points.device}
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
    options = {"generator": generator, "device": points.device}
    n, d = points.shape
    corner = torch.randint(2 * d, (n, 1), **options)
    size = region.eps[:, None] * (1 - 2 * (corner % 2))
    corner = region.center.scatter_add(1, corner // 2, size.to(points.dtype))
    share = torch.rand((n, 1), dtype=points.dtype, **options) ** 3  # mostly short
    return share * (corner - points)


def _finite(region: Region) -> Region:
    """Replace an infinite radius by that of a ball that holds the box wherever its centre is."""
    low, high = region.bounds
    widest = (high - low) * region.center[0].numel() ** (1 / region.norm)
    return region._replace(eps=region.eps.clamp_max(widest))


def _pulled(points: Tensor, region: Region, share: float, generator: torch.Generator) -> Tensor:
    """Move a share of the points towards the centre, each by a random factor."""
    if share == 0:
        return points
    options = {"generator": generator, "dtype": points.dtype, "device": points.device}
    chosen, factor = torch.rand((2, len(points)), **options)
    factor = torch.where(chosen < share, factor, 1).view(-1, *[1] * (points.ndim - 1))
    return region.center + factor * (points - region.center)
