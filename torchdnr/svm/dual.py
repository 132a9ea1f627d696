"""The dual problem of the C-SVC, and the certificate of a solution to it.

With b = y * alpha every problem on the same samples has the same quadratic form:

    minimise 1/2 b'Kb - y'b   subject to   1'b = 0   and   min(0, y C) <= b <= max(0, y C).

Labels, C, weights and held-out samples (C = 0) change only y and the bounds.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchdnr.distributed.processes import warn_once
from torchdnr.svm.kernel_rows import KernelRows

DESCENT, ACTIVE_SET = "descent", "active set"
HANDED_OVER = "descent, after the active set failed"
"""What a problem was solved by: working sets, or all samples at once where many are free."""


class ConvergenceWarning(UserWarning):
    """Warns that a dual problem was returned before it met its tolerance."""


@dataclass(frozen=True)
class Certificate:
    """How good solutions of P dual problems on one kernel are; ``(P,)`` but where said otherwise.

    Attributes:
        violation: LIBSVM's largest KKT violation in score units, on a fresh float64 product.
        duality_gap: Primal minus dual objective at (b, intercept), >= 0 up to rounding.
        objective: ``1/2 b'Kb - y'b``, as LIBSVM reports it.
        steps: Newton steps and two-variable updates spent.
        converged: Whether the violation is within the tolerance.
        kernel_rows: Rows of the Gram matrix that were evaluated for all problems together, a
            number; n if it was given whole.
        samples: How many there are, n.
        method: What each problem was solved by: ``"descent"`` by working sets, ``"active set"`` on
            all samples at once where many are free, or ``"descent, after the active set failed"``.
    """

    violation: Tensor
    duality_gap: Tensor
    objective: Tensor
    steps: Tensor
    converged: Tensor
    kernel_rows: int
    samples: int
    method: tuple[str, ...]


@dataclass(frozen=True)
class DualSolution(Certificate):
    """Solutions of P dual problems on one kernel, and how good they are.

    Attributes:
        dual_coef: b = y * alpha, float64 ``(n, P)``.
        intercept: Intercept of the decision function ``K b + intercept``, ``(P,)``.
        scores: Decision values ``K b + intercept`` of all samples, those held out too, float64
            ``(n, P)``.
    """

    dual_coef: Tensor
    intercept: Tensor
    scores: Tensor

    def certificate(self) -> Certificate:
        """Return what is worth keeping once the solution is in use, on the CPU."""
        kept: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(Certificate)}
        kept |= {name: v.cpu() for name, v in kept.items() if isinstance(v, Tensor)}
        return Certificate(**kept)


class Points(NamedTuple):
    """Where P problems stand: F = K b - y, b and the bounds of b, ``(P, n)`` or ``(P, k)`` each."""

    gradient: Tensor
    dual_coef: Tensor
    lower: Tensor
    upper: Tensor

    def of(self, problems: Tensor) -> "Points":
        """Select problems, ``(p,)``."""
        return Points(*(t[problems] for t in self))

    def at(self, index: Tensor) -> "Points":
        """Select samples of each problem, ``(P, k)``."""
        return Points(*(t.gather(1, index) for t in self))


def dual_bounds(targets: Tensor, C: float | Tensor) -> tuple[Tensor, Tensor]:
    """Compute the lower and upper bounds of b, float64 ``(n, P)``, from labels and C."""
    limits = targets.double() * C
    return limits.clamp_max(0.0), limits.clamp_min(0.0)


def snap_to_bounds(
    values: Tensor, lower: Tensor, upper: Tensor, share: float, scale: Tensor | None = None
) -> Tensor:
    """Put values ``(P, k)`` that are all but at a bound exactly on it, lest they count as free.

    ``share`` says how near that is: a share of the distance between the bounds, or of ``scale``,
    the largest value of each problem, where C is far beyond all of them.
    """
    scale = values.abs().amax(dim=1, keepdim=True) if scale is None else scale
    slack = share * torch.minimum(upper - lower, scale)
    values = torch.where(values <= lower + slack, lower, values)
    return torch.where(values >= upper - slack, upper, values)


def to_double(values: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Widen values to float64, and put those at a rounded bound on the bound itself.

    A C that float32 rounds down would leave every sample at it just short of it.
    """
    result = torch.where(values >= upper.to(values.dtype), upper, values.double())
    return torch.where(values <= lower.to(values.dtype), lower, result)


