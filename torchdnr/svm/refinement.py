"""From the best point of a grid to better ones: C by class and gamma, by the gradient of a loss."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from torchdnr.svm.implicit import implicit_out_of_fold_scores
from torchdnr.svm.multiclass import CheckedWeight

REACH = math.log(100.0)
"""How far log C and log gamma may go from the grid's point: less than a factor of 100."""
EVALUATIONS = 25
"""Losses with gradients that one refinement may take, each as long as a fit without each fold."""
SLOPES = 0.01, 1_000.0
HALVINGS = 40
"""Where the slope of the loss is looked for, and in how many steps."""
NEGLIGIBLE = 1e-6
"""Loss from which on there is nothing to gain."""
REJECTED = 0.1
"""Share of held-out samples that the threshold rejects when two points are compared."""


@dataclass(frozen=True)
class Refinement:
    """What a refinement went from, what it went to, and whether that is kept.

    The loss is on the folds that the gradient saw; accuracy and errors, pairs of before and after,
    are on folds of another seed, in whose choice it had no part.

    Attributes:
        C: C before, and of each class after.
        gamma: Gamma before and after.
        loss: Out of fold, the cross-entropy of ``softmax(slope * scores)`` at its best slope. With
            a fixed slope it would fall by making all scores larger.
        accuracy: Cross-validated accuracy.
        accepted_errors: Share of all samples that are wrong and yet accepted, where a tenth is
            rejected: those of the lowest best scores. It is what rejection is for. An area under a
            curve would also count rates of rejection that nobody uses, and rises with every sample
            that is easily told to be wrong.
        kept: Whether neither accuracy nor accepted errors became worse.
        reason: Why it was kept or not, a sentence.
    """

    C: tuple[float, tuple[float, ...]]
    gamma: tuple[float, float]
    loss: tuple[float, float]
    accuracy: tuple[float, float]
    accepted_errors: tuple[float, float]
    kept: bool
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}
        return {**values, "C": [self.C[0], list(self.C[1])]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read what ``to_dict`` returned."""
        before, after = values["C"]
        pairs: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**{**pairs, "C": (before, tuple(after))})


class FoldedProblem(NamedTuple):
    """Samples and their folds, for losses out of fold that are functions of C and gamma."""

    features: Tensor  # (n, d)
    labels: Tensor  # (n,)
    fold: Tensor  # (n,)
    class_weight: CheckedWeight
    weight: Tensor | None  # (n,)
    memory_limit: int | None

    def scores(
        self, C: Tensor, gamma: Tensor, initial: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Score the samples out of fold, with gradients; also return where to start from next."""
        return implicit_out_of_fold_scores(
            self.features,
            self.labels,
            self.fold,
            C=C,
            gamma=gamma,
            class_weight=self.class_weight,
            sample_weight=self.weight,
            initial=initial,
            memory_limit=self.memory_limit,
        )

    def loss(self, scores: Tensor) -> Tensor:
        """Average the smooth loss, a scalar."""
        with torch.no_grad():  # at the best slope its own derivative is 0
            low, high = (scores.new_full((), math.log(slope)) for slope in SLOPES)
            own = one_hot(self.labels, scores.shape[1])
            for _ in range(HALVINGS):
                middle = (low + high) / 2
                excess = (middle.exp() * scores).softmax(dim=1) - own
                falls = self._mean((excess * scores).sum(dim=1)) < 0
                low, high = torch.where(falls, middle, low), torch.where(falls, high, middle)
        return self._mean(cross_entropy(low.exp() * scores, self.labels, reduction="none"))

    def judge(self, scores: Tensor) -> tuple[float, float]:
        """Return accuracy and accepted errors, see ``Refinement``."""
        best, predicted = scores.max(dim=1)
        right = (predicted == self.labels).double()
        order = best.argsort(descending=True)
        total = torch.ones_like(best).double() if self.weight is None else self.weight
        accepted = torch.empty_like(right)
        accepted[order] = (total[order].cumsum(0) <= (1.0 - REJECTED) * total.sum()).double()
        return self._mean(right).item(), self._mean(accepted * (1.0 - right)).item()

    def _mean(self, values: Tensor) -> Tensor:
        weight = torch.ones_like(values) if self.weight is None else self.weight
        return (weight * values).sum() / weight.sum()


@torch.inference_mode(False)
@torch.enable_grad()
def refine_point(
    features: Tensor,
    labels: Tensor,
    folds: tuple[Tensor, Tensor],
    point: tuple[float, float],
    class_weight: CheckedWeight = None,
    sample_weight: Tensor | None = None,
    *,
    memory_limit: int | None = None,
) -> Refinement:
    """Lower a smooth out-of-fold loss by C of each class and gamma, and judge what comes of it.

    L-BFGS moves the logarithms of C and gamma along exact derivatives of the fits.

    Args:
        features: ``(n, d)``.
        labels: ``(n,)`` in 0..c-1.
        folds: Of each sample, ``(n,)``: those of the loss, and others to judge on.
        point: C and gamma to start from.
        class_weight: As in ``RBFSVM``.
        sample_weight: Factor >= 0 of C per sample, and its share in all means, ``(n,)``.
        memory_limit: Bytes for the rows of a kernel; default 4 GiB.

    Returns:
        What was found, with both points and their values.

    Source: Chapelle et al., "Choosing multiple parameters for support vector machines", Machine
    Learning 46 (2002), who follow the gradient of an estimate of the error; Bertrand et al.,
    "Implicit differentiation for fast hyperparameter selection in non-smooth convex learning",
    JMLR 23 (2022); the slope is the temperature of Guo et al., "On calibration of modern neural
    networks", ICML 2017.
    """
    # Copies, since autograd keeps no tensor that was made in inference mode.
    wide, labels = features.detach().to(torch.float64, copy=True), labels.clone()
    weight = None if sample_weight is None else sample_weight.clone()
    seen, judging = (
        FoldedProblem(wide, labels, fold.clone(), class_weight, weight, memory_limit)
        for fold in folds
    )
    c = int(labels.max()) + 1
    C, gamma = point
    first = torch.tensor([C] * c + [gamma], dtype=torch.float64)
    steps = torch.zeros_like(first, requires_grad=True)
    losses: list[float] = []
    best, start = first, None

    def closure() -> Tensor:
        nonlocal best, start
        optimizer.zero_grad()
        values = first * (REACH * (steps / REACH).tanh()).exp()
        there = values.to(wide.device)
        scores, start = seen.scores(there[:-1], there[-1], start)
        loss = seen.loss(scores)
        if not losses or loss.item() < min(losses):
            best = values.detach()
        losses.append(loss.item())
        # Its derivatives say by which share the loss falls, and vanish with it.
        logarithm = (loss + NEGLIGIBLE).log()
        logarithm.backward()
        return logarithm

    optimizer = torch.optim.LBFGS(
        [steps],
        max_iter=EVALUATIONS,
        max_eval=EVALUATIONS,
        tolerance_grad=1e-3,
        tolerance_change=1e-4,
        line_search_fn="strong_wolfe",
    )
    optimizer.step(closure)
    with torch.no_grad():
        before, after = (
            judging.judge(judging.scores(values[:-1], values[-1])[0])
            for values in (first.to(wide.device), best.to(wide.device))
        )
    accuracy, errors = zip(before, after, strict=True)
    reached = (*best[:-1].tolist(),), best[-1].item()
    kept = accuracy[1] >= accuracy[0] and errors[1] <= errors[0] and min(losses) < losses[0]
    pairs = (losses[0], min(losses)), accuracy, errors
    return Refinement((C, reached[0]), (gamma, reached[1]), *pairs, kept, _reason(*pairs))


def _reason(
    loss: tuple[float, float], accuracy: tuple[float, float], errors: tuple[float, float]
) -> str:
    """Say why a refinement is kept or not."""
    rates = (
        f"cross-validated accuracy {accuracy[0]:.2%} before, {accuracy[1]:.2%} after; wrong and "
        f"accepted where {REJECTED:.0%} is rejected {errors[0]:.2%} before, {errors[1]:.2%} after"
    )
    if loss[1] >= loss[0]:
        return f"not kept, no point of a smaller loss was found from {loss[0]:.4g}"
    worse = [
        name
        for name, is_worse in (
            ("accuracy", accuracy[1] < accuracy[0]),
            ("rejection", errors[1] > errors[0]),
        )
        if is_worse
    ]
    verdict = f"not kept, {' and '.join(worse)} became worse" if worse else "kept"
    return f"{verdict}: out-of-fold loss {loss[0]:.4g} to {loss[1]:.4g}, {rates}"
