"""Fitted machines of scikit-learn to `RBFSVM`, and back.

scikit-learn is imported inside the functions only: torchdnr works without it. Its ``SVC`` has no
public constructor from fitted state, so that some of its private attributes are read and written
here, and nowhere else.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from torchdnr.decisions import NotFittedError
from torchdnr.kernels.any_kernel import make_rbf_kernel, rbf_gamma
from torchdnr.svm.multiclass import ONE_VS_ONE, ONE_VS_REST, class_pairs, classes_of_pairs

if TYPE_CHECKING:
    from numpy import ndarray
    from sklearn.base import ClassifierMixin
    from sklearn.svm import SVC

    from torchdnr.svm.rbf_svm import RBFSVM


class LibsvmLayout(NamedTuple):
    """Support vectors by class, and their coefficients against the other classes."""

    order: Tensor  # rows of the support vectors in LIBSVM's order, int64 (m,)
    n_support: Tensor  # support vectors of each class, int64 (c,)
    dual_coef: Tensor  # alpha * y, y = +1 for the first class of a pair, (c - 1, m)


def to_libsvm(dual_coef: Tensor) -> LibsvmLayout:
    """Bring alpha * y, one column per pair of classes, to LIBSVM's layout.

    The class of a support vector is read off its signs: > 0 in a pair whose first class it is. Rows
    of zeros, which support nothing, are left out of the layout.
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
    """Bring LIBSVM's layout to alpha * y, one column per pair of classes."""
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


MISSING = "scikit-learn 1.6 or newer is needed for this: pip install torchdnr[sklearn]"


def from_sklearn(cls: type["RBFSVM"], classifier: "ClassifierMixin") -> "RBFSVM":
    """Convert a fitted classifier of scikit-learn, in float64, on the CPU.

    An ``SVC`` becomes one-vs-one: scores are its ``decision_function`` of shape "ovr", (-f, f)
    where it has two classes, and ``pairwise_scores`` that of shape "ovo". A ``OneVsRestClassifier``
    of ``SVC`` becomes one-vs-rest. Classes are renumbered 0..c-1 in the order of ``classes_``.
    Settings come along as far as both have them: class weights by binary label, inside
    one-vs-rest, do not.

    Args:
        cls: The class to build.
        classifier: ``SVC`` with kernel "rbf" or "precomputed", or ``OneVsRestClassifier`` of those.

    Returns:
        The fitted module. ``center`` is the mean of the support vectors; ``solution`` is None.

    Raises:
        NotFittedError: If the classifier is not fitted.
        ValueError: If it is of another kind, or has another kernel.
        ImportError: If scikit-learn is not installed.
    """
    try:
        from sklearn.exceptions import NotFittedError as NotFittedInSklearn
        from sklearn.multiclass import OneVsRestClassifier
        from sklearn.svm import SVC
        from sklearn.utils.validation import check_is_fitted
    except ImportError as error:
        raise ImportError(MISSING) from error
    name = type(classifier).__name__
    if not isinstance(classifier, SVC | OneVsRestClassifier):
        raise ValueError(f"expected an SVC or a OneVsRestClassifier of SVC, got {name}")
    try:
        check_is_fitted(classifier)
    except NotFittedInSklearn as error:
        raise NotFittedError(f"this {name} is not fitted: call fit(X, y) first") from error
    one_vs_one = isinstance(classifier, SVC)
    machines = [classifier] if one_vs_one else classifier.estimators_
    for machine in machines:
        if not isinstance(machine, SVC):
            raise ValueError(f"expected a {name} of fitted SVC, got {type(machine).__name__}")
        if machine.kernel not in ("rbf", "precomputed"):
            raise ValueError(f'kernel must be "rbf" or "precomputed", got {machine.kernel!r}')
    if not one_vs_one and classifier.multilabel_:
        raise ValueError("expected one label per sample, got a multi-label OneVsRestClassifier")
    module = cls(**_options(machines[0], one_vs_one))
    state = _pairwise_state(classifier) if one_vs_one else _one_vs_rest_state(machines)
    support, vectors, dual_coef, intercept = (torch.as_tensor(part) for part in state)
    module.support, module.dual_coef = support.long(), dual_coef.double()
    module.intercept = intercept.double()
    if module.is_precomputed:
        module.support_vectors = module.dual_coef.new_zeros(len(support), 0)
        module.center = module.dual_coef.new_zeros(machines[0].shape_fit_[0])
        return module
    module.support_vectors = vectors.double()
    module.center = module.support_vectors.mean(dim=0)
    module.kernel = make_rbf_kernel(machines[0]._gamma, like=module.support_vectors)
    return module


