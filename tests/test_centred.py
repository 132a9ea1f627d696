"""Tests of the centred vectors beside the support vectors: scores follow every change."""

import copy
import gc
import io
import weakref

import pytest
import torch

from torchdnr.kernels import rbf_gamma
from torchdnr.kernels.rbf import rbf_scores, squared_norms, tiles
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


def test_they_are_made_in_fit_and_then_taken(svm, few):
    kept = svm._centred()
    svm(few)
    assert all(one is other for one, other in zip(svm._centred(), kept, strict=True))
    torch.testing.assert_close(kept[0], svm.support_vectors - svm.center)
    torch.testing.assert_close(kept[1], kept[0].square().sum(1))


def test_they_are_not_in_the_state_dict(svm):
    assert not [name for name in svm.state_dict() if "centred" in name or "norms" in name]


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


def test_a_change_between_forward_and_backward_leaves_the_gradient_of_the_forward(svm, few):
    few.requires_grad_()
    (expected,) = torch.autograd.grad(plain(svm, few).sum(), few)
    scores = svm(few)
    svm.support_vectors.mul_(1.1)
    svm(few)
    torch.testing.assert_close(torch.autograd.grad(scores.sum(), few)[0], expected)
    scores = svm(few)
    svm.dual_coef.mul_(1.1)  # of which there is no copy
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
        svm.support_vectors.mul_(1.1)
        torch.testing.assert_close(svm(few), plain(svm, few))


def test_gradients_by_the_vectors_are_those_of_the_plain_formula(svm, few):
    svm(few)
    svm.support_vectors = svm.support_vectors.clone().requires_grad_()
    ours, expected = (
        torch.autograd.grad(scores.square().sum(), svm.support_vectors)[0]
        for scores in (svm(few), plain(svm, few))
    )
    torch.testing.assert_close(ours, expected)


def test_vectors_may_be_trained(svm, few):
    """Each step changes the leaf in place."""
    svm.support_vectors = svm.support_vectors.clone().requires_grad_()
    optimiser = torch.optim.SGD([svm.support_vectors], lr=0.1)
    for _ in range(2):
        optimiser.zero_grad()
        scores = svm(few)
        torch.testing.assert_close(scores, plain(svm, few))
        scores.square().sum().backward()
        optimiser.step()
    svm.support_vectors.requires_grad_(False)
    assert_right(svm, few)


def test_they_are_dropped_with_the_vectors(few):
    svm = fitted()
    svm(few)
    kept = weakref.ref(svm._centred()[0])
    assert kept() is not None
    del svm
    gc.collect()
    assert kept() is None


def test_smoothed_views_share_it(svm, few):
    kept = svm._centred()[0]
    view = svm.smoothed(0.5)
    view(few)
    assert view._centred()[0] is kept


@pytest.mark.parametrize("n", [1, 33, 300])
@pytest.mark.parametrize("block_elements", [50, 700, 2**24])
def test_any_tiles_give_the_same_scores_and_gradients(n, block_elements):
    tensors = [torch.randn(*shape).double() for shape in ((n, 4), (1500, 4), (1500, 3))]
    gamma, center = torch.tensor(0.3).double(), torch.randn(4).double()
    vectors = tensors[1] - center
    found = []
    for ready in (False, True):
        leaf = tensors[0].clone().requires_grad_()
        if ready:
            options = {"norms": squared_norms(vectors), "block_elements": block_elements}
            scores = rbf_scores(leaf - center, vectors, tensors[2], gamma, **options)
        else:
            scores = rbf_scores(leaf, *tensors[1:], gamma, center)
        found.append([scores, torch.autograd.grad(scores.square().sum(), leaf)[0]])
    torch.testing.assert_close(*found)
    cut = list(tiles(tensors[0], vectors, block_elements))
    sizes = [(r.stop - r.start) * (c.stop - c.start) for r, c in cut]
    assert sum(sizes) == n * 1500
    assert max(sizes) <= block_elements
