"""Sums of RBF kernels: squared distances, scores and their exact gradients, tile by tile.

Inputs and vectors are measured from one center, the mean of the training features: that removes the
cancellation of large norms, and a row's distances depend on no other row of its batch.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import RLock
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

BLOCK_ELEMENTS = 2**24
"""Largest number of kernel values held at once while scoring (64 MiB in float32)."""

_CPU_TILE = (1024, 512)
"""Most rows and columns of a tile on a CPU: it stays in cache from the exponents to the sum."""
_CPU_TILE_ELEMENTS = 2**15
"""Kernel values up to which a tile of few rows may have more columns."""
_COLUMN_LAYOUT = (32, 64)
"""From so many rows, and up to so many classes, MKL is twice as fast by columns."""
_SWITCHES = RLock()
_LOWERED: dict[Any, str] = {}
"""The switches that ``full_precision`` has changed, and what they were set to."""
_BLOCKS: set[object] = set()
"""The blocks, in all threads, that rely on it."""


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Keep TF32, bfloat16 products and autocast away from the enclosed products.

    A score sums kernel values times dual coefficients as large as C: the ten mantissa bits that
    TF32 leaves to a distance would show in the leading digits of the score. The switches are those
    of all threads: they go back when the last such block ends. Under `torch.compile`, which cannot
    change them, it keeps away autocast alone.

    Args:
        device: Where the enclosed work runs.
    """
    if torch.compiler.is_compiling():
        with torch.autocast(device.type, enabled=False):
            yield
        return
    autocast: AbstractContextManager[Any] = nullcontext()
    if torch.is_autocast_enabled(device.type):  # not all kinds of device have it
        autocast = torch.autocast(device.type, enabled=False)
    mkldnn = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # torch does not type it
    block = object()
    with _SWITCHES:
        for switch in (torch.backends.cuda.matmul, mkldnn):
            if switch.fp32_precision not in ("ieee", "none"):
                _LOWERED[switch] = switch.fp32_precision
                switch.fp32_precision = "ieee"
        if _LOWERED:  # by this block, or by one of another thread that may end before it
            _BLOCKS.add(block)
    try:
        with autocast:
            yield
    finally:
        if block in _BLOCKS:
            with _SWITCHES:
                _BLOCKS.remove(block)
                while _LOWERED and not _BLOCKS:
                    switch, precision = _LOWERED.popitem()
                    switch.fp32_precision = "none"  # inherits, as before if that suffices
                    if switch.fp32_precision != precision:
                        switch.fp32_precision = precision


def squared_norms(rows: Tensor) -> Tensor:
    """Compute the squared norms of rows ``(n, d)``; ``(n,)``."""
    if rows.requires_grad:
        return rows.square().sum(dim=1)  # the norm has no second derivative at 0
    return torch.linalg.vector_norm(rows, dim=1).square_()


def squared_distances(inputs: Tensor, vectors: Tensor, center: Tensor) -> Tensor:
    """Compute all squared Euclidean distances of features by one matrix product, ``(n, m)``.

    Inputs ``(n, d)`` and vectors ``(m, d)`` are measured from ``center``, the mean of the training
    features. Distances are at least 0; without gradient the diagonal is exactly 0 where the vectors
    are the inputs themselves.
    """
    with full_precision(inputs.device):
        z = inputs - center
        if vectors is inputs:
            distances = _unclamped_distances(z, z).clamp_min_(0.0)
            return distances.fill_diagonal_(0.0) if not distances.requires_grad else distances
        return _unclamped_distances(z, vectors - center).clamp_min_(0.0)


def _unclamped_distances(inputs: Tensor, vectors: Tensor) -> Tensor:
    """Compute squared distances, which rounding may make negative."""
    products = torch.addmm(squared_norms(vectors), inputs, vectors.T, alpha=-2.0)
    return products.add_(squared_norms(inputs).unsqueeze(1))


