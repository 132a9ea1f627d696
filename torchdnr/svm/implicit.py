"""The solution of an SVM as a function of its training data, with exact derivatives.

At the solution some samples are free, 0 < alpha < C, and the others at a bound. The free ones F and
the intercept t solve a linear system, in which b = y * alpha of the bounded ones B is given:

    K_FF b_F + t 1 = y_F - K_FB b_B,        1'b_F = -1'b_B.

The solver finds which samples are free; this system, solved once more, gives the derivatives by all
that it is made of. They are those of the solution wherever no sample at a bound lies exactly at the
margin: there it has a derivative to each side.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchdnr.distributed.sharing import ShardedFeatures
from torchdnr.kernels.rbf import full_precision, rbf_scores
from torchdnr.svm.checks import check_labels
from torchdnr.svm.dual import Certificate, DualSolution
from torchdnr.svm.gram import planned_rows
from torchdnr.svm.multiclass import (
    ONE_VS_REST,
    CheckedWeight,
    PerClass,
    binary_targets,
    upper_bounds,
)
from torchdnr.svm.solver import solve_dual

TOL = 1e-6
"""KKT violation of the solutions: a larger one leaves in doubt which samples are free."""
NEAR = 1e-5
"""Distance from the margin, in score units, below which a sample at a bound is degenerate."""
RIDGE = 1e-10
"""Added to the diagonal of K_FF, which duplicates among the free samples make singular."""
FACTOR_ELEMENTS = 1 << 24
"""Entries of the matrices that are factored together."""


class ImplicitSolution(NamedTuple):
    """Solutions of P problems on n samples, differentiable by what they were solved from.

    Attributes:
        dual_coef: b = y * alpha, ``(n, P)``.
        intercept: t, ``(P,)``.
        degenerate: Samples at a bound that lie at the margin, bool ``(n, P)``: there derivatives
            are those to one side only. So are those by C of a problem without free samples, all of
            whose samples count.
        certificate: How good the solutions are, see ``Certificate``.
    """

    dual_coef: Tensor
    intercept: Tensor
    degenerate: Tensor
    certificate: Certificate


def implicit_solution(
    features: Tensor,
    targets: Tensor,
    C: Tensor,
    gamma: Tensor,
    *,
    tol: float = TOL,
    initial: Tensor | None = None,
    memory_limit: int | None = None,
    other_side: bool = False,
) -> ImplicitSolution:
    """Solve P duals on one RBF kernel, ``exp(-gamma |z_i - z_j|^2)``, with exact derivatives.

    The backward pass solves one linear system per problem, with the factor of the forward pass, and
    takes the derivatives of the kernel in tiles. It is of first order.

    Args:
        features: ``(n, d)``, floating point.
        targets: Labels in {-1, 1} by problem, ``(n, P)``; they have no derivative.
        C: Upper bound of each alpha, ``(n, P)`` or what broadcasts to it; 0 holds a sample out.
        gamma: Kernel width, a scalar tensor > 0.
        tol: KKT violation up to which the solver goes on.
        initial: b = y * alpha to start from, ``(n, P)``, such as that of a solution nearby.
        memory_limit: Bytes for the rows of the kernel; default 4 GiB.
        other_side: Whether degenerate samples count as free ones in the derivatives. By how much
            these differ then is how far they are one-sided.

    Returns:
        The solutions, on device and in dtype of the features, which samples are degenerate, and the
        certificate.

    Raises:
        ValueError: If shapes or values do not fit, or a problem holds one class only.

    Warns:
        ConvergenceWarning: If the solver missed ``tol``.
    """
    limits = torch.as_tensor(C, dtype=torch.float64, device=features.device)
    limits = limits.expand(targets.shape)
    with torch.no_grad():
        wide = features.detach().double()
        sharded, center, problems = ShardedFeatures.of(wide), wide.mean(dim=0), targets.shape[1]
        kernel = planned_rows(sharded, gamma.item(), center, problems, memory_limit, None)
        solved = solve_dual(kernel, targets.double(), limits, tol=tol, initial=initial)
    tensors = (features, limits, gamma, targets)
    dual_coef, intercept, degenerate = _Solution.apply(*tensors, solved, other_side)
    return ImplicitSolution(dual_coef, intercept, degenerate, solved.certificate())


def svm_scores(
    features: Tensor,
    labels: Tensor,
    inputs: Tensor,
    *,
    C: float | Tensor = 10.0,
    gamma: float | Tensor,
    sample_weight: Tensor | None = None,
    num_classes: int | None = None,
) -> Tensor:
    """Fit an RBF-SVM, one-vs-rest, and score inputs: a layer with gradients by all its tensors.

    A leading dimension of episodes makes as many fits in one call, on samples of their own.

    Args:
        features: Training features, ``(n, d)``, or ``(e, n, d)`` of e episodes.
        labels: Their classes, int64 ``(n,)`` or ``(e, n)``, every class in every episode.
        inputs: What to score, ``(m, d)`` or ``(e, m, d)``.
        C: Upper bound of alpha: a number, or a tensor: a scalar, or one per class, ``(c,)``.
        gamma: Kernel width > 0, a number or a scalar tensor.
        sample_weight: Factor >= 0 of C per sample, like ``labels``.
        num_classes: c; default: largest label + 1.

    Returns:
        Scores, ``(m, c)`` or ``(e, m, c)``.

    Raises:
        ValueError: If shapes or values do not fit, or a class has no sample.

    Warns:
        ConvergenceWarning: If a problem missed its tolerance.

    Source: implicit differentiation of the optimum, as Barratt, "On the differentiability of the
    solution to convex optimization problems", 2018; an SVM as a layer: Lee et al., "Meta-learning
    with differentiable convex optimization", CVPR 2019.
    """
    if features.ndim == 2:
        weight = None if sample_weight is None else sample_weight[None]
        options: Any = {"C": C, "gamma": gamma, "sample_weight": weight, "num_classes": num_classes}
        return svm_scores(features[None], labels[None], inputs[None], **options)[0]
    fits = features.ndim == inputs.ndim == 3 and labels.shape == features.shape[:2]
    if not fits or inputs.shape[::2] != features.shape[::2]:
        raise ValueError(
            "expected features (e, n, d), labels (e, n) and inputs (e, m, d), or all without e, "
            f"got {tuple(features.shape)}, {tuple(labels.shape)} and {tuple(inputs.shape)}"
        )
    e, n, _ = features.shape
    c = max(check_labels(of_one, n, num_classes) for of_one in labels)
    gamma = torch.as_tensor(gamma, dtype=features.dtype, device=features.device)
    if gamma.ndim or not gamma > 0:
        raise ValueError(f"gamma must be one number > 0, got {gamma.tolist()}")
    bounds = torch.as_tensor(C, dtype=torch.float64, device=features.device).expand(c)
    # One problem per episode and class, which holds out the samples of all other episodes.
    members = torch.eye(e, dtype=torch.float64, device=features.device)
    members = members.repeat_interleave(n, dim=0).repeat_interleave(c, dim=1)
    if sample_weight is not None:
        members = members * sample_weight.flatten()[:, None]
    targets = binary_targets(labels.flatten(), c, ONE_VS_REST).repeat(1, e)
    solution = implicit_solution(features.flatten(0, 1), targets, members * bounds.repeat(e), gamma)
    dual_coef = solution.dual_coef.view(e, n, e, c)
    each = torch.arange(e, device=features.device)
    dual_coef, intercept = dual_coef[each, :, each], solution.intercept.view(e, 1, c)
    center = features.detach().mean(dim=1, keepdim=True)
    pairs = zip(inputs - center, features - center, dual_coef, strict=True)
    return torch.stack([rbf_scores(x, z, b, gamma) for x, z, b in pairs]) + intercept


def implicit_out_of_fold_scores(
    features: Tensor,
    labels: Tensor,
    fold: Tensor,
    *,
    C: PerClass,
    gamma: float | Tensor,
    class_weight: CheckedWeight = None,
    sample_weight: Tensor | None = None,
    initial: Tensor | None = None,
    memory_limit: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Score every sample by the SVM fitted on the other folds, with gradients by all its tensors.

    Args:
        features: ``(n, d)``.
        labels: ``(n,)`` in 0..c-1.
        fold: Of each sample, from 0, ``(n,)``; see ``stratified_folds``.
        C: Upper bound of alpha: a number, a scalar tensor, or one per class, ``(c,)``.
        gamma: Kernel width > 0, a number or a scalar tensor.
        class_weight: As in ``RBFSVM``.
        sample_weight: Factor >= 0 of C per sample, ``(n,)``.
        initial: Dual coefficients to start from, as an earlier call returned them.
        memory_limit: As in ``implicit_solution``.

    Returns:
        Scores, ``(n, c)``; and the dual coefficients of all folds, ``(n, folds * c)``.
    """
    c, folds = int(labels.max()) + 1, int(fold.max()) + 1
    weight = (
        torch.ones_like(labels, dtype=torch.float64) if sample_weight is None else sample_weight
    )
    C = torch.as_tensor(C, dtype=torch.float64, device=labels.device)
    limits = [
        torch.as_tensor(upper_bounds(labels, c, ONE_VS_REST, 1.0, class_weight, kept)) * C
        for kept in (weight * (fold != k) for k in range(folds))
    ]
    bounds = torch.cat([limit.expand(len(labels), c) for limit in limits], dim=1)
    gamma = torch.as_tensor(gamma, dtype=features.dtype, device=features.device)
    targets = binary_targets(labels, c, ONE_VS_REST).repeat(1, folds)
    solution = implicit_solution(
        features, targets, bounds, gamma, initial=initial, memory_limit=memory_limit
    )
    centred = features - features.detach().mean(dim=0)
    scores = rbf_scores(centred, centred, solution.dual_coef, gamma) + solution.intercept
    each = torch.arange(len(labels), device=labels.device)
    return scores.unflatten(1, (folds, c))[each, fold], solution.dual_coef.detach()


