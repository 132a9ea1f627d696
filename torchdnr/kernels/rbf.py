"""Sums of RBF kernels: distances, scores and their exact gradients, tile by tile."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class Moved(NamedTuple):
    """What distances to vectors need of them.

    Attributes:
        vectors: Less the centre, ``(m, d)``.
        norms: Their squared norms, ``(m,)``.
    """

    vectors: Tensor
    norms: Tensor


class _Kept(NamedTuple):
    center: Tensor
    versions: tuple[int, int]
    moved: Moved


_KEPT: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # for as long as the vectors live


def centred(vectors: Tensor, center: Tensor) -> Moved | None:
    """Return vectors less their centre, and their squared norms, made once while both are the same.

    To make them costs two passes over all vectors, which for few inputs is as much as the distances
    themselves. A copy of the vectors is held as long as they live. Another centre, or a change in
    place that autograd knows of, has them made again.

    Args:
        vectors: ``(m, d)``.
        center: ``(d,)``.

    Returns:
        Tensors without gradient; None where changes could not be seen, or derivatives by one of
        the two are wanted.
    """
    if any(t.requires_grad or t.is_inference() for t in (vectors, center)):
        return None
    versions = (vectors._version, center._version)
    kept = _KEPT.get(vectors)
    if kept is None or kept.center is not center or kept.versions != versions:
        _KEPT.pop(vectors, None)  # frees it before there is another
        with torch.inference_mode(False), torch.no_grad():
            moved = vectors - center
            norms = torch.linalg.vector_norm(moved, dim=1).square_()
        _KEPT[vectors] = kept = _Kept(center, versions, Moved(moved, norms))
    return kept.moved


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


BLOCK_ELEMENTS = 2**24
"""Largest number of kernel values held at once while scoring (64 MiB in float32)."""

_FEW_ROWS = 512
"""Rows up to which the centring of the vectors is worth keeping."""
_COLUMN_LAYOUT = (32, 64)
"""From so many rows, and up to so many classes, MKL is twice as fast by columns."""


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Keep TF32, bfloat16 products and autocast away from the enclosed products.

    A score sums kernel values times dual coefficients as large as C: the ten mantissa bits that
    TF32 leaves to a distance would show in the leading digits of the score. Under `torch.compile`,
    which cannot change the switches, it keeps away autocast alone.

    Args:
        device: Where the enclosed work runs.
    """
    modules = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    if torch.compiler.is_compiling():
        modules = ()
    lowered = [(m, m.fp32_precision) for m in modules if m.fp32_precision not in ("ieee", "none")]
    try:
        for module, _ in lowered:
            module.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for module, precision in lowered:
            module.fp32_precision = "none"  # inherits, as before if that suffices
            if module.fp32_precision != precision:
                module.fp32_precision = precision


def squared_distances(inputs: Tensor, vectors: Tensor, center: Tensor) -> Tensor:
    """Compute all squared Euclidean distances by one matrix product.

    Both sides are first moved by ``center``, the mean of the training features: that removes the
    cancellation of large norms, and a row's distances depend on no other row of its batch.

    Args:
        inputs: Features, ``(n, d)``.
        vectors: Features to measure to, ``(m, d)``; may be ``inputs`` itself.
        center: Mean of the training features, ``(d,)``.

    Returns:
        Squared distances, ``(n, m)``, at least 0. Without gradient the diagonal is exactly 0
        when ``vectors is inputs``.
    """
    with full_precision(inputs.device):
        moved = inputs - center
        if vectors is inputs:
            distances = _unclamped_distances(moved, moved).clamp_min_(0.0)
            return distances.fill_diagonal_(0.0) if not distances.requires_grad else distances
        return _unclamped_distances(moved, vectors - center).clamp_min_(0.0)


def _unclamped_distances(inputs: Tensor, vectors: Tensor) -> Tensor:
    products = torch.addmm(squared_norms(vectors), inputs, vectors.T, alpha=-2.0)
    return products.add_(squared_norms(inputs).unsqueeze(1))


