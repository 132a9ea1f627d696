"""Accuracy under attack over the rejection threshold: what security costs on clean inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from torchdnr.attacks.view import ModelView
from torchdnr.decisions import evaluation_mode, has_reject_column, split_scores
from torchdnr.evaluation.judging import (
    Task,
    check_outputs,
    checked_points,
    checked_task,
    keep_inside,
    outputs,
    stacked,
    wanted_classes,
    worst_predictions,
)
from torchdnr.evaluation.metrics import DecisionRates, Estimate, Plain, decision_rates
from torchdnr.rejection import rejection_threshold
from torchdnr.resources import progress_bar


class WithThreshold(ModelView):
    """A view of a classifier with another rejection threshold; the classifier is not changed.

    Args:
        model: Maps ``(n, ...)`` to scores ``(n, c)``, or ``(n, c + 1)`` with theta last.
        threshold: theta of the view, finite.
        reject: Whether the last column of ``model`` is theta; None: ask the model.
    """

    def __init__(
        self, model: Callable[[Tensor], Tensor], threshold: float, reject: bool | None = None
    ) -> None:
        rejects = has_reject_column(model, reject)

        def replace_threshold(_: Tensor, output: Tensor) -> Tensor:
            scores = split_scores(output, rejects)[0]
            return torch.cat([scores, scores.new_full((len(scores), 1), threshold)], dim=1)

        super().__init__(model, replace_threshold, reject=True)
        self.threshold = float(threshold)


Rates = list[list[Estimate]]
AttackAtEps = Callable[..., Tensor]


@dataclass(frozen=True, eq=False)
class ThresholdSweep(Plain):
    """Rates of one classifier over the threshold, for attacks of one or more sizes.

    Attributes:
        name: Name of the classifier.
        norm: Norm of the perturbations.
        eps: Perturbation sizes, > 0, increasing: the rows of the rates below.
        thresholds: theta, increasing: the columns.
        clean_accuracy: Accuracy on clean inputs, a reject being an error, one per theta.
        false_rejection_rate: Share of clean inputs rejected, one per theta.
        accuracy: Accuracy under attack on the given points, one row per eps.
        rejection_rate: Share of them rejected.
        reattacked_accuracy: The same in the worst case over the given points and those of an attack
            on the classifier with that theta; None if there was no such attack.
        reattacked_rejection_rate: Share of these worst-case points rejected; or None.
        settings: What the caller added.
    """

    name: str | None
    norm: float
    eps: list[float]
    thresholds: list[float]
    clean_accuracy: list[Estimate]
    false_rejection_rate: list[Estimate]
    accuracy: Rates
    rejection_rate: Rates
    reattacked_accuracy: Rates | None = None
    reattacked_rejection_rate: Rates | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> ThresholdSweep:
        """Read what ``to_dict`` made, also by way of JSON."""
        rates = {key: _estimates(value) for key, value in content.items() if key != "settings"}
        return cls(**{**content, **rates, "norm": float(content["norm"])})


def thresholds_at_rates(scores: Tensor, rates: Sequence[float]) -> list[float]:
    """Find the thresholds that reject given shares of clean calibration inputs.

    Args:
        scores: Class scores of inputs that nothing else is measured on, ``(n, c)``.
        rates: Shares to reject, in [0, 1).

    Returns:
        Thresholds, increasing and without repetition.

    Raises:
        ValueError: If the scores are not finite, or a rate is out of range.
    """
    return sorted({rejection_threshold(scores, rate).item() for rate in rates})


def threshold_sweep(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    labels: Tensor,
    adversarial: Mapping[float, Tensor],
    thresholds: Sequence[float],
    *,
    attack: AttackAtEps | None = None,
    norm: float = 2,
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
) -> ThresholdSweep:
    """Vary the threshold: on given adversarial points, and if wanted attacked again at each.

    Points made against one threshold are weak against another: one that was rejected need not be
    the best that an attacker can do about a lower theta. The paper does not say which of the two
    its figure shows. Points of a smaller eps count at every larger one, as do the clean inputs;
    points of an attack at one threshold count at every lower one too, which accepts them as well.

    Args:
        model: Maps ``(n, ...)`` to scores ``(n, c)``, or ``(n, c + 1)`` with theta in the last
            column, which is not used. A module is put into evaluation mode and back.
        inputs: Clean inputs within ``bounds``, ``(n, ...)``.
        labels: True labels 0..c-1, int64 ``(n,)``.
        adversarial: Points by eps > 0, ``(n, ...)`` or of k attacks ``(k, n, ...)``, each within
            eps.
        thresholds: Values of theta, finite; see ``thresholds_at_rates``.
        attack: ``attack(model, inputs, labels, eps) -> points`` on a model that has the threshold
            in question, for the samples not evaded yet, given ``mask``, ``targets`` and ``levels``
            by name where there are such; None: only the given points.
        norm: Norm of the perturbation; 1, 2 or infinity.
        mask: What of each input may change, as in ``security_evaluation``; None: everything.
        targets: Class wanted, as there: only what is accepted as it is evaded.
        levels: Levels of a pixel, as there.
        bounds: Smallest and largest value of an input.
        batch_size: Inputs per batch; None: as many as suits their size.
        reject: Whether the last column of the output is theta; None: ask the model.
        confidence: Coverage of the intervals, in (0, 1).
        name: Name of the classifier.
        settings: What else to store with the result.
        progress: Whether to show a progress bar.

    Returns:
        ``ThresholdSweep``.

    Raises:
        ValueError: If an argument is not as described.

    Source: Sotgiu et al., Fig. 4.
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
    inputs, labels = task.inputs, task.labels
    wanted = None if task.targets is None else wanted_classes(labels, task.targets)
    eps, thetas = _checked_grid(adversarial, thresholds)

    def rates_at(pool: Tensor, theta: float, value: float) -> DecisionRates:
        predictions = worst_predictions(pool, labels, task.reject, theta, wanted)
        return decision_rates(predictions, labels, value, targets=wanted, confidence=confidence)

    with evaluation_mode(model):
        check_outputs(task)
        clean = outputs(model, inputs, task.batch_size)[None]
        at_clean = [rates_at(clean, theta, 0.0) for theta in thetas]
        pools, pool = [], clean
        for value in eps:
            for points in stacked(adversarial[value], inputs):
                points, _ = keep_inside(task, points.to(inputs), value, "adversarial")
                pool = torch.cat([pool, outputs(model, points, task.batch_size)[None]])
            pools.append(pool)
        fixed = [
            [rates_at(pool, theta, value) for theta in thetas]
            for pool, value in zip(pools, eps, strict=True)
        ]
        again: list[list[DecisionRates]] | None = None
        if attack is not None:
            with progress_bar(progress, total=len(thetas) * len(eps), desc=name) as bar:
                again = _attack_again(task, attack, pools, eps, thetas, rates_at, bar)
    return ThresholdSweep(
        name=name,
        norm=float(norm),
        eps=eps,
        thresholds=thetas,
        clean_accuracy=[rates.accuracy for rates in at_clean],
        false_rejection_rate=[rates.rejection for rates in at_clean],
        accuracy=_column(fixed, "accuracy"),
        rejection_rate=_column(fixed, "rejection"),
        reattacked_accuracy=None if again is None else _column(again, "accuracy"),
        reattacked_rejection_rate=None if again is None else _column(again, "rejection"),
        settings={
            "samples": len(inputs),
            "confidence": confidence,
            **task.about,
            **(settings or {}),
        },
    )


