"""Sparse random projections that keep distances, and how well they kept them."""

import math

import torch
from torch import Tensor

# Rows that each value is added to. More keep the distances of sparse outputs more surely (an
# output of few values that differ) and cost more; from 4 on the gain is small.
BLOCKS = 4


def random_rows(inputs: int, size: int, seed: int) -> Tensor:
    """Draw a sparse Johnson-Lindenstrauss projection.

    The ``size`` rows are split into ``BLOCKS`` blocks of one length (2 or 1 where ``size`` is not a
    multiple of 4). In each block every value goes to one random row with a random sign.

    Args:
        inputs: Number of values p that are projected, >= 1.
        size: Number of rows d, >= 1.
        seed: Same seed, same projection.

    Returns:
        Row of each value in each block, ``(blocks, p)`` int64 on the CPU: 0..d-1 to be added,
        d..2d-1 to be subtracted from row - d.

    Source: Kane, Nelson, "Sparser Johnson-Lindenstrauss transforms", J. ACM 61 (2014), Sec. 1,
    block construction.
    """
    blocks = math.gcd(size, BLOCKS)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(size // blocks, (blocks, inputs), generator=generator)
    rows += torch.arange(blocks).unsqueeze(1) * (size // blocks)
    return rows + size * torch.randint(2, rows.shape, generator=generator)


def sparse_projection(inputs: Tensor, rows: Tensor, size: int) -> Tensor:
    """Apply a projection from ``random_rows``.

    The expectation of squared distances, over the draw, is the squared distance of the inputs;
    their relative standard deviation is at most ``sqrt(2 / size)``. Cost: one addition per value
    and block, and ``8 * blocks`` bytes per value. On a GPU the order of the additions may vary from
    call to call, unless ``torch.use_deterministic_algorithms`` is on.

    Args:
        inputs: ``(n, p)``; half precision is summed in float32.
        rows: ``(blocks, p)`` int64.
        size: Number of rows d.

    Returns:
        ``(n, d)``; differentiable in the inputs.
    """
    inputs = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
    # Signs as two sets of sums: the large inputs are then read as they are, without a product.
    sums = inputs.new_zeros(inputs.shape[0], 2 * size)
    for block in rows:
        sums = sums.index_add(1, block, inputs)
    return (sums[:, :size] - sums[:, size:]) / math.sqrt(rows.shape[0])


def projection_distortion(inputs: Tensor, projected: Tensor) -> dict[str, float] | None:
    """Compare the distances between all pairs before and after a projection.

    Args:
        inputs: ``(n, p)``.
        projected: ``(n, d)``, in the same order.

    Returns:
        ``pairs``, the number of pairs at a distance above 0, and of their relative errors
        ``projected distance / distance - 1`` the root mean square ``rms`` and the largest absolute
        value ``max``; None where there is no such pair.
    """
    wide = torch.promote_types(inputs.dtype, torch.float32)
    before = torch.nn.functional.pdist(inputs.to(wide))
    after = torch.nn.functional.pdist(projected.to(wide))
    apart = before > 0
    errors = after[apart] / before[apart] - 1
    if not errors.numel():
        return None
    rms, largest = errors.square().mean().sqrt(), errors.abs().max()
    return {"pairs": errors.numel(), "rms": rms.item(), "max": largest.item()}
