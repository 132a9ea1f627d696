"""Checks of training data, at the border where a user hands it in."""

import torch
from torch import Tensor

from torchdnr.arrays import ArrayLike, as_features
from torchdnr.distributed.sharing import ShardedFeatures
from torchdnr.kernels.row_blocks import all_finite
from torchdnr.resources import has_float64

SYMMETRY = 1e-4
"""Largest difference across the diagonal of a Gram matrix, relative to its largest entry."""


def checked_features(features: ArrayLike | ShardedFeatures) -> Tensor | ShardedFeatures:
    """Convert features; refuse those that are no finite float matrix with at least one row."""
    if not isinstance(features, ShardedFeatures):
        features = as_features("features", features)
    local = features.local if isinstance(features, ShardedFeatures) else features
    if local.ndim != 2 or 0 in local.shape:
        raise ValueError(f"features must be (n, d) with n, d >= 1, got {tuple(local.shape)}")
    if local.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"features must be float32 or float64, got {local.dtype}: call .float() first"
        )
    check_device(local.device)
    if not ShardedFeatures.of(features).partition.processes.all(all_finite(local)):
        raise ValueError("features must be finite, got NaN or infinity: check network and inputs")
    return features


def check_device(device: torch.device) -> None:
    """Refuse a device that does not compute in float64, as the solver does."""
    if not has_float64(device):
        raise ValueError(
            f"SVMs are fitted in float64, which {device} does not have: call .cpu() first, and "
            "move what was fitted back"
        )


def check_labels(labels: Tensor, n: int, num_classes: int | None = None) -> int:
    """Refuse labels that are not ``(n,)`` in 0..c-1 with every class present, and return c."""
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


def check_gram(gram: Tensor) -> None:
    """Refuse a precomputed kernel that is not square, and symmetric up to rounding."""
    n = len(gram)
    if gram.shape != (n, n):
        raise ValueError(
            "features must be the square Gram matrix (n, n) of the training samples for "
            f'kernel="precomputed", got {tuple(gram.shape)}'
        )
    asymmetry, size = (gram - gram.T).abs().max().item(), gram.abs().max().item()
    if asymmetry > SYMMETRY * size:
        raise ValueError(
            "features must be a symmetric Gram matrix, got entries that differ from their "
            f"transpose by {asymmetry:.2g}: pass (K + K.T) / 2 if that is meant"
        )


def checked_sample_weight(
    sample_weight: ArrayLike | None, labels: Tensor, num_classes: int
) -> Tensor | None:
    """Convert weights to float64 beside the labels; None stays.

    Refuse those that are not finite and >= 0, or that leave a class without samples.
    """
    if sample_weight is None:
        return None
    n = len(labels)
    sample_weight = as_features("sample_weight", sample_weight).to(labels.device, torch.float64)
    if sample_weight.shape != (n,):
        raise ValueError(
            f"sample_weight must be ({n},), one per sample, got {tuple(sample_weight.shape)}"
        )
    if not (torch.isfinite(sample_weight) & (sample_weight >= 0)).all():
        raise ValueError("sample_weight must be finite and >= 0, got other values")
    counts = torch.bincount(labels[sample_weight > 0].long(), minlength=num_classes)
    if missing := (counts == 0).nonzero().squeeze(1).tolist():
        raise ValueError(
            "sample_weight must leave every class a sample of weight > 0, got none for classes "
            f"{missing[:10]}: raise a weight, or remove the class"
        )
    return sample_weight
