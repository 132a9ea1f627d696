"""Sums of RBF kernels as an operator that `torch.compile` takes whole.

A compiler that sees the formula makes the whole kernel, and the centred vectors in every call. As
one operator the sums are those of ``rbf_scores``: in tiles, with what is kept between calls.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from torchdnr.kernels.rbf import (
    BLOCK_ELEMENTS,
    full_precision,
    gradients,
    moved_vectors,
    sum_kernels,
)
from torchdnr.rbf_tiles import cut_tiles, tile_slices

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
