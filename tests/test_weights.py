"""Tests of class and sample weights in DNR and NR, against scikit-learn's SVC on the features."""

import json

import numpy as np
import pytest
import torch
from sklearn.svm import SVC
from small_models import LAYERS, make_images, small_network

from torchdnr import DNR, NR
from torchdnr.svm import grid_search, out_of_fold_scores
from torchdnr.svm.folds import stratified_folds

C, TOL = 2.0, 1e-6
GAMMAS = {"conv": 1.0, "logits": 30.0, "combiner": 0.3}
PAIRS = {name: (C, gamma) for name, gamma in GAMMAS.items()}
PAIR = PAIRS["logits"]
CLOSE = {"atol": 2e-4, "rtol": 0}


@pytest.fixture(scope="module")
def data():
    """Few images of class 2, noisy labels, and weights from 0.1 to 3."""
    torch.manual_seed(0)
    images, labels = make_images(90), torch.arange(90) % 3
    kept = (labels != 2) | (torch.arange(90) % 2 == 0)
    images, labels = images[kept], labels[kept]
    labels[::9] = (labels[::9] + 1) % 3
    return images, labels, torch.rand(len(images), dtype=torch.float64) * 2.9 + 0.1


def network():
    torch.manual_seed(1)
    return small_network().double()


def features(net, layer, images):
    model = NR(net, layer, hyperparameters={layer: PAIRS[layer]})
    with torch.no_grad():
        return model.features(images.double())[layer].numpy()


def svc_scores(train, labels, weight, class_weight, inputs, C=C, gamma=GAMMAS["logits"]):
    """Score as one binary SVC per class does, whose samples have the weights of their own class."""
    columns = []
    for k in range(3):
        y, given = labels == k, weight
        if class_weight == "balanced":
            share = np.where(y, weight[y].sum(), weight[~y].sum())
            given = weight * weight.sum() / (2 * share)
        elif class_weight is not None:
            given = weight * np.array([class_weight[label] for label in labels])
        svc = SVC(C=C, gamma=gamma, tol=TOL).fit(train, y, sample_weight=given)
        columns.append(svc.decision_function(inputs))
    return np.stack(columns, axis=1)


WEIGHTS = [None, "balanced", [1.0, 2.0, 5.0], {0: 0.5, 1: 1.0, 2: 4.0}]


@pytest.mark.parametrize("class_weight", WEIGHTS)
@pytest.mark.parametrize("with_samples", [False, True])
def test_an_nr_is_the_svc_of_its_weights(data, class_weight, with_samples):
    images, labels, weight = data
    weight = weight if with_samples else torch.ones_like(weight)
    net = network()
    model = NR(net, "logits", hyperparameters={"logits": PAIR}, class_weight=class_weight, tol=TOL)
    model.fit(images.double(), labels, sample_weight=weight if with_samples else None)
    z = features(net, "logits", images)
    expected = svc_scores(z, labels.numpy(), weight.numpy(), class_weight, z)
    np.testing.assert_allclose(model.scores(images.double()).detach().numpy(), expected, **CLOSE)


def held_out_scores(z, labels, weight, class_weight, folds, **pair):
    fold = stratified_folds(torch.as_tensor(labels), folds).numpy()
    scores = np.zeros((len(z), 3))
    for k in range(folds):
        rest = fold != k
        part = z[rest], labels[rest], weight[rest], class_weight
        scores[~rest] = svc_scores(*part, z[~rest], **pair)
    return scores


@pytest.mark.parametrize("class_weight", ["balanced", [1.0, 2.0, 5.0]])
def test_a_combiner_learns_from_weighted_folds_with_weights_of_its_own(data, class_weight):
    images, labels, weight = data
    net = network()
    model = DNR(
        net,
        LAYERS,
        hyperparameters=PAIRS,
        class_weight=class_weight,
        tol=TOL,
    )
    model.fit(images.double(), labels, sample_weight=weight)
    y, w = labels.numpy(), weight.numpy()
    held_out, fitted = [], []
    for layer in LAYERS:
        z, gamma = features(net, layer, images), GAMMAS[layer]
        held_out.append(held_out_scores(z, y, w, class_weight, 3, gamma=gamma))
        fitted.append(svc_scores(z, y, w, class_weight, z, gamma=gamma))
    given = np.concatenate(held_out, axis=1), y, w, class_weight
    expected = svc_scores(*given, np.concatenate(fitted, axis=1), gamma=GAMMAS["combiner"])
    np.testing.assert_allclose(
        model.scores(images.double()).detach().numpy(), expected, atol=2e-3, rtol=0
    )


