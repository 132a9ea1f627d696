"""Statistics of features that are too large to copy, a block of rows at a time."""

from collections.abc import Sequence

import torch
from torch import Tensor

READ_BYTES = 2**26
"""Bytes of a block that is only read."""
COPIED_BYTES = 2**22
"""Bytes of a block of which copies are made."""


def row_blocks(features: Tensor, block_bytes: int) -> tuple[Tensor, ...]:
    """Split features ``(n, d)`` into blocks of rows, as views: one row each at the least."""
    row = features.element_size() * features.shape[1]
    return features.split(max(1, block_bytes // max(1, row)))


def all_finite(features: Tensor, *, block_bytes: int = COPIED_BYTES) -> bool:
    """Return whether there is neither NaN nor infinity among the features, ``(n, d)``."""
    blocks = row_blocks(features, block_bytes)
    return bool(torch.stack([torch.isfinite(block).all() for block in blocks]).all())


def column_means(features: Tensor, *, block_bytes: int = READ_BYTES) -> Tensor:
    """Compute the mean ``(d,)`` of the rows of features ``(n, d)``."""
    blocks = row_blocks(features, block_bytes)
    if len(blocks) == 1:
        return features.mean(dim=0)
    total = torch.zeros(features.shape[1], dtype=torch.float64, device=features.device)
    for block in blocks:
        total += block.mean(dim=0).double() * (len(block) / len(features))
    return total.to(features.dtype)


def entry_moments(features: Tensor, *, block_bytes: int = COPIED_BYTES) -> Tensor:
    """Compute the (biased) variance and the mean of all entries together, float64 ``(2,)``."""
    blocks = row_blocks(features, block_bytes)
    parts = [torch.stack(torch.var_mean(block.double(), correction=0)) for block in blocks]
    return joint_moments(torch.stack(parts), [len(block) for block in blocks])


def joint_moments(parts: Tensor, sizes: Sequence[int]) -> Tensor:
    """Compute the variance and the mean ``(2,)`` of a whole from those of its parts, ``(p, 2)``."""
    share = torch.tensor([size / sum(sizes) for size in sizes], dtype=torch.float64)
    share = share.to(parts.device)
    variances, means = parts.unbind(dim=1)
    mean = (share * means).sum()
    return torch.stack([(share * (variances + (means - mean).square())).sum(), mean])
