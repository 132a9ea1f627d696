"""Tests of arrays of numpy and lists of numbers in the place of tensors."""

import numpy as np
import pytest
import torch
from small_models import fitted, make_images, options, small_network
from torch import nn

from torchdnr import DNR, NR, RBFSVM
from torchdnr.arrays import as_tensor
from torchdnr.attacks import boundary_walk, line_search_pgd, lowest_confidence, multi_target, pgd
from torchdnr.evaluation import security_evaluation
from torchdnr.rejection import WithReject
from torchdnr.svm import grid_search, out_of_fold_scores, solve_dual
from torchdnr.svm.compression import compress_svm

KINDS = {
    "array": lambda t: t.numpy(),
    "double": lambda t: t.numpy().astype(np.float64),
    "list": lambda t: t.tolist(),
    "reversed": lambda t: np.ascontiguousarray(t.numpy()[::-1])[::-1],
    "read-only": lambda t: np.lib.stride_tricks.as_strided(t.numpy(), writeable=False),
    "big-endian": lambda t: t.numpy().astype(t.numpy().dtype.newbyteorder(">")),
    "fortran": lambda t: np.asfortranarray(t.numpy()),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def integers(t):
    return t.numpy().astype(np.int32)


@pytest.fixture(scope="module")
def features():
    torch.manual_seed(0)
    y = torch.arange(60) % 3
    return torch.randn(60, 4) + y[:, None], y


@pytest.mark.filterwarnings("error::UserWarning")
def test_an_svm_is_fitted_on_arrays_and_scores_them(features, kind):
    x, y = features
    expected = RBFSVM(2.0, tol=1e-6).fit(x, y, sample_weight=torch.arange(60) / 30)
    svm = RBFSVM(2.0, tol=1e-6).fit(kind(x), integers(y), sample_weight=np.arange(60) / 30)
    assert svm.dual_coef.dtype in (torch.float32, torch.float64)
    torch.testing.assert_close(svm(kind(x)), expected(x).to(svm.dual_coef), rtol=0, atol=1e-4)
    torch.testing.assert_close(expected(kind(x)), expected(x))


def test_integers_are_features_where_they_come_from_elsewhere(features):
    x, y = (10 * features[0]).round(), features[1]
    expected = RBFSVM().fit(x, y)(x)
    for given in (x.int().numpy(), x.int().tolist()):
        torch.testing.assert_close(RBFSVM().fit(given, y.tolist())(given), expected)
    with pytest.raises(ValueError, match=r"must be float32 or float64, got torch\.int32"):
        RBFSVM().fit(x.int(), y)


def test_search_compression_and_solver_take_arrays(features):
    x, y = features
    grid = {"C_grid": (1.0, 10.0), "gamma_grid": (1.0,), "folds": 2}
    one, two = grid_search(x, y, **grid), grid_search(x.numpy(), y.numpy(), **grid)
    assert torch.equal(one.accuracy, two.accuracy) and one.C == two.C
    scores = [out_of_fold_scores(*d, C=1.0, gamma=0.1) for d in ((x, y), (x.numpy(), y.tolist()))]
    torch.testing.assert_close(*scores)
    few = [compress_svm(one.svm, given, 10, steps=3)(x) for given in (x, x.numpy())]
    torch.testing.assert_close(*few)
    kernel = torch.exp(-0.1 * torch.cdist(x, x) ** 2).double()
    targets = torch.where(y[:, None] == torch.arange(3), 1.0, -1.0)
    duals = [solve_dual(*d, 1.0) for d in ((kernel, targets), (kernel.numpy(), targets.numpy()))]
    torch.testing.assert_close(duals[0].dual_coef, duals[1].dual_coef)


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(0)
    return make_images(30)


def make_dnr(images, labels, held_out):
    torch.manual_seed(1)
    layers = ["conv", "logits"]
    model = DNR(small_network(), layers, **options(*layers, "combiner"))
    return model.fit(images, labels).calibrate(held_out, 0.2)


@pytest.fixture(scope="module")
def expected(images):
    """What is made of tensors."""
    return make_dnr(images, torch.arange(30) % 3, images.flip(-1))


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_classifier_is_fitted_calibrated_and_called_on_arrays(images, expected, kind):
    labels, held_out = torch.arange(30) % 3, images.flip(-1)
    model = make_dnr(kind(images), labels.tolist(), kind(held_out))
    torch.testing.assert_close(model(kind(images)), expected(images))
    torch.testing.assert_close(model.scores(kind(images)), expected.scores(images))
    assert torch.equal(model.predict(kind(images)), expected.predict(images))
    small = model.compress(kind(images), factor=1.0, steps=1, joint_steps=0)
    assert small.scores(kind(images)).shape == (30, 3)
    model.double()
    assert model(kind(images)).dtype == torch.float64


def test_a_loader_may_yield_arrays(images):
    labels = torch.arange(30) % 3
    tensors = list(zip(images.split(7), labels.split(7), strict=True))
    arrays = [(x.numpy(), y.numpy()) for x, y in tensors]
    one, two = (make_dnr(loader, None, loader) for loader in (tensors, arrays))
    torch.testing.assert_close(one(images), two(images))


def test_attacks_and_evaluations_take_arrays(images, kind):
    labels = torch.arange(30) % 3
    model = fitted(NR(small_network(), "logits", **options("logits", gamma=1.0)), images)
    x, y = images[:6], labels[:6]
    given = kind(x), y.numpy()
    for attack, more in ((line_search_pgd, {}), (pgd, {"targets": (y + 1) % 3})):
        common = {"norm": 2, "steps": 3}
        expected = attack(model, x, y, 0.5, start=x, **common, **more)
        arrays = {name: value.tolist() for name, value in more.items()}
        found = attack(model, *given, 0.5, start=kind(x), **common, **arrays)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected)
    pool = {"init_inputs": kind(images), "init_labels": labels.tolist()}
    assert boundary_walk(model, *given, steps=3, **pool).shape == x.shape
    assert multi_target(model, *given, 0.5, attack=pgd, steps=2).shape == x.shape
    assert lowest_confidence(model, given[0], 0.5, steps=2, restarts=1).shape == x.shape
    curve = security_evaluation(model, *given, eps=[0.0], norm=2, progress=False)
    assert torch.equal(curve.predictions[0], model.predict(x))


