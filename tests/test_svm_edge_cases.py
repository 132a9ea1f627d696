"""`RBFSVM` where problems are small, degenerate or extreme; its invariances; wrong arguments."""

import copy
import itertools

import numpy as np
import pytest
import torch
from gpytorch.kernels import MaternKernel
from hypothesis import given
from hypothesis import strategies as st
from property_examples import up_to
from sklearn.svm import SVC

from torchdnr.files import CheckpointError
from torchdnr.svm import RBFSVM, NotFittedError
from torchdnr.svm.multiclass import class_pairs

STRATEGIES = ["one-vs-rest", "one-vs-one"]
GRID = [-2.0, -1.0, 0.0, 1.0, 2.0]


def noisy(n=40, c=3, d=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % c
    x = torch.randn(n, d, generator=generator, dtype=torch.float64) + 0.6 * y.unsqueeze(1)
    return x, y


def oracle(x, y, unseen, strategy, **options):
    """Return scikit-learn's values of the binary problems, and whether it met its tolerance."""
    pairs = [(k, None) for k in range(y.max() + 1)]
    if strategy == "one-vs-one":
        pairs = list(itertools.combinations(range(y.max() + 1), 2))
    values = []
    for first, second in pairs:
        rows = np.ones(len(y), bool) if second is None else (y == first) | (y == second)
        svc = SVC(tol=1e-6, **options).fit(x[rows], y[rows] == first)
        values.append(svc.decision_function(unseen))
    return np.stack(values, axis=1)


def values_of(svm, z):
    return (svm if svm.strategy == "one-vs-rest" else svm.pairwise_scores)(z)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("C", "gamma"), [(1e-3, 0.3), (1e6, 2.0), (1.0, 1e-6), (1.0, 1e4), (1e6, 1e4), (1e-3, 1e-6)]
)
def test_extreme_options(strategy, C, gamma):
    x, y = noisy()
    unseen = noisy(10, seed=1)[0]
    svm = RBFSVM(C, gamma, strategy=strategy, tol=1e-6).fit(x, y)
    assert svm.solution.converged.all()
    expected = oracle(x.numpy(), y.numpy(), unseen.numpy(), strategy, C=C, gamma=gamma)
    np.testing.assert_allclose(values_of(svm, unseen), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "make",
    [
        lambda: (torch.tensor([[0.0], [1.0]]).double(), torch.tensor([0, 1])),
        lambda: (torch.eye(4).double(), torch.arange(4)),
        lambda: (torch.cat([noisy()[0]] * 3), torch.cat([noisy()[1]] * 3)),
        lambda: (torch.cat([noisy()[0]] * 2), torch.cat([noisy()[1], (noisy()[1] + 1) % 3])),
        lambda: (torch.ones(9, 2).double(), torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2])),
        lambda: (torch.ones(4, 2).double(), torch.tensor([0, 0, 1, 1])),
    ],
    ids=["n=2", "one per class", "duplicates", "contradictions", "constant", "constant, balanced"],
)
def test_small_and_degenerate_problems(strategy, make):
    x, y = make()
    svm = RBFSVM(1.0, strategy=strategy, tol=1e-6).fit(x, y)
    unseen = torch.randn(10, x.shape[1], dtype=torch.float64)
    expected = oracle(x.numpy(), y.numpy(), unseen.numpy(), strategy, C=1.0, gamma=gamma_of(svm))
    np.testing.assert_allclose(values_of(svm, unseen), expected, atol=1e-5)
    assert svm.solution.converged.all()


def gamma_of(svm):
    return 0.5 / svm.kernel.lengthscale.item() ** 2


@pytest.mark.parametrize("strategy", STRATEGIES)
@up_to(15)
@given(
    x=st.lists(st.tuples(st.sampled_from(GRID), st.sampled_from(GRID)), min_size=6, max_size=20),
    C=st.sampled_from([0.1, 1.0, 50.0]),
    seed=st.integers(0, 99),
)
def test_any_small_problem_is_that_of_scikit_learn(strategy, x, C, seed):
    x = torch.tensor(x, dtype=torch.float64)  # on a grid: full of duplicates
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (len(x),), generator=generator)
    y[:3] = torch.arange(3)
    svm = RBFSVM(C, 0.5, strategy=strategy, tol=1e-6).fit(x, y)
    expected = oracle(x.numpy(), y.numpy(), x.numpy(), strategy, C=C, gamma=0.5)
    np.testing.assert_allclose(values_of(svm, x), expected, atol=1e-4)


