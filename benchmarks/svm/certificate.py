"""What a set of dual coefficients is worth, recomputed in float64 from nothing but the data.

Every contender is measured by the same few lines; no number that a solver reports is used.
"""

import torch
from torch import Tensor

BLOCK_ROWS = 1000
"""Rows of the Gram matrix held at a time."""


def gram_product(queries: Tensor, features: Tensor, gamma: float, vectors: Tensor) -> Tensor:
    """Multiply the float64 Gram matrix between queries and features by vectors, in row blocks.

    Args:
        queries: ``(q, d)``.
        features: ``(n, d)``.
        gamma: Kernel width.
        vectors: ``(n, P)``.

    Returns:
        Product, float64 ``(q, P)``.
    """
    center = features.double().mean(dim=0)
    features, vectors = features.double() - center, vectors.double()
    norms = features.square().sum(dim=1)
    blocks = []
    for block in queries.split(BLOCK_ROWS):
        moved = block.double() - center
        distances = torch.addmm(norms, moved, features.T, alpha=-2.0)
        distances += moved.square().sum(dim=1, keepdim=True)
        blocks.append(distances.clamp_min_(0.0).mul_(-gamma).exp_() @ vectors)
    return torch.cat(blocks)


def certificate(
    product: Tensor, targets: Tensor, coef: Tensor, intercept: Tensor, C: float
) -> dict[str, Tensor]:
    """Measure candidate solutions of one-vs-rest problems.

    Args:
        product: K b, float64 ``(n, P)``.
        targets: Labels in {-1, +1}, float64 ``(n, P)``.
        coef: b = y * alpha as the contender returned it, float64 ``(n, P)``.
        intercept: ``(P,)``.
        C: Upper bound of alpha.

    Returns:
        One value per problem: ``objective`` 1/2 b'Kb - y'b (smaller is better); ``primal`` at
        (b, intercept), at least minus the optimal objective; ``violation``, m - M of LIBSVM's
        stopping rule; ``sum_over_C`` |1'b| / C; ``outside_box``, the largest excess over the
        bounds as a share of C; ``support_vectors``, the number of nonzero coefficients.
    """
    lower, upper = (targets * C).clamp_max(0.0), (targets * C).clamp_min(0.0)
    quadratic, slope = (coef * product).sum(dim=0), targets - product
    hinge = (1.0 - targets * (product + intercept)).clamp_min(0.0)
    growing = slope.masked_fill(coef >= upper, -torch.inf).amax(dim=0)
    shrinking = slope.masked_fill(coef <= lower, torch.inf).amin(dim=0)
    outside = torch.maximum(lower - coef, coef - upper).clamp_min(0.0)
    return {
        "objective": quadratic / 2 - (targets * coef).sum(dim=0),
        "primal": quadratic / 2 + C * hinge.sum(dim=0),
        "violation": (growing - shrinking).clamp_min(0.0),
        "sum_over_C": coef.sum(dim=0).abs() / C,
        "outside_box": outside.amax(dim=0) / C,
        "support_vectors": coef.ne(0).sum(dim=0),
    }


def one_vs_rest(labels: Tensor, columns: int) -> Tensor:
    """Turn labels into one float64 column of -1 and +1 for each of the first classes.

    Args:
        labels: ``(n,)`` in 0..c-1.
        columns: Number of classes wanted.

    Returns:
        Targets, ``(n, columns)``.
    """
    classes = torch.arange(columns, device=labels.device)
    return (labels.unsqueeze(1) == classes).double() * 2 - 1
