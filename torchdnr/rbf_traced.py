"""Sums of RBF kernels as one plain formula, for `torch.export`."""

from torch import Tensor


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
