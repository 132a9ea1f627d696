"""What stands in for `sklearn.svm.SVC` in scikit-learn's own tests: `RBFSVC`, and Gram matrices.

`RBFSVC` has the kernels "rbf" and "precomputed". Linear and callable kernels, which many of those
tests use for their known answers, become precomputed ones here, so that the solver, the weights and
the one-vs-one part are tested all the same.
"""

import numpy as np
from sklearn.utils.validation import check_is_fitted, validate_data

from torchdnr.svm import RBFSVC


class SVC(RBFSVC):
    def __init__(
        self,
        *,
        C=1.0,
        kernel="rbf",
        gamma="scale",
        tol=1e-3,
        max_iter=-1,
        class_weight=None,
        decision_function_shape="ovr",
        break_ties=False,
        random_state=None,
    ):
        super().__init__(
            C=C,
            kernel=kernel,
            gamma=gamma,
            tol=tol,
            max_iter=max_iter,
            class_weight=class_weight,
            decision_function_shape=decision_function_shape,
            break_ties=break_ties,
        )
        self.random_state = random_state

    @property
    def _by_gram(self):
        return self.kernel == "linear" or callable(self.kernel)

    def fit(self, X, y, sample_weight=None):
        if not self._by_gram:
            return super().fit(X, y, sample_weight)
        self.x_fit_ = X if callable(self.kernel) else validate_data(self, X, dtype=np.float64)
        options = {k: v for k, v in self.get_params().items() if k != "random_state"}
        inner = RBFSVC(**{**options, "kernel": "precomputed"})
        inner.fit(self._gram(self.x_fit_), y, sample_weight)
        fitted = {k: v for k, v in vars(inner).items() if k.endswith("_")}
        vars(self).update({k: v for k, v in fitted.items() if k != "n_features_in_"})
        self.inner_ = inner
        if not callable(self.kernel):
            self.support_vectors_ = self.x_fit_[self.support_]
        return self

    def _gram(self, X):
        if callable(self.kernel):
            return self.kernel(X, self.x_fit_)
        return np.dot(X, self.x_fit_.T)

    def _pairwise_values(self, X):
        check_is_fitted(self)
        if not self._by_gram:
            return super()._pairwise_values(X)
        if not callable(self.kernel):
            X = validate_data(self, X, dtype=np.float64, reset=False)
        return self.inner_._pairwise_values(self._gram(X))

    @property
    def coef_(self):
        if self.kernel != "linear":
            raise AttributeError("coef_ is only available when using a linear kernel")
        dual_coef, c = self.svm_.dual_coef.T.numpy(), len(self.classes_)
        coef = dual_coef @ self.x_fit_[self.svm_.support.numpy()]
        return -coef if c == 2 else coef