def rbf_scores(
    inputs: Tensor,
    vectors: Tensor,
    coefficients: Tensor,
    gamma: Tensor,
    center: Tensor | None = None,
    *,
    norms: Tensor | None = None,
    block_elements: int = BLOCK_ELEMENTS,
) -> Tensor:
    """Compute ``sum_j coefficients_j exp(-gamma ||inputs - vectors_j||^2)`` for all classes.

    The kernel is made tile by tile. It is kept for the gradient if it has at most
    ``block_elements`` entries; otherwise its tiles are made again there. Derivatives of any order
    by all of inputs, vectors, coefficients and gamma are exact; only a gradient that is itself to
    be differentiated (``create_graph=True``) needs the whole kernel at once, and so do those of
    ``torch.func`` and of forward mode.

    Under ``torch.compile`` it is ``compiled_rbf_scores``, under ``torch.export``
    ``traced_rbf_scores``.

    Args:
        inputs: Features, ``(n, d)``.
        vectors: Support vectors, ``(m, d)``.
        coefficients: One column of dual coefficients per class, ``(m, c)``.
        gamma: Kernel width, a scalar tensor > 0.
        center: Mean of the training features, ``(d,)``; None if both sides are measured from it
            already. It serves the rounding alone: the sums do not depend on it.
        norms: Squared norms of the vectors less the center, ``(m,)``, if they are at hand.
        block_elements: Largest number of kernel values held at once.

    Returns:
        Sums without intercept, ``(n, c)``.
    """
    if center is not None:
        inputs, vectors = inputs - center, vectors - center
    if torch.compiler.is_exporting():
        return traced_rbf_scores(inputs, vectors, coefficients, gamma)
    if norms is None:
        norms = squared_norms(vectors.detach())
    tensors = (inputs, vectors, coefficients, gamma)
    if torch.compiler.is_compiling():
        return compiled_rbf_scores(*tensors, norms)
    if is_transformed():
        with full_precision(inputs.device):
            if forward_ad._current_level >= 0:  # its derivatives are plain operations too
                return _plain_scores(*tensors)
            return _TransformedScores.apply(*tensors, block_elements)
    size = len(inputs) * len(vectors)
    keep = size <= block_elements and _gradient_is_wanted(*tensors)
    kernel = inputs.new_empty(size if keep else 0)
    with full_precision(inputs.device):
        return _RBFScores.apply(*tensors, norms, kernel, block_elements)


def traced_rbf_scores(
    inputs: Tensor, vectors: Tensor, coefficients: Tensor, gamma: Tensor
) -> Tensor:
    """Compute what ``rbf_scores`` computes, in plain operations of PyTorch.

    An exported program has to run without this package. The kernel is made whole, ``(n, m)``: a
    number of rows that is only known when the program runs cannot be cut into tiles.
    """
    norms = inputs.square().sum(dim=1, keepdim=True) + vectors.square().sum(dim=1)
    distances = (norms - 2.0 * inputs @ vectors.T).clamp_min(0.0)
    return (-gamma * distances).exp() @ coefficients


def compiled_rbf_scores(
    inputs: Tensor, vectors: Tensor, coefficients: Tensor, gamma: Tensor, norms: Tensor
) -> Tensor:
    """Compute what ``rbf_scores`` computes, as one operator of a program that is being compiled.

    Its derivatives are of first order. Where they are wanted the kernel is kept for them, whatever
    its size.
    """
    keep = _gradient_is_wanted(inputs, vectors, coefficients, gamma)
    return scores_and_kernel(inputs, vectors, coefficients, gamma, norms, keep)[0]


def is_transformed() -> bool:
    """Tell whether a transform of ``torch.func`` or forward-mode differentiation is under way."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _gradient_is_wanted(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def tiles(inputs: Tensor, vectors: Tensor, block_elements: int) -> Iterator[tuple[slice, slice]]:
    """Yield rows and columns of each tile of the kernel, left to right, then top to bottom."""
    n, m = len(inputs), len(vectors)
    most_rows, most_columns = _CPU_TILE if inputs.device.type == "cpu" else (n, m)
    most_columns = max(most_columns, _CPU_TILE_ELEMENTS // max(1, n))
    width = max(1, min(m, most_columns, block_elements))
    blocks = math.ceil(n / max(1, min(most_rows, block_elements // width)))
    height = math.ceil(n / max(1, blocks))  # a last block of a few rows would be slow
    for top in range(0, n, max(1, height)):
        for left in range(0, m, width):
            yield slice(top, min(top + height, n)), slice(left, min(left + width, m))


def _split_kernel(
    kernel: Tensor, inputs: Tensor, vectors: Tensor, block_elements: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield rows, columns and memory of each tile: its part of the kernel, or one for all."""
    keep, buffer, start = kernel.numel() > 0, inputs.new_empty(0), 0
    for rows, columns in tiles(inputs, vectors, block_elements):
        height, width = rows.stop - rows.start, columns.stop - columns.start
        if keep:
            yield rows, columns, kernel[start : start + height * width].view(height, width)
            start += height * width
        else:
            yield rows, columns, buffer.resize_(height, width)


def _exponentials_(products: Tensor, input_norms: Tensor, gamma: Tensor) -> Tensor:
    """Make kernel values of the vectors' norms less twice the products, in their memory."""
    return products.add_(input_norms).clamp_min_(0.0).mul_(-gamma).exp_()