class _Solution(torch.autograd.Function):
    """A solution as a function of what was solved: one adjoint system per problem backward."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - that of autograd, which has no public type
        features: Tensor,
        limits: Tensor,
        gamma: Tensor,
        targets: Tensor,
        solved: DualSolution,
        other_side: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        b, t, upper = solved.dual_coef, solved.intercept, targets * limits
        free = (b != 0) & (b != upper)
        at_margin = (solved.scores - targets).abs() < NEAR
        degenerate = ~free & (limits > 0) & (at_margin | ~free.any(dim=0))
        moving = free | degenerate if other_side else free
        centred = features.double()
        systems = _systems(centred - centred.mean(dim=0), gamma.double(), moving)
        # K_FF b_F + t 1 = y_F - K_FB b_B, written as a correction of what the solver found.
        residual = torch.where(free, targets - solved.scores, 0)
        step, shift = _solve(systems, residual, b.new_zeros(b.shape[1]))
        moved = b + step
        low, high = upper.clamp_max(0), upper.clamp_min(0)
        inside = ((moved >= low) & (moved <= high)).all(dim=0)  # else the solver's own digits stay
        b, t = torch.where(inside, moved, b), torch.where(inside, t + shift, t)
        deciding = _deciding(targets - solved.scores, b, low, high) * ~moving.any(dim=0)
        ctx.save_for_backward(features, limits, gamma, targets, b, moving, deciding)
        ctx.systems = systems
        ctx.mark_non_differentiable(degenerate)
        return b.to(features), t.to(features), degenerate

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any,  # noqa: ANN401 - as above
        by_coef: Tensor,
        by_intercept: Tensor,
        _: Tensor,
    ) -> tuple[Tensor | None, ...]:
        features, limits, gamma, targets, b, free, deciding = ctx.saved_tensors
        by_coef, by_intercept = by_coef.double(), by_intercept.double()
        u, v = _solve(ctx.systems, torch.where(free, by_coef, 0), by_intercept)
        u = u + deciding * by_intercept
        rows, columns = u.ne(0).any(dim=1), b.ne(0).any(dim=1)  # whose kernel values count at all
        with torch.enable_grad():
            z = (features.detach() - features.detach().mean(dim=0)).double()
            z.requires_grad_(ctx.needs_input_grad[0])
            width = gamma.detach().double().requires_grad_()
            moment = -(u[rows] * rbf_scores(z[rows], z[columns], b[columns], width)).sum()
            by_gamma, *by_z = torch.autograd.grad(moment, (width, z) if z.requires_grad else width)
        by_limits = None
        if ctx.needs_input_grad[1]:
            at_upper = (b == targets * limits) & (limits > 0) & ~free
            some = at_upper.any(dim=1)
            products = torch.zeros_like(u)
            z, width = z.detach(), width.detach()
            products[some] = rbf_scores(z[some], z[rows], u[rows], width)
            by_limits = torch.where(at_upper, targets * (by_coef - products - v), 0)
        by_features = by_z[0].to(features) if by_z else None
        return by_features, by_limits, by_gamma.to(gamma), None, None, None


class _System(NamedTuple):
    """Linear systems of some problems with about as many free samples each."""

    problems: Tensor  # (p,)
    samples: Tensor  # (p, f), those of a shorter set padded
    valid: Tensor  # which count, bool (p, f)
    factor: Tensor  # of K_FF, with an identity where it is padded, (p, f, f)
    ones: Tensor  # K_FF^-1 1, (p, f)


def _deciding(residual: Tensor, b: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return the share of each sample in the intercept of problems without free samples, (n, P).

    That is the mean of y - K b of two samples: the largest of those whose b can grow, and the
    smallest of those whose b can shrink; see ``dual.intercepts``.
    """
    largest = residual.masked_fill(b >= high, -torch.inf).argmax(dim=0, keepdim=True)
    smallest = residual.masked_fill(b <= low, torch.inf).argmin(dim=0, keepdim=True)
    half = residual.new_full(largest.shape, 0.5)
    return torch.zeros_like(residual).scatter_add(0, largest, half).scatter_add(0, smallest, half)


