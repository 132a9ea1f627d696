"""ROC of two groups of scores: curve, area with DeLong's interval, two areas, FPR at a given TPR.

Higher scores mean positive, and a score equal to a threshold is called positive, as in scikit-learn
and in pytorch-ood ("higher = more outlying").
"""

import math
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from torchdnr.evaluation.metrics import Estimate, quantile_ranks, square_and_add, wilson_interval
from torchdnr.resources import in_float64


class ROC(NamedTuple):
    """Operating points in the order of falling thresholds, the first at infinity.

    Attributes:
        false_positive_rate: Share of negatives with a score >= threshold, float64 ``(t,)``.
        true_positive_rate: Share of positives with a score >= threshold, float64 ``(t,)``.
        thresholds: Infinity, then every score that occurs, once, ``(t,)``.
    """

    false_positive_rate: Tensor
    true_positive_rate: Tensor
    thresholds: Tensor


def roc_curve(negatives: Tensor, positives: Tensor) -> ROC:
    """Compute the ROC curve; equal scores are one step of it.

    Args:
        negatives: Scores of negatives, ``(m,)``.
        positives: Scores of positives, ``(n,)``; higher means more positive.

    Returns:
        ``ROC``; the area by the trapezoidal rule is ``auroc``.

    Raises:
        ValueError: If a group is empty, or a score is NaN.
    """
    _check(negatives, positives)
    values = torch.cat([negatives, positives]).unique().flip(0)

    def rates(group: Tensor) -> Tensor:
        at_least = len(group) - torch.searchsorted(group.sort().values, values)
        return in_float64(torch.cat([at_least.new_zeros(1), at_least])) / len(group)

    thresholds = torch.cat([values.new_full((1,), torch.inf), values])
    return ROC(rates(negatives), rates(positives), thresholds)


def auroc(negatives: Tensor, positives: Tensor, *, confidence: float = 0.95) -> Estimate:
    """Compute the area under the ROC curve: P(positive above negative), ties counting a half.

    The interval is DeLong's, on the scale of the logit, so that it stays in [0, 1]. Two cases have
    no variance. Groups that do not overlap: with k samples in the smaller group, k independent
    pairs are all in order with probability AUROC^k, which gives an exact bound. Scores that are all
    equal: Wilson's interval for k samples. A group of one sample tells nothing: [0, 1].

    Args:
        negatives: Scores of negatives, ``(m,)``.
        positives: Scores of positives, ``(n,)``; higher means more positive.
        confidence: Coverage of the interval, in (0, 1).

    Returns:
        ``Estimate`` on m + n samples.

    Raises:
        ValueError: If a group is empty, or a score is NaN.

    Source: DeLong et al., "Comparing the areas under two or more correlated receiver operating
    characteristic curves", Biometrics 44 (1988).
    """
    _check(negatives, positives)
    below, above = _placements(negatives, positives)
    area = below.mean().item()
    smaller, total = min(len(below), len(above)), len(below) + len(above)
    if smaller == 1:
        return Estimate(area, 0.0, 1.0, total)
    variance = _variance(below, above)
    if not 0 < area < 1:
        reach = ((1 - confidence) / 2) ** (1 / smaller)
        low, high = (reach, 1.0) if area == 1 else (0.0, 1 - reach)
        return Estimate(area, low, high, total)
    if variance < 1e-15:  # all placements are equal but for rounding
        return Estimate(area, *wilson_interval(area, smaller, confidence), total)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    logit = math.log(area) - math.log1p(-area)
    half = z * math.sqrt(variance) / (area * (1 - area))
    low, high = torch.tensor([logit - half, logit + half], dtype=torch.float64).sigmoid().tolist()
    return Estimate(area, low, high, total)