def rbf_scores(
    inputs: Tensor,
    vectors: Tensor,
    coefficients: Tensor,
    gamma: Tensor,
    center: Tensor,
    *,
    block_elements: int = BLOCK_ELEMENTS,
    keep_centred: bool = False,
) -> Tensor:
    """Compute ``sum_j coefficients_j exp(-gamma ||inputs - vectors_j||^2)`` for all classes.

    The kernel is made tile by tile. It is kept for the gradient if it has at most
    ``block_elements`` entries; otherwise its tiles are made again there. First and second
    derivatives by all of inputs, vectors, coefficients and gamma are exact; only a gradient that
    is itself to be differentiated (``create_graph=True``) takes the kernel whole.

    Args:
        inputs: Features, ``(n, d)``.
        vectors: Support vectors, ``(m, d)``.
        coefficients: One column of dual coefficients per class, ``(m, c)``.
        gamma: Kernel width, a scalar tensor > 0.
        center: Mean of the training features, ``(d,)``. It serves the rounding alone: the sums do
            not depend on it, and its derivative is zero.
        block_elements: Largest number of kernel values held at once.
        keep_centred: Whether the centred vectors are kept for the next call, if there are so few
            inputs that it pays.

    Returns:
        Sums without intercept, ``(n, c)``.
    """
    tensors = (inputs, vectors, coefficients, gamma, center)
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    keep_kernel = wanted and len(inputs) * len(vectors) <= block_elements
    moved = moved_vectors(inputs, vectors, center) if keep_centred else None
    with full_precision(inputs.device):
        return _RBFScores.apply(*tensors, block_elements, keep_kernel, *(moved or (None, None)))


def moved_vectors(inputs: Tensor, vectors: Tensor, center: Tensor) -> Moved | None:
    """Look up the centred vectors, where there are so few inputs that it pays to keep them."""
    return centred(vectors, center) if len(inputs) <= _FEW_ROWS else None


def sum_kernels(
    inputs: Tensor, coefficients: Tensor, rate: Tensor, tiles: Iterator[Tile], keep: bool
) -> tuple[Tensor, list[Tensor]]:
    """Sum kernel values times coefficients, without derivatives.

    Args:
        inputs: Features, ``(n, d)``.
        coefficients: ``(m, c)``.
        rate: -gamma.
        tiles: Of ``inputs`` and the vectors.
        keep: Whether the kernels are wanted.

    Returns:
        Sums, ``(n, c)``, and the kernel of each tile, if wanted.
    """
    n, c = len(inputs), coefficients.shape[1]
    scores = coefficients.new_zeros(n, c)
    few_columns = n >= _COLUMN_LAYOUT[0] and c <= _COLUMN_LAYOUT[1]
    factors = coefficients.T.contiguous().T if few_columns else coefficients
    kept, room = [], inputs.new_empty(0)
    for tile in tiles:
        kernel = kernel_values(tile, rate, inputs.new_empty(0) if keep else room)
        scores[tile.rows].addmm_(kernel, factors[tile.columns])
        if keep:
            kept.append(kernel)
    return scores, kept