def test_a_detector_beside_a_network_predicts_arrays(images, kind):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    pair = WithReject(net, lambda x: x.flatten(1).mean(1), 0.3)
    assert torch.equal(pair.predict(kind(images)), pair.predict(images))


WRONG = [
    (["cat", "dog"], "labels", "got a list of str, 'cat' first"),
    (np.array(["cat", "dog"]), "labels", "got ndarray of dtype <U3"),
    (np.array([1, None]), "labels", "got ndarray of dtype object"),
    ([[1.0, 2.0], [3.0]], "features", "rows of one length, got a list of float"),
    (np.array([1j, 2]), "features", "got ndarray of dtype complex128"),
    ({"a": 1}, "features", "got dict"),
    (None, "features", "got NoneType"),
    ("text", "features", "got str"),
]


@pytest.mark.parametrize(("value", "name", "message"), WRONG, ids=lambda v: str(v)[:20])
def test_what_holds_no_numbers_is_a_type_error_that_says_what_came(value, name, message, images):
    with pytest.raises(TypeError, match=message):
        as_tensor(name, value)
    x, y = torch.rand(2, 2), torch.arange(2)
    arguments = (value, y) if name == "features" else (x, value)
    with pytest.raises(TypeError, match=message):
        RBFSVM().fit(*arguments)
    model = NR(small_network(), "logits", **options("logits"))
    if name == "labels":
        with pytest.raises(TypeError, match=message):
            model.fit(images[:2], value)
    model = fitted(model, images)
    for predict in (model, model.predict, model.scores):
        with pytest.raises(TypeError, match=message):
            predict(value)
    if name == "features":
        with pytest.raises(TypeError, match=message):
            pgd(model, value, y, 0.1)
    else:
        with pytest.raises(TypeError, match=message):
            pgd(model, images[:2], value, 0.1)


def test_integer_images_are_not_guessed_at(images):
    model = fitted(NR(small_network(), "logits", **options("logits")), images)
    for call in (model.predict, model.calibrate, lambda x: model.fit(x, [0, 1, 2] * 10)):
        with pytest.raises(ValueError, match=r"floating point in \(0.0, 1.0\), got torch.uint8"):
            call((255 * images).byte().numpy())


def test_labels_that_are_no_integers_are_refused_as_of_tensors(features):
    x, y = features
    for wrong in (y.numpy() + 0.5, (y > 0).tolist()):
        with pytest.raises(ValueError, match=r"labels must be integers 0\.\.c-1"):
            RBFSVM().fit(x.numpy(), wrong)
