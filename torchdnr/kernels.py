"""Kernel matrices and kernel scores: a fused path for the RBF, gpytorch itself for the rest."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from gpytorch.kernels import Kernel, RBFKernel
from torch import Tensor

BLOCK_ELEMENTS = 2**24
"""Largest number of kernel values held at once while scoring (64 MiB in float32)."""


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Keep TF32, bfloat16 products and autocast away from the enclosed products.

    A score sums kernel values times dual coefficients as large as C: the ten mantissa bits that
    TF32 leaves to a distance would show in the leading digits of the score.

    Args:
        device: Where the enclosed work runs.
    """
    modules = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
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
            distances = _squared_distances(moved, moved)
            return distances.fill_diagonal_(0.0) if not distances.requires_grad else distances
        return _squared_distances(moved, vectors - center)


def _squared_distances(inputs: Tensor, vectors: Tensor) -> Tensor:
    norms = inputs.square().sum(dim=1, keepdim=True)
    products = torch.addmm(vectors.square().sum(dim=1), inputs, vectors.T, alpha=-2.0)
    return (products + norms).clamp_min(0.0)


class _RBFScores(torch.autograd.Function):
    """``exp(-gamma D) A`` with D the squared distances; two matrix products each way.

    ``keep_kernel`` stores the kernel block for the backward pass; otherwise it is recomputed. When
    the gradient itself is to be differentiated the block is always recomputed, since a stored
    block would count as a constant.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        inputs: Tensor,
        vectors: Tensor,
        coefficients: Tensor,
        gamma: Tensor,
        keep_kernel: bool,
    ) -> Tensor:
        kernel = _squared_distances(inputs, vectors).mul_(-gamma).exp_()
        ctx.save_for_backward(
            inputs, vectors, coefficients, gamma, *([kernel] if keep_kernel else [])
        )
        return kernel @ coefficients

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple:
        inputs, vectors, coefficients, gamma, *kept = ctx.saved_tensors
        with full_precision(grad.device):
            if kept and not torch.is_grad_enabled():
                kernel = kept[0]
            else:
                kernel = (-gamma * _squared_distances(inputs, vectors)).exp()
            return *_rbf_gradients(
                grad, inputs, vectors, coefficients, gamma, kernel, ctx.needs_input_grad
            ), None


def _rbf_gradients(
    grad: Tensor,
    inputs: Tensor,
    vectors: Tensor,
    coefficients: Tensor,
    gamma: Tensor,
    kernel: Tensor,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of RBF scores, by differentiable operations only.

    With W = K * (G A'), the derivative by an input z is -2 gamma (sum_j W_j z - sum_j W_j s_j).
    """
    weights = kernel * (grad @ coefficients.T)
    grad_inputs = grad_vectors = grad_coefficients = grad_gamma = None
    if needed[0]:
        moments = torch.addmm(
            weights.sum(dim=1, keepdim=True) * inputs, weights, vectors, beta=1.0, alpha=-1.0
        )
        grad_inputs = -2.0 * gamma * moments
    if needed[1]:
        moments = weights.sum(dim=0).unsqueeze(1) * vectors - weights.T @ inputs
        grad_vectors = -2.0 * gamma * moments
    if needed[2]:
        grad_coefficients = kernel.T @ grad
    if needed[3]:
        grad_gamma = -(weights * _squared_distances(inputs, vectors)).sum()
    return grad_inputs, grad_vectors, grad_coefficients, grad_gamma


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

    The kernel is never held whole when it has more than ``block_elements`` entries: blocks of rows
    are scored one after the other, and recomputed for the gradient. First and second derivatives
    by all of inputs, vectors, coefficients and gamma are exact.

    Args:
        inputs: Features, ``(n, d)``.
        vectors: Support vectors, ``(m, d)``.
        coefficients: One column of dual coefficients per class, ``(m, c)``.
        gamma: Kernel width, a scalar tensor > 0.
        center: Mean of the training features, ``(d,)``.
        block_elements: Largest number of kernel values held at once.

    Returns:
        Sums without intercept, ``(n, c)``.
    """
    with full_precision(inputs.device):
        moved, moved_vectors = inputs - center, vectors - center
        rows = max(1, block_elements // max(1, len(vectors)))
        keep_kernel = len(inputs) <= rows
        blocks = [
            _RBFScores.apply(block, moved_vectors, coefficients, gamma, keep_kernel)
            for block in moved.split(rows)
        ]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def scale_gamma(features: Tensor) -> float:
    """Compute scikit-learn's ``gamma="scale"``: 1 / (d * variance of all entries).

    Args:
        features: Training features, ``(n, d)``.

    Returns:
        The kernel width; 1.0 for constant features, as scikit-learn has it.
    """
    variance = features.double().var(correction=0).item()
    return 1.0 / (features.shape[1] * variance) if variance > 0.0 else 1.0


def make_rbf_kernel(gamma: float, like: Tensor) -> RBFKernel:
    """Build the gpytorch RBF kernel of a given width: gamma = 1 / (2 lengthscale^2).

    Args:
        gamma: Kernel width, > 0.
        like: Tensor whose dtype and device the kernel takes.

    Returns:
        Kernel whose hyper-parameter is frozen; call ``requires_grad_()`` on it to train it.
    """
    kernel = RBFKernel().to(like)
    kernel.lengthscale = math.sqrt(0.5 / gamma)
    return kernel.requires_grad_(False)


def rbf_gamma(kernel: Kernel) -> Tensor | None:
    """Read gamma from a kernel that the fused path can take.

    Args:
        kernel: Any gpytorch kernel.

    Returns:
        Gamma as a scalar tensor, differentiable by the lengthscale; None for any kernel other
        than a plain RBF with one lengthscale, which then has to run through gpytorch.
    """
    plain = type(kernel) is RBFKernel and kernel.active_dims is None
    if not plain or kernel.lengthscale.numel() != 1:
        return None
    return 0.5 / kernel.lengthscale.square().reshape(())


def kernel_matrix(kernel: Kernel, inputs: Tensor, vectors: Tensor, center: Tensor) -> Tensor:
    """Evaluate a kernel between two sets of features.

    Args:
        kernel: Any gpytorch kernel.
        inputs: Features, ``(n, d)``.
        vectors: Features, ``(m, d)``.
        center: Mean of the training features, ``(d,)``. A non-stationary kernel, which is not
            invariant to it, gets the features as they are.

    Returns:
        Kernel values, ``(n, m)``.
    """
    gamma = rbf_gamma(kernel)
    if gamma is not None:
        return (-gamma * squared_distances(inputs, vectors, center)).exp()
    with full_precision(inputs.device):
        if kernel.is_stationary:
            same = vectors is inputs
            inputs = inputs - center
            vectors = inputs if same else vectors - center
        return kernel(inputs, vectors).to_dense()


def kernel_scores(
    kernel: Kernel,
    inputs: Tensor,
    vectors: Tensor,
    coefficients: Tensor,
    center: Tensor,
    *,
    block_elements: int = BLOCK_ELEMENTS,
) -> Tensor:
    """Sum kernel values times coefficients, in blocks of rows.

    Args:
        kernel: Any gpytorch kernel; a plain RBF takes the fused path of ``rbf_scores``.
        inputs: Features, ``(n, d)``.
        vectors: Support vectors, ``(m, d)``.
        coefficients: One column per class, ``(m, c)``.
        center: Mean of the training features, ``(d,)``.
        block_elements: Largest number of kernel values held at once on the fused path.

    Returns:
        Sums without intercept, ``(n, c)``.
    """
    gamma = rbf_gamma(kernel)
    if gamma is not None:
        return rbf_scores(
            inputs, vectors, coefficients, gamma, center, block_elements=block_elements
        )
    rows = max(1, block_elements // max(1, len(vectors)))
    with full_precision(inputs.device):
        blocks = [
            kernel_matrix(kernel, block, vectors, center) @ coefficients
            for block in inputs.split(rows)
        ]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)