def violation_bounds(points: Points) -> tuple[Tensor, Tensor]:
    """Compute m and M of LIBSVM's stopping rule m - M <= tol, ``(P,)`` each.

    m is the largest -F among samples whose b can grow, M the smallest among those whose b can
    shrink.

    Source: Fan, Chen and Lin, JMLR 6 (2005), Sec. 2.
    """
    gradient, dual_coef, lower, upper = points
    steepest_up = (-gradient).masked_fill(dual_coef >= upper, -torch.inf).amax(dim=1)
    steepest_down = (-gradient).masked_fill(dual_coef <= lower, torch.inf).amin(dim=1)
    return steepest_up, steepest_down


def intercepts(points: Points) -> Tensor:
    """Compute LIBSVM's intercepts: the mean of -F over free samples, else (m + M) / 2; ``(P,)``."""
    gradient, dual_coef, lower, upper = points
    free = (dual_coef > lower) & (dual_coef < upper)
    count = free.sum(dim=1)
    mean = -(gradient * free).sum(dim=1) / count.clamp_min(1)
    steepest_up, steepest_down = violation_bounds(points)
    middle = (steepest_up + steepest_down) / 2
    return torch.where(count > 0, mean, middle)


def certify(
    kernel: KernelRows,
    targets: Tensor,
    lower: Tensor,
    upper: Tensor,
    dual_coef: Tensor,
    *,
    tol: float,
    steps: Tensor,
) -> DualSolution:
    """Measure a candidate b, ``(n, P)``, afresh: nothing that the solver kept is trusted."""
    targets = targets.double()
    product = kernel.product(dual_coef.T.contiguous()).T
    points = Points((product - targets).T, dual_coef.T, lower.T, upper.T)
    steepest_up, steepest_down = violation_bounds(points)
    violation = (steepest_up - steepest_down).clamp_min(0.0)
    intercept = kernel.replicate(intercepts(points))
    quadratic = (dual_coef * product).sum(dim=0)
    linear = (targets * dual_coef).sum(dim=0)
    hinge = (1.0 - targets * (product + intercept)).clamp_min(0.0)
    primal = quadratic / 2 + ((upper - lower) * hinge).sum(dim=0)
    return DualSolution(
        dual_coef=dual_coef,
        intercept=intercept,
        violation=violation,
        duality_gap=primal - (linear - quadratic / 2),
        objective=quadratic / 2 - linear,
        steps=steps,
        converged=violation <= tol,
        scores=product + intercept,
        kernel_rows=kernel.evaluated,
        samples=len(dual_coef),
        method=(DESCENT,) * dual_coef.shape[1],
    )


def join_solutions(parts: Sequence[DualSolution]) -> DualSolution:
    """Put the solutions of groups of problems on one kernel side by side, in their order."""
    if len(parts) == 1:
        return parts[0]
    values: dict[str, Any] = {
        field.name: torch.cat([getattr(part, field.name) for part in parts], dim=-1)
        for field in fields(DualSolution)
        if field.name not in ("kernel_rows", "samples", "method")
    }
    method = tuple(itertools.chain.from_iterable(part.method for part in parts))
    return replace(parts[-1], **values, method=method)


def warn_if_not_converged(solution: DualSolution, tol: float) -> None:
    """Warn once about all problems that did not meet the tolerance."""
    failed = (~solution.converged).nonzero().squeeze(1).tolist()
    if not failed:
        return
    named = ", ".join(f"{k} (violation {solution.violation[k]:.2g})" for k in failed[:10])
    more = f" and {len(failed) - 10} more" if len(failed) > 10 else ""
    warn_once(
        f"{len(failed)} of {len(solution.converged)} dual problems did not reach a KKT violation "
        f"of {tol:g}: {named}{more}. Raise max_steps, lower C, or scale the features.",
        ConvergenceWarning,
        stacklevel=3,
    )