class _RBFScores(torch.autograd.Function):
    """``exp(-gamma D) A`` with D the squared distances; two matrix products each way."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        inputs: Tensor,
        vectors: Tensor,
        coefficients: Tensor,
        gamma: Tensor,
        center: Tensor,
        block_elements: int,
        keep_kernel: bool,
        moved_vectors: Tensor | None,
        norms: Tensor | None,
    ) -> Tensor:
        moved = None if moved_vectors is None else Moved(moved_vectors, norms)
        tiles = cut_tiles(inputs, vectors, center, block_elements, moved)
        scores, kept = sum_kernels(inputs, coefficients, -gamma, tiles, keep_kernel)
        ctx.block_elements, ctx.is_moved = block_elements, moved is not None
        saved = (inputs, vectors, coefficients, gamma, center, scores, *(moved or ()))
        ctx.save_for_backward(*saved, *kept)
        return scores

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple:
        inputs, vectors, coefficients, gamma, center, scores, *kept = ctx.saved_tensors
        moved = Moved(kept.pop(0), kept.pop(0)) if ctx.is_moved else None
        tensors, needed = (inputs, vectors, coefficients, gamma, center), ctx.needs_input_grad[:4]
        with full_precision(grad.device):
            if torch.is_grad_enabled():
                found = _differentiable_gradients(grad, *tensors, needed)
            else:
                tiles = cut_tiles(inputs, vectors, center, ctx.block_elements, moved)
                found = gradients(grad, *tensors, scores, kept, tiles, needed)
        by_center = torch.zeros_like(center) if ctx.needs_input_grad[4] else None
        return *found, by_center, None, None, None, None


def gradients(
    grad: Tensor,
    inputs: Tensor,
    vectors: Tensor,
    coefficients: Tensor,
    gamma: Tensor,
    center: Tensor,
    scores: Tensor,
    kept: list[Tensor],
    tiles: Iterator[Tile],
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of the sums tile by tile.

    Args:
        grad: Of the sums, ``(n, c)``.
        inputs: ``(n, d)``.
        vectors: ``(m, d)``.
        coefficients: ``(m, c)``.
        gamma: Scalar tensor.
        center: ``(d,)``.
        scores: The sums, ``(n, c)``.
        kept: The kernel of each tile, or nothing.
        tiles: Of ``inputs`` and the vectors.
        needed: Which of inputs, vectors, coefficients and gamma have gradients.

    Returns:
        These gradients, None where not needed.

    With W = K * (G A'), the derivative by an input z is 2 gamma (sum_j W_j s_j - sum_j W_j z), and
    sum_j W_j is the product of its rows of G and of the scores K A.
    """
    tensors = (inputs, vectors, coefficients, gamma)
    by_inputs, by_vectors, by_coefficients, by_gamma = found = [
        torch.zeros_like(t) if need else None for t, need in zip(tensors, needed, strict=True)
    ]
    rate, room, more_room = -gamma, inputs.new_empty(0), inputs.new_empty(0)
    for number, tile in enumerate(tiles):
        rows, columns, z, s = tile.rows, tile.columns, tile.inputs, tile.vectors
        kernel = kept[number] if kept else kernel_values(tile, rate, room)
        weights = more_room.resize_(kernel.shape)
        torch.mm(grad[rows], coefficients[columns].T, out=weights).mul_(kernel)
        if needed[0]:
            by_inputs[rows].addmm_(weights, s)
        if needed[1]:
            by_vectors[columns].addmm_(weights.T, z).sub_(weights.sum(dim=0).unsqueeze(1) * s)
        if needed[2]:
            by_coefficients[columns].addmm_(kernel.T, grad[rows])
        if needed[3]:
            by_gamma.sub_(weights.mul_(tile.unclamped_distances(inputs.new_empty(0))).sum())
    if needed[0]:
        by_inputs.sub_((grad * scores).sum(dim=1, keepdim=True) * (inputs - center)).mul_(2 * gamma)
    if needed[1]:
        by_vectors.mul_(2 * gamma)
    return tuple(found)