def _attack_again(
    task: Task,
    attack: AttackAtEps,
    pools: list[Tensor],
    eps: Sequence[float],
    thetas: Sequence[float],
    rates_at: Callable[[Tensor, float, float], DecisionRates],
    bar: tqdm,
) -> list[list[DecisionRates]]:
    """Attack at every theta, the highest first, and at every eps, the smallest first.

    Only samples are attacked that no point of the pool evades; the outputs at the new points join
    the pools of this and all larger eps.
    """
    again: list[list[DecisionRates]] = [[] for _ in eps]
    for theta in reversed(thetas):
        view = WithThreshold(task.model, theta, task.reject)
        for row, value in enumerate(eps):
            given = task.labels, task.reject, theta, task.targets
            predictions = worst_predictions(pools[row], *given)
            rows = (~task.succeeds(predictions)).nonzero()[:, 0]
            if len(rows):
                part = task.part(rows)
                points = attack(view, part.inputs, part.labels, value, **task.given(rows))
                points = checked_points(points, part.inputs, "attack")
                points, _ = keep_inside(part, points, value, "attack")
                output = outputs(task.model, points, task.batch_size)
                new = pools[row][:1].index_copy(1, rows, output[None])
                pools[row:] = [torch.cat([pool, new]) for pool in pools[row:]]
            again[row].insert(0, rates_at(pools[row], theta, value))
            bar.update()
    return again


def _checked_grid(
    adversarial: Mapping[float, Tensor], thresholds: Sequence[float]
) -> tuple[list[float], list[float]]:
    eps = sorted(adversarial)
    if not eps or not all(0 < value < float("inf") for value in eps):
        raise ValueError(f"adversarial must have points for eps > 0 and finite, got eps {eps}")
    thetas = sorted({float(value) for value in thresholds})
    if not thetas or not all(abs(value) < float("inf") for value in thetas):
        raise ValueError(f"thresholds must be finite and at least one, got {thetas}")
    return eps, thetas


def _column(rows: list[list[DecisionRates]], rate: str) -> Rates:
    return [[getattr(rates, rate) for rates in row] for row in rows]


def _estimates(value: Any) -> Any:  # noqa: ANN401 - whatever to_dict made
    """Turn the dictionaries within lists back into estimates; NaN may have become text."""
    if isinstance(value, dict):
        low, middle, high = (float(value[key]) for key in ("low", "value", "high"))
        return Estimate(middle, low, high, value["n"])
    return [_estimates(item) for item in value] if isinstance(value, list) else value