def _systems(centred: Tensor, gamma: Tensor, free: Tensor) -> list[_System]:
    """Factor K_FF of each problem that has free samples, those of like size together."""
    counts = free.sum(dim=0)
    order = counts.argsort()
    order, sizes = order[counts[order] > 0], counts[order][counts[order] > 0].tolist()
    systems, first = [], 0
    while first < len(sizes):
        last = first + 1
        while last < len(sizes) and (last + 1 - first) * sizes[last] ** 2 <= FACTOR_ELEMENTS:
            last += 1
        systems.append(_factored(centred, gamma, free, order[first:last], sizes[last - 1]))
        first = last
    return systems


def _factored(centred: Tensor, gamma: Tensor, free: Tensor, problems: Tensor, f: int) -> _System:
    valid, samples = free[:, problems].T.to(torch.int8).sort(dim=1, descending=True, stable=True)
    valid, samples = valid[:, :f].bool(), samples[:, :f]
    z = centred[samples]
    with full_precision(z.device):
        norms = z.square().sum(dim=2)
        distances = norms[:, :, None] + norms[:, None] - 2 * z @ z.transpose(1, 2)
    kernel = (-gamma * distances.clamp_min(0)).exp()
    both = valid[:, :, None] & valid[:, None]
    identity = torch.eye(f, dtype=kernel.dtype, device=kernel.device)
    factor = torch.linalg.cholesky(
        torch.where(both, kernel, 0) + identity * (torch.where(valid, RIDGE, 1.0)[:, None])
    )
    ones = torch.cholesky_solve(valid.to(kernel)[:, :, None], factor)[:, :, 0]
    return _System(problems, samples, valid, factor, torch.where(valid, ones, 0))


def _solve(systems: list[_System], right: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Solve ``K_FF x + s 1 = right``, ``1'x = total``; x ``(n, P)`` is 0 where nothing is free."""
    x, s = torch.zeros_like(right), torch.zeros_like(total)
    for system in systems:
        problems, samples, valid, factor, ones = system
        given = torch.where(valid, right[samples, problems[:, None]], 0)
        one = torch.cholesky_solve(given[:, :, None], factor)[:, :, 0]
        one = torch.where(valid, one, 0)
        s[problems] = (one.sum(dim=1) - total[problems]) / ones.sum(dim=1)
        values = one - s[problems][:, None] * ones
        x[samples, problems[:, None]] += torch.where(valid, values, 0)
    return x, s
