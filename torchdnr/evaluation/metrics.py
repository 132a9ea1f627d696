"""What is counted when a classifier may reject: each rate is defined here, once."""

from statistics import NormalDist

from torch import Tensor

from torchdnr.attacks.objectives import split_scores
from torchdnr.rejection import REJECT, predict_with_rejection


def predict_labels(output: Tensor, reject: bool) -> Tensor:
    """Predict labels from what a model returns.

    Args:
        output: Scores ``(n, c)``, or with ``reject`` ``(n, c + 1)`` with theta in the last column.
        reject: Whether the last column is the rejection threshold.

    Returns:
        Labels 0..c-1, or ``REJECT`` where no score is above theta, int64 ``(n,)``.
    """
    scores, threshold = split_scores(output, reject)
    if threshold is None:
        return scores.argmax(dim=1)
    return predict_with_rejection(scores, threshold)


def accuracy_under_attack(predictions: Tensor, labels: Tensor, eps: float) -> float:
    """Compute the share of correct decisions on inputs perturbed within ``eps``.

    Without a perturbation (``eps = 0``) to reject is an error. Under attack (``eps > 0``) every
    input is an adversarial example, and to reject it is as correct as to find its true class.

    Args:
        predictions: Labels or ``REJECT``, ``(n,)``.
        labels: True labels, ``(n,)``.
        eps: Perturbation size, >= 0.

    Returns:
        Share in [0, 1].

    Raises:
        ValueError: If the shapes differ, there is no sample, or ``eps`` is negative.

    Source: Sotgiu et al., Sec. IV-A, "Security Evaluation".
    """
    if not eps >= 0:
        raise ValueError(f"eps must be >= 0, got {eps}")
    correct = _same_length(predictions, labels) == labels
    if eps > 0:
        correct = correct | (predictions == REJECT)
    return _share(correct)


def rejection_rate(predictions: Tensor) -> float:
    """Compute the share of rejected inputs among ``predictions``, ``(n,)``."""
    return _share(_same_length(predictions, predictions) == REJECT)


def evasion_rate(predictions: Tensor, labels: Tensor) -> float:
    """Compute the share of inputs that are accepted and wrong.

    Args:
        predictions: Labels or ``REJECT``, ``(n,)``.
        labels: True labels, ``(n,)``.

    Returns:
        Share in [0, 1]. For ``eps > 0`` it is one minus the accuracy under attack.
    """
    return _share(evaded(_same_length(predictions, labels), labels))


def evaded(predictions: Tensor, labels: Tensor) -> Tensor:
    """Tell which inputs are accepted and wrong, bool ``(n,)``."""
    return (predictions != REJECT) & (predictions != labels)


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


def _same_length(predictions: Tensor, labels: Tensor) -> Tensor:
    if predictions.ndim != 1 or predictions.shape != labels.shape or len(predictions) == 0:
        raise ValueError(
            "predictions and labels must both be (n,) with n >= 1, "
            f"got {tuple(predictions.shape)} and {tuple(labels.shape)}"
        )
    return predictions


def _share(which: Tensor) -> float:
    return which.double().mean().item()