@pytest.mark.parametrize("strategy", STRATEGIES)
@up_to(10)
@given(seed=st.integers(0, 999))
def test_the_order_of_the_samples_does_not_matter(strategy, seed):
    x, y = noisy()
    weight = torch.rand(len(x), generator=torch.Generator().manual_seed(seed)) + 0.1
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    options = {"strategy": strategy, "class_weight": "balanced", "tol": 1e-7}
    one = RBFSVM(5.0, **options).fit(x, y, sample_weight=weight)
    other = RBFSVM(5.0, **options).fit(x[order], y[order], sample_weight=weight[order])
    torch.testing.assert_close(one(x), other(x), atol=1e-5, rtol=0)
    assert set(one.support.tolist()) == set(order[other.support].tolist())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("names", [(1, 0), (2, 0, 1), (2, 1, 0)])
def test_renaming_the_classes_renames_the_scores(strategy, names):
    c, names = len(names), torch.tensor(names)
    x, y = noisy(c=c)
    C = torch.tensor([0.5, 5.0, 1.0])[:c]
    renamed = torch.empty_like(C)
    renamed[names] = C
    one = RBFSVM(C, strategy=strategy, tol=1e-7).fit(x, y)
    other = RBFSVM(renamed, strategy=strategy, tol=1e-7).fit(x, names[y])
    torch.testing.assert_close(one(x), other(x)[:, names], atol=1e-5, rtol=0)


