"""Options of `RBFSVM` against scikit-learn's SVC: strategies, weights, bounds, kernels."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from property_examples import up_to
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.multiclass import OneVsRestClassifier
from sklearn.svm import SVC
from sklearn.utils.multiclass import _ovr_decision_function
from torch.autograd import gradcheck

from torchdnr.kernels import scale_gamma
from torchdnr.svm import RBFSVM
from torchdnr.svm.multiclass import (
    balanced_weights,
    class_pairs,
    classes_of_pairs,
    votes_and_confidence,
)

TOL = 1e-6
CLOSE = {"atol": 2e-5, "rtol": 0}
STRATEGIES = ["one-vs-rest", "one-vs-one"]
OVO, OVR = {"strategy": "one-vs-one", "tol": TOL}, {"tol": TOL}


def noisy(n=45, c=3, d=4, seed=3):
    """Return overlapping classes of unequal size, so that some alphas are at their bounds."""
    generator = np.random.default_rng(seed)
    y = np.minimum(generator.integers(0, c + 2, n), c - 1)
    y[:c] = np.arange(c)
    x = generator.normal(size=(n, d)) + 0.5 * y[:, None] * generator.normal(size=d)
    return x, y


def fitted(x, y, *args, sample_weight=None, **options):
    weight = None if sample_weight is None else torch.tensor(sample_weight)
    return RBFSVM(*args, **options).fit(torch.tensor(x), torch.tensor(y), sample_weight=weight)


def binary_values(x, y, weights=None, C=1.0, **options):
    """Return scikit-learn's value of each class against the rest, on the training samples."""
    values = []
    for k in range(y.max() + 1):
        weight = weights if np.ndim(weights) < 2 else weights[:, k].copy()
        C_k = C if np.isscalar(C) else C[k]
        svc = SVC(tol=TOL, C=C_k, **options).fit(x, y == k, sample_weight=weight)
        values.append(svc.decision_function(x))
    return np.stack(values, axis=1)


def pair_values(x, y, weights=None, **options):
    svc = SVC(tol=TOL, decision_function_shape="ovo", **options).fit(x, y, sample_weight=weights)
    values = svc.decision_function(x)
    return -values[:, None] if values.ndim == 1 else values


@pytest.fixture
def weights():
    return np.random.default_rng(1).uniform(0.1, 3.0, 45)


