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
    """Compute scikit-learn's ``gamma="scale"``: 1 / (d * variance of all entries).

    Args:
        features: Training features, ``(n, d)``.

    Returns:
        The kernel width; 1.0 for constant features, as scikit-learn has it.
    """
    return gamma_for_variance(entry_moments(features)[0].item(), features.shape[1])


def gamma_for_variance(variance: float, d: int) -> float:
    """Compute ``gamma="scale"`` for d features whose entries have this variance."""
    return 1.0 / (d * variance) if variance > 0.0 else 1.0


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
        tensors = (inputs, vectors, coefficients, gamma, center)
        return rbf_scores(*tensors, block_elements=block_elements)
    rows = max(1, block_elements // max(1, len(vectors)))
    with full_precision(inputs.device):
        blocks = [
            kernel_matrix(kernel, block, vectors, center) @ coefficients
            for block in inputs.split(rows)
        ]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)
