"""Tests of the centred vectors that are kept: scores follow every change, and nothing is stale."""

import copy
import gc
import io
import weakref

import pytest
import torch

from torchdnr.kernels import rbf_gamma
from torchdnr.kernels.rbf import centred, cut_tiles, rbf_scores
from torchdnr.svm import RBFSVM


def fitted(n=40, d=5, offset=3.0):
    features = torch.randn(n, d, dtype=torch.float64) + offset
    return RBFSVM(C=10.0, gamma=0.2).fit(features, torch.arange(n) % 3)


def plain(svm, features):
    differences = features.unsqueeze(1) - svm.support_vectors.unsqueeze(0)
    kernel = (-rbf_gamma(svm.kernel) * differences.square().sum(2)).exp()
    return kernel @ svm.dual_coef + svm.intercept


@pytest.fixture
def svm():
    return fitted()


@pytest.fixture
def few():
    return torch.randn(6, 5, dtype=torch.float64) + 3


def assert_right(svm, features):
    for _ in range(2):  # what the first call keeps, the second takes
        leaf = features.clone().requires_grad_()
        scores, expected = svm(leaf), plain(svm, leaf)
        torch.testing.assert_close(scores, expected)
        gradients = (torch.autograd.grad(s.square().sum(), leaf)[0] for s in (scores, expected))
        torch.testing.assert_close(*gradients)


def test_the_second_call_takes_what_the_first_made(svm, few):
    svm(few)
    kept = centred(svm.support_vectors, svm.center)
    svm(few)
    assert centred(svm.support_vectors, svm.center) is kept
    torch.testing.assert_close(kept.vectors, svm.support_vectors - svm.center)
    torch.testing.assert_close(kept.norms, kept.vectors.square().sum(1))


@pytest.mark.parametrize(
    "change",
    [
        lambda svm: svm.support_vectors.mul_(1.1),
        lambda svm: svm.center.add_(1.0),
        lambda svm: setattr(svm, "support_vectors", svm.support_vectors * 1.1),
        lambda svm: setattr(svm, "center", svm.center + 1.0),
        lambda svm: svm.load_state_dict(fitted().state_dict()),
        lambda svm: svm.load_state_dict(fitted(50).state_dict()),
        lambda svm: svm.fit(torch.randn(30, 5).double(), torch.arange(30) % 3),
    ],
)
def test_scores_follow_a_change(svm, few, change):
    assert_right(svm, few)
    change(svm)
    assert_right(svm, few)


def test_scores_follow_another_dtype(svm, few):
    expected = svm(few)
    torch.testing.assert_close(svm.float()(few), expected.float())
    torch.testing.assert_close(svm.double()(few).float(), expected.float())


def test_a_change_between_forward_and_backward_is_refused(svm, few):
    scores = svm(few.requires_grad_())
    svm.support_vectors.mul_(1.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        scores.sum().backward()


def test_copies_and_pickles_keep_none_of_it(svm, few):
    size = lambda module: len(pickled(module))  # noqa: E731
    before = size(svm)
    svm(few)
    assert size(svm) == before
    twin = copy.deepcopy(svm)
    twin.support_vectors.mul_(2)
    assert_right(twin, few)
    assert_right(svm, few)


def pickled(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    return buffer.getvalue()


def test_what_inference_mode_made_serves_gradients(svm, few):
    with torch.inference_mode():
        svm(few)
    assert_right(svm, few)


def test_vectors_made_in_inference_mode_are_not_kept(few):
    with torch.inference_mode():
        svm = fitted()
        torch.testing.assert_close(svm(few), plain(svm, few))
        assert centred(svm.support_vectors, svm.center) is None


def test_gradients_by_the_vectors_are_those_of_the_plain_formula(svm, few):
    svm(few)
    svm.support_vectors = svm.support_vectors.clone().requires_grad_()
    ours, expected = (
        torch.autograd.grad(scores.square().sum(), svm.support_vectors)[0]
        for scores in (svm(few), plain(svm, few))
    )
    torch.testing.assert_close(ours, expected)


def test_many_rows_keep_nothing(svm, few, monkeypatch):
    asked = []
    monkeypatch.setattr("torchdnr.kernels.rbf.centred", lambda *given: asked.append(given))
    svm(torch.randn(600, 5).double())
    assert not asked
    svm(few)
    assert len(asked) == 1


def test_it_is_dropped_with_the_vectors(few):
    svm = fitted()
    svm(few)
    kept = weakref.ref(centred(svm.support_vectors, svm.center).vectors)
    assert kept() is not None
    del svm
    gc.collect()
    assert kept() is None


def test_smoothed_views_share_it(svm, few):
    kept = centred(svm.support_vectors, svm.center)
    view = svm.smoothed(0.5)
    view(few)
    assert centred(view.support_vectors, view.center) is kept


@pytest.mark.parametrize("n", [1, 33, 300])
@pytest.mark.parametrize("block_elements", [50, 700, 2**24])
def test_any_tiles_give_the_same_scores_and_gradients(n, block_elements):
    tensors = [torch.randn(*shape).double() for shape in ((n, 4), (1500, 4), (1500, 3))]
    gamma, center = torch.tensor(0.3).double(), torch.randn(4).double()
    found = []
    for options in ({}, {"keep_centred": True, "block_elements": block_elements}):
        leaf = tensors[0].clone().requires_grad_()
        scores = rbf_scores(leaf, *tensors[1:], gamma, center, **options)
        found.append([scores, torch.autograd.grad(scores.square().sum(), leaf)[0]])
    torch.testing.assert_close(*found)
    moved = centred(tensors[1], center)
    tiles = list(cut_tiles(tensors[0], tensors[1], center, block_elements, moved))
    values = sum(len(tile.inputs) * len(tile.vectors) for tile in tiles)
    assert values == n * 1500
    assert max(len(tile.inputs) * len(tile.vectors) for tile in tiles) <= block_elements
