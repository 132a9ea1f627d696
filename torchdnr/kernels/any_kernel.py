"""Any kernel of gpytorch: its matrix and its scores, on the fused path where it is a plain RBF."""

import math
from threading import RLock

import torch
from gpytorch.kernels import Kernel, RBFKernel
from gpytorch.settings import lazily_evaluate_kernels
from torch import Tensor

from torchdnr.kernels.rbf import BLOCK_ELEMENTS, full_precision, rbf_scores, squared_distances
from torchdnr.kernels.row_blocks import entry_moments

_SETTINGS = RLock()  # those of gpytorch are the same for all threads


def scale_gamma(features: Tensor) -> float:
    """Compute scikit-learn's ``gamma="scale"`` of features ``(n, d)``; 1.0 where all are equal."""
    return gamma_for_variance(entry_moments(features)[0].item(), features.shape[1])


def gamma_for_variance(variance: float, d: int) -> float:
    """Compute 1 / (d * variance), as ``gamma="scale"`` for d features of this variance is."""
    return 1.0 / (d * variance) if variance > 0.0 else 1.0


def make_rbf_kernel(gamma: float | Tensor, like: Tensor) -> RBFKernel:
    """Build the gpytorch RBF kernel of a width > 0: gamma = 1 / (2 lengthscale^2).

    It takes the dtype and device of ``like``. Its hyper-parameter is frozen; call
    ``requires_grad_()`` on it to train it. A width that has a graph keeps it.
    """
    kernel = RBFKernel().to(like)
    kernel.lengthscale = math.sqrt(0.5 / (gamma.item() if isinstance(gamma, Tensor) else gamma))
    if isinstance(gamma, Tensor) and gamma.requires_grad:
        lengthscale = (0.5 / gamma).sqrt().reshape(1, 1).to(like)
        raw = kernel.raw_lengthscale_constraint.inverse_transform(lengthscale)
        del kernel.raw_lengthscale
        kernel.register_buffer("raw_lengthscale", raw)
    return kernel.requires_grad_(False)


def rbf_gamma(kernel: Kernel) -> Tensor | None:
    """Read gamma from a kernel that the fused path can take, a plain RBF with one lengthscale.

    It is a scalar tensor, differentiable by the lengthscale; None for any other kernel, which has
    to run through gpytorch.
    """
    # torch.export traces stand-ins of modules, each of another class.
    stands_in = torch.compiler.is_exporting() and hasattr(type(kernel), "get_base")
    kernel = kernel.get_base() if stands_in else kernel
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
        exponents = -gamma * squared_distances(inputs, vectors, center)
        return exponents.exp() if exponents.requires_grad else exponents.exp_()
    with full_precision(inputs.device):
        if kernel.is_stationary:
            same = vectors is inputs
            inputs = inputs - center
            vectors = inputs if same else vectors - center
        # Lazily, gpytorch would set active_dims of the kernel to None for a moment.
        with _SETTINGS, lazily_evaluate_kernels(False):
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
    """Sum kernel values times coefficients ``(m, c)``, in blocks of rows: ``(n, c)``.

    A plain RBF takes the fused path of ``rbf_scores``; the arguments are as there, and as in
    ``kernel_matrix``.
    """
    gamma = rbf_gamma(kernel)
    if gamma is not None:
        tensors = (inputs, vectors, coefficients, gamma, center)
        return rbf_scores(*tensors, block_elements=block_elements)
    rows = max(1, block_elements // max(1, len(vectors)))
    with full_precision(inputs.device):
        blocks = [
            kernel_matrix(kernel, block, vectors, center) @ coefficients
            for block in inputs.split(rows)
        ]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)
