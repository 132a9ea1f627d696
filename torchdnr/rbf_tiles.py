"""The kernel matrix of an RBF in tiles that stay in cache."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from torchdnr.centred import Moved

_CPU_TILE = (1024, 512)
"""Most rows and columns of a tile on a CPU: it stays in cache from the exponents to the sum."""
_CPU_TILE_ELEMENTS = 2**15
"""Kernel values up to which a tile may have more columns, where centred vectors are at hand."""


def squared_norms(rows: Tensor) -> Tensor:
    """Compute the squared norms of rows ``(n, d)``; ``(n,)``."""
    if rows.requires_grad:
        return rows.square().sum(dim=1)  # the norm has no second derivative at 0
    return torch.linalg.vector_norm(rows, dim=1).square_()


class Tile(NamedTuple):
    """A part of the kernel matrix: where it is, and what its distances are made of."""

    rows: slice
    columns: slice
    inputs: Tensor  # centred, as the vectors
    input_norms: Tensor  # squared, as those of the vectors
    vectors: Tensor
    vector_norms: Tensor

    def unclamped_distances(self, room: Tensor) -> Tensor:
        """Compute squared distances, which rounding may make negative, in a piece of memory."""
        out = room.resize_(len(self.inputs), len(self.vectors))
        torch.addmm(self.vector_norms, self.inputs, self.vectors.T, alpha=-2.0, out=out)
        return out.add_(self.input_norms)


def tile_slices(
    inputs: Tensor, vectors: Tensor, block_elements: int, is_moved: bool
) -> Iterator[tuple[slice, slice]]:
    """Say where the kernel matrix is cut; the arguments are those of ``cut_tiles``.

    Yields:
        Rows and columns of each tile, left to right, then top to bottom.
    """
    n, m = len(inputs), len(vectors)
    most_rows, most_columns = _CPU_TILE if inputs.device.type == "cpu" else (n, m)
    if is_moved:  # nothing but kernel values has to stay in cache
        most_columns = max(most_columns, _CPU_TILE_ELEMENTS // max(1, n))
    width = max(1, min(m, most_columns, block_elements))
    blocks = math.ceil(n / max(1, min(most_rows, block_elements // width)))
    height = math.ceil(n / max(1, blocks))  # a last block of a few rows would be slow
    for top in range(0, n, max(1, height)):
        for left in range(0, m, width):
            yield slice(top, min(top + height, n)), slice(left, min(left + width, m))


def cut_tiles(
    inputs: Tensor, vectors: Tensor, center: Tensor, block_elements: int, moved: Moved | None
) -> Iterator[Tile]:
    """Cut the kernel matrix.

    Args:
        inputs: Features, ``(n, d)``.
        vectors: Support vectors, ``(m, d)``.
        center: What both are measured from, ``(d,)``.
        block_elements: Largest number of kernel values in a tile.
        moved: The centred vectors, if they are at hand.

    Yields:
        Tiles, left to right, then top to bottom. Centred vectors that were not at hand share one
        piece of memory: they last until the next tile is asked for.
    """
    room, above = vectors.new_empty(0), None
    for rows, columns in tile_slices(inputs, vectors, block_elements, moved is not None):
        if rows != above:
            z, above = inputs[rows] - center, rows
            z_norms = squared_norms(z).unsqueeze(1)
        if moved is not None:
            s, s_norms = (part[columns] for part in moved)
        else:
            part = vectors[columns]
            s = torch.sub(part, center, out=room.resize_(part.shape))
            s_norms = squared_norms(s)
        yield Tile(rows, columns, z, z_norms, s, s_norms)


def kernel_values(tile: Tile, rate: Tensor, room: Tensor) -> Tensor:
    """Compute ``exp(rate * distances)`` of a tile, in a piece of memory; the rate is -gamma."""
    return tile.unclamped_distances(room).clamp_min_(0.0).mul_(rate).exp_()