def _differentiable_gradients(
    grad: Tensor,
    inputs: Tensor,
    vectors: Tensor,
    coefficients: Tensor,
    gamma: Tensor,
    center: Tensor,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Compute the gradients by autograd, which can then differentiate them.

    Distances are not clamped: where rounding makes one negative, the clamp would take away its
    part of the second derivative.
    """
    # Views tell the arguments apart where one tensor was given twice.
    tensors = [t.view_as(t) for t in (inputs, vectors, coefficients, gamma)]
    z, s = tensors[0] - center, tensors[1] - center
    scores = (-tensors[3] * _unclamped_distances(z, s)).exp() @ tensors[2]
    chosen = [t for t, need in zip(tensors, needed, strict=True) if need]
    found = iter(torch.autograd.grad(scores, chosen, grad, create_graph=True) if chosen else ())
    return tuple(next(found) if need else None for need in needed)


Context = torch.autograd.function.FunctionCtx


def compiled_rbf_scores(
    inputs: Tensor, vectors: Tensor, coefficients: Tensor, gamma: Tensor, center: Tensor
) -> Tensor:
    """Compute what ``rbf_scores`` computes, in a program that is being compiled.

    Args:
        inputs: Features, ``(n, d)``.
        vectors: Support vectors, ``(m, d)``.
        coefficients: One column of dual coefficients per class, ``(m, c)``.
        gamma: Kernel width, a scalar tensor > 0.
        center: Mean of the training features, ``(d,)``.

    Returns:
        Sums without intercept, ``(n, c)``, with derivatives of first order. Where they are wanted
        the kernel is kept for them, whatever its size.
    """
    tensors = (inputs, vectors, coefficients, gamma, center)
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return scores_and_kernel(*tensors, wanted)[0]


@torch.library.custom_op("torchdnr::rbf_scores", mutates_args=())
def scores_and_kernel(
    inputs: Tensor,
    vectors: Tensor,
    coefficients: Tensor,
    gamma: Tensor,
    center: Tensor,
    keep_kernel: bool,
) -> tuple[Tensor, Tensor]:
    """Sum kernels times coefficients; the arguments are those of ``compiled_rbf_scores``.

    Returns:
        Sums, ``(n, c)``, and all kernel values, tile after tile, ``(n * m,)``; ``(0,)`` if they
        are not to be kept.
    """
    with full_precision(inputs.device):
        moved = moved_vectors(inputs, vectors, center)
        tiles = cut_tiles(inputs, vectors, center, BLOCK_ELEMENTS, moved)
        scores, kept = sum_kernels(inputs, coefficients, -gamma, tiles, keep_kernel)
    flat = [kernel.flatten() for kernel in kept]
    return scores, torch.cat(flat) if flat else inputs.new_empty(0)


@scores_and_kernel.register_fake
def _(
    inputs: Tensor,
    vectors: Tensor,
    coefficients: Tensor,
    gamma: Tensor,
    center: Tensor,
    keep_kernel: bool,
) -> tuple[Tensor, Tensor]:
    n, m = inputs.shape[0], vectors.shape[0]
    scores = coefficients.new_empty(n, coefficients.shape[1])
    return scores, inputs.new_empty(n * m if keep_kernel else 0)


@torch.library.custom_op("torchdnr::rbf_gradients", mutates_args=())
def rbf_gradients(
    grad: Tensor,
    inputs: Tensor,
    vectors: Tensor,
    coefficients: Tensor,
    gamma: Tensor,
    center: Tensor,
    scores: Tensor,
    kernel: Tensor,
    needed: Sequence[bool],
) -> list[Tensor]:
    """Compute the gradients of the sums from their own gradient.

    Args:
        grad: Of the sums, ``(n, c)``.
        inputs: As the next four, those of ``compiled_rbf_scores``.
        vectors: See there.
        coefficients: See there.
        gamma: See there.
        center: See there.
        scores: The sums.
        kernel: Their kernel values, or ``(0,)`` where they were not kept.
        needed: Which of inputs, vectors, coefficients and gamma have gradients.

    Returns:
        Four gradients; ``(0,)`` in the place of those not needed.
    """
    moved = moved_vectors(inputs, vectors, center)
    kept = _kept_tiles(kernel, tile_slices(inputs, vectors, BLOCK_ELEMENTS, moved is not None))
    with full_precision(inputs.device):
        tiles = cut_tiles(inputs, vectors, center, BLOCK_ELEMENTS, moved)
        tensors = (inputs, vectors, coefficients, gamma, center)
        found = gradients(grad, *tensors, scores, kept, tiles, tuple(needed))
    return [inputs.new_empty(0) if part is None else part for part in found]


def _kept_tiles(kernel: Tensor, slices: Iterable[tuple[slice, slice]]) -> list[Tensor]:
    if not kernel.numel():
        return []
    shapes = [(rows.stop - rows.start, columns.stop - columns.start) for rows, columns in slices]
    parts = kernel.split([height * width for height, width in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


@rbf_gradients.register_fake
def _(
    grad: Tensor,
    inputs: Tensor,
    vectors: Tensor,
    coefficients: Tensor,
    gamma: Tensor,
    center: Tensor,
    scores: Tensor,
    kernel: Tensor,
    needed: Sequence[bool],
) -> list[Tensor]:
    tensors = (inputs, vectors, coefficients, gamma)
    return [
        torch.empty_like(t, memory_format=torch.preserve_format) if need else inputs.new_empty(0)
        for t, need in zip(tensors, needed, strict=True)
    ]


def _keep(ctx: Context, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, _ = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Context, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:4]
    found = rbf_gradients(grad, *ctx.saved_tensors, needed)
    return *(part if need else None for part, need in zip(found, needed, strict=True)), None, None


scores_and_kernel.register_autograd(_backward, setup_context=_keep)


def traced_rbf_scores(
    inputs: Tensor, vectors: Tensor, coefficients: Tensor, gamma: Tensor, center: Tensor
) -> Tensor:
    """Compute what ``rbf_scores`` computes, in operations of PyTorch's own.

    An exported program has to run without this package. The kernel is taken whole, ``(n, m)``: a
    number of rows that is only known when the program runs cannot be cut into tiles.

    Args:
        inputs: Features, ``(n, d)``.
        vectors: Support vectors, ``(m, d)``.
        coefficients: One column of dual coefficients per class, ``(m, c)``.
        gamma: Kernel width, a scalar tensor > 0.
        center: Mean of the training features, ``(d,)``.

    Returns:
        Sums without intercept, ``(n, c)``.
    """
    z, s = inputs - center, vectors - center
    norms = z.square().sum(dim=1, keepdim=True) + s.square().sum(dim=1)
    distances = (norms - 2.0 * z @ s.T).clamp_min(0.0)
    return (-gamma * distances).exp() @ coefficients