@pytest.mark.parametrize("c", [2, 3, 5])
@pytest.mark.parametrize("C", [0.3, 30.0])
def test_one_vs_one_is_the_svc(c, C):
    x, y = noisy(60, c)
    svm = fitted(x, y, C, **OVO)
    svc = SVC(C=C, tol=TOL).fit(x, y)
    pairs = svm.pairwise_scores(torch.tensor(x)).numpy()
    assert pairs.shape == (60, c * (c - 1) // 2) and svm.num_classes == c
    np.testing.assert_allclose(pairs, pair_values(x, y, C=C), **CLOSE)
    scores, expected = svm(torch.tensor(x)).numpy(), svc.decision_function(x)
    expected = np.stack([-expected, expected], axis=1) if c == 2 else expected
    np.testing.assert_allclose(scores, expected, **CLOSE)
    assert (scores.argmax(1) == SVC(C=C, tol=TOL, break_ties=True).fit(x, y).predict(x)).all()
    np.testing.assert_array_equal(svm.support, np.sort(svc.support_))
    np.testing.assert_array_equal(svm.support_vectors, x[svm.support])
    assert svm.solution.converged.shape == (pairs.shape[1],)
    for k, (i, j) in enumerate(class_pairs(c)):  # the others were held out
        assert set(y[svm.support[svm.dual_coef[:, k] != 0]]) <= {int(i), int(j)}


def test_sample_weights_scale_the_bounds(weights):
    x, y = noisy()
    svm = fitted(x, y, 2.0, sample_weight=weights, **OVR)
    expected = binary_values(x, y, weights, C=2.0)
    np.testing.assert_allclose(svm(torch.tensor(x)), expected, **CLOSE)
    svm = fitted(x, y, 2.0, sample_weight=weights, **OVO)
    expected = pair_values(x, y, weights, C=2.0)
    np.testing.assert_allclose(svm.pairwise_scores(torch.tensor(x)), expected, **CLOSE)


@pytest.mark.parametrize("form", [dict, list, torch.tensor])
def test_class_weights_go_by_the_class_of_the_sample(form, weights):
    x, y = noisy()
    factors = np.array([3.0, 0.2, 1.0])
    given = {0: 3.0, 1: 0.2} if form is dict else form([3.0, 0.2, 1.0])
    svm = fitted(x, y, 2.0, class_weight=given, sample_weight=weights, **OVR)
    expected = binary_values(x, y, factors[y] * weights, C=2.0)
    np.testing.assert_allclose(svm(torch.tensor(x)), expected, **CLOSE)
    svm = fitted(x, y, 2.0, class_weight=given, sample_weight=weights, **OVO)
    expected = pair_values(x, y, weights, C=2.0, class_weight=dict(enumerate(factors)))
    np.testing.assert_allclose(svm.pairwise_scores(torch.tensor(x)), expected, **CLOSE)


@pytest.mark.parametrize("c", [2, 3])
def test_balanced_is_as_in_scikit_learn(c):
    x, y = noisy(c=c)
    svm = fitted(x, y, 2.0, class_weight="balanced", **OVO)
    expected = pair_values(x, y, C=2.0, class_weight="balanced")
    np.testing.assert_allclose(svm.pairwise_scores(torch.tensor(x)), expected, **CLOSE)
    svm = fitted(x, y, 2.0, class_weight="balanced", **OVR)
    rest = OneVsRestClassifier(SVC(C=2.0, tol=TOL, class_weight="balanced")).fit(x, y)
    expected = rest.decision_function(x)
    scores = svm(torch.tensor(x)).numpy()
    np.testing.assert_allclose(scores[:, 1] if c == 2 else scores, expected, **CLOSE)


def test_balanced_counts_by_sample_weight(weights):
    x, y = noisy()

    def balanced(of):  # scikit-learn's compute_class_weight with sample_weight, of after 1.6
        return weights.sum() / ((of.max() + 1) * np.bincount(of, weights))

    expected = balanced(y)
    found = balanced_weights(torch.tensor(y), 3, torch.tensor(weights))
    np.testing.assert_allclose(found, expected)
    svm = fitted(x, y, class_weight="balanced", sample_weight=weights, **OVO)
    same = fitted(x, y, class_weight=expected, sample_weight=weights, **OVO)
    np.testing.assert_allclose(svm(torch.tensor(x)), same(torch.tensor(x)), **CLOSE)
    svm = fitted(x, y, 2.0, class_weight="balanced", sample_weight=weights, **OVR)
    binary = [(y == k).astype(int) for k in range(3)]
    each = np.stack([balanced(of)[of] for of in binary], axis=1)
    expected = binary_values(x, y, each * weights[:, None], C=2.0)
    np.testing.assert_allclose(svm(torch.tensor(x)), expected, **CLOSE)


@pytest.mark.parametrize("form", [tuple, list, np.array, torch.tensor])
def test_C_per_class(form):
    x, y = noisy()
    C = [0.1, 1.0, 20.0]
    svm = fitted(x, y, form(C), **OVR)
    np.testing.assert_allclose(svm(torch.tensor(x)), binary_values(x, y, C=C), **CLOSE)
    svm = fitted(x, y, form(C), **OVO)
    expected = pair_values(x, y, C=1.0, class_weight=dict(enumerate(C)))
    np.testing.assert_allclose(svm.pairwise_scores(torch.tensor(x)), expected, **CLOSE)


def test_gamma_auto():
    x, y = noisy()
    svm = fitted(x, y, 1.0, "auto", **OVR)
    np.testing.assert_allclose(svm(torch.tensor(x)), binary_values(x, y, gamma="auto"), **CLOSE)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_precomputed_kernel_is_the_kernel(strategy, dtype):
    x, y = noisy()
    options = {"strategy": strategy, "tol": TOL}
    gram = torch.tensor(rbf_kernel(x, gamma=0.3)).to(dtype)
    svm = RBFSVM(1.0, kernel="precomputed", **options).fit(gram, torch.tensor(y))
    same = fitted(x, y, 1.0, 0.3, **options)
    unseen = np.random.default_rng(5).normal(size=(20, 4))
    cross = torch.tensor(rbf_kernel(unseen, x, gamma=0.3)).to(dtype)
    assert svm(cross).dtype == dtype and svm.kernel is None
    np.testing.assert_allclose(svm(cross), same(torch.tensor(unseen)), atol=1e-4)
    elsewhere = torch.ones(45, dtype=torch.bool)
    elsewhere[svm.support] = False
    cross[:, elsewhere] = torch.nan  # only the support vectors' columns are used
    assert svm(cross).isfinite().all() and elsewhere.any()
    assert svm.support_vectors.shape == (len(svm.support), 0)


@pytest.mark.parametrize("kernel", [None, "precomputed"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@up_to(10)
@given(zeros=st.sets(st.integers(3, 29)), seed=st.integers(0, 99))
def test_a_weight_of_zero_removes_the_sample(kernel, strategy, zeros, seed):
    x, y = noisy(30, seed=seed)
    weight = np.random.default_rng(seed).uniform(0.5, 2.0, 30)
    weight[list(zeros)] = 0.0
    kept = weight > 0
    options = {"strategy": strategy, "kernel": kernel, "class_weight": "balanced"}
    gram = rbf_kernel(x) if kernel else x
    with_all = fitted(gram, y, 2.0, sample_weight=weight, **options)
    inputs = gram[kept][:, kept] if kernel else x[kept]
    without = fitted(inputs, y[kept], 2.0, sample_weight=weight[kept], **options)
    scores = with_all(torch.tensor(gram))
    torch.testing.assert_close(scores[kept], without(torch.tensor(inputs)), atol=1e-12, rtol=0)
    assert torch.equal(with_all.dual_coef, without.dual_coef)
    assert torch.equal(with_all.support, torch.tensor(kept.nonzero()[0])[without.support])
    assert with_all.solution.samples == 30
    assert set(with_all.support.tolist()) <= set(kept.nonzero()[0])
    if not kernel:
        assert torch.equal(with_all.center, without.center)


@pytest.mark.parametrize("strategy", STRATEGIES)
@up_to(10)
@given(times=arrays(np.int64, 20, elements=st.integers(0, 3)), balanced=st.booleans())
def test_a_whole_weight_repeats_the_sample(strategy, times, balanced):
    x, y = noisy(20)
    times[:3] += 1
    options = {"class_weight": "balanced" if balanced else None, "strategy": strategy, "tol": 1e-8}
    weighted = fitted(x, y, 2.0, 0.3, sample_weight=times.astype(float), **options)
    repeated = fitted(x.repeat(times, axis=0), y.repeat(times), 2.0, 0.3, **options)
    np.testing.assert_allclose(weighted(torch.tensor(x)), repeated(torch.tensor(x)), atol=1e-5)


def test_gamma_scale_heeds_zero_weights_only():
    x, y = noisy()
    weight = np.random.default_rng(0).uniform(0.5, 2.0, 45)
    weight[[7, 9]] = 0.0
    gamma = 0.5 / fitted(x, y, sample_weight=weight).kernel.lengthscale.square()
    assert gamma.item() == pytest.approx(scale_gamma(torch.tensor(x[weight > 0])), rel=1e-6)


@up_to(60)
@given(c=st.integers(3, 6), data=st.data())
def test_votes_are_those_of_scikit_learn(c, data):
    pairs = c * (c - 1) // 2
    some = st.floats(-3, 3) | st.sampled_from([0.0, -0.0, 1.0, -1.0])
    values = data.draw(arrays(np.float64, (4, pairs), elements=some))
    expected = _ovr_decision_function(values < 0, -values, c)
    np.testing.assert_allclose(votes_and_confidence(torch.tensor(values)), expected, atol=1e-12)
    assert classes_of_pairs(pairs) == c


@pytest.mark.parametrize("c", [2, 3, 4])
def test_gradients_of_one_vs_one(c):
    svm = fitted(*noisy(c=c), **OVO)
    z = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(svm, z) and gradcheck(svm.pairwise_scores, z)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_through_a_precomputed_kernel(strategy):
    x, y = noisy()
    svm = fitted(rbf_kernel(x), y, kernel="precomputed", strategy=strategy)
    assert gradcheck(svm, torch.tensor(rbf_kernel(x[:3], x), requires_grad=True))
