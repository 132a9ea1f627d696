"""Checks of training data, at the border where a user hands it in."""

import torch
from torch import Tensor


def check_features(features: Tensor) -> None:
    """Check that features are a finite float matrix with at least one row.

    Args:
        features: Candidate features.

    Raises:
        ValueError: Saying what was expected, what came and what to do.
    """
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"features must be (n, d) with n, d >= 1, got {tuple(features.shape)}")
    if features.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"features must be float32 or float64, got {features.dtype}: call .float() first"
        )
    if not torch.isfinite(features).all():
        raise ValueError("features must be finite, got NaN or infinity: check network and inputs")


def check_labels(labels: Tensor, n: int, num_classes: int | None = None) -> int:
    """Check that labels are 0..c-1 with every class present.

    Args:
        labels: Candidate labels.
        n: Number of samples they belong to.
        num_classes: c; default: largest label + 1.

    Returns:
        c.

    Raises:
        ValueError: Saying what was expected, what came and what to do.
    """
    if labels.shape != (n,):
        raise ValueError(f"labels must be ({n},), one per sample, got {tuple(labels.shape)}")
    if labels.dtype.is_floating_point or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers 0..c-1, got {labels.dtype}: call .long() first")
    lowest, highest = int(labels.min()), int(labels.max())
    c = highest + 1 if num_classes is None else num_classes
    if lowest < 0 or highest >= c:
        raise ValueError(f"labels must be in 0..{c - 1}, got {lowest}..{highest}")
    counts = torch.bincount(labels.long(), minlength=c)
    missing = (counts == 0).nonzero().squeeze(1).tolist()
    if c < 2 or missing:
        raise ValueError(
            f"labels must hold at least two classes and all of 0..{c - 1}, got none of "
            f"{missing[:10] or 'a second class'}: add samples or renumber the labels"
        )
    return c
