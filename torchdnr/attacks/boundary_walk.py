"""Minimum-norm evasion: a walk along the boundary from accepted samples of other classes."""

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from torchdnr.attacks.checks import check_count, check_eps, check_inputs
from torchdnr.attacks.minimum_norm import walk
from torchdnr.attacks.objectives import decision_objective
from torchdnr.attacks.projections import project
from torchdnr.attacks.starts import (
    assigned_classes,
    bisect,
    check_pool,
    keep_nearest,
    nearest_other_class,
)
from torchdnr.attacks.target import (
    Target,
    check_classes,
    evaluate,
    has_reject_column,
    left_as_found,
)

_HALVINGS = 6  # bisections of the line to each pool sample; the walk does the rest
_SLACK = 512  # roundings of the spread of the scores by which an evading point must evade
_FLOOR = 4  # roundings of the largest score, the least that can be told apart


def boundary_walk(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    labels: Tensor,
    init_inputs: Tensor,
    *,
    init_labels: Tensor | None = None,
    eps: float | Tensor | None = None,
    norm: float = 2,
    steps: int = 100,
    neighbours: int = 20,
    starts: int = 10,
    bounds: tuple[float, float] = (0.0, 1.0),
    reject: bool | None = None,
    batch_size: int = 256,
    progress: bool = False,
) -> Tensor:
    """Find the nearest evading (accepted and wrong) point of each input.

    From accepted pool samples of other classes the straight line to the input is bisected, and the
    nearest evading points become starts. The walk then shrinks its radius while it evades and grows
    it while it does not, each step along the normalised gradient of
    ``max(s_y, theta) - max_{j != y} s_j``; only the most promising starts are walked to the end.
    One run gives the whole security curve: an input is evaded at every eps from its norm on.

    Where the walk ends depends more on where it starts than on its length, so many starts are
    walked for a while. Step sizes follow cosine cycles of 100, 200, 400, ... steps, each from the
    best point so far: more steps are never worse, and 100, 300, 700, ... make the best use of them.
    Each step is one forward and backward of every start still walked; with the defaults an input
    costs about 380 of them, plus some 160 forwards.

    A point counts as evading only if it does so by more than rounding, so that it still evades when
    it is evaluated in another batch. An input that is wrong and accepted is returned as it is.

    Args:
        model: Maps inputs to scores ``(n, c)``, or ``(n, c + 1)`` with the rejection threshold in
            the last column; differentiable. Left as found; evaluated in evaluation mode.
        inputs: ``(n, ...)`` in ``bounds``, floating point.
        labels: True classes, int64 ``(n,)``.
        init_inputs: Samples to start from, of all classes, for instance training samples,
            ``(m, ...)``.
        init_labels: Class that the model assigns to each of them, -1 where it rejects, int64
            ``(m,)``; saves one forward over them. Their true classes serve as well.
        eps: Project farther points onto this radius, a number or ``(n,)``; they do not evade then.
            ``None`` returns the nearest evading points at any distance.
        norm: Norm of the perturbation; 2.
        steps: Steps of the walk.
        neighbours: Pool samples tried per input, half of them the nearest of each of the nearest
            classes.
        starts: Starts per input, of different classes as far as there are; half of them are dropped
            after 15, 30 and 45 steps.
        bounds: Smallest and largest value of an input.
        batch_size: Rows in one forward, and inputs attacked at a time.
        reject: Whether the last column of the output is the threshold; ``None`` asks whether
            ``model.reject_index`` is set.
        progress: Whether to show a progress bar.

    Returns:
        Adversarial inputs, like ``inputs``. An input without any start is returned as it is.

    Raises:
        ValueError: If an argument is out of range, or shapes, dtypes or devices disagree.

    Warns once (``UserWarning``) with the number of inputs without a start: give a larger pool.
    """
    check_inputs(inputs, labels, norm, bounds)
    radius = None if eps is None else check_eps(eps, inputs)
    check_pool(init_inputs, init_labels, inputs, bounds)
    check_count("steps", steps, 0)
    for name, value in (("neighbours", neighbours), ("starts", starts), ("batch_size", batch_size)):
        check_count(name, value, 1)
    target = Target(model, _safe_decision, has_reject_column(model, reject), batch_size)
    nearest, lost = inputs.clone(), 0
    with left_as_found(model), torch.no_grad():
        check_classes(target, inputs, labels)
        if init_labels is None:
            init_labels = assigned_classes(target, init_inputs)
        unsolved = (~_evading_rows(target, inputs, labels)).nonzero()[:, 0]
        for rows in unsolved.split(batch_size) if len(unsolved) else ():
            center, row_labels = inputs[rows], labels[rows]
            owner, first = _starts(
                target, center, row_labels, init_inputs, init_labels, neighbours, starts, bounds
            )
            with tqdm(total=steps, disable=not progress, desc="boundary walk", leave=False) as bar:
                owner, found = walk(
                    target,
                    center,
                    row_labels,
                    owner,
                    first,
                    steps=steps if len(owner) else 0,
                    starts=starts,
                    norm=norm,
                    bounds=bounds,
                    bar=bar,
                )
            nearest[rows[owner]] = found
            lost += len(rows) - len(owner)
    if lost:
        warnings.warn(
            f"no accepted sample of another class in init_inputs to start from for {lost} of "
            f"{len(inputs)} inputs, returned as they are; pass more samples of all classes",
            stacklevel=2,
        )
    return nearest if radius is None else project(nearest, inputs, radius, norm, bounds)


def _safe_decision(
    scores: Tensor, threshold: Tensor | None, classes: Tensor, targeted: bool = False
) -> Tensor:
    """Compute the "decision" objective plus a slack that rounding of the scores does not exceed.

    It is relative to their spread: a constant added to all scores decides nothing.
    """
    values = scores.detach()
    if threshold is not None:
        values = torch.cat([values, threshold.detach()[:, None]], dim=1)
    spread = values.amax(dim=1) - values.amin(dim=1)
    slack = _SLACK * spread + _FLOOR * values.abs().amax(dim=1)
    slack = slack * torch.finfo(scores.dtype).eps
    return decision_objective(scores, threshold, classes, targeted) + slack


def _evading_rows(target: Target, points: Tensor, labels: Tensor) -> Tensor:
    """Tell which points evade, slack or not, bool ``(n,)``."""
    return evaluate(target, points, labels)[1]


def _starts(
    target: Target,
    center: Tensor,
    labels: Tensor,
    pool: Tensor,
    classes: Tensor,
    neighbours: int,
    starts: int,
    bounds: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """Find evading points near each input: the nearest of each class, then the nearest of all.

    Returns:
        The input that each of them belongs to ``(r,)``, and the points ``(r, ...)``.
    """
    nearest, usable = nearest_other_class(center, labels, pool, classes, neighbours)
    owner, column = usable.nonzero(as_tuple=True)
    sample = nearest[owner, column]

    def evading(points: Tensor) -> Tensor:
        return evaluate(target, points, labels[owner])[0] < 0

    good = evading(pool[sample])
    owner, sample = owner[good], sample[good]
    points = bisect(evading, center[owner], pool[sample], _HALVINGS)
    lengths = (points - center[owner]).flatten(1).norm(dim=1)
    leaders = keep_nearest(owner * (classes.max() + 1) + classes[sample], lengths, 1)
    diameter = (bounds[1] - bounds[0]) * math.sqrt(center[0].numel())
    rank = (lengths + diameter).index_copy(0, leaders, lengths[leaders])  # leaders come first
    keep = keep_nearest(owner, rank, starts)
    return owner[keep], points[keep]
