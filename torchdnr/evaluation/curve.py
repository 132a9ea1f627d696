"""The result of a security evaluation: what was predicted at each eps, and every rate of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchdnr.evaluation.figures import plot_curves
from torchdnr.evaluation.metrics import DecisionRates, Estimate, decision_rates, median_of
from torchdnr.files import read_json, write_json

FORMAT = 1
PER_EPS = "seconds", "forwards", "backwards", "violations"


@dataclass(eq=False)
class Predictions:
    """Predictions at each eps, from which all rates follow.

    Attributes:
        eps: Perturbation sizes, increasing.
        labels: True labels, ``(n,)``.
        predictions: Labels or ``REJECT``, ``(len(eps), n)``.
        mean_norm: Mean norm of the perturbations, one per eps.
        targets: Classes that the attacks wanted, ``(n,)``; None: any but the true ones. With them
            an evasion is to be accepted as the target.
    """

    eps: list[float]
    labels: Tensor
    predictions: Tensor
    mean_norm: list[float]
    targets: Tensor | None = field(default=None, kw_only=True)

    def estimates(self, confidence: float = 0.95) -> list[DecisionRates]:
        """Measure every rate, with its confidence interval, at each eps."""
        return [
            decision_rates(row, self.labels, eps, targets=self.targets, confidence=confidence)
            for row, eps in zip(self.predictions, self.eps, strict=True)
        ]

    @property
    def accuracy(self) -> list[float]:
        """Accuracy under attack, one per eps."""
        return [rates.accuracy.value for rates in self.estimates()]

    @property
    def rejection_rate(self) -> list[float]:
        """Share of rejected samples, one per eps."""
        return [rates.rejection.value for rates in self.estimates()]

    @property
    def evasion_rate(self) -> list[float]:
        """Share of samples accepted and wrong, one per eps."""
        return [rates.evasion.value for rates in self.estimates()]

    @property
    def accuracy_interval(self) -> list[tuple[float, float]]:
        """95 % confidence interval of the accuracy, one per eps."""
        return [(rates.accuracy.low, rates.accuracy.high) for rates in self.estimates()]

    @property
    def rejection_interval(self) -> list[tuple[float, float]]:
        """95 % confidence interval of the rejection rate, one per eps."""
        return [(rates.rejection.low, rates.rejection.high) for rates in self.estimates()]

    @property
    def evasion_interval(self) -> list[tuple[float, float]]:
        """95 % confidence interval of the evasion rate, one per eps."""
        return [(rates.evasion.low, rates.evasion.high) for rates in self.estimates()]

    def rates(self) -> dict[str, list]:
        """Collect every rate for a reader of the JSON file; loading computes them afresh."""
        names = "accuracy", "accuracy_interval", "rejection_rate", "rejection_interval"
        return {name: getattr(self, name) for name in (*names, "evasion_rate", "evasion_interval")}


@dataclass(eq=False)
class AttackCurve(Predictions):
    """What one attack of the line-up reached alone.

    Attributes:
        minimum_norm: Whether one run served every eps; its cost is then booked at the first
            positive eps.
        seconds: Time in the attack, one per eps.
        forwards: Input rows sent through the model, one per eps.
        backwards: Input rows sent back through the model, one per eps.
        violations: Points that left the ball or the box and were projected back, one per eps.
        settings: Options of the attack.
    """

    minimum_norm: bool
    seconds: list[float]
    forwards: list[int]
    backwards: list[int]
    violations: list[int]
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class Refinement:
    """What one attack added below the norms that the others had found.

    Attributes:
        tried: Samples that it attacked just below the smallest norm that evades them so far, or,
            where that is larger, at the largest eps.
        nearer: Samples that it evaded there.
        seconds: Time in the attack.
        forwards: Input rows sent through the model.
        backwards: Input rows sent back through the model.
        violations: Points that left the ball or the box and were projected back.
        settings: Options of the attack.
    """

    tried: int
    nearer: int
    seconds: float
    forwards: int
    backwards: int
    violations: int
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class SecurityCurve(Predictions):
    """Security evaluation of one classifier: the worst case per sample over all attacks.

    The inherited ``predictions`` and rates are those of the worst case.

    Attributes:
        name: Name of the classifier.
        norm: Norm of the perturbations: 1, 2 or infinity.
        rejects: Whether the classifier has a rejection option.
        attacks: Each attack of the line-up that serves every eps, alone, by name.
        evasion_norm: Smallest norm at which each sample was evaded, at whatever eps;
            infinite where it never was; ``(n,)``.
        settings: Options of the evaluation, and what the caller added (seed, data set, ...).
        environment: Versions and hardware.
        seconds: Time in the attacks, including what a resumed run had spent before.
        adversarial: Worst-case points on the CPU, ``(len(eps), n, ...)``; never in the JSON.
        nearest: Nearest evading points on the CPU, ``(n, ...)``, at the norms ``evasion_norm``; the
            input where there is none; never in the JSON.
        refinements: What the other attacks of the line-up added, by name.
        rounded: What is predicted once these points are rounded to 8 bits, as in an image file.
    """

    name: str | None
    norm: float
    rejects: bool
    attacks: dict[str, AttackCurve]
    evasion_norm: Tensor
    settings: dict[str, Any]
    environment: dict[str, Any]
    seconds: float
    adversarial: Tensor | None = None
    nearest: Tensor | None = None
    rounded: Predictions | None = None
    refinements: dict[str, Refinement] = field(default_factory=dict)

    @property
    def median_evasion_norm(self) -> float:
        """Median over the samples of ``evasion_norm``; infinite if half were never evaded."""
        return median_of(self.evasion_norm).value

    def to_dict(self) -> dict[str, Any]:
        """Convert to numbers, lists and dictionaries: everything but the points."""
        shared = "eps", "labels", "targets"
        attacks = {name: _plain(curve, *shared) for name, curve in self.attacks.items()}
        rounded = None if self.rounded is None else _plain(self.rounded, *shared)
        refinements = {name: asdict(refinement) for name, refinement in self.refinements.items()}
        content = _plain(self, "adversarial", "nearest")
        content |= {"attacks": attacks, "rounded": rounded, "refinements": refinements}
        return {"format": FORMAT, **content, "median_evasion_norm": self.median_evasion_norm}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> SecurityCurve:
        """Rebuild a curve from ``to_dict``; the rates are computed afresh.

        Raises:
            ValueError: If ``content`` is not a curve, or of another format.
        """
        if not isinstance(content, Mapping) or content.get("format") != FORMAT:
            raise ValueError(f"not a security curve of format {FORMAT}: evaluate the model again")
        try:
            shared = {key: content.get(key) for key in ("eps", "labels", "targets")}
            rounded = content.get("rounded")
            if rounded is not None:
                rounded = Predictions(**_fields(Predictions, {**rounded, **shared}))
            attacks = {
                name: AttackCurve(**_fields(AttackCurve, {**attack, **shared}))
                for name, attack in content["attacks"].items()
            }
            refinements = content.get("refinements", {}).items()  # none in an older file
            whole = {**content, "attacks": attacks, "rounded": rounded}
            whole["refinements"] = {name: Refinement(**one) for name, one in refinements}
            whole |= {"adversarial": None, "nearest": None, "norm": float(content["norm"])}
            return cls(**_fields(cls, whole))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a security curve, {error!r}: evaluate the model again") from None

    def save(self, path: str | Path) -> None:
        """Write the curve to a JSON file, atomically and without the adversarial points."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> SecurityCurve:
        """Read a curve written by ``save``; ``adversarial`` and ``nearest`` are None."""
        return cls.from_dict(read_json(path))

    def plot(self, path: str | Path) -> None:
        """Draw the curve to an image file; see ``figures.plot_curves``."""
        plot_curves({self.name or "classifier": self}, path)


