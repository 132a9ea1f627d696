"""Kernel matrices and kernel scores: a fused path for the RBF, gpytorch itself for the rest."""

from torchdnr.kernels.any_kernel import (
    kernel_matrix,
    kernel_scores,
    make_rbf_kernel,
    rbf_gamma,
    scale_gamma,
)
from torchdnr.kernels.rbf import BLOCK_ELEMENTS, full_precision, rbf_scores, squared_distances

__all__ = [
    "BLOCK_ELEMENTS",
    "full_precision",
    "kernel_matrix",
    "kernel_scores",
    "make_rbf_kernel",
    "rbf_gamma",
    "rbf_scores",
    "scale_gamma",
    "squared_distances",
]