@pytest.mark.parametrize(
    "class_weight",
    [
        pytest.param(weight, marks=[] if weight == WEIGHTS[2] else pytest.mark.slow)
        for weight in WEIGHTS
    ],
)
def test_a_search_weights_its_folds_and_its_accuracy(data, class_weight):
    images, labels, weight = data
    z = features(network(), "logits", images)
    y, w = labels.numpy(), weight.numpy()
    common = {"class_weight": class_weight, "sample_weight": weight, "tol": TOL}
    # With balanced weights a C so small that all samples are at it leaves the intercept open.
    grid = {"C_grid": (4.0, 20.0), "gamma_grid": (0.5, 2.0), "folds": 3}
    search = grid_search(torch.tensor(z), labels, **grid, **common)
    for row, limit in enumerate(search.C_grid):
        for column, gamma in enumerate(search.gamma_grid):
            scores = held_out_scores(z, y, w, class_weight, 3, C=limit, gamma=gamma)
            expected = (w * (scores.argmax(1) == y)).sum() / w.sum()
            assert search.accuracy[row, column].item() == pytest.approx(expected, abs=1e-9)
            found = out_of_fold_scores(torch.tensor(z), labels, C=limit, gamma=gamma, **common)
            np.testing.assert_allclose(found.numpy(), scores, **CLOSE)
    expected = svc_scores(z, y, w, class_weight, z, C=search.C, gamma=search.gamma)
    np.testing.assert_allclose(search.svm(torch.tensor(z)).numpy(), expected, **CLOSE)


def searched(images, labels, **options):
    model = DNR(network(), LAYERS, C_grid=(0.1, 2.0), gamma_grid=(1.0,), folds=3, tol=TOL)
    return model.fit(images.double(), labels, **options)


def test_images_of_weight_0_are_as_good_as_removed(data):
    images, labels, weight = data
    weight = weight.clone()
    weight[1::5] = 0.0
    kept = weight > 0
    model = searched(images, labels, sample_weight=weight)
    without = searched(images[kept], labels[kept], sample_weight=weight[kept])
    assert model.selection == without.selection
    torch.testing.assert_close(model.scores(images.double()), without.scores(images.double()))


@pytest.mark.slow
def test_equal_weights_change_nothing_and_doubled_ones_are_doubled_images(data):
    images, labels, _ = data
    plain = searched(images, labels)
    equal = searched(images, labels, sample_weight=np.ones(len(images)))
    assert plain.selection == equal.selection
    torch.testing.assert_close(plain.scores(images.double()), equal.scores(images.double()))
    net, pair = network(), {"logits": PAIR}
    rows = torch.cat([torch.arange(len(images)), torch.arange(10)])
    twice = NR(net, "logits", hyperparameters=pair, tol=TOL).fit(
        images.double()[rows], labels[rows]
    )
    weight = torch.ones(len(images))
    weight[:10] = 2.0
    weighted = NR(net, "logits", hyperparameters=pair, tol=TOL)
    weighted.fit(images.double(), labels, sample_weight=weight)
    torch.testing.assert_close(
        twice.scores(images.double()), weighted.scores(images.double()), atol=1e-4, rtol=0
    )


@pytest.mark.slow
def test_weights_go_with_a_loader_in_its_order(data):
    images, labels, weight = data
    loader = list(zip(images.double().split(16), labels.split(16), strict=True))
    one = searched(images, labels, sample_weight=weight)
    model = DNR(network(), LAYERS, C_grid=(0.1, 2.0), gamma_grid=(1.0,), folds=3, tol=TOL)
    two = model.fit(loader, sample_weight=weight.tolist())
    torch.testing.assert_close(one.scores(images.double()), two.scores(images.double()))


@pytest.mark.parametrize("class_weight", WEIGHTS)
def test_a_file_keeps_the_class_weights(data, class_weight, tmp_path):
    images, labels, _ = data
    net = small_network()
    options = {"hyperparameters": {"logits": PAIR}, "class_weight": class_weight}
    model = NR(net, "logits", **options).fit(images, labels)
    json.dumps(model.settings())
    model.save(tmp_path / "nr")
    loaded = NR.load(tmp_path / "nr", net)
    expected = tuple(class_weight) if isinstance(class_weight, list) else class_weight
    assert loaded.svm_options.class_weight == expected
    assert all(svm.class_weight == expected for svm in loaded.svms.named().values())
    again = loaded.fit(images, labels)
    torch.testing.assert_close(again.scores(images), model.scores(images))


def test_wrong_weights_are_refused_and_change_nothing(data):
    images, labels, weight = data
    net = small_network()
    with pytest.raises(ValueError, match='None, "balanced", one factor per class'):
        NR(net, "logits", class_weight="equal")
    with pytest.raises(ValueError, match="finite factors > 0"):
        NR(net, "logits", class_weight=[1.0, 0.0, 1.0])
    model = NR(net, "logits", hyperparameters={"logits": PAIR}).fit(images, labels)
    before = model.scores(images)
    zero = torch.where(labels == 2, 0.0, 1.0)
    for wrong, message in (
        (weight[1:], r"sample_weight must be \(75,\)"),
        (-weight, "finite and >= 0"),
        (zero, r"none for classes \[2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            model.fit(images, labels, sample_weight=wrong)
    with pytest.raises(TypeError, match="sample_weight must hold numbers"):
        model.fit(images, labels, sample_weight=["a"] * 75)
    torch.testing.assert_close(model.scores(images), before)
