"""How c classes become binary problems, with the bounds of these, and their values class scores."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

ONE_VS_REST, ONE_VS_ONE = STRATEGIES = ("one-vs-rest", "one-vs-one")

PerClass = float | Sequence[float] | Tensor
ClassWeight = str | Sequence[float] | Mapping[int, float] | Tensor
CheckedWeight = str | tuple[float, ...] | dict[int, float] | None
"""None, ``"balanced"``, one factor per class, or factors by class (1 for the others)."""


def class_pairs(num_classes: int, device: torch.device | str = "cpu") -> Tensor:
    """List the pairs of classes, ``(c (c - 1) / 2, 2)``, in scikit-learn's order: 0v1, 0v2, ..."""
    return torch.combinations(torch.arange(num_classes, device=device))


def classes_of_pairs(count: int) -> int:
    """Compute the number of classes that have ``count`` pairs; 0 for none."""
    return (1 + math.isqrt(1 + 8 * count)) // 2 if count else 0


def one_vs_rest(labels: Tensor, num_classes: int) -> Tensor:
    """Turn labels ``(n,)`` into one column of -1 and +1 per class, float64 ``(n, c)``."""
    classes = torch.arange(num_classes, device=labels.device)
    return torch.where(labels.unsqueeze(1) == classes, 1.0, -1.0).double()


def one_vs_one(labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Turn labels into one column per pair of classes: +1 for its first class, else -1.

    Returns targets, float64 ``(n, c (c - 1) / 2)``, and whether the sample takes part: the target
    of one that does not means nothing.
    """
    first, second = class_pairs(num_classes, labels.device).unbind(dim=1)
    is_first = labels.unsqueeze(1) == first
    return torch.where(is_first, 1.0, -1.0).double(), is_first | (labels.unsqueeze(1) == second)


def binary_targets(labels: Tensor, num_classes: int, strategy: str) -> Tensor:
    """Turn labels into targets, float64 ``(n, P)``; of any sign where a sample takes no part."""
    if strategy == ONE_VS_REST:
        return one_vs_rest(labels, num_classes)
    return one_vs_one(labels, num_classes)[0]


def votes_and_confidence(values: Tensor) -> Tensor:
    """Turn values of pairs, ``(n, c (c - 1) / 2)``, into class scores by scikit-learn's formula.

    A class gets one vote for each pair it wins, plus the sum s of its values squeezed to s / (3
    (|s| + 1)): that breaks ties and never overturns a vote. The votes are piecewise constant, so
    that only the squeezed sums have a gradient. The one pair of two classes does not vote: (v, -v).

    Source: scikit-learn, ``sklearn.utils.multiclass._ovr_decision_function``.
    """
    pairs = values.shape[1]
    if pairs == 1:
        return torch.cat([values, -values], dim=1)
    c = classes_of_pairs(pairs)
    first, second = class_pairs(c, values.device).unbind(dim=1)
    wins_first = (values >= 0).to(values.dtype)
    scores = values.new_zeros(len(values), c)
    votes = scores.index_add(1, first, wins_first).index_add(1, second, 1.0 - wins_first)
    sums = scores.index_add(1, first, values).index_add(1, second, -values)
    return votes + sums / (3.0 * (sums.abs() + 1.0))


def checked_C(C: PerClass) -> float | tuple[float, ...]:
    """Return C > 0 as a Python number, or as one per class."""
    values = _numbers(C, "C")
    if not all(value > 0.0 for value in values):
        raise ValueError(f"C must be > 0, got {C}")
    scalar = not isinstance(C, Sequence) and getattr(C, "ndim", 0) == 0
    return values[0] if scalar else values


def checked_class_weight(class_weight: ClassWeight | None) -> CheckedWeight:
    """Return class weights as Python values; refuse factors that are not finite and > 0."""
    if class_weight is None or (isinstance(class_weight, str) and class_weight == "balanced"):
        return class_weight
    if isinstance(class_weight, str):
        raise ValueError(
            'class_weight must be None, "balanced", one factor per class or a dict, '
            f"got {class_weight!r}"
        )
    factors = [*class_weight.values()] if isinstance(class_weight, Mapping) else class_weight
    values = _numbers(factors, "class_weight")
    if not all(0.0 < value < float("inf") for value in values):
        raise ValueError(
            f"class_weight must hold finite factors > 0, got {class_weight}: to leave samples out, "
            "remove them or give them sample_weight 0"
        )
    if isinstance(class_weight, Mapping):
        return dict(zip(map(int, class_weight), values, strict=True))
    return values


def upper_bounds(
    labels: Tensor,
    num_classes: int,
    strategy: str,
    C: float | tuple[float, ...],
    class_weight: CheckedWeight,
    sample_weight: Tensor | None,
) -> float | Tensor:
    """Compute the bound of each sample's alpha in each binary problem, 0 where it takes no part.

    It is a number, or float64 that broadcasts to ``(n, P)``: the product of C, by problem in
    one-vs-rest and by class in one-vs-one, the weight of the sample's class, and that of the
    sample. Class weights go by the sample's class under both strategies, except that ``"balanced"``
    balances each problem of one-vs-rest by itself, its class against all others.
    """
    by_sample = 1.0 if sample_weight is None else sample_weight.unsqueeze(1)
    factors: float | Tensor = 1.0
    if isinstance(class_weight, str):
        weights = balanced_weights(labels, num_classes, sample_weight)
        factors = weights[labels].unsqueeze(1)
        if strategy == ONE_VS_REST:
            share = 1.0 / (num_classes * weights)  # of the class in all the weight
            is_class = labels.unsqueeze(1) == torch.arange(num_classes, device=labels.device)
            factors = 0.5 / torch.where(is_class, share, 1.0 - share)
    elif class_weight is not None:
        weights = _per_class("class_weight", class_weight, num_classes, labels.device)
        factors = weights[labels].unsqueeze(1)
    limits = C if isinstance(C, float) else _per_class("C", C, num_classes, labels.device)
    if strategy == ONE_VS_REST:
        return limits * factors * by_sample
    if isinstance(limits, Tensor):
        limits = limits[labels].unsqueeze(1)
    return one_vs_one(labels, num_classes)[1].double() * limits * factors * by_sample


def balanced_weights(
    labels: Tensor, num_classes: int, sample_weight: Tensor | None = None
) -> Tensor:
    """Compute scikit-learn's ``"balanced"`` class weights: total / (c * weighted count)."""
    counts = torch.bincount(labels, weights=sample_weight, minlength=num_classes).double()
    return counts.sum() / (num_classes * counts)


def _per_class(
    name: str, values: tuple[float, ...] | dict[int, float], c: int, device: torch.device
) -> Tensor:
    if isinstance(values, dict):
        if unknown := sorted(k for k in values if not 0 <= k < c):
            raise ValueError(f"{name} must name classes 0..{c - 1}, got {unknown}: remove them")
        values = tuple(values.get(k, 1.0) for k in range(c))
    if len(values) != c:
        raise ValueError(f"{name} must have one value per class, {c}, got {len(values)}")
    return torch.tensor(values, dtype=torch.float64, device=device)


def _numbers(values: PerClass, name: str) -> tuple[float, ...]:
    try:
        numbers = torch.as_tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must hold numbers, got {values!r}") from error
    if numbers.ndim > 1 or numbers.numel() == 0:
        raise ValueError(f"{name} must be one number or one per class, got {values!r}")
    return tuple(numbers.reshape(-1).tolist())
