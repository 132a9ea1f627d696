"""Fewer support vectors: replace those of an `RBFSVM` by a few prototypes with the same scores.

The reduced-set problem. With f(z) = sum_j alpha_j k(z, s_j) the score of a class without its
intercept, prototypes p_i with coefficients beta_i minimise, over all classes,

    mean over the features of ||g - f||^2  +  smoothness * ||g - f||^2 in the space of the kernel,

g the sum over the prototypes. The second term holds the scores away from the features, where
attacks go: it bounds their difference everywhere (`score_bound`). Intercepts, center and kernel
stay as they are, and so do the scores far from all data and what a margin of 1 means.
"""

from copy import deepcopy

import torch
from torch import Tensor

from torchdnr.svm.checks import check_features
from torchdnr.svm.rbf_svm import RBFSVM
from torchdnr.svm.reduced_set import KernelSum, ReducedSet, greedy_choice

SMOOTHNESS = 1e-3
"""Weight of the difference in the space of the kernel, against that at the features."""

STEPS = 100
"""Iterations of L-BFGS on the positions of the prototypes."""


@torch.no_grad()
def compress_svm(
    svm: RBFSVM,
    features: Tensor,
    prototypes: int,
    *,
    targets: Tensor | None = None,
    steps: int = STEPS,
    smoothness: float = SMOOTHNESS,
) -> RBFSVM:
    """Replace the support vectors of a fitted SVM by fewer prototypes.

    They start at support vectors, chosen greedily: each time the one whose addition brings the
    sum nearest to the scores in the space of the kernel. Their coefficients always are the
    minimum, in closed form; their positions descend by L-BFGS, of which the best point is kept.
    Nothing is random. All is done in float64; beyond copies of the support vectors, memory is
    bounded: features are taken block by block.

    Args:
        svm: The fitted SVM, which is left as it is; any kernel but a precomputed one.
        features: Where the scores are compared, such as the training features, ``(n, d)``.
        prototypes: How many, 1..m.
        targets: Decision values wanted at the features, ``(n, P)``; None: those of ``svm``. In a
            stack the features may come from compressed SVMs and the targets from the original ones.
        steps: Iterations of L-BFGS, >= 0; 0 leaves the prototypes at support vectors.
        smoothness: Weight > 0 of the difference in the space of the kernel.

    Returns:
        A new SVM with the prototypes as ``support_vectors``. Its ``dual_coef`` are plain
        coefficients, which no C bounds; ``support`` is -1 and ``solution`` None: prototypes are no
        training samples, and no certificate of the dual problem holds for them.

    Raises:
        NotFittedError: If ``svm`` is not fitted.
        ValueError: If an argument is not as said above, or its kernel has no gradient.

    Source: Burges, "Simplified support vector decision rules", ICML (1996); the greedy choice is
    the f/P-greedy one of Wirtz and Haasdonk, "A vectorial kernel orthogonal greedy algorithm",
    Dolomites Research Notes on Approximation 6 (2013).
    """
    _check(svm, features, prototypes, targets, steps, smoothness)
    target = KernelSum.of(svm)
    if targets is None:
        blocks = features.split(target.block_rows)
        targets = torch.cat([svm._decision_values(block) for block in blocks])
    problem = ReducedSet(target, features, targets - svm.intercept, smoothness)
    start = target.vectors[greedy_choice(target, prototypes)]
    found = problem.descend(start, steps)
    return with_prototypes(svm, found, problem.coefficients(found))


def _check(
    svm: RBFSVM,
    features: Tensor,
    prototypes: int,
    targets: Tensor | None,
    steps: int,
    smoothness: float,
) -> None:
    svm._require_fit()
    if svm.is_precomputed:
        raise ValueError(
            "compression moves support vectors, and with a precomputed kernel there are none to "
            "move: fit the SVM on features, with the RBF or a kernel of gpytorch"
        )
    check_features(features)
    if features.shape[1] != svm.center.numel():
        raise ValueError(
            f"features must be (n, {svm.center.numel()}) as in fit, got {tuple(features.shape)}"
        )
    m = len(svm.support_vectors)
    if isinstance(prototypes, bool) or not isinstance(prototypes, int) or not 1 <= prototypes <= m:
        raise ValueError(
            f"prototypes must be an integer in 1..{m}, the number of support vectors, "
            f"got {prototypes!r}"
        )
    shape = len(features), svm.intercept.numel()
    if targets is not None and targets.shape != shape:
        raise ValueError(f"targets must be {shape}, got {tuple(targets.shape)}")
    if steps < 0 or not 0.0 < smoothness < torch.inf:
        raise ValueError(
            "expected steps >= 0 and smoothness > 0 and finite, "
            f"got steps={steps} and smoothness={smoothness}"
        )


def with_prototypes(svm: RBFSVM, prototypes: Tensor, coefficients: Tensor) -> RBFSVM:
    """Build an SVM that has prototypes in the place of its support vectors.

    Args:
        svm: The fitted SVM, of which intercept, center, kernel and settings are copied.
        prototypes: ``(p, d)``; brought to the dtype of the SVM.
        coefficients: ``(p, P)``.

    Returns:
        The new SVM, without a certificate.
    """
    kernel = deepcopy(svm.kernel)
    new = RBFSVM(**{**svm.settings(), "kernel": kernel if svm.has_own_kernel else None})
    new.kernel = kernel
    new.support_vectors = prototypes.detach().to(svm.support_vectors)
    new.support = torch.full_like(svm.support[:1], -1).repeat(len(prototypes))
    new.dual_coef = coefficients.detach().to(svm.dual_coef)
    new.intercept, new.center = svm.intercept.clone(), svm.center.clone()
    return new.train(svm.training)


@torch.no_grad()
def score_bound(svm: RBFSVM, compressed: RBFSVM) -> Tensor:
    """Bound the difference of two SVMs of one kernel, whatever the features.

    By Cauchy and Schwarz it is at most the norm of the difference in the space of the kernel, times
    sqrt(k(z, z)), and that is the same for all z where the kernel is stationary.

    Args:
        svm: A fitted SVM.
        compressed: Another of the same kernel, as ``compress_svm`` returns it.

    Returns:
        Largest difference of each decision value, ``(P,)``; infinite where the kernel is not
        stationary.

    Raises:
        ValueError: If the two have not the same kernel.
    """
    one, two = KernelSum.of(svm), KernelSum.of(compressed)
    probe = one.vectors[:8]
    if not torch.equal(one.matrix(probe, probe), two.matrix(probe, probe)):
        raise ValueError("expected two SVMs of the same kernel and width, got others")
    shift = (svm.intercept - compressed.intercept).double().abs()
    if not one.kernel.is_stationary:
        return torch.full_like(shift, torch.inf)
    vectors = torch.cat([one.vectors, two.vectors])
    coefficients = torch.cat([one.coefficients, -two.coefficients])
    squares = (coefficients * one.scores(vectors, vectors, coefficients)).sum(dim=0)
    largest = one.kernel(probe[:1], probe[:1], diag=True)
    return shift + (squares.clamp_min(0.0) * largest).sqrt()
