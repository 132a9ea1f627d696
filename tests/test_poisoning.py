"""Poisoning of the training data: derivatives through the fit, and what attacks make of them."""

import pytest
import torch
from accelerator import accelerator
from torch import nn

from torchdnr import DNR, NR
from torchdnr.attacks.poisoning import choose_points, flip_labels, poison_inputs
from torchdnr.svm import RBFSVM, influence, svm_scores


def blobs(n, seed):
    """Points of three classes in the unit square, that overlap a little."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    centres = torch.tensor([[0.3, 0.3], [0.7, 0.3], [0.5, 0.7]], dtype=torch.float64)
    noise = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    return (centres[labels] + 0.1 * noise).clamp(0, 1), labels


def fit(inputs, labels, sample_weight=None):
    """Train an SVM on the points themselves."""

    def scores(others):
        options = {"C": 5.0, "gamma": 10.0, "sample_weight": sample_weight, "num_classes": 3}
        return svm_scores(inputs, labels, others, **options)

    return scores


@pytest.fixture(scope="module")
def data():
    return blobs(60, 0), blobs(60, 1), blobs(300, 2)


def errors(data, labels, points=None, wrong=None):
    """Count the test errors of an SVM on training data that were tampered with."""
    (inputs, _), _, (test, truth) = data
    if points is not None:
        inputs, labels = torch.cat([inputs, points]), torch.cat([labels, wrong])
    with torch.no_grad():
        return int((fit(inputs, labels)(test).argmax(dim=1) != truth).sum())


def test_moved_points_do_more_harm_than_where_they_began(data):
    (inputs, labels), validation, _ = data
    points, true = blobs(9, 3)
    wrong = (true + 1) % 3
    poison = poison_inputs(fit, inputs, labels, points, wrong, *validation, steps=12, step_size=0.1)
    assert poison.losses.max() > poison.losses[0] + 0.02
    assert 0 <= poison.inputs.min() and poison.inputs.max() <= 1
    assert torch.equal(poison.labels, wrong) and len(poison.losses) == 13
    assert errors(data, labels, poison.inputs, wrong) > errors(data, labels, points, wrong)


def test_chosen_points_do_more_harm_than_random_ones(data):
    (inputs, labels), validation, _ = data
    pool, true = blobs(60, 4)
    which, wrong = choose_points(fit, inputs, labels, pool, true, 9, *validation, rounds=3)
    assert len(set(which.tolist())) == 9 and (wrong != true[which]).all()
    chosen = errors(data, labels, pool[which], wrong)
    assert chosen > max(
        errors(data, labels, pool[9 * i : 9 * i + 9], (true[9 * i : 9 * i + 9] + 1) % 3)
        for i in range(3)
    )


def test_chosen_flips_do_more_harm_than_random_ones(data):
    (inputs, labels), validation, _ = data
    flipped = flip_labels(fit, inputs, labels, 7, *validation, rounds=3)
    assert (flipped != labels).sum() == 7
    random = []
    for seed in range(3):
        rows = torch.randperm(60, generator=torch.Generator().manual_seed(seed))[:7]
        random.append(labels.index_put((rows,), (labels[rows] + 1) % 3))
    assert errors(data, flipped) > max(errors(data, labels) for labels in random)


def test_nonsense_is_refused(data):
    (inputs, labels), validation, _ = data
    with pytest.raises(ValueError, match=r"count must be in 0\.\.60"):
        flip_labels(fit, inputs, labels, 61, *validation)
    with pytest.raises(ValueError, match="steps must be >= 1"):
        poison_inputs(fit, inputs, labels, inputs, labels, *validation, steps=0)
    with pytest.raises(ValueError, match="no objective 'harm'"):
        poison_inputs(fit, inputs, labels, inputs, labels, *validation, objective="harm")


class Net(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Flatten(), nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh())


@pytest.fixture(scope="module", params=[DNR, NR])
def fitted(request):
    net, images = Net().double(), blobs(45, 0)
    layers = ["2", "4"] if request.param is DNR else "4"
    names = ["2", "4", "combiner"] if request.param is DNR else ["4"]
    options = {"hyperparameters": dict.fromkeys(names, (5.0, 2.0)), "tol": 1e-6}
    model = request.param(net, layers, **options).fit(*images)
    return model.calibrate(blobs(60, 1)[0], rejection_rate=0.1), images, options


def test_a_refitted_classifier_is_the_one_fitted_on_those_images(fitted):
    model, (images, labels), options = fitted
    others, weight = blobs(20, 5)[0], torch.ones(45)
    weight[[4, 9]] = torch.tensor([0.0, 0.5])
    images = images.flip(0).contiguous()
    fresh = type(model)(model.net, list(model.layers) if type(model) is DNR else "4", **options)
    fresh.fit(images, labels.flip(0), sample_weight=weight)
    view = model.refitted(images, labels.flip(0), weight)
    assert torch.allclose(view.scores(others), fresh.scores(others), atol=1e-4)
    assert view.threshold == model.threshold and type(view) is type(model)
    assert not torch.allclose(model.scores(others), fresh.scores(others), atol=1e-2)


def test_scores_differentiate_into_training_images(fitted):
    model, (images, labels), _ = fitted
    others = blobs(5, 6)[0]
    generator = torch.Generator().manual_seed(0)
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model.refitted(leaf, labels).scores(others).sum(), leaf)
    direction = torch.randn(images.shape, dtype=torch.float64, generator=generator)
    step = 1e-6 * direction
    with torch.no_grad():
        ahead, behind = (
            model.refitted(moved, labels).scores(others).sum()
            for moved in (images + step, images - step)
        )
    assert (ahead - behind).item() / 2e-6 == pytest.approx(
        (gradient * direction).sum().item(), rel=1e-3
    )


def test_influence_is_that_of_each_svm(fitted):
    model, _, _ = fitted
    others = blobs(5, 6)[0]
    effects = model.influence(others)
    assert list(effects) == [*model.layers, *["combiner"] * (type(model) is DNR)]
    for name, svm in model.svms.named().items():
        assert torch.equal(effects[name].support, svm.support)
        assert effects[name].effects.shape == (5, len(svm.support))


def gradient_through_a_fit(inputs, labels, others):
    inputs = inputs.requires_grad_()
    scores = RBFSVM(5.0, 10.0).fit(inputs, labels, differentiable=True)(others)
    return torch.autograd.grad(scores.square().sum(), inputs)[0]


CALLS = {
    "gradient": lambda fitted, others, pool: gradient_through_a_fit(*fitted, others[0]),
    "moved": lambda fitted, others, pool: (
        poison_inputs(
            fit, *fitted, pool[0], (pool[1] + 1) % 3, *others, steps=3, step_size=0.1
        ).inputs
    ),
    "chosen": lambda fitted, others, pool: choose_points(fit, *fitted, *pool, 5, *others)[0],
    "flipped": lambda fitted, others, pool: flip_labels(fit, *fitted, 5, *others),
    "influence": lambda fitted, others, pool: influence(RBFSVM().fit(*fitted), *others)[0],
}


@pytest.mark.parametrize(
    "name",
    [
        *("gradient", "influence"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("moved", "chosen", "flipped")),
    ],
)
def test_on_any_device_derivatives_through_a_fit_are_those_of_the_cpu(name):
    data = blobs(60, 0), blobs(60, 1), blobs(9, 3)
    expected = CALLS[name](*data)
    with accelerator() as device:
        there = [[part.detach().to(device) for part in pair] for pair in data]
        torch.testing.assert_close(CALLS[name](*there).cpu(), expected)