OPTIONS = [
    {"C": [1.0, 2.0, 3.0], "gamma": "auto"},
    {"class_weight": "balanced", "strategy": "one-vs-one", "max_steps": 5000},
    {"class_weight": {0: 2.0, 2: 0.5}, "gamma": 0.25, "tol": 1e-4},
    {"class_weight": [2.0, 1.0, 0.5], "C": np.float32(3.0)},
    {"kernel": "precomputed", "strategy": "one-vs-one"},
    {"kernel": "precomputed", "class_weight": torch.tensor([2.0, 1.0, 0.5])},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_every_option_is_saved(options, tmp_path):
    x, y = noisy()
    x = torch.exp(-(torch.cdist(x, x) ** 2)) if "kernel" in options else x
    svm = RBFSVM(**options).fit(x, y, sample_weight=torch.rand(len(x)) + 0.1)
    svm.save(tmp_path / "svm.safetensors")
    loaded = RBFSVM.load(tmp_path / "svm.safetensors")
    assert loaded.settings() == svm.settings()
    for name in ("C", "gamma", "class_weight", "strategy", "tol", "max_steps", "is_precomputed"):
        assert getattr(loaded, name) == getattr(svm, name), name
    assert torch.equal(loaded(x), svm(x)) and torch.equal(loaded.support, svm.support)
    assert torch.equal(loaded.fit(x, y)(x), RBFSVM(**options).fit(x, y)(x))
    assert torch.equal(copy.deepcopy(svm)(x), svm(x))
    unfitted = RBFSVM(**options)
    unfitted.load_state_dict(svm.state_dict())
    assert torch.equal(unfitted(x), svm(x)) and unfitted.num_classes == 3
    assert svm.to(torch.float32)(x).dtype == torch.float32 and svm.support.dtype == torch.int64


def test_a_precomputed_file_refuses_a_kernel(tmp_path):
    x, y = noisy()
    RBFSVM(kernel="precomputed").fit(x @ x.T, y).save(tmp_path / "svm.safetensors")
    with pytest.raises(CheckpointError, match=r"expected kernel=precomputed.* got MaternKernel"):
        RBFSVM.load(tmp_path / "svm.safetensors", kernel=MaternKernel())


def test_a_state_without_indices_is_that_of_an_older_version():
    x, y = noisy()
    svm = RBFSVM().fit(x, y)
    old = svm.state_dict()
    indices = old.pop("support")
    loaded = RBFSVM()
    loaded.load_state_dict(old)
    assert torch.equal(loaded(x), svm(x))
    assert (loaded.support == -1).all() and loaded.support.shape == indices.shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"C": [1.0, -1.0]}, "C must be > 0"),
        ({"C": [1.0, float("nan")]}, "C must be > 0"),
        ({"C": []}, "C must be one number or one per class"),
        ({"C": torch.ones(2, 2)}, "C must be one number or one per class"),
        ({"C": "large"}, "C must hold numbers, got 'large'"),
        ({"gamma": 0.0}, "gamma must be a number > 0"),
        ({"gamma": float("inf")}, "gamma must be a number > 0"),
        ({"kernel": "linear"}, "kernel must be None, a kernel or \"precomputed\", got 'linear'"),
        ({"strategy": "ovo"}, "strategy must be one of .* got 'ovo'"),
        ({"tol": 0.0}, "tol must be > 0"),
        ({"class_weight": "equal"}, "class_weight must be None, .* got 'equal'"),
        ({"class_weight": [1.0, 0.0]}, "class_weight must hold finite factors > 0"),
        ({"class_weight": {0: float("inf")}}, "class_weight must hold finite factors > 0"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RBFSVM(**options)


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({"C": [1.0, 1.0]}, {}, "C must have one value per class, 3, got 2"),
        ({"class_weight": [1.0]}, {}, "class_weight must have one value per class, 3, got 1"),
        ({"class_weight": {3: 1.0, 0: 2.0}}, {}, r"must name classes 0\.\.2, got \[3\]"),
        ({}, {"sample_weight": torch.ones(39)}, r"sample_weight must be \(40,\), .* got \(39,\)"),
        ({}, {"sample_weight": torch.ones(40, 1)}, r"sample_weight must be \(40,\)"),
        ({}, {"sample_weight": -torch.ones(40)}, "sample_weight must be finite and >= 0"),
        ({}, {"sample_weight": torch.full((40,), torch.nan)}, "sample_weight must be finite"),
        (
            {},
            {"sample_weight": (torch.arange(40) % 3 != 1).double()},
            r"leave every class a sample of weight > 0, got none for classes \[1\]",
        ),
        ({"kernel": "precomputed"}, {}, r"square Gram matrix .* got \(40, 3\)"),
        (
            {"kernel": "precomputed"},
            {"features": torch.eye(40) + torch.ones(40, 40).triu()},
            "features must be a symmetric Gram matrix, got entries that differ .* by 1",
        ),
        ({"kernel": "precomputed"}, {"features": torch.eye(40) / 0}, "features must be finite"),
        ({}, {"features": 1e200 * noisy()[0]}, 'gamma="scale" is 0.0 here'),
    ],
)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_wrong_training_arguments_are_refused(strategy, options, arguments, message):
    x, y = noisy()
    svm = RBFSVM(strategy=strategy, **options)
    arguments = {"features": x, **arguments}
    with pytest.raises(ValueError, match=message):
        svm.fit(labels=y, **arguments)
    assert not svm.is_fitted


def test_rounding_does_not_make_a_gram_matrix_asymmetric():
    x, y = noisy()
    gram = torch.exp(-torch.cdist(x, x).square()).float()
    gram = gram * (1 + 1e-6 * torch.randn(40, 40))
    assert RBFSVM(kernel="precomputed").fit(gram, y).is_fitted


def test_wrong_calls_are_refused():
    x, y = noisy()
    with pytest.raises(ValueError, match='pairs need strategy="one-vs-one"'):
        RBFSVM().fit(x, y).pairwise_scores(x)
    with pytest.raises(NotFittedError, match="is not fitted"):
        RBFSVM(strategy="one-vs-one").pairwise_scores(x)
    svm = RBFSVM(kernel="precomputed").fit(x @ x.T, y)
    with pytest.raises(ValueError, match=r"features must be \(n, 40\) as in fit, got \(5, 39\)"):
        svm(torch.ones(5, 39))
    assert len(class_pairs(svm.num_classes)) == 3
