"""LIBSVM's layout of one-vs-one coefficients, to which scikit-learn's attributes keep.

LIBSVM sorts the support vectors by class and stores c - 1 coefficients for each: that of class i
takes part in c - 1 pairs only, and row r holds its coefficient against the r-th other class.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from torchdnr.svm.multiclass import class_pairs, classes_of_pairs


class LibsvmLayout(NamedTuple):
    """Support vectors by class, and their coefficients against the other classes.

    Attributes:
        order: Rows of the support vectors in LIBSVM's order, int64 ``(m,)``.
        n_support: Support vectors of each class, int64 ``(c,)``.
        dual_coef: alpha * y, y = +1 for the first class of a pair, ``(c - 1, m)``.
    """

    order: Tensor
    n_support: Tensor
    dual_coef: Tensor


def to_libsvm(dual_coef: Tensor) -> LibsvmLayout:
    """Bring one column per pair of classes to LIBSVM's layout.

    The class of a support vector is read off its signs: > 0 in a pair whose first class it is.

    Args:
        dual_coef: alpha * y, ``(m, c (c - 1) / 2)``, ascending in the training samples. Rows of
            zeros, which support nothing, are left out of the layout.

    Returns:
        The layout, of at most m support vectors.
    """
    c = classes_of_pairs(dual_coef.shape[1])
    pairs = class_pairs(c, dual_coef.device)
    used = dual_coef.ne(0).any(dim=1).nonzero().squeeze(1)
    strongest = dual_coef[used].abs().argmax(dim=1, keepdim=True)
    is_second = dual_coef[used].gather(1, strongest).lt(0).long()
    classes = pairs[strongest.squeeze(1)].gather(1, is_second).squeeze(1)
    by_class = classes.argsort(stable=True)
    order, classes = used[by_class], classes[by_class]
    columns = _pairs_of_class(pairs)[classes]
    return LibsvmLayout(
        order, torch.bincount(classes, minlength=c), dual_coef[order].gather(1, columns).T
    )


def from_libsvm(dual_coef: Tensor, n_support: Tensor) -> Tensor:
    """Bring LIBSVM's layout to one column per pair of classes.

    Args:
        dual_coef: alpha * y, y = +1 for the first class of a pair, ``(c - 1, m)``.
        n_support: Support vectors of each class, int64 ``(c,)``.

    Returns:
        alpha * y, ``(m, c (c - 1) / 2)``, 0 where a support vector takes no part.
    """
    c = len(n_support)
    classes = torch.arange(c, device=n_support.device).repeat_interleave(n_support)
    pairs = class_pairs(c, n_support.device)
    columns = _pairs_of_class(pairs)[classes]
    return dual_coef.new_zeros(len(classes), len(pairs)).scatter(1, columns, dual_coef.T)


def _pairs_of_class(pairs: Tensor) -> Tensor:
    """List the pairs that each class is in, by the other class, ``(c, c - 1)``."""
    c = int(pairs.max()) + 1
    index = torch.arange(len(pairs), device=pairs.device)
    table = torch.zeros(c, c, dtype=torch.int64, device=pairs.device)
    table[pairs[:, 0], pairs[:, 1]] = table[pairs[:, 1], pairs[:, 0]] = index
    others = ~torch.eye(c, dtype=torch.bool, device=pairs.device)
    return table[others].view(c, c - 1)
