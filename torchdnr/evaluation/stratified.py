"""Robustness where rejecting a small perturbation is an error too: the price of easy rejection."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchdnr.attacks.lowest_confidence import lowest_confidence
from torchdnr.decisions import REJECT, evaluation_mode
from torchdnr.evaluation.judging import (
    check_outputs,
    checked_task,
    increasing,
    judge,
    keep_inside,
    stacked,
)
from torchdnr.evaluation.metrics import Estimate, share, to_plain
from torchdnr.resources import progress_bar

ALPHAS = 0.0, 0.01, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.5, 1.0


@dataclass(frozen=True, eq=False)
class StratifiedCurve:
    """Robustness at one eps, over the share of it within which to reject is an error.

    Attributes:
        name: Name of the classifier.
        eps: Perturbation size of the attack that wants to evade.
        norm: Norm of the perturbations.
        alphas: Shares of eps, increasing.
        evaded: Whether each sample is accepted and wrong somewhere within eps, bool ``(n,)``.
        rejected: Whether it is rejected somewhere within alpha * eps, bool ``(len(alphas), n)``.
        confidence: Coverage of the intervals.
        settings: Options of the attacks, and what the caller added.
    """

    name: str | None
    eps: float
    norm: float
    alphas: list[float]
    evaded: Tensor
    rejected: Tensor
    confidence: float = 0.95
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def robustness(self) -> list[Estimate]:
        """Share of samples neither evaded nor rejected within alpha * eps, one per alpha."""
        return [share(~(self.evaded | row), confidence=self.confidence) for row in self.rejected]

    @property
    def rejection(self) -> list[Estimate]:
        """Share of samples rejected somewhere within alpha * eps, one per alpha."""
        return [share(row, confidence=self.confidence) for row in self.rejected]

    def to_dict(self) -> dict[str, Any]:
        """Convert to numbers, lists and dictionaries."""
        rates = {"robustness": self.robustness, "rejection": self.rejection}
        return to_plain({**vars(self), **rates})

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> StratifiedCurve:
        """Read what ``to_dict`` made, also by way of JSON; the rates are computed afresh."""
        values = {key: content[key] for key in cls.__dataclass_fields__}
        rows = {key: torch.tensor(values[key]) for key in ("evaded", "rejected")}
        return cls(**{**values, **rows, "norm": float(values["norm"])})


def stratified_curve(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    labels: Tensor,
    adversarial: Tensor,
    eps: float,
    *,
    norm: float = 2,
    alphas: Sequence[float] = ALPHAS,
    reject_attack: Callable[..., Tensor] | None = None,
    reject_options: Mapping[str, Any] | None = None,
    mask: Tensor | None = None,
    targets: int | Tensor | None = None,
    levels: int | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    batch_size: int | None = None,
    reject: bool | None = None,
    confidence: float = 0.95,
    name: str | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> StratifiedCurve:
    """Count per alpha the samples that are neither evaded nor rejected within ``alpha * eps``.

    An attack that wants to be rejected is run at every alpha, on the samples not rejected yet; what
    is rejected stays so within every larger ball, so the curve falls. It is an upper bound: a
    stronger attack may lower it.

    Args:
        model: Maps ``(n, ...)`` to scores ``(n, c)``, or ``(n, c + 1)`` with theta in the last
            column. A module is put into evaluation mode and back.
        inputs: Clean inputs within ``bounds``, ``(n, ...)``.
        labels: True labels 0..c-1, int64 ``(n,)``.
        adversarial: Points within ``eps`` that want to evade, ``(n, ...)`` or of k attacks
            ``(k, n, ...)``, for instance ``SecurityCurve.adversarial[index]``; the inputs
            themselves are counted too.
        eps: Radius of the ball, > 0.
        norm: Norm of the perturbation; 1, 2 or infinity.
        alphas: Shares of ``eps``, in [0, 1] and increasing.
        reject_attack: ``reject_attack(model, inputs, labels, radius) -> points``, each within
            ``radius``, given ``mask`` by name too if there is one; None: ``lowest_confidence``,
            from where it ended at the previous alpha.
        reject_options: Options of ``lowest_confidence``: steps, restarts, seed, ...
        mask: What of each input may change, as in ``security_evaluation``; None: everything.
        targets: Class wanted, as there: only what is accepted as it is evaded.
        levels: Levels of a pixel, as there: the points of the reject attack are rounded to them.
        bounds: Smallest and largest value of an input.
        batch_size: Inputs per batch; None: as many as suits their size.
        reject: Whether the last column of the output is theta; None: ask the model.
        confidence: Coverage of the intervals, in (0, 1).
        name: Name of the classifier.
        settings: What else to store with the result.
        progress: Whether to show a progress bar.

    Returns:
        ``StratifiedCurve``.

    Raises:
        ValueError: If an argument is not as described.

    Source: Chen et al., "Stratified adversarial robustness with rejection", ICML 2023.
    """
    task = checked_task(
        model,
        inputs,
        labels,
        norm=norm,
        bounds=bounds,
        batch_size=batch_size,
        reject=reject,
        mask=mask,
        targets=targets,
        levels=levels,
    )
    inputs, labels, reject = task.inputs, task.labels, task.reject
    alphas = increasing("alphas", alphas, "in [0, 1]", lambda value: 0 <= value <= 1)
    if not 0 < eps < float("inf"):
        raise ValueError(f"eps must be > 0 and finite, got {eps}")
    if reject_attack is not None and reject_options:
        raise ValueError("reject_options belong to the default attack: leave out one of the two")
    options = dict(reject_options or {})
    shared: dict[str, Any] = {"norm": norm, "bounds": bounds, "batch_size": task.batch_size}
    shared |= {"reject": reject, **options}
    with evaluation_mode(model):
        check_outputs(task)
        clean = judge(task, inputs).predictions
        evading, rejected = task.succeeds(clean), clean == REJECT
        for points in stacked(adversarial, inputs):
            points, _ = keep_inside(task, points.to(inputs), eps, "adversarial")
            evading = evading | task.succeeds(judge(task, points).predictions)
        lowest, within = inputs.clone(), []
        for alpha in progress_bar(progress, alphas, desc=name, unit="alpha"):
            radius, rows = alpha * eps, (~rejected).nonzero()[:, 0]
            if radius > 0 and reject and len(rows):
                part = task.part(rows)
                masked = {} if part.mask is None else {"mask": part.mask}
                if reject_attack is not None:
                    points = reject_attack(model, part.inputs, part.labels, radius, **masked)
                else:
                    shared |= {"start": lowest[rows], **masked}
                    points = lowest_confidence(model, part.inputs, radius, **shared)
                points, _ = keep_inside(part, points, radius, "reject attack")
                points = points if levels is None else part.inside(points, radius)
                lowest = lowest.index_copy(0, rows, points)
                rejects = judge(part, points).predictions == REJECT
                rejected = rejected.index_copy(0, rows, rejects)
            within.append(rejected)
    return StratifiedCurve(
        name=name,
        eps=float(eps),
        norm=float(norm),
        alphas=alphas,
        evaded=evading.cpu(),
        rejected=torch.stack(within).cpu(),
        confidence=confidence,
        settings={
            "reject_attack": "lowest confidence" if reject_attack is None else "given",
            **task.about,
            **options,
            **(settings or {}),
        },
    )