def to_sklearn(svm: "RBFSVM") -> "ClassifierMixin":
    """Convert a fitted RBFSVM: same decision values and predictions, classes 0..c-1.

    Settings come along as far as scikit-learn has them, so that a clone can be fitted again.

    Args:
        svm: One-vs-one or two classes: becomes an ``SVC``. One-vs-rest of more: becomes a
            ``OneVsRestClassifier`` of those. The two scores of a one-vs-rest machine for two
            classes become half their difference, whose sign is the prediction.

    Returns:
        The fitted classifier.

    Raises:
        NotFittedError: If the module is not fitted.
        ValueError: If it has a kernel of gpytorch that is no plain RBF.
        ImportError: If scikit-learn is not installed.
    """
    svm._require_fit()
    try:
        from sklearn.multiclass import OneVsRestClassifier
        from sklearn.preprocessing import LabelBinarizer
    except ImportError as error:
        raise ImportError(MISSING) from error
    if svm.strategy == ONE_VS_ONE:
        return _fitted_svc(svm, svm.dual_coef, svm.intercept, svm.C)
    if svm.num_classes == 2:
        dual_coef = (svm.dual_coef[:, :1] - svm.dual_coef[:, 1:]) / 2
        return _fitted_svc(svm, dual_coef, (svm.intercept[:1] - svm.intercept[1:]) / 2, svm.C)
    classes = range(svm.num_classes)
    limits = svm.C if isinstance(svm.C, tuple) else [svm.C] * svm.num_classes
    machines = [  # the first class of scikit-learn's binary problem is "not k"
        _fitted_svc(svm, -svm.dual_coef[:, [k]], -svm.intercept[[k]], limits[k], k) for k in classes
    ]
    model = OneVsRestClassifier(_unfitted_svc(svm, limits[0], of_rest=True))
    model.estimators_, model.n_features_in_ = machines, svm.center.numel()
    model.label_binarizer_ = LabelBinarizer(sparse_output=True).fit(list(classes))
    if not isinstance(getattr(OneVsRestClassifier, "classes_", None), property):  # as in 1.6
        model.classes_ = model.label_binarizer_.classes_
    return model


def _options(machine: "SVC", one_vs_one: bool) -> dict[str, Any]:
    """Read what our constructor needs off scikit-learn's parameters."""
    weight = machine.class_weight if machine.class_weight == "balanced" else None
    if one_vs_one and machine.class_weight is not None and weight is None:
        weight = machine.class_weight_.tolist()
    return {
        "C": machine.C,
        "gamma": machine.gamma,
        "kernel": "precomputed" if machine.kernel == "precomputed" else None,
        "class_weight": weight,
        "strategy": ONE_VS_ONE if one_vs_one else ONE_VS_REST,
        "tol": machine.tol,
        **({"max_steps": machine.max_iter} if machine.max_iter >= 0 else {}),
    }


def _pairwise_state(svc: "SVC") -> tuple["ndarray", ...]:
    """Read indices, vectors, coefficients and intercepts, > 0 for the first class of a pair."""
    sign = -1.0 if len(svc.classes_) == 2 else 1.0  # scikit-learn turns the binary case round
    rows = torch.as_tensor(sign * _dense(svc.dual_coef_))
    columns = from_libsvm(rows, torch.as_tensor(svc.n_support_, dtype=torch.int64)).numpy()
    order = svc.support_.argsort()
    vectors = _dense(svc.support_vectors_)
    vectors = vectors[order] if len(vectors) else vectors
    return svc.support_[order], vectors, columns[order], sign * svc.intercept_


