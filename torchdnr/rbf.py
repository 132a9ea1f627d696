"""Sums of RBF kernels: distances, scores and their exact gradients, tile by tile."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

BLOCK_ELEMENTS = 2**24
"""Largest number of kernel values held at once while scoring (64 MiB in float32)."""

_CPU_TILE = (1024, 512)
"""Most rows and columns of a tile on a CPU: it stays in cache from the exponents to the sum."""


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


def _unclamped_distances(inputs: Tensor, vectors: Tensor, out: Tensor | None = None) -> Tensor:
    products = torch.addmm(_squared_norms(vectors), inputs, vectors.T, alpha=-2.0, out=out)
    return products.add_(_squared_norms(inputs).unsqueeze(1))


def _squared_norms(rows: Tensor) -> Tensor:
    if rows.requires_grad:
        return rows.square().sum(dim=1)  # the norm has no second derivative at 0
    return torch.linalg.vector_norm(rows, dim=1).square_()


def rbf_scores(
    inputs: Tensor,
    vectors: Tensor,
    coefficients: Tensor,
    gamma: Tensor,
    center: Tensor,
    *,
    block_elements: int = BLOCK_ELEMENTS,
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

    Returns:
        Sums without intercept, ``(n, c)``.
    """
    tensors = (inputs, vectors, coefficients, gamma, center)
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    keep_kernel = wanted and len(inputs) * len(vectors) <= block_elements
    with full_precision(inputs.device):
        return _RBFScores.apply(*tensors, block_elements, keep_kernel)


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
    ) -> Tensor:
        scores = coefficients.new_zeros(len(inputs), coefficients.shape[1])
        by_column = coefficients.T.contiguous().T  # the layout in which MKL is twice as fast
        kept, room = [], inputs.new_empty(0)
        for rows, columns, z, s in _tiles(inputs, vectors, center, block_elements):
            kernel = _kernel(z, s, gamma, inputs.new_empty(0) if keep_kernel else room)
            scores[rows].addmm_(kernel, by_column[columns])
            if keep_kernel:
                kept.append(kernel)
        ctx.block_elements = block_elements
        ctx.save_for_backward(inputs, vectors, coefficients, gamma, center, scores, *kept)
        return scores

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple:
        inputs, vectors, coefficients, gamma, center, scores, *kept = ctx.saved_tensors
        tensors, needed = (inputs, vectors, coefficients, gamma, center), ctx.needs_input_grad[:4]
        with full_precision(grad.device):
            if torch.is_grad_enabled():
                found = _differentiable_gradients(grad, *tensors, needed)
            else:
                found = _gradients(grad, *tensors, scores, kept, ctx.block_elements, needed)
        return *found, torch.zeros_like(center) if ctx.needs_input_grad[4] else None, None, None


def _tiles(
    inputs: Tensor, vectors: Tensor, center: Tensor, block_elements: int
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Cut the kernel matrix: rows, columns, and the centred inputs and vectors of each tile.

    Centred vectors share one piece of memory: they last until the next tile is asked for.
    """
    n, m = len(inputs), len(vectors)
    most_rows, most_columns = _CPU_TILE if inputs.device.type == "cpu" else (n, m)
    width = max(1, min(m, most_columns, block_elements))
    blocks = math.ceil(n / max(1, min(most_rows, block_elements // width)))
    height = math.ceil(n / max(1, blocks))  # a last block of a few rows would be slow
    room = vectors.new_empty(0)
    for top in range(0, n, max(1, height)):
        rows = slice(top, min(top + height, n))
        z = inputs[rows] - center
        for left in range(0, m, width):
            columns = slice(left, min(left + width, m))
            part = vectors[columns]
            yield rows, columns, z, torch.sub(part, center, out=room.resize_(part.shape))


def _kernel(z: Tensor, s: Tensor, gamma: Tensor, room: Tensor) -> Tensor:
    distances = _unclamped_distances(z, s, out=room.resize_(len(z), len(s)))
    return distances.clamp_min_(0.0).mul_(-gamma).exp_()


def _gradients(
    grad: Tensor,
    inputs: Tensor,
    vectors: Tensor,
    coefficients: Tensor,
    gamma: Tensor,
    center: Tensor,
    scores: Tensor,
    kept: list[Tensor],
    block_elements: int,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Compute the gradients tile by tile.

    With W = K * (G A'), the derivative by an input z is 2 gamma (sum_j W_j s_j - sum_j W_j z), and
    sum_j W_j is the product of its rows of G and of the scores K A.
    """
    tensors = (inputs, vectors, coefficients, gamma)
    by_inputs, by_vectors, by_coefficients, by_gamma = found = [
        torch.zeros_like(t) if need else None for t, need in zip(tensors, needed, strict=True)
    ]
    room, more_room = inputs.new_empty(0), inputs.new_empty(0)
    tiles = _tiles(inputs, vectors, center, block_elements)
    for number, (rows, columns, z, s) in enumerate(tiles):
        kernel = kept[number] if kept else _kernel(z, s, gamma, room)
        weights = more_room.resize_(kernel.shape)
        torch.mm(grad[rows], coefficients[columns].T, out=weights).mul_(kernel)
        if needed[0]:
            by_inputs[rows].addmm_(weights, s)
        if needed[1]:
            by_vectors[columns].addmm_(weights.T, z).sub_(weights.sum(dim=0).unsqueeze(1) * s)
        if needed[2]:
            by_coefficients[columns].addmm_(kernel.T, grad[rows])
        if needed[3]:
            by_gamma.sub_(weights.mul_(_unclamped_distances(z, s)).sum())
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
