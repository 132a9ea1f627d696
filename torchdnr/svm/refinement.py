"""From the best point of a grid to better ones: C by class and widths, along a gradient."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from torchdnr.svm.folds import stratified_folds
from torchdnr.svm.implicit import implicit_out_of_fold_scores
from torchdnr.svm.multiclass import CheckedWeight
from torchdnr.svm.rbf_svm import RBFSVM

Refine = bool | Literal["ard"]
"""Whether to refine a point of the grid; ``"ard"``: with a width for each feature."""
REACH = math.log(100.0)
"""How far log C and log gamma may go from the grid's point: less than a factor of 100."""
SCALE_REACH = math.log(10.0)
"""The same of the factor of a feature, whose square is that of its gamma."""
EVALUATIONS = 25
"""Losses with gradients that one refinement may take, each as long as a fit without each fold."""
SPREAD = 0.5
"""Deviation of the logarithm of such a factor, before any sample is seen."""
SLOPES = 0.01, 1_000.0
HALVINGS = 40
"""Where the slope of the loss is looked for, and in how many steps."""
NEGLIGIBLE = 1e-6
"""Loss from which on there is nothing to gain."""
JUDGED = 3
"""Folds on which a refinement is judged: it is repeated without each of them."""
REJECTED = 0.1
"""Share of held-out samples that the threshold rejects when two points are compared."""


def check_refine(refine: object) -> None:
    """Raise ``ValueError`` unless it is a ``Refine``."""
    if not (isinstance(refine, bool) or refine == "ard"):
        raise ValueError(f'refine must be False, True or "ard", got {refine!r}')