def _one_vs_rest_state(machines: list["SVC"]) -> tuple["ndarray", ...]:
    """Unite the support vectors of binary machines; a single one decides for class 1."""
    import numpy as np

    support = np.unique(np.concatenate([machine.support_ for machine in machines]))
    vectors = np.zeros((len(support), machines[0].support_vectors_.shape[1]))
    columns = np.zeros((len(support), len(machines)))
    for k, machine in enumerate(machines):
        if machine._gamma != machines[0]._gamma or machine.kernel != machines[0].kernel:
            raise ValueError("expected SVC of one kernel and gamma, got more than one")
        rows = np.searchsorted(support, machine.support_)
        columns[rows, k] = _dense(machine.dual_coef_)[0]
        if machine.kernel != "precomputed":
            vectors[rows] = _dense(machine.support_vectors_)
    intercept = np.concatenate([machine.intercept_ for machine in machines])
    if len(machines) == 1:
        columns, intercept = np.hstack([-columns, columns]), np.hstack([-intercept, intercept])
    return support, vectors, columns, intercept


def _unfitted_svc(svm: "RBFSVM", C: float | tuple[float, ...], *, of_rest: bool) -> "SVC":
    """Build an SVC with our settings; weights by class make no sense for one class of many."""
    from sklearn.svm import SVC

    weight, limit = svm.class_weight, C
    if isinstance(weight, tuple):
        weight = dict(enumerate(weight))
    if isinstance(weight, dict) and of_rest:
        weight = None
    if isinstance(C, tuple):
        factors = weight if isinstance(weight, dict) else {}
        weight, limit = {k: value * factors.get(k, 1.0) for k, value in enumerate(C)}, 1.0
    kernel = "precomputed" if svm.is_precomputed else "rbf"
    options = {"tol": svm.tol, "max_iter": svm.max_steps}
    return SVC(C=limit, kernel=kernel, gamma=svm.gamma, class_weight=weight, **options)


def _fitted_svc(
    svm: "RBFSVM",
    dual_coef: Tensor,
    intercept: Tensor,
    C: float | tuple[float, ...],
    problem: int | None = None,
) -> "SVC":
    """Build a fitted SVC from values > 0 for the first class of a pair; ``problem``: of rest."""
    import numpy as np

    gamma = torch.zeros(()) if svm.is_precomputed else rbf_gamma(svm.kernel)
    if gamma is None:
        raise ValueError(
            f"scikit-learn's SVC has no {type(svm.kernel).__name__}: expected a plain RBF kernel "
            'or kernel="precomputed"'
        )
    layout = to_libsvm(dual_coef.detach())
    c, solution = len(layout.n_support), svm.solution
    steps, failed = torch.zeros(dual_coef.shape[1]), False
    if solution is not None:
        chosen = slice(None) if problem is None else slice(problem, problem + 1)
        steps = solution.steps[chosen][: dual_coef.shape[1]]
        failed = not solution.converged[chosen].all()
    model = _unfitted_svc(svm, C, of_rest=problem is not None)
    model.classes_, model.class_weight_ = np.arange(c), np.ones(c)
    model.n_features_in_ = svm.center.numel()
    n = solution.samples if solution is not None else int(svm.support.max()) + 1
    model.shape_fit_ = (n, svm.center.numel()) if not svm.is_precomputed else (len(svm.center),) * 2
    model.support_ = _array(svm.support[layout.order], np.int32)
    vectors = svm.support_vectors[layout.order]
    model.support_vectors_ = np.empty((0, 0)) if svm.is_precomputed else _array(vectors)
    model._n_support = _array(layout.n_support, np.int32)
    model._dual_coef_, model._intercept_ = _array(layout.dual_coef), _array(intercept)
    sign = -1.0 if c == 2 else 1.0  # scikit-learn turns the binary case round
    model.dual_coef_, model.intercept_ = sign * model._dual_coef_, sign * model._intercept_
    model._probA, model._probB = np.empty(0), np.empty(0)
    model._effective_probability, model._sparse = False, False
    model._gamma, model.fit_status_ = float(gamma), int(failed)
    model._num_iter = model.n_iter_ = _array(steps, np.int32)
    return model


def _dense(array: Any) -> "ndarray":  # noqa: ANN401, an array, or a sparse one if it was fitted so
    return array.toarray() if hasattr(array, "toarray") else array


def _array(tensor: Tensor, dtype: Any = "float64") -> "ndarray":  # noqa: ANN401, numpy's dtypes
    return tensor.contiguous().numpy(force=True).astype(dtype)
