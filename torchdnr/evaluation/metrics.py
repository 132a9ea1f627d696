"""Rates of a classifier that may reject, each defined once, with their confidence intervals."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchdnr.decisions import REJECT, is_evasion, is_success
from torchdnr.resources import in_float64


class Plain:
    """Results that can be written as JSON."""

    def to_dict(self) -> dict[str, Any]:
        """Convert to numbers, lists and dictionaries."""
        return to_plain(self)


@dataclass(frozen=True)
class Estimate(Plain):
    """A value measured on samples, with its confidence interval.

    Attributes:
        value: What was measured; NaN if there was no sample to measure it on.
        low: Lower end of the interval.
        high: Upper end of the interval.
        n: Samples it rests on; for a share of a part, the size of that part.
    """

    value: float
    low: float
    high: float
    n: int


def to_plain(value: Any) -> Any:  # noqa: ANN401 - results of any kind, as JSON would hold them
    """Convert results to numbers, lists and dictionaries; a number that is a key becomes text."""
    if isinstance(value, Tensor):
        return value.tolist()
    if is_dataclass(value):
        value = vars(value)
    elif hasattr(value, "_asdict"):  # a named tuple
        value = value._asdict()
    if isinstance(value, Mapping):
        return {
            key if isinstance(key, str) else f"{key:g}": to_plain(item)
            for key, item in value.items()
        }
    return [to_plain(item) for item in value] if isinstance(value, list | tuple) else value


def share(which: Tensor, among: Tensor | None = None, *, confidence: float = 0.95) -> Estimate:
    """Measure the share of samples for which something holds, among all or among some of them.

    The interval is Wilson's. Among some of the samples it is conditional: it holds for further
    samples of that part, and ``n`` is the size of the part.

    Args:
        which: For which samples it holds, bool ``(n,)``.
        among: Which samples are counted, bool ``(n,)``; None: all.
        confidence: Coverage of the interval, in (0, 1).

    Returns:
        ``Estimate``. If no sample is counted the value is NaN and the interval [0, 1].

    Raises:
        ValueError: If the shapes differ, or there is no sample at all.
    """
    if which.ndim != 1 or len(which) == 0 or which.dtype != torch.bool:
        raise ValueError(
            f"which must be bool (n,) with n >= 1, got {which.dtype} {tuple(which.shape)}"
        )
    if among is None:
        among = torch.ones_like(which)
    if among.shape != which.shape or among.dtype != torch.bool:
        raise ValueError(
            f"among must be bool like which, {tuple(which.shape)}, "
            f"got {among.dtype} {tuple(among.shape)}"
        )
    n, hits = int(among.sum()), int((which & among).sum())
    if n == 0:
        return Estimate(math.nan, 0.0, 1.0, 0)
    return Estimate(hits / n, *wilson_interval(hits / n, n, confidence), n)


class DecisionRates(NamedTuple):
    """Rates of the decisions on the same samples.

    Attributes:
        accuracy: Accuracy under attack, in which a reject counts as correct iff eps > 0.
        rejection: Share rejected.
        evasion: Share accepted and wrong.
        error_if_accepted: Share of the accepted that is wrong.
        rejection_if_not_right: Share of those not given their true class that is rejected.
    """

    accuracy: Estimate
    rejection: Estimate
    evasion: Estimate
    error_if_accepted: Estimate
    rejection_if_not_right: Estimate


def decision_rates(
    predictions: Tensor,
    labels: Tensor,
    eps: float,
    *,
    targets: Tensor | None = None,
    confidence: float = 0.95,
) -> DecisionRates:
    """Measure every rate of decisions on inputs perturbed within ``eps``.

    Accuracy: without a perturbation (``eps = 0``) to reject is an error. Under attack (``eps > 0``)
    every input is an adversarial example, and to reject it is as correct as to give its true class.

    Args:
        predictions: Labels or ``REJECT``, ``(n,)``.
        labels: True labels, ``(n,)``.
        eps: Perturbation size, >= 0.
        targets: Classes that attacks wanted, ``(n,)``: an evasion is to be accepted as them.
        confidence: Coverage of the intervals, in (0, 1).

    Returns:
        ``DecisionRates``.

    Raises:
        ValueError: If the shapes differ, there is no sample, or ``eps`` is negative.

    Source: Sotgiu et al., Sec. IV-A, "Security Evaluation", for the first two.
    """
    if not eps >= 0:
        raise ValueError(f"eps must be >= 0, got {eps}")
    if predictions.ndim != 1 or predictions.shape != labels.shape or len(predictions) == 0:
        raise ValueError(
            "predictions and labels must both be (n,) with n >= 1, "
            f"got {tuple(predictions.shape)} and {tuple(labels.shape)}"
        )
    right, rejected = predictions == labels, predictions == REJECT
    evading = is_evasion(predictions, labels)
    return DecisionRates(
        accuracy=share(right | rejected if eps > 0 else right, confidence=confidence),
        rejection=share(rejected, confidence=confidence),
        evasion=share(is_success(predictions, labels, targets), confidence=confidence),
        error_if_accepted=share(evading, ~rejected, confidence=confidence),
        rejection_if_not_right=share(rejected, ~right, confidence=confidence),
    )


def accuracy_under_attack(predictions: Tensor, labels: Tensor, eps: float) -> float:
    """Compute the share of correct decisions; see ``decision_rates`` for arguments and errors."""
    return decision_rates(predictions, labels, eps).accuracy.value


def rejection_rate(predictions: Tensor) -> float:
    """Compute the share of rejected inputs among ``predictions``, ``(n,)``."""
    return decision_rates(predictions, predictions, 0.0).rejection.value


def evasion_rate(predictions: Tensor, labels: Tensor) -> float:
    """Compute the share accepted and wrong: for ``eps > 0``, one minus the accuracy."""
    return decision_rates(predictions, labels, 0.0).evasion.value


def wilson_interval(rate: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Compute the Wilson score interval of a rate measured on ``n`` independent samples.

    Args:
        rate: Measured share, in [0, 1].
        n: Number of samples, >= 1.
        confidence: Coverage, in (0, 1).

    Returns:
        Lower and upper end, in [0, 1]; ``rate`` lies between them, also when it is 0 or 1.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference",
    JASA 22 (1927).
    """
    if not 0 <= rate <= 1 or n < 1 or not 0 < confidence < 1:
        raise ValueError(
            "expected rate in [0, 1], n >= 1 and confidence in (0, 1), "
            f"got {rate}, {n} and {confidence}"
        )
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    centre = rate + z * z / (2 * n)
    half = z * (rate * (1 - rate) / n + z * z / (4 * n * n)) ** 0.5
    low, high = (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
    return max(0.0, min(low, rate)), min(1.0, max(high, rate))


def median_of(values: Tensor, *, confidence: float = 0.95, smallest: float = 0.0) -> Estimate:
    """Measure the median, with the interval that two of the ordered values span.

    Nothing is assumed of the distribution, and the coverage is at least ``confidence``. Values may
    be infinite, such as the evasion norm of a sample that no attack evaded.

    Args:
        values: One value per sample, ``(n,)``.
        confidence: Coverage of the interval, in (0, 1).
        smallest: Bound known beforehand, where the interval begins if n is too small for a lower
            end; without an upper end it is infinite.

    Returns:
        ``Estimate``; for an even n the value is the mean of the middle two.

    Raises:
        ValueError: If there is no value, or a NaN.

    Source: the sign test; David and Nagaraja, "Order statistics", 3rd ed., Sec. 7.1.
    """
    if values.ndim != 1 or len(values) == 0 or values.isnan().any():
        raise ValueError(
            f"values must be (n,) with n >= 1 and no NaN, got {tuple(values.shape)} "
            f"with {int(values.isnan().sum())} NaN"
        )
    ordered, n = in_float64(values).sort().values, len(values)
    middle = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    low, high = quantile_ranks(n, 0.5, confidence)
    return Estimate(
        middle.item(),
        ordered[low - 1].item() if low > 0 else min(smallest, ordered[0].item()),
        ordered[high - 1].item() if high <= n else math.inf,
        n,
    )


def quantile_ranks(n: int, q: float, confidence: float = 0.95) -> tuple[int, int]:
    """Find which two of n ordered samples enclose the q-quantile of their distribution.

    Ranks run from 1 to n; 0 or n + 1 where n is too small for a lower or an upper end. The
    coverage is at least ``confidence``.

    Source: David and Nagaraja, "Order statistics", 3rd ed., Sec. 7.1: the number of samples below
    the quantile is binomial.
    """
    if n < 1 or not 0 < q < 1 or not 0 < confidence < 1:
        raise ValueError(
            f"expected n >= 1 and q and confidence in (0, 1), got {n}, {q} and {confidence}"
        )
    count = torch.arange(n + 1, dtype=torch.float64)
    log_ways = math.lgamma(n + 1) - torch.lgamma(count + 1) - torch.lgamma(n - count + 1)
    mass = (log_ways + count * math.log(q) + (n - count) * math.log1p(-q)).exp()
    tail = (1 - confidence) / 2
    low = int((mass.cumsum(0) <= tail).sum())  # P(at most low - 1 below) <= tail
    above = int((mass.flip(0).cumsum(0) <= tail).sum())  # P(at least n + 1 - above below) <= tail
    return low, n + 1 - above


def square_and_add(
    value: float, first: tuple[float, float], second: tuple[float, float]
) -> tuple[float, float]:
    """Combine the intervals of one value from two independent sources of error.

    The distances of the ends from the value add in squares.

    Source: Zou and Donner, "Construction of confidence limits about effect measures", Statistics
    in Medicine 27 (2008).
    """
    low = math.hypot(value - first[0], value - second[0])
    high = math.hypot(first[1] - value, second[1] - value)
    return value - low, value + high
