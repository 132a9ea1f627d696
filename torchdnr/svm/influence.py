"""Which training samples a decision rests on: how scores change if one of them is left out."""

from typing import NamedTuple

import torch
from torch import Tensor

from torchdnr.decisions import NotFittedError
from torchdnr.kernels.any_kernel import kernel_matrix
from torchdnr.svm.multiclass import ONE_VS_REST
from torchdnr.svm.rbf_svm import RBFSVM

RIDGE = 1e-10
"""Added to the diagonal of the free samples' kernel, which duplicates make singular."""
SLACK = 10.0
"""Times the tolerance of the fit within which a sample counts as on the margin, and so as free."""


class Influence(NamedTuple):
    """What each training sample does to one score of each input.

    Attributes:
        support: Indices of the m support vectors among the training samples, int64 ``(m,)``; no
            other sample has any influence.
        effects: By how much the score is higher for each of them than it were without, ``(n, m)``:
            those > 0 support it, those < 0 oppose it.
    """

    support: Tensor
    effects: Tensor

    def strongest(self, row: int, count: int) -> tuple[list[int], list[int]]:
        """Return the training samples that support and oppose a score most, ``count`` or fewer."""
        effects = self.effects[row]
        order = effects.argsort(descending=True)
        supporting = order[effects[order] > 0][:count]
        opposing = order[effects[order] < 0].flip(0)[:count]
        return self.support[supporting].tolist(), self.support[opposing].tolist()


@torch.no_grad()
def influence(svm: RBFSVM, features: Tensor, classes: Tensor) -> Influence:
    """Compute by how much a score would fall if the SVM were fitted without one of its samples.

    It is exact where all other samples stay free or at their bound as they are; elsewhere it is an
    estimate that ranks samples well, and overstates what others would take over. It takes the
    kernel between the support vectors, ``(m, m)``, and an inverse per class.

    Args:
        svm: A fitted one-vs-rest SVM, not compressed.
        features: Inputs, ``(n, d)``.
        classes: Whose score, of each input, int64 ``(n,)``.

    Returns:
        The effects, in float64.

    Raises:
        NotFittedError: If the SVM is not fitted.
        ValueError: If it is one-vs-one, compressed, or has a precomputed kernel.

    Source: the leave-one-out formula of least squares on the free samples, after Cauwenberghs and
    Poggio, "Incremental and decremental support vector machine learning", NeurIPS 2000.
    """
    if not svm.is_fitted:
        raise NotFittedError("influence needs a fitted RBFSVM: call fit(features, labels)")
    if svm.strategy != ONE_VS_REST or svm.kernel is None or bool((svm.support < 0).any()):
        raise ValueError(
            "influence needs an RBFSVM that is one-vs-rest, with a kernel and the support vectors "
            "of its fit; this one is one-vs-one, precomputed or compressed"
        )
    vectors, b = svm.support_vectors, svm.dual_coef.double()
    between = kernel_matrix(svm.kernel, vectors, vectors, svm.center).double()
    toward = kernel_matrix(svm.kernel, features.to(vectors), vectors, svm.center).double()
    margins = (between @ b + svm.intercept) * b.sign()
    free = (margins - 1).abs() <= SLACK * svm.tol
    effects = torch.zeros_like(toward)
    for k in classes.unique().tolist():
        rows = classes == k
        effects[rows] = _effects(between, toward[rows], b[:, k], free[:, k] & b[:, k].ne(0))
    return Influence(svm.support, effects)


def _effects(between: Tensor, toward: Tensor, b: Tensor, free: Tensor) -> Tensor:
    """Compute the effects in one binary problem, ``(n, m)``.

    With M = [K_FF 1; 1' 0] and k(x) = [K_xF; 1] a bounded sample i adds ``b_i (K_xi - k(x)'M^-1
    k_i)``, a free one ``b_i (M^-1 k(x))_i / (M^-1)_ii``: the others take over the rest.
    """
    if not free.any():
        return toward * b  # the intercept is not determined then, and stays
    size = int(free.sum())
    system = between.new_ones(size + 1, size + 1)
    system[:size, :size] = between[free][:, free]
    system[:size, :size].diagonal().add_(RIDGE)
    system[size, size] = 0.0
    inverse = torch.linalg.inv(system)
    one = between.new_ones(1)
    solved = torch.cat([toward[:, free], one.expand(len(toward), 1)], dim=1) @ inverse  # (n, f + 1)
    shares = torch.cat([between[free], one.expand(1, between.shape[1])])
    effects = b * (toward - solved @ shares)
    effects[:, free] = b[free] * solved[:, :size] / inverse.diagonal()[:size]
    return effects