@dataclass(frozen=True)
class Refinement:
    """What a refinement went from, what it went to, and whether that is kept.

    The loss is on the folds that the gradient saw. Accuracy and errors, pairs of before and after,
    are on others: each sample is scored by an SVM that was refined and fitted without it.

    Attributes:
        C: C before, and of each class after.
        gamma: Gamma before and after.
        loss: Out of fold, the cross-entropy of ``softmax(slope * scores)`` at its best slope. With
            a fixed slope it would fall by making all scores larger.
        accuracy: Accuracy.
        accepted_errors: Share of all samples that are wrong and yet accepted, where a tenth is
            rejected: those of the lowest best scores. It is what rejection is for. An area under a
            curve would also count rates of rejection that nobody uses, and rises with every sample
            that is easily told to be wrong.
        kept: Whether neither accuracy nor accepted errors became worse.
        reason: Why it was kept or not, a sentence.
        scale: Factor of each feature, whose width it divides; None without ``"ard"``. Gamma is that
            of the features times these.
    """

    C: tuple[float, tuple[float, ...]]
    gamma: tuple[float, float]
    loss: tuple[float, float]
    accuracy: tuple[float, float]
    accepted_errors: tuple[float, float]
    kept: bool
    reason: str
    scale: tuple[float, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        given = {k: v for k, v in vars(self).items() if v is not None}
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in given.items()}
        return {**values, "C": [self.C[0], list(self.C[1])]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read what ``to_dict`` returned."""
        before, after = values["C"]
        pairs: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**{**pairs, "C": (before, tuple(after))})


class Point(NamedTuple):
    """Hyper-parameters: C by class, ``(c,)``, gamma, a scalar, and perhaps factors of features."""

    C: Tensor
    gamma: Tensor
    scale: Tensor | None = None  # (d,)

    @classmethod
    def first(cls, C: float, gamma: float, problem: "FoldedProblem", ard: bool) -> Self:
        """Make the point of a grid, in whose kernel all features have one width."""
        c, d = int(problem.labels.max()) + 1, problem.features.shape[1]
        like: Any = {"dtype": torch.float64, "device": problem.features.device}
        scale = torch.ones(d, **like) if ard else None
        return cls(torch.full((c,), C, **like), torch.full((), gamma, **like), scale)

    def moved(self, logarithms: Tensor) -> Self:
        """Multiply all values by exponentials of ``(c + 1,)`` or ``(c + 1 + d,)`` numbers."""
        C, gamma, scale = logarithms.exp().tensor_split((len(self.C), len(self.C) + 1))
        scaled = None if self.scale is None else self.scale * scale
        return type(self)(self.C * C, self.gamma * gamma.squeeze(0), scaled)


class FoldedProblem(NamedTuple):
    """Samples and their folds, for losses out of fold that are functions of C and gamma."""

    features: Tensor  # (n, d)
    labels: Tensor  # (n,)
    fold: Tensor  # (n,)
    class_weight: CheckedWeight
    weight: Tensor | None  # (n,)
    memory_limit: int | None

    def scores(
        self,
        C: Tensor,
        gamma: Tensor,
        scale: Tensor | None = None,
        initial: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Score the samples out of fold, with gradients; also return where to start from next."""
        return implicit_out_of_fold_scores(
            self.features if scale is None else self.features * scale,
            self.labels,
            self.fold,
            C=C,
            gamma=gamma,
            class_weight=self.class_weight,
            sample_weight=self.weight,
            initial=initial,
            memory_limit=self.memory_limit,
        )

    def part(self, kept: Tensor, seed: int) -> "FoldedProblem":
        """Select samples, bool ``(n,)``, some of each class, in folds of their own."""
        labels = self.labels[kept]
        folds = min(int(self.fold.max()) + 1, int(labels.bincount().min()))
        fold = stratified_folds(labels, folds, seed)
        weight = None if self.weight is None else self.weight[kept]
        options = self.class_weight, weight, self.memory_limit
        return FoldedProblem(self.features[kept], labels, fold, *options)

    @torch.no_grad()
    def fit_and_score(self, point: Point, inputs: Tensor) -> Tensor:
        """Score inputs by an SVM that is fitted on all samples, ``(m, c)``."""
        factors = 1.0 if point.scale is None else point.scale
        options: Any = {"sample_weight": self.weight, "memory_limit": self.memory_limit}
        svm = RBFSVM(point.C.tolist(), point.gamma.item(), class_weight=self.class_weight)
        return svm.fit(self.features * factors, self.labels, **options)(inputs * factors)

    def loss(self, scores: Tensor) -> Tensor:
        """Average the smooth loss, a scalar."""
        with torch.no_grad():  # at the best slope its own derivative is 0
            low, high = (scores.new_full((), math.log(slope)) for slope in SLOPES)
            truth = one_hot(self.labels, scores.shape[1])
            for _ in range(HALVINGS):
                middle = (low + high) / 2
                excess = (middle.exp() * scores).softmax(dim=1) - truth
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
    point: tuple[float, float],
    class_weight: CheckedWeight = None,
    sample_weight: Tensor | None = None,
    *,
    folds: int = 5,
    seed: int = 0,
    ard: bool = False,
    memory_limit: int | None = None,
) -> Refinement:
    """Lower a smooth out-of-fold loss by C of each class and gamma, and judge what comes of it.

    L-BFGS moves the logarithms of C and gamma along exact derivatives of the fits. It does so once
    for the result, and once without each of the folds to judge on: the samples that chose many
    widths cannot tell whether these are any good.

    Args:
        features: ``(n, d)``.
        labels: ``(n,)`` in 0..c-1, at least ``JUDGED`` of each class.
        point: C and gamma to start from.
        class_weight: As in ``RBFSVM``.
        sample_weight: Factor >= 0 of C per sample, and its share in all means, ``(n,)``.
        folds: Stratified folds of the loss.
        seed: Of all folds.
        ard: Whether each feature gets a width of its own: automatic relevance determination. The
            logarithms of the factors have a normal distribution around 0 of deviation ``SPREAD``
            as prior.
        memory_limit: Bytes for the rows of a kernel; default 4 GiB.

    Returns:
        What was found, with both points and their values.

    Source: Chapelle et al., "Choosing multiple parameters for support vector machines", Machine
    Learning 46 (2002), who follow the gradient of an estimate of the error; Bertrand et al.,
    "Implicit differentiation for fast hyperparameter selection in non-smooth convex learning",
    JMLR 23 (2022); the slope is the temperature of Guo et al., "On calibration of modern neural
    networks", ICML 2017; Cawley, Talbot, "On over-fitting in model selection", JMLR 11 (2010).
    """
    # Copies, since autograd keeps no tensor that was made in inference mode.
    wide, labels = features.detach().to(torch.float64, copy=True), labels.clone()
    weight = None if sample_weight is None else sample_weight.clone()
    seen, judged = stratified_folds(labels, folds, seed), stratified_folds(labels, JUDGED, seed + 1)
    problem = FoldedProblem(wide, labels, seen, class_weight, weight, memory_limit)
    first = Point.first(*point, problem, ard)
    best, losses = _descend(problem, first)
    scores = wide.new_zeros(2, len(labels), len(best.C))
    for k in range(JUDGED):
        part, held_out = problem.part(judged != k, seed), judged == k
        for of_point, there in zip(scores, (first, _descend(part, first)[0]), strict=True):
            of_point[held_out] = part.fit_and_score(there, wide[held_out])
    accuracy, errors = zip(*map(problem.judge, scores), strict=True)
    kept = accuracy[1] >= accuracy[0] and errors[1] <= errors[0] and losses[1] < losses[0]
    reason = _reason(losses, accuracy, errors)
    C, gamma = (point[0], tuple(best.C.tolist())), (point[1], best.gamma.item())
    scale = None if best.scale is None else tuple(best.scale.tolist())
    return Refinement(C, gamma, losses, accuracy, errors, kept, reason, scale)


def _descend(problem: FoldedProblem, first: Point) -> tuple[Point, tuple[float, float]]:
    """Follow the gradient from a point; return the best point, and the first and least loss."""
    reach = torch.tensor([REACH] * len(first.C) + [REACH], dtype=torch.float64)
    prior = 0.0
    if first.scale is not None:
        reach = torch.cat([reach, reach.new_full((len(first.scale),), SCALE_REACH)])
        prior = 1.0 / (2.0 * SPREAD**2 * len(problem.labels))
    steps = torch.zeros_like(reach, requires_grad=True)
    losses: list[float] = []
    best, start = first, None

    def closure() -> Tensor:
        nonlocal best, start
        optimizer.zero_grad()
        logarithms = (reach * (steps / reach).tanh()).to(problem.features.device)
        there = first.moved(logarithms)
        scores, start = problem.scores(*there, start)
        loss = problem.loss(scores) + prior * logarithms[len(first.C) + 1 :].square().sum()
        if not losses or loss.item() < min(losses):
            best = first.moved(logarithms.detach())
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
    return best, (losses[0], min(losses))


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
