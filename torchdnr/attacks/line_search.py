"""Maximum-confidence evasion at a given eps: Algorithm 1 with a line search on every step."""

from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from torchdnr.attacks.checks import check_count, check_eps, check_inputs, check_like
from torchdnr.attacks.descent import (
    Points,
    Region,
    best_column,
    better,
    descend,
    put,
    rows_at_once,
)
from torchdnr.attacks.objectives import find_objective
from torchdnr.attacks.projections import project
from torchdnr.attacks.starts import assigned_classes, check_pool, nearest_other_class
from torchdnr.attacks.target import (
    Target,
    check_classes,
    evaluate,
    has_reject_column,
    left_as_found,
)

_CANDIDATES = 10  # pool samples tried per input as its second start


def line_search_pgd(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    labels: Tensor,
    eps: float | Tensor,
    *,
    norm: float = 2,
    objective: str = "paper",
    steps: int = 20,
    step_size: float = 0.1,
    doublings: int = 10,
    halvings: int = 5,
    tol: float = 1e-3,
    start: Tensor | None = None,
    init_inputs: Tensor | None = None,
    init_labels: Tensor | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    batch_size: int = 256,
    reject: bool | None = None,
    progress: bool = False,
) -> Tensor:
    """Minimise the objective within ``eps`` of each input.

    Each step follows the normalised gradient and tries ``step_size * 2^k`` for k = 0..doublings,
    and halved steps where none of them improves; every trial is projected on ball and box and the
    best one is the next point. A sample stops when no trial improves, or when three steps in a row
    change its objective by no more than ``tol`` of all its descent. It then leaves the batch, and
    its result does not depend, but for rounding, on which samples shared it.

    What is returned is the best point evaluated: an evading point (accepted and wrong) beats any
    other, then the lower objective counts. More steps, or a start, never make it worse.

    RBF scores are flat far from the training data, so a descent from the input alone stalls and
    flatters the defence: pass ``init_inputs`` for a second descent from accepted samples of other
    classes, and ``start`` when eps grows.

    Args:
        model: Maps inputs to scores ``(n, c)``, or ``(n, c + 1)`` with the rejection threshold in
            the last column; differentiable. Left as found; evaluated in evaluation mode.
        inputs: ``(n, ...)`` in ``bounds``, floating point.
        labels: True classes, int64 ``(n,)``.
        eps: Largest perturbation >= 0, a number or ``(n,)``.
        norm: Norm of the perturbation; 2.
        objective: Name in ``OBJECTIVES``: "paper", "decision" or "secml".
        steps: Largest number of steps of a descent.
        step_size: Smallest step tried at first, l2 length in input units.
        doublings: Times the step is doubled.
        halvings: Times the step is halved where no larger one improves.
        tol: Change of the objective that counts as small, relative to the descent so far.
        start: Where to start, ``(n, ...)``, for instance the result at a smaller eps; projected,
            and used where it is better than the input itself.
        init_inputs: Samples of any class to take a second start from, ``(m, ...)``.
        init_labels: Class that the model assigns to each of them, -1 where it rejects, int64
            ``(m,)``; saves one forward over them. Their true classes serve as well.
        bounds: Smallest and largest value of an input.
        batch_size: Rows in one forward, and inputs attacked at a time.
        reject: Whether the last column of the output is the threshold; ``None`` asks whether
            ``model.reject_index`` is set.
        progress: Whether to show a progress bar.

    Returns:
        Adversarial inputs, like ``inputs``.

    Raises:
        ValueError: If an argument is out of range, or shapes, dtypes or devices disagree.

    Source: Sotgiu et al., "Deep neural rejection against adversarial examples", Algorithm 1; step
    sizes and second start as in the authors' library ``secml``.
    """
    check_inputs(inputs, labels, norm, bounds)
    eps = check_eps(eps, inputs)
    _check_options(steps, step_size, doublings, halvings, tol, batch_size)
    if start is not None:
        check_like("start", start, inputs, same_length=True)
    target = Target(model, find_objective(objective), has_reject_column(model, reject), batch_size)
    exponents = torch.arange(-halvings, doublings + 1, device=inputs.device)
    sizes = step_size * torch.exp2(exponents.to(inputs.dtype))
    with left_as_found(model), torch.no_grad():
        check_classes(target, inputs, labels)
        if init_inputs is not None:
            check_pool(init_inputs, init_labels, inputs, bounds)
            if init_labels is None:
                init_labels = assigned_classes(target, init_inputs)
        results = []
        for rows in torch.arange(len(inputs), device=inputs.device).split(batch_size):
            region = Region(inputs[rows], eps[rows], norm, bounds)
            own = None if start is None else start[rows]
            pool = None if init_inputs is None else (init_inputs, init_labels)
            reference, owner, first = _first_points(target, region, labels[rows], own, pool)
            with tqdm(total=steps, disable=not progress, desc="line search", leave=False) as bar:
                found = descend(
                    target,
                    region.rows(owner),
                    labels[rows][owner],
                    first,
                    (sizes[halvings:], sizes[:halvings]),
                    steps=steps,
                    tol=tol,
                    reference=reference[owner],
                    bar=bar,
                )
            results.append(_best_of_starts(found, owner, len(rows)))
    return torch.cat(results)


