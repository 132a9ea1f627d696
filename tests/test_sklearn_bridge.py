"""`RBFSVM.from_sklearn`, `RBFSVM.to_sklearn`, and what `RBFSVC` has of SVC."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from gpytorch.kernels import MaternKernel, RBFKernel
from scipy.sparse import csr_matrix
from sklearn.base import clone
from sklearn.datasets import make_blobs
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.model_selection import GridSearchCV
from sklearn.multiclass import OneVsOneClassifier, OneVsRestClassifier
from sklearn.svm import SVC, NuSVC

import torchdnr.svm
from torchdnr.svm import RBFSVC, RBFSVM, NotFittedError

CLOSE = {"atol": 1e-5, "rtol": 0}
KERNELS = ["rbf", "precomputed"]
FITTED = (
    "support_",
    "support_vectors_",
    "n_support_",
    "dual_coef_",
    "intercept_",
    "classes_",
    "class_weight_",
)


def blobs(c, kernel="rbf", names="abcdefgh"):
    """Return training features, labels that are names, unseen features and tensors of those."""
    x, y = make_blobs(70, 3, centers=c, cluster_std=4.0, random_state=c)
    x = x / x.std(0)
    labels = np.array(list(names))[y]
    if kernel == "precomputed":
        gram = rbf_kernel(x, gamma=0.5)
        return gram[:50, :50], labels[:50], gram[50:, :50]
    return x[:50], labels[:50], x[50:]


def as_scores(values):
    return np.stack([-values, values], axis=1) if values.ndim == 1 else values


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("c", [2, 3, 4])
@pytest.mark.parametrize("weight", [None, "balanced", {"a": 3.0, "b": 0.5}])
def test_an_svc_becomes_one_vs_one(kernel, c, weight):
    x, y, unseen = blobs(c, kernel)
    svc = SVC(kernel=kernel, C=2.0, class_weight=weight).fit(x, y)
    svm, z = RBFSVM.from_sklearn(svc), torch.tensor(unseen)
    np.testing.assert_allclose(svm(z), as_scores(svc.decision_function(unseen)), **CLOSE)
    svc.decision_function_shape = "ovo"
    pairs = svc.decision_function(unseen)
    pairs = -pairs[:, None] if c == 2 else pairs
    np.testing.assert_allclose(svm.pairwise_scores(z), pairs, **CLOSE)
    assert svm.strategy == "one-vs-one" and svm.num_classes == c and svm.solution is None
    np.testing.assert_array_equal(svm.support, np.sort(svc.support_))
    if kernel == "rbf":
        np.testing.assert_array_equal(svm.support_vectors, x[svm.support])
    labels = torch.tensor(np.unique(y, return_inverse=True)[1])
    again = svm.fit(torch.tensor(x), labels)(z)  # the settings came along
    np.testing.assert_allclose(again, as_scores(_ovr(svc).decision_function(unseen)), atol=5e-3)


def _ovr(svc):
    svc.decision_function_shape = "ovr"
    return svc


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("c", [2, 4])
def test_one_vs_rest_of_svc_becomes_one_vs_rest(kernel, c):
    x, y, unseen = blobs(c, kernel)
    rest = OneVsRestClassifier(SVC(kernel=kernel, C=2.0, class_weight="balanced")).fit(x, y)
    svm, z = RBFSVM.from_sklearn(rest), torch.tensor(unseen)
    expected = as_scores(rest.decision_function(unseen))
    np.testing.assert_allclose(svm(z), expected, **CLOSE)
    assert svm.strategy == "one-vs-rest" and svm.num_classes == c
    labels = torch.tensor(np.unique(y, return_inverse=True)[1])
    np.testing.assert_allclose(svm.fit(torch.tensor(x), labels)(z), expected, atol=5e-3)


def test_an_svc_that_was_fitted_on_sparse_features():
    x, y, unseen = blobs(3)
    svc = SVC().fit(csr_matrix(x), y)
    svm = RBFSVM.from_sklearn(svc)
    np.testing.assert_allclose(svm(torch.tensor(unseen)), svc.decision_function(unseen), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("strategy", ["one-vs-rest", "one-vs-one"])
@pytest.mark.parametrize("c", [2, 3, 4])
def test_a_module_becomes_a_classifier_of_scikit_learn(c, strategy, kernel, dtype):
    x, y, unseen = blobs(c, kernel)
    labels = torch.tensor(np.unique(y, return_inverse=True)[1])
    own = "precomputed" if kernel == "precomputed" else None
    svm = RBFSVM(3.0, kernel=own, strategy=strategy).fit(torch.tensor(x).to(dtype), labels)
    model = svm.to_sklearn()
    scores = svm(torch.tensor(unseen).to(dtype)).double().numpy()
    expected = (scores[:, 1] - scores[:, 0]) / 2 if c == 2 else scores
    atol = 1e-9 if dtype == torch.float64 else 2e-5
    np.testing.assert_allclose(model.decision_function(unseen), expected, atol=atol)
    machines = [model] if isinstance(model, SVC) else model.estimators_
    assert isinstance(model, OneVsRestClassifier) == (strategy == "one-vs-rest" and c > 2)
    same = pickle.loads(pickle.dumps(model)).predict(unseen)
    np.testing.assert_array_equal(same, model.predict(unseen))
    if strategy == "one-vs-rest" or c == 2:
        np.testing.assert_array_equal(same, scores.argmax(1))
    for machine in machines:
        assert machine.n_support_.sum() == len(machine.support_)
        assert (machine.fit_status_, machine.shape_fit_) == (0, x.shape)
        if kernel == "rbf":
            np.testing.assert_array_equal(
                machine.support_vectors_, torch.tensor(x).to(dtype).double()[machine.support_]
            )
    again = clone(model).fit(x, labels.numpy()).decision_function(unseen)
    np.testing.assert_allclose(again, expected, atol=1e-2)
    back = RBFSVM.from_sklearn(model)
    np.testing.assert_allclose(back(torch.tensor(unseen)), as_scores(expected), **CLOSE)


@pytest.mark.parametrize("c", [2, 3, 4])
def test_attributes_survive_the_way_there_and_back(c):
    x, y, unseen = blobs(c, names="01234567")
    svc = SVC(C=2.0).fit(x, y.astype(int))
    back = RBFSVM.from_sklearn(svc).to_sklearn()
    for name in FITTED:
        np.testing.assert_array_equal(getattr(back, name), getattr(svc, name), err_msg=name)
    assert back.get_params() == {**svc.get_params(), "max_iter": 1_000_000}
    np.testing.assert_array_equal(back.predict(unseen), svc.predict(unseen))


def test_settings_go_to_scikit_learn():
    x, y, _ = blobs(3)
    labels = np.unique(y, return_inverse=True)[1]
    data = torch.tensor(x), torch.tensor(labels)
    weighted = {"C": [1.0, 2.0, 3.0], "class_weight": {1: 5.0}}
    model = RBFSVM(**weighted, strategy="one-vs-one").fit(*data).to_sklearn()
    assert (model.C, model.class_weight) == (1.0, {0: 1.0, 1: 10.0, 2: 3.0})
    model = RBFSVM(**weighted).fit(*data).to_sklearn()
    assert [machine.C for machine in model.estimators_] == [1.0, 2.0, 3.0]
    assert model.estimator.class_weight is None
    kernel = RBFKernel().requires_grad_(False)
    model = RBFSVM(kernel=kernel).fit(*data).to_sklearn()
    np.testing.assert_allclose(
        model.decision_function(x), RBFSVM(kernel=kernel).fit(*data)(data[0]), atol=1e-5
    )


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda x, y: SVC(), NotFittedError, "this SVC is not fitted"),
        (lambda x, y: OneVsRestClassifier(SVC()), NotFittedError, "this OneVsRestClassifier is"),
        (lambda x, y: SVC(kernel="linear").fit(x, y), ValueError, "kernel must .* got 'linear'"),
        (lambda x, y: SVC(kernel=rbf_kernel).fit(x, y), ValueError, "kernel must be .* got <func"),
        (lambda x, y: NuSVC().fit(x, y), ValueError, "expected an SVC .* got NuSVC"),
        (lambda x, y: OneVsOneClassifier(SVC()).fit(x, y), ValueError, "got OneVsOneClassifier"),
        (
            lambda x, y: OneVsRestClassifier(LogisticRegression()).fit(x, y),
            ValueError,
            "expected a OneVsRestClassifier of fitted SVC, got LogisticRegression",
        ),
        (
            lambda x, y: OneVsRestClassifier(SVC()).fit(x, np.eye(3)[np.arange(len(x)) % 3]),
            ValueError,
            "got a multi-label OneVsRestClassifier",
        ),
        (lambda x, y: 3, ValueError, "expected an SVC .* got int"),
    ],
)
def test_other_classifiers_are_refused(make, error, message):
    x, y, _ = blobs(3)
    with pytest.raises(error, match=message):
        RBFSVM.from_sklearn(make(x, y))


def test_modules_that_scikit_learn_cannot_be_are_refused():
    x, _, _ = blobs(3)
    with pytest.raises(NotFittedError, match="is not fitted"):
        RBFSVM().to_sklearn()
    svm = RBFSVM(kernel=MaternKernel()).fit(torch.tensor(x), torch.arange(50) % 3)
    with pytest.raises(ValueError, match="scikit-learn's SVC has no MaternKernel"):
        svm.to_sklearn()


@pytest.mark.slow
def test_torchdnr_works_without_scikit_learn():
    code = """