def auroc_difference(
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], *, confidence: float = 0.95
) -> Estimate:
    """Compute by how much the area of one score exceeds that of another on the same samples.

    DeLong's interval, which knows that both scores are of the same samples. Where a score separates
    the groups fully, or the areas differ by nothing that varies, it has no variance to go by: the
    intervals of the two areas are then combined as if they were independent.

    Args:
        first: Scores of negatives ``(m,)`` and of positives ``(n,)``.
        second: Another score of the same samples in the same order.
        confidence: Coverage of the interval, in (0, 1).

    Returns:
        ``Estimate`` on m + n samples, in [-1, 1]; > 0 if the first score is better.

    Raises:
        ValueError: If the sizes differ, a group is empty, or a score is NaN.

    Source: DeLong et al., Biometrics 44 (1988); Zou and Donner, Statistics in Medicine 27 (2008).
    """
    _check(*first)
    _check(*second)
    sizes = [tuple(map(len, groups)) for groups in (first, second)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"second must be of the samples of first, {sizes[0][0]} negatives and {sizes[0][1]} "
            f"positives, got {sizes[1][0]} and {sizes[1][1]}"
        )
    placed = [_placements(*groups) for groups in (first, second)]
    areas = [below.mean().item() for below, _ in placed]
    value, total = areas[0] - areas[1], sum(sizes[0])
    if min(sizes[0]) == 1:
        return Estimate(value, -1.0, 1.0, total)
    variance = _variance(*(one - two for one, two in zip(*placed, strict=True)))
    if variance < 1e-15 or not all(0 < area < 1 for area in areas):
        one, two = (auroc(*groups, confidence=confidence) for groups in (first, second))
        low, high = square_and_add(
            value,
            (one.low - two.value, one.high - two.value),
            (one.value - two.high, one.value - two.low),
        )
    else:
        half = NormalDist().inv_cdf(0.5 + confidence / 2) * math.sqrt(variance)
        low, high = value - half, value + half
    return Estimate(value, max(-1.0, low), min(1.0, high), total)


def fpr_at_tpr(
    negatives: Tensor, positives: Tensor, tpr: float = 0.95, *, confidence: float = 0.95
) -> Estimate:
    """Compute the share of negatives called positive where at least a given share of positives is.

    No interpolation: the threshold is the highest that reaches ``tpr``, a score that occurs. The
    interval adds, in squares, Wilson's at that threshold and the range of the FPR over the interval
    of the threshold, which is itself an estimate from a sample of positives.

    Which group is positive differs between authors. Outlier detection (pytorch-ood): adversarial
    inputs are, with the rejection score. CCAT: accepted clean inputs are; call with
    ``fpr_at_tpr(-adversarial, -clean, tpr)``.

    Args:
        negatives: Scores of negatives, ``(m,)``.
        positives: Scores of positives, ``(n,)``; higher means more positive.
        tpr: Share of positives to be called positive, in (0, 1].
        confidence: Coverage of the interval, in (0, 1).

    Returns:
        ``Estimate`` on m samples.

    Raises:
        ValueError: If a group is empty, a score is NaN, or ``tpr`` is out of range.
    """
    _check(negatives, positives)
    if not 0 < tpr <= 1:
        raise ValueError(f"tpr must be in (0, 1], got {tpr}")
    falling = positives.sort(descending=True).values
    ordered, n = negatives.sort().values, len(negatives)

    def rate_at(rank: int) -> float:
        if rank < 1:
            return 0.0
        if rank > len(falling):
            return 1.0
        return 1 - torch.searchsorted(ordered, falling[rank - 1]).item() / n

    value = rate_at(needed_rank(len(falling), tpr))
    last = len(falling)  # at a TPR of 1 nothing tells how low the scores of further positives are
    ranks = quantile_ranks(last, tpr, confidence) if tpr < 1 else (last, last + 1)
    of_threshold = min(value, rate_at(ranks[0])), max(value, rate_at(ranks[1]))
    low, high = square_and_add(value, wilson_interval(value, n, confidence), of_threshold)
    return Estimate(value, max(0.0, low), min(1.0, high), n)


def needed_rank(n: int, share: float) -> int:
    """Return the smallest number of n samples that is at least a share of them, >= 1."""
    return max(1, math.ceil(share * n - 1e-9))  # 0.95 * 20 is 19.000...


def _placements(negatives: Tensor, positives: Tensor) -> tuple[Tensor, Tensor]:
    """Return the share of negatives below each positive, and of positives above each negative."""
    return _share_below(positives, negatives), 1 - _share_below(negatives, positives)


def _variance(below: Tensor, above: Tensor) -> float:
    return (below.var() / len(below) + above.var() / len(above)).item()


def _share_below(points: Tensor, group: Tensor) -> Tensor:
    """Return for each point the share of a group below it, ties counting a half, float64."""
    ordered = group.sort().values
    less = torch.searchsorted(ordered, points)
    not_greater = torch.searchsorted(ordered, points, right=True)
    return in_float64(less + not_greater) / (2 * len(group))


def _check(negatives: Tensor, positives: Tensor) -> None:
    for name, scores in (("negatives", negatives), ("positives", positives)):
        if scores.ndim != 1 or len(scores) == 0:
            raise ValueError(f"{name} must be (n,) with n >= 1, got {tuple(scores.shape)}")
        if not scores.is_floating_point() or scores.isnan().any():
            raise ValueError(f"{name} must be floating point without NaN, got {scores.dtype}")
    if negatives.dtype != positives.dtype or negatives.device != positives.device:
        raise ValueError(
            f"positives must be like negatives, {negatives.dtype} on {negatives.device}, "
            f"got {positives.dtype} on {positives.device}"
        )
