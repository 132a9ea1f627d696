"""Measured values with confidence intervals: shares, shares of a part, medians, sums of errors."""

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from torchdnr.evaluation.metrics import wilson_interval


@dataclass(frozen=True)
class Estimate:
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

    def to_dict(self) -> dict[str, float | int]:
        """Convert to a dictionary of numbers."""
        return asdict(self)


def share(which: Tensor, among: Tensor | None = None, *, confidence: float = 0.95) -> Estimate:
    """Measure the share of samples for which something holds, among all or among some of them.

    The interval is Wilson's. Among some of the samples it is conditional: it tells what holds for
    further samples of that part, and ``n`` is the size of the part.

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


def median_of(values: Tensor, *, confidence: float = 0.95, smallest: float = 0.0) -> Estimate:
    """Measure the median, with the interval that two of the ordered values span.

    Nothing is assumed of the distribution, and the coverage is at least ``confidence``. Values may
    be infinite, such as the norm of an evasion that was never found.

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
    ordered = _ordered(values)
    n = len(ordered)
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

    Args:
        n: Number of samples, >= 1.
        q: Which quantile, in (0, 1).
        confidence: Least coverage, in (0, 1).

    Returns:
        Ranks from 1 to n; 0 or n + 1 where n is too small for a lower or an upper end.

    Raises:
        ValueError: If an argument is out of range.

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

    Args:
        value: The value.
        first: Interval that has the first error only.
        second: Interval that has the second error only.

    Returns:
        Interval with both: the distances of its ends from the value add in squares.

    Source: Zou and Donner, "Construction of confidence limits about effect measures", Statistics
    in Medicine 27 (2008).
    """
    low = math.hypot(value - first[0], value - second[0])
    high = math.hypot(first[1] - value, second[1] - value)
    return value - low, value + high


def _ordered(values: Tensor) -> Tensor:
    if values.ndim != 1 or len(values) == 0 or values.isnan().any():
        raise ValueError(
            f"values must be (n,) with n >= 1 and no NaN, got {tuple(values.shape)} "
            f"with {int(values.isnan().sum())} NaN"
        )
    return values.double().sort().values