def _plain(curve: Predictions, *left_out: str) -> dict[str, Any]:
    """Collect every rate, and the fields except some, the longest last."""
    kept = [(key, value) for key, value in vars(curve).items() if key not in left_out]
    short = {key: value for key, value in kept if not isinstance(value, Tensor)}
    long = {key: value.tolist() for key, value in kept if isinstance(value, Tensor)}
    return {**curve.rates(), **short, **long}


def _fields(kind: type[Predictions], content: Mapping[str, Any]) -> dict[str, Any]:
    """Read the fields of a curve from what ``_plain`` made, also by way of JSON."""
    absent = {"targets": None}  # of an older file
    values = {key: {**absent, **content}[key] for key in kind.__dataclass_fields__}
    tensors = [key for key in ("labels", "predictions", "targets") if values[key] is not None]
    values |= {key: torch.tensor(values[key]) for key in tensors}
    if "evasion_norm" in values:
        norms = [float(norm) for norm in values["evasion_norm"]]  # infinity may have become text
        values["evasion_norm"] = torch.tensor(norms, dtype=torch.float64)
    return values


def median_evasion_norm(curve: SecurityCurve, *, confidence: float = 0.95) -> Estimate:
    """Measure the median norm at which samples are evaded, with its interval.

    Args:
        curve: Security evaluation; a sample that was never evaded counts as infinite.
        confidence: Coverage of the interval, in (0, 1).

    Returns:
        ``Estimate``; its value is ``curve.median_evasion_norm``, and infinite ends are possible.
    """
    if len(curve.evasion_norm) == 0:
        return Estimate(math.nan, 0.0, math.inf, 0)
    return median_of(curve.evasion_norm, confidence=confidence)


def most_telling_eps(curve: SecurityCurve) -> float | None:
    """Return the positive eps at which accuracy is nearest to one half; None if there is none.

    There most is at stake. Among equals it is the largest.
    """
    positive = [pair for pair in zip(curve.eps, curve.accuracy, strict=True) if pair[0] > 0]
    if not positive:
        return None
    # Rounded: 0.3 and 0.7 are equally near.
    return min(positive, key=lambda pair: (round(abs(pair[1] - 0.5), 9), -pair[0]))[0]
