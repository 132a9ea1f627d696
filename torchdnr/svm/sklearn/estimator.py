"""`RBFSVC`: the SVM as an estimator of scikit-learn, in the place of `sklearn.svm.SVC`."""

import warnings
from collections.abc import Mapping
from typing import Any, Self, cast

import torch

from torchdnr.svm.dual import Certificate, ConvergenceWarning
from torchdnr.svm.multiclass import ONE_VS_ONE, class_pairs, votes_and_confidence
from torchdnr.svm.rbf_svm import RBFSVM
from torchdnr.svm.sklearn.convert import MISSING, to_libsvm

try:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray
    from scipy.sparse import issparse
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.exceptions import ConvergenceWarning as SklearnConvergenceWarning
    from sklearn.utils import Tags, compute_class_weight
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data
except ImportError as missing:
    raise ImportError(MISSING) from missing

FLOATS = [np.float64, np.float32]
HARD_MARGIN = 1e10
"""The C that stands for C = inf."""
UNLIMITED = 10_000_000
"""Steps per problem for max_iter = -1: the limit of LIBSVM itself, so that a fit ends."""


class RBFSVC(ClassifierMixin, BaseEstimator):
    """Support vector classifier with ``SVC``'s parameters, attributes and decision values.

    Binary problems are those of LIBSVM, one per pair of classes. It differs from ``SVC`` thus:
    kernels are "rbf" and "precomputed" (which must be symmetric) only, inputs dense; float32 inputs
    are solved in float32; samples of weight <= 0 are left out of ``gamma="scale"`` too;
    ``class_weight`` must be > 0; and there is no ``probability``: see ``CalibratedClassifierCV``.

    Args:
        C: Upper bound of the dual variables, > 0; inf counts as 1e10.
        kernel: ``"rbf"`` or ``"precomputed"``.
        gamma: Kernel width > 0, ``"scale"`` or ``"auto"``.
        tol: Largest KKT violation accepted.
        max_iter: Two-variable updates per problem; -1 for 10 million.
        class_weight: Factors of C as a dict by label, ``"balanced"`` or None.
        decision_function_shape: ``"ovr"``, (n, c) by votes and confidence, or ``"ovo"``, pairs.
        break_ties: Whether ``predict`` breaks ties of votes by confidence ("ovr" only).
        device: Where torch solves and scores; default the CPU.

    Attributes:
        classes_: Labels, ``(c,)``.
        class_weight_: ``(c,)``.
        support_: Indices of the support vectors, by class, ``(m,)``.
        support_vectors_: ``(m, d)``; empty with a precomputed kernel.
        n_support_: Support vectors per class, ``(c,)``.
        dual_coef_: alpha * y in LIBSVM's layout, ``(c - 1, m)``.
        intercept_: ``(c (c - 1) / 2,)``.
        n_iter_: Two-variable updates per pair, ``(c (c - 1) / 2,)``.
        fit_status_: 0 if all problems met ``tol``, else 1.
        shape_fit_: Shape of the training features.
        n_features_in_: Number of features.
        svm_: The fitted ``RBFSVM``: differentiable, with the certificate in ``svm_.solution``.
    """

    def __init__(
        self,
        *,
        C: float = 1.0,
        kernel: str = "rbf",
        gamma: float | str = "scale",
        tol: float = 1e-3,
        max_iter: int = -1,
        class_weight: Mapping | str | None = None,
        decision_function_shape: str = "ovr",
        break_ties: bool = False,
        device: str | torch.device | None = None,
    ) -> None:
        self.C = C
        self.kernel = kernel
        self.gamma = gamma
        self.tol = tol
        self.max_iter = max_iter
        self.class_weight = class_weight
        self.decision_function_shape = decision_function_shape
        self.break_ties = break_ties
        self.device = device

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.pairwise = self.kernel == "precomputed"
        return tags

    def fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> Self:
        """Solve one binary problem per pair of classes.

        Args:
            X: Features, ``(n, d)``, or the precomputed kernel, ``(n, n)``.
            y: Labels of any kind that scikit-learn takes, ``(n,)``.
            sample_weight: Factor of C per sample, ``(n,)``; samples with <= 0 are left out.

        Returns:
            The estimator itself.

        Raises:
            TypeError: If a precomputed kernel is sparse.
            ValueError: If parameters or data are not as said above.

        Warns:
            ConvergenceWarning: scikit-learn's, if a problem missed ``tol``.
        """
        if self.kernel not in ("rbf", "precomputed"):
            raise ValueError(f'kernel must be "rbf" or "precomputed", got {self.kernel!r}')
        if self.decision_function_shape not in ("ovr", "ovo"):
            shape = self.decision_function_shape
            raise ValueError(f'decision_function_shape must be "ovr" or "ovo", got {shape!r}')
        if self.kernel == "precomputed" and issparse(X):
            raise TypeError("Sparse precomputed kernels are not supported.")
        data: tuple[NDArray, NDArray] = validate_data(self, X, y, dtype=FLOATS, order="C")
        features, y = data
        check_classification_targets(y)
        y = column_or_1d(y, warn=True)
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError("The number of classes has to be greater than one; got 1 class")
        self.class_weight_ = compute_class_weight(self.class_weight, classes=self.classes_, y=y)
        weight = _positive_weight(sample_weight, labels, len(self.classes_))
        with np.errstate(over="ignore", invalid="ignore"):
            variance = features.var(dtype=np.float64)
        if self.kernel == "rbf" and not np.isfinite(variance):
            raise ValueError(
                "The dual coefficients or intercepts are not finite: the variance of X overflows. "
                "The input data may contain large values and need to be preprocessed."
            )
        self.svm_ = RBFSVM(
            min(self.C, HARD_MARGIN),
            self.gamma,
            kernel="precomputed" if self.kernel == "precomputed" else None,
            class_weight=self.class_weight_,
            strategy=ONE_VS_ONE,
            tol=self.tol,
            max_steps=self.max_iter if self.max_iter >= 0 else UNLIMITED,
        )
        device = torch.device(self.device or "cpu")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # scikit-learn's comes below
            self.svm_.fit(
                torch.tensor(features, device=device),
                torch.tensor(labels, device=device),
                sample_weight=None if weight is None else torch.tensor(weight, device=device),
            )
        self.shape_fit_ = features.shape
        self._read_attributes()
        return self

    def _read_attributes(self) -> None:
        """Set the attributes that scikit-learn has, and warn as it does."""
        svm, layout = self.svm_, to_libsvm(self.svm_.dual_coef)
        solution, kernel = cast(Certificate, svm.solution), cast(Any, svm.kernel)  # after a fit
        sign = -1 if len(self.classes_) == 2 else 1  # scikit-learn turns the binary case round
        self.support_ = svm.support[layout.order].numpy(force=True).astype(np.int32)
        precomputed = self.kernel == "precomputed"
        vectors = (
            np.empty((0, 0)) if precomputed else svm.support_vectors[layout.order].numpy(force=True)
        )
        self.support_vectors_ = vectors
        self.n_support_ = layout.n_support.numpy(force=True).astype(np.int32)
        self.dual_coef_ = sign * layout.dual_coef.numpy(force=True)
        self.intercept_ = sign * svm.intercept.numpy(force=True)
        self.n_iter_ = solution.steps.numpy(force=True).astype(np.int32)
        self._gamma = 0.0 if precomputed else float(0.5 / kernel.lengthscale.double() ** 2)
        self.fit_status_ = int(not solution.converged.all())
        if self.fit_status_:
            warnings.warn(
                f"Solver terminated early (max_iter={self.max_iter}).  Consider pre-processing "
                "your data with StandardScaler or MinMaxScaler.",
                SklearnConvergenceWarning,
                stacklevel=3,
            )

    def _pairwise_values(self, X: ArrayLike) -> torch.Tensor:
        check_is_fitted(self)
        if issparse(X):
            raise ValueError(
                f"cannot use sparse input in {type(self).__name__!r}: expected a dense array, "
                "call .toarray() first"
            )
        X = validate_data(self, X, dtype=FLOATS, order="C", reset=False)
        with torch.no_grad():
            return self.svm_.pairwise_scores(torch.tensor(X, device=self.svm_.intercept.device))

    def decision_function(self, X: ArrayLike) -> NDArray:
        """Compute decision values.

        Args:
            X: Features, ``(n, d)``, or kernel values with the training samples.

        Returns:
            Two classes: ``(n,)``, > 0 for the second. More: ``(n, c)``, or with shape "ovo" one
            column per pair, > 0 for its first class.
        """
        values = self._pairwise_values(X)
        if len(self.classes_) == 2:
            return -values.numpy(force=True).ravel()
        ovr = self.decision_function_shape == "ovr"
        return (votes_and_confidence(values) if ovr else values).numpy(force=True)

    def predict(self, X: ArrayLike) -> NDArray:
        """Predict labels by the votes of the pairs.

        Args:
            X: As in ``decision_function``.

        Returns:
            Labels, ``(n,)``; ties go to the first class, unless ``break_ties``.

        Raises:
            ValueError: If ``break_ties`` is set with ``decision_function_shape="ovo"``.
        """
        check_is_fitted(self)
        if self.break_ties and self.decision_function_shape == "ovo":
            raise ValueError("break_ties must be False when decision_function_shape is 'ovo'")
        c = len(self.classes_)
        if self.break_ties and c > 2:
            return self.classes_[self.decision_function(X).argmax(axis=1)]
        values = self._pairwise_values(X).numpy(force=True)
        pairs = class_pairs(c).numpy()
        winners = np.where(values > 0, pairs[:, 0], pairs[:, 1])
        votes = np.stack([(winners == k).sum(axis=1) for k in range(c)], axis=1)
        return self.classes_[votes.argmax(axis=1)]


def _positive_weight(sample_weight: ArrayLike | None, labels: NDArray, c: int) -> NDArray | None:
    """Check weights, with LIBSVM's errors, and set those below 0 to 0."""
    if sample_weight is None:
        return None
    weight = np.asarray(sample_weight, dtype=np.float64)
    if weight.shape != labels.shape:
        raise ValueError(
            f"sample_weight and X have incompatible shapes: {weight.shape} vs {labels.shape}"
        )
    left = np.bincount(labels[weight > 0], minlength=c) > 0
    if not left.any():
        raise ValueError("Invalid input - all samples have zero or negative weights.")
    if left.sum() == 1:
        raise ValueError(
            "Invalid input - all samples with positive weights belong to the same class."
        )
    return np.maximum(weight, 0.0)
