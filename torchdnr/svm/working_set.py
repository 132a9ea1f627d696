"""Working sets of many dual problems: their choice, and their solution by two-variable updates.

After ThunderSVM and its relatives: an outer step gives every problem a working set of its worst
violators, and all these small problems are solved at once. Each problem selects, updates and stops
by its own state only, so its answer does not depend on its neighbours.

Source: Fan, Chen and Lin, "Working set selection using second order information", JMLR 6 (2005);
Wen et al., "ThunderSVM", JMLR 19 (2018).
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from torchdnr.svm.dual import Points, snap_to_bounds

TAU = 1e-12
"""Floor of the curvature along a pair, for duplicate samples (as in LIBSVM)."""
CHECK_EVERY = 32
"""Two-variable updates between two looks at whether all problems are done (a device sync)."""
FIRST_SAMPLES = 256
"""Samples of the first working set."""
NEW_SAMPLES = 160
"""Samples at a bound that enter a working set at least, if so many want to leave their bound."""
NEW_SHARE = 0.5
"""The same as a share of the free samples."""
NEW_NONZERO = 0.25
"""The same as a share of all that are not 0."""


def select_working_sets(points: Points, size: int) -> Tensor:
    """Choose working sets ``(P, size)``: half may grow b, half may shrink it, worst first."""
    gradient, dual_coef, lower, upper = points
    n = gradient.shape[1]
    if size >= n:
        return torch.arange(n, device=gradient.device).expand(len(gradient), n)
    growing = (-gradient).masked_fill(dual_coef >= upper, -torch.inf)
    top = growing.topk(size - size // 2, dim=1).indices
    shrinking = gradient.masked_fill(dual_coef <= lower, -torch.inf)
    # Below all real candidates, but above the samples that are in the set already.
    shrinking = shrinking.clamp_min(torch.finfo(gradient.dtype).min)
    shrinking = shrinking.scatter(1, top, -torch.inf)
    return torch.cat([top, shrinking.topk(size // 2, dim=1).indices], dim=1)


def largest_violators(points: Points, intercept: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Choose each problem's working set: its free samples, and the worst of those at a bound.

    Returns indices, ``(P, k)``, and whether they belong to the set. Those that do belong do not
    repeat. The pair that violates most is among them, unless the free samples are more than fit in
    the set. A multiplier is F + intercept.
    """
    gradient, dual_coef, lower, upper = points
    multiplier = gradient + intercept.unsqueeze(1)
    free = (dual_coef > lower) & (dual_coef < upper)
    count = free.sum(dim=1)
    nonzero = (dual_coef != 0).sum(dim=1)
    new = torch.maximum(NEW_SHARE * count, NEW_NONZERO * nonzero).long()
    new = new.clamp(min(NEW_SAMPLES, largest), max(2, largest // 2))
    n = gradient.shape[1]
    half = int(((new + 1) // 2).max().clamp_max(n))
    rank = torch.arange(half, device=gradient.device)
    growing = (-multiplier).masked_fill((dual_coef >= upper) | free, -torch.inf).topk(half, dim=1)
    shrinking = multiplier.masked_fill((dual_coef <= lower) | free, -torch.inf).topk(half, dim=1)
    within = rank < ((new + 1) // 2).unsqueeze(1)
    leaving = torch.cat([(growing.values > 0) & within, (shrinking.values > 0) & within], dim=1)
    # As many free samples as fit beside them: those that are left out slow down the convergence.
    worst = multiplier.abs().masked_fill(~free, -1.0)
    inner = worst.topk(min(n, largest, int(count.max())), dim=1)
    rank = torch.arange(inner.values.shape[1], device=gradient.device)
    fits = rank < (largest - leaving.sum(dim=1, keepdim=True))
    index = torch.cat([inner.indices, growing.indices, shrinking.indices], dim=1)
    return index, torch.cat([(inner.values >= 0) & fits, leaving], dim=1)


def common_sample(n: int, device: torch.device, size: int = FIRST_SAMPLES) -> Tensor:
    """Draw the samples of n that problems start with: ascending, always the same for the same n."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    return order[:size].sort().values.to(device)


def first_sets(
    lower: Tensor, upper: Tensor, index: Tensor, valid: Tensor, fresh: Tensor, largest: int
) -> tuple[Tensor, Tensor]:
    """Give ``fresh`` problems, at b = 0, one random working set, whose kernel they share.

    There all samples violate alike, so that any choice is as good as the worst violators. The
    others, and those of which the random set holds one class only, keep their sets.
    """
    common = common_sample(lower.shape[1], index.device)[:largest]
    both = (lower[:, common] < 0).any(dim=1) & (upper[:, common] > 0).any(dim=1)
    width = max(len(common), index.shape[1])
    index, valid = (pad(t, (0, width - t.shape[1])) for t in (index, valid))
    counts = torch.arange(width, device=index.device) < len(common)
    common = pad(common, (0, width - len(common)))
    choice = (both & fresh).unsqueeze(1)
    return torch.where(choice, common, index), torch.where(choice, counts, valid)


def make_feasible(
    values: Tensor, gradient: Tensor, lower: Tensor, upper: Tensor, total: Tensor
) -> Tensor:
    """Bring b ``(P, k)`` within its bounds and to its sums, leaving on a bound what is there.

    Where samples have to leave their bounds for the sake of the sum, those go first that win most
    by it, by the gradient there or nearby.
    """
    tiny = torch.finfo(values.dtype).tiny
    for _ in range(2):  # the second time for what the first put within the slack of a bound
        values = torch.minimum(torch.maximum(values, lower), upper)
        values = snap_to_bounds(values, lower, upper, 1e-9)
        missing = (total - values.sum(dim=1)).unsqueeze(1)
        slack = torch.where(missing > 0, upper - values, values - lower)
        inner = slack * ((values > lower) & (values < upper))
        whole = inner.sum(dim=1, keepdim=True)
        enough = whole > 2 * missing.abs()
        values = values + torch.where(enough, inner * (missing / whole.clamp_min(tiny)), 0.0)
        # Few problems need what is left, which sorts: worth the sync that tells them.
        rest = (~enough & (missing != 0)).squeeze(1).nonzero().squeeze(1)
        if len(rest):
            some, sign = missing[rest], missing[rest].sign()
            values[rest] += sign * _fill(slack[rest], sign * gradient[rest], some.abs())
    return torch.minimum(torch.maximum(values, lower), upper)


def _fill(slack: Tensor, cost: Tensor, amount: Tensor) -> Tensor:
    """Use up the slack of the cheapest entries, one after the other."""
    order = cost.argsort(dim=1, stable=True)
    ordered = slack.gather(1, order)
    before = ordered.cumsum(dim=1) - ordered
    used = torch.minimum((amount - before).clamp_min(0.0), ordered)
    return torch.zeros_like(slack).scatter(1, order, used)


def solve_blocks(
    kernels: Tensor, points: Points, tol: Tensor, max_steps: Tensor
) -> tuple[Tensor, Tensor]:
    """Solve P small problems, ``(P, q)``, by two-variable updates: new b, and updates spent."""
    gradient, dual_coef, lower, upper = points
    count, size = gradient.shape
    problem = torch.arange(count, device=gradient.device)
    diagonal = kernels.diagonal(dim1=1, dim2=2)
    rows = kernels.reshape(count * size, size)
    offset = problem * size
    negative = -gradient
    dual_coef = dual_coef.clone()
    blocked_up = torch.zeros_like(negative).masked_fill_(dual_coef >= upper, -torch.inf)
    blocked_down = torch.zeros_like(negative).masked_fill_(dual_coef <= lower, torch.inf)
    steps = torch.zeros(count, dtype=torch.int64, device=gradient.device)
    for step in range(int(max_steps.max())):
        steepest_up, i = (negative + blocked_up).max(dim=1, keepdim=True)
        down = negative + blocked_down
        running = steepest_up - down.amin(dim=1, keepdim=True) > tol.unsqueeze(1)
        running &= (steps < max_steps).unsqueeze(1)
        if step % CHECK_EVERY == 0 and not running.any():
            break
        row_i = rows[offset + i.squeeze(1)]
        slope = (steepest_up - down).clamp_min_(0.0)
        curvature = torch.add(diagonal + diagonal.gather(1, i), row_i, alpha=-2.0).clamp_min_(TAU)
        j = (slope.square() / curvature).argmax(dim=1, keepdim=True)
        slack = torch.minimum(
            upper.gather(1, i) - dual_coef.gather(1, i), dual_coef.gather(1, j) - lower.gather(1, j)
        )
        change = torch.minimum(slope.gather(1, j) / curvature.gather(1, j), slack) * running
        negative.addcmul_(change, rows[offset + j.squeeze(1)] - row_i)
        pair, signed = torch.cat([i, j], dim=1), torch.cat([change, -change], dim=1)
        low, high = lower.gather(1, pair), upper.gather(1, pair)
        old = dual_coef.gather(1, pair)
        scale = torch.maximum(old.abs(), signed.abs()).amax(dim=1, keepdim=True)
        moved = snap_to_bounds(old + signed, low, high, 1e-12, scale)
        dual_coef.scatter_(1, pair, moved)
        zeros = torch.zeros_like(moved)
        blocked_up.scatter_(1, pair, zeros.masked_fill(moved >= high, -torch.inf))
        blocked_down.scatter_(1, pair, zeros.masked_fill(moved <= low, torch.inf))
        steps += running.squeeze(1)
    return dual_coef, steps