import sys
sys.modules["sklearn"] = None
import torch, torchdnr, torchdnr.svm
svm = torchdnr.RBFSVM(strategy="one-vs-one").fit(torch.eye(3), torch.arange(3))
for use in (svm.to_sklearn, lambda: svm.from_sklearn(svm), lambda: torchdnr.svm.RBFSVC):
    try:
        use()
    except ImportError as error:
        print(error)
"""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True
    )
    assert run.stdout.count("pip install torchdnr[sklearn]") == 3, run.stderr


def test_the_estimator_is_exported_on_demand():
    assert torchdnr.svm.RBFSVC is RBFSVC
    with pytest.raises(AttributeError, match="has no attribute 'RBFSVM2'"):
        _ = torchdnr.svm.RBFSVM2


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("weight", [None, "balanced", {"a": 3.0, "b": 0.5}])
@pytest.mark.parametrize("c", [2, 3, 5])
def test_the_estimator_has_the_attributes_of_svc(kernel, weight, c):
    x, y, unseen = blobs(c, kernel)
    options = {"C": 2.0, "kernel": kernel, "class_weight": weight, "tol": 1e-6}
    weights = np.random.default_rng(0).uniform(0.5, 2.0, len(x))
    ours, theirs = RBFSVC(**options), SVC(**options)
    assert ours.fit(x, y, weights) is ours
    theirs.fit(x, y, weights)
    for name in FITTED:
        found, expected = getattr(ours, name), getattr(theirs, name)
        assert found.shape == expected.shape and found.dtype == expected.dtype, name
        if found.dtype.kind == "f":
            np.testing.assert_allclose(found, expected, atol=1e-4, err_msg=name)
        else:
            np.testing.assert_array_equal(found, expected, err_msg=name)
    assert ours.shape_fit_ == theirs.shape_fit_ and ours.n_features_in_ == theirs.n_features_in_
    assert ours.n_iter_.shape == theirs.n_iter_.shape and ours.fit_status_ == 0
    for shape in ("ovr", "ovo"):
        ours.decision_function_shape = theirs.decision_function_shape = shape
        found, expected = ours.decision_function(unseen), theirs.decision_function(unseen)
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, **CLOSE)
    np.testing.assert_array_equal(ours.predict(unseen), theirs.predict(unseen))
    ours.set_params(decision_function_shape="ovr", break_ties=True)
    theirs.set_params(decision_function_shape="ovr", break_ties=True)
    np.testing.assert_array_equal(ours.predict(unseen), theirs.predict(unseen))


def test_the_estimator_keeps_the_dtype_and_pickles():
    x, y, unseen = blobs(3)
    single = RBFSVC().fit(x.astype(np.float32), y)
    assert single.svm_.dual_coef.dtype == torch.float32
    assert RBFSVC().fit(x, y).svm_.dual_coef.dtype == torch.float64
    assert RBFSVC().fit((9 * x).astype(int), y).svm_.dual_coef.dtype == torch.float64
    copy = pickle.loads(pickle.dumps(single))
    np.testing.assert_array_equal(copy.predict(unseen), single.predict(unseen))


def test_the_estimator_in_a_search():
    x, y, unseen = blobs(3)
    grid = {"C": [0.1, 1.0, 10.0], "gamma": [0.1, 1.0]}
    ours, theirs = (GridSearchCV(e, grid, cv=3).fit(x, y) for e in (RBFSVC(), SVC()))
    assert ours.best_params_ == theirs.best_params_
    np.testing.assert_array_equal(ours.predict(unseen), theirs.predict(unseen))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "linear"}, 'kernel must be "rbf" or "precomputed", got \'linear\''),
        ({"decision_function_shape": "ovx"}, r"decision_function_shape must be .* got 'ovx'"),
        ({"C": 0.0}, "C must be > 0"),
        ({"gamma": "none"}, "gamma must be"),
        ({"tol": -1.0}, "tol must be > 0"),
        ({"class_weight": {"z": 2.0}}, "are not in class_weight"),
    ],
)
def test_wrong_options_of_the_estimator_are_refused(options, message):
    x, y, _ = blobs(3)
    with pytest.raises(ValueError, match=message):
        RBFSVC(**options).fit(x, y)


def test_wrong_weights_and_inputs_of_the_estimator_are_refused():
    x, y, _ = blobs(3)
    with pytest.raises(ValueError, match="sample_weight and X have incompatible shapes"):
        RBFSVC().fit(x, y, np.ones(49))
    with pytest.raises(ValueError, match="sample_weight must be finite"):
        RBFSVC().fit(x, y, np.where(np.arange(50) == 3, np.nan, 1.0))
    with pytest.raises(ValueError, match=r"none for classes \[0\]"):
        RBFSVC().fit(x, y, (y != "a").astype(float))
    with pytest.raises(TypeError, match="Sparse"):
        RBFSVC().fit(csr_matrix(x), y)


def test_an_early_end_is_told_as_scikit_learn_does():
    x, y, _ = blobs(3)
    with pytest.warns(ConvergenceWarning, match=r"terminated early \(max_iter=1\)") as caught:
        model = RBFSVC(max_iter=1, C=1e4, tol=1e-9).fit(x, y)
    assert model.fit_status_ == 1 and caught[0].filename == __file__
