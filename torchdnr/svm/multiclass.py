"""How c classes become binary problems, and the values of those become class scores again."""

import math

import torch
from torch import Tensor

ONE_VS_REST, ONE_VS_ONE = STRATEGIES = ("one-vs-rest", "one-vs-one")


def class_pairs(num_classes: int, device: torch.device | str = "cpu") -> Tensor:
    """List the pairs of classes in scikit-learn's order: 0v1, 0v2, ..., 1v2, ...

    Args:
        num_classes: c.
        device: Where to put the list.

    Returns:
        Pairs (i, j) with i < j, int64 ``(c (c - 1) / 2, 2)``.
    """
    return torch.combinations(torch.arange(num_classes, device=device))


def classes_of_pairs(count: int) -> int:
    """Compute the number of classes that have ``count`` pairs.

    Args:
        count: c (c - 1) / 2; 0 for a machine that is not fitted.

    Returns:
        c; 0 for no pairs.
    """
    return (1 + math.isqrt(1 + 8 * count)) // 2 if count else 0


def one_vs_rest(labels: Tensor, num_classes: int) -> Tensor:
    """Turn labels into one column of -1 and +1 per class.

    Args:
        labels: ``(n,)`` in 0..c-1.
        num_classes: c.

    Returns:
        Targets, float64 ``(n, c)``.
    """
    classes = torch.arange(num_classes, device=labels.device)
    return torch.where(labels.unsqueeze(1) == classes, 1.0, -1.0).double()


def one_vs_one(labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Turn labels into one column of -1 and +1 per pair of classes.

    Args:
        labels: ``(n,)`` in 0..c-1.
        num_classes: c.

    Returns:
        Targets, float64 ``(n, c (c - 1) / 2)``, +1 for the first class of the pair; and whether the
        sample takes part, bool of the same shape: the target of one that does not means nothing.
    """
    first, second = class_pairs(num_classes, labels.device).unbind(dim=1)
    is_first = labels.unsqueeze(1) == first
    return torch.where(is_first, 1.0, -1.0).double(), is_first | (labels.unsqueeze(1) == second)


def binary_targets(labels: Tensor, num_classes: int, strategy: str) -> Tensor:
    """Turn labels into the targets of all binary problems.

    Args:
        labels: ``(n,)`` in 0..c-1.
        num_classes: c.
        strategy: ``"one-vs-rest"`` or ``"one-vs-one"``.

    Returns:
        Targets, float64 ``(n, P)``; of any sign where a sample takes no part.
    """
    if strategy == ONE_VS_REST:
        return one_vs_rest(labels, num_classes)
    return one_vs_one(labels, num_classes)[0]


def votes_and_confidence(values: Tensor) -> Tensor:
    """Turn values of pairs into class scores by scikit-learn's formula.

    A class gets one vote for each pair it wins, plus the sum s of its values squeezed to
    s / (3 (|s| + 1)): that breaks ties and never overturns a vote. The votes are piecewise
    constant: their gradient is 0, so that only the squeezed sums can be followed by a gradient.

    Args:
        values: Decision values of the pairs, ``(n, c (c - 1) / 2)``, > 0 for the first class.

    Returns:
        Scores, ``(n, c)``. Two classes have one pair, whose value v is the score without voting:
        (v, -v).

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