def sum_kernels(
    ctx: Any,  # noqa: ANN401 - that of autograd, which has no public type
    inputs: Tensor,
    vectors: Tensor,
    coefficients: Tensor,
    gamma: Tensor,
    norms: Tensor,
    kernel: Tensor,
    block_elements: int,
) -> Tensor:
    """Sum kernel values times coefficients: ``(n, c)``, of inputs and vectors less the center.

    ``kernel`` is memory for all kernel values, tile after tile, ``(n * m,)``; ``(0,)`` if they are
    not to be kept. ``_RBFScores`` saves in ``ctx`` what its backward pass needs; None elsewhere.
    """
    n, c = len(inputs), coefficients.shape[1]
    scores = coefficients.new_zeros(n, c)
    input_norms = squared_norms(inputs.detach()).unsqueeze(1)
    few_columns = n >= _COLUMN_LAYOUT[0] and c <= _COLUMN_LAYOUT[1]
    factors = coefficients.T.contiguous().T if few_columns else coefficients
    for rows, columns, tile in _split_kernel(kernel, inputs, vectors, block_elements):
        torch.addmm(norms[columns], inputs[rows], vectors[columns].T, alpha=-2.0, out=tile)
        _exponentials_(tile, input_norms[rows], gamma)
        scores[rows].addmm_(tile, factors[columns])
    if ctx is not None:
        ctx.block_elements = block_elements
        ctx.save_for_backward(inputs, vectors, coefficients, gamma, norms, scores, kernel)
    return scores


def kernel_gradients(
    grad: Tensor,
    inputs: Tensor,
    vectors: Tensor,
    coefficients: Tensor,
    gamma: Tensor,
    norms: Tensor,
    scores: Tensor,
    kernel: Tensor,
    needed: Sequence[bool],
    block_elements: int,
) -> list[Tensor | None]:
    """Compute the gradients of the sums tile by tile, None where not ``needed``.

    ``grad`` is that of the sums, ``scores`` the sums; the rest is as in ``sum_kernels``. With W = K
    * (G A'), the derivative by an input z is 2 gamma (sum_j W_j s_j - sum_j W_j z), and sum_j W_j
    is the product of its rows of G and of the scores K A.
    """
    by_inputs, by_vectors, by_coefficients, by_gamma = gradients = [
        torch.zeros_like(tensor) if need else None
        for tensor, need in zip((inputs, vectors, coefficients, gamma), needed, strict=True)
    ]
    input_norms = squared_norms(inputs.detach()).unsqueeze(1)
    buffer = inputs.new_empty(0)
    for rows, columns, tile in _split_kernel(kernel, inputs, vectors, block_elements):
        z, s = inputs[rows], vectors[columns]
        if not kernel.numel():
            torch.addmm(norms[columns], z, s.T, alpha=-2.0, out=tile)
            _exponentials_(tile, input_norms[rows], gamma)
        weights = buffer.resize_(tile.shape)
        torch.mm(grad[rows], coefficients[columns].T, out=weights).mul_(tile)
        if by_inputs is not None:
            by_inputs[rows].addmm_(weights, s)
        if by_vectors is not None:
            by_vectors[columns].addmm_(weights.T, z).sub_(weights.sum(dim=0).unsqueeze(1) * s)
        if by_coefficients is not None:
            by_coefficients[columns].addmm_(tile.T, grad[rows])
        if by_gamma is not None:
            distances = torch.addmm(norms[columns], z, s.T, alpha=-2.0).add_(input_norms[rows])
            by_gamma.sub_(weights.mul_(distances).sum())
    if by_inputs is not None:
        by_inputs.sub_((grad * scores).sum(dim=1, keepdim=True) * inputs).mul_(2 * gamma)
    if by_vectors is not None:
        by_vectors.mul_(2 * gamma)
    return gradients


class _RBFScores(torch.autograd.Function):
    """``exp(-gamma D) A`` with D the squared distances; two matrix products each way."""

    forward = staticmethod(sum_kernels)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - as above
        needed = ctx.needs_input_grad[:4]
        with full_precision(grad.device):
            # A batch of gradients: torch.autograd.grad(..., is_grads_batched=True).
            is_batched = torch._C._functorch.is_legacy_batchedtensor(grad)
            if torch.is_grad_enabled() or is_batched or is_transformed():
                gradients = _plain_gradients(grad, ctx.saved_tensors[:4], needed)
            else:
                options = {"needed": needed, "block_elements": ctx.block_elements}
                gradients = kernel_gradients(grad, *ctx.saved_tensors, **options)
        return *gradients, None, None, None