def _check_options(
    steps: int, step_size: float, doublings: int, halvings: int, tol: float, batch_size: int
) -> None:
    for name, value in (("steps", steps), ("doublings", doublings), ("halvings", halvings)):
        check_count(name, value, 0)
    check_count("batch_size", batch_size, 1)
    if not 0 < step_size < torch.inf:
        raise ValueError(f"step_size must be > 0 and finite, got {step_size}")
    if not tol >= 0:
        raise ValueError(f"tol must be >= 0, got {tol}")


def _first_points(
    target: Target,
    region: Region,
    labels: Tensor,
    start: Tensor | None,
    pool: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Points]:
    """Evaluate where the descents begin.

    Returns:
        Objective at the centres ``(n,)``; then one row per descent: the input that it attacks
        ``(r,)``, and its first point. The first n rows belong to the inputs in their order.
    """
    rows = torch.arange(len(labels), device=labels.device)
    first = Points(region.center.clone(), *evaluate(target, region.center, labels))
    reference = first.values.clone()
    if start is not None:
        warm = project(start, *region)
        warm = Points(warm, *evaluate(target, warm, labels))
        put(first, rows, warm, better(warm, first))
    if pool is None:
        return reference, rows, first
    owner, second = _pool_points(target, region, labels, *pool)
    joined = (torch.cat(pair) for pair in zip(first, second, strict=True))
    return reference, torch.cat([rows, owner]), Points(*joined)


def _pool_points(
    target: Target, region: Region, labels: Tensor, pool: Tensor, classes: Tensor
) -> tuple[Tensor, Points]:
    """Find the best pool sample for each input after projection; inputs without one are absent."""
    nearest, usable = nearest_other_class(region.center, labels, pool, classes, _CANDIDATES)
    owner = usable.any(dim=1).nonzero()[:, 0]
    nearest, usable = nearest[owner], usable[owner]
    count = nearest.shape[1]
    found = [Points(region.center[:0], region.center.new_zeros(0), usable[:0, 0])]
    for part in torch.arange(len(owner), device=owner.device).split(rows_at_once(target, count)):
        rows = owner[part].repeat_interleave(count)
        points = project(pool[nearest[part].flatten()], *region.rows(rows))
        tried = Points(points, *evaluate(target, points, labels[rows]))
        values = torch.where(usable[part], tried.values.view(-1, count), torch.inf)
        column = best_column(values, tried.evading.view(-1, count) & usable[part])
        found.append(tried.rows(torch.arange(len(part), device=owner.device) * count + column))
    return owner, Points(*map(torch.cat, zip(*found, strict=True)))


def _best_of_starts(found: Points, owner: Tensor, count: int) -> Tensor:
    """Merge the second descents, whose rows follow the first ``count``, into the first ones."""
    best = found.rows(slice(0, count))
    again, owner = found.rows(slice(count, None)), owner[count:]
    put(best, owner, again, better(again, best.rows(owner)))
    return best.inputs