class _TransformedScores(torch.autograd.Function):
    """``_RBFScores`` under the transforms of ``torch.func``.

    It is a class of its own because torch takes as long to call one that has ``setup_context`` as
    to score a few inputs.
    """

    @staticmethod
    def forward(
        inputs: Tensor, vectors: Tensor, coefficients: Tensor, gamma: Tensor, block_elements: int
    ) -> Tensor:
        norms, kernel = squared_norms(vectors), inputs.new_empty(0)
        tensors = (inputs, vectors, coefficients, gamma, norms, kernel)
        return sum_kernels(None, *tensors, block_elements)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
        ctx.save_for_backward(*inputs[:4])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        with full_precision(grad.device):
            return *_plain_gradients(grad, ctx.saved_tensors, ctx.needs_input_grad[:4]), None

    @staticmethod
    def vmap(
        info: Any,  # noqa: ANN401 - torch does not export its type
        in_dims: tuple[int | None, ...],
        inputs: Tensor,
        *others: Any,  # noqa: ANN401 - the other arguments of forward
    ) -> tuple[Tensor, int]:
        dim, *rest = in_dims
        if dim is not None and rest == [None] * len(rest):  # a larger batch, to the same vectors
            inputs = inputs.movedim(dim, 0)
            scores = _TransformedScores.apply(inputs.flatten(0, 1), *others)
            return scores.unflatten(0, inputs.shape[:2]), 0
        return torch.vmap(_plain_scores, in_dims[:4])(inputs, *others[:3]), 0


def _plain_kernel(inputs: Tensor, vectors: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Compute squared distances and kernel values, ``(n, m)``, in operations that have derivatives.

    Distances are not clamped: where rounding makes one negative, the clamp would take away its
    part of the second derivative.
    """
    norms = inputs.square().sum(dim=1, keepdim=True)
    distances = torch.addmm(vectors.square().sum(dim=1), inputs, vectors.T, alpha=-2.0) + norms
    return distances, (-gamma * distances).exp()


def _plain_scores(inputs: Tensor, vectors: Tensor, coefficients: Tensor, gamma: Tensor) -> Tensor:
    return _plain_kernel(inputs, vectors, gamma)[1] @ coefficients


def _plain_gradients(
    grad: Tensor, tensors: Sequence[Tensor], needed: Sequence[bool]
) -> list[Tensor | None]:
    """Compute what ``kernel_gradients`` computes, of the whole kernel, to be differentiated."""
    inputs, vectors, coefficients, gamma = tensors
    distances, kernel = _plain_kernel(inputs, vectors, gamma)
    weights = kernel * (grad @ coefficients.T)
    formulas: tuple[Callable[[], Tensor], ...] = (
        lambda: 2 * gamma * (weights @ vectors - weights.sum(1, keepdim=True) * inputs),
        lambda: 2 * gamma * (weights.T @ inputs - weights.sum(0).unsqueeze(1) * vectors),
        lambda: kernel.T @ grad,
        lambda: -(weights * distances).sum(),
    )
    return [formula() if need else None for formula, need in zip(formulas, needed, strict=True)]


@torch.library.custom_op("torchdnr::rbf_scores", mutates_args=())
def scores_and_kernel(
    inputs: Tensor,
    vectors: Tensor,
    coefficients: Tensor,
    gamma: Tensor,
    norms: Tensor,
    keep_kernel: bool,
) -> tuple[Tensor, Tensor]:
    """Sum kernels times coefficients, ``(n, c)``; return all kernel values too, or ``(0,)``."""
    kernel = inputs.new_empty(len(inputs) * len(vectors) if keep_kernel else 0)
    tensors = (inputs, vectors, coefficients, gamma, norms, kernel)
    with full_precision(inputs.device):
        return sum_kernels(None, *tensors, BLOCK_ELEMENTS), kernel


@scores_and_kernel.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401 - those of the operator
    inputs, vectors, coefficients, _, _, keep_kernel = arguments
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
    norms: Tensor,
    scores: Tensor,
    kernel: Tensor,
    needed: Sequence[bool],
) -> list[Tensor]:
    """Compute what ``kernel_gradients`` computes, ``(0,)`` in the place of those not needed."""
    tensors = (inputs, vectors, coefficients, gamma, norms, scores, kernel)
    with full_precision(inputs.device):
        gradients = kernel_gradients(grad, *tensors, needed, BLOCK_ELEMENTS)
    return [inputs.new_empty(0) if part is None else part for part in gradients]


@rbf_gradients.register_fake
def _(*arguments: Any) -> list[Tensor]:  # noqa: ANN401 - those of the operator
    tensors, needed = arguments[1:5], arguments[-1]
    return [
        torch.empty_like(t, memory_format=torch.preserve_format) if need else t.new_empty(0)
        for t, need in zip(tensors, needed, strict=True)
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ANN401
    *tensors, _ = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    needed = ctx.needs_input_grad[:4]
    gradients = rbf_gradients(grad, *ctx.saved_tensors, needed)
    return (*(g if need else None for g, need in zip(gradients, needed, strict=True)), None, None)


scores_and_kernel.register_autograd(_backward, setup_context=_save)
