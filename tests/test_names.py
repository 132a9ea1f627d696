"""Tests of layers that are called like parts of a classifier: the two must not be mistaken."""

from collections import OrderedDict

import pytest
import torch
from small_models import fitted, make_images
from torch import nn

from torchdnr import DNR, NR
from torchdnr.attacks import smoothed_pgd
from torchdnr.evaluation import Attack, security_evaluation

GAMMA = 1e-2


def network(*names):
    """Make a network whose layers with weights have these names."""
    first, last = names
    return nn.Sequential(
        OrderedDict(
            [(first, nn.Conv2d(1, 4, 3)), ("flatten", nn.Flatten()), (last, nn.Linear(144, 3))]
        )
    )


@pytest.fixture
def images():
    return make_images(30)


@pytest.fixture
def dnr(images):
    pairs = {"conv": (5.0, GAMMA), "combiner": (100.0, GAMMA), ".combiner": (20.0, 2 * GAMMA)}
    net = network("conv", "combiner")
    model = DNR(net, ["conv", "combiner"], hyperparameters=pairs, stacking_folds=2)
    return fitted(model, images)


def test_a_layer_called_combiner_and_the_combiner_are_two(dnr, images, tmp_path):
    assert list(dnr.selection) == ["conv", "combiner", ".combiner"]
    assert [svm.C for svm in (*dnr.base_svms, dnr.combiner)] == [5.0, 100.0, 20.0]
    features = dnr.features(images)
    scores = [svm(features[name]) for name, svm in zip(dnr.layers, dnr.base_svms, strict=True)]
    assert torch.equal(dnr.scores(images), dnr.combiner(torch.cat(scores, dim=1)))
    dnr.save(tmp_path / "dnr")
    again = DNR.load(tmp_path / "dnr", dnr.net)
    assert torch.equal(again(images), dnr(images))
    assert [svm.C for svm in (*again.base_svms, again.combiner)] == [5.0, 100.0, 20.0]
    assert [svm.gamma for svm in (*again.base_svms, again.combiner)] == [GAMMA, GAMMA, 2 * GAMMA]
    assert again.settings() == dnr.settings()


def test_each_of_the_two_is_compressed_and_smoothed_by_its_name(dnr, images):
    few = dnr.compress(images, {"combiner": 3, ".combiner": 4}, steps=5, joint_steps=5)
    before = len(dnr.base_svms[0].support_vectors)
    sizes = [len(svm.support_vectors) for svm in (*few.base_svms, few.combiner)]
    assert sizes == [before, 3, 4]

    def gammas(model):
        svms = *model.base_svms, model.combiner
        return [0.5 / svm.kernel.lengthscale.square().item() for svm in svms]

    for name, factors in (("combiner", [1, 0.5, 1]), (".combiner", [1, 1, 0.5])):
        view = dnr.smoothed(0.5, [name])
        expected = [f * g for f, g in zip(factors, gammas(dnr), strict=True)]
        assert gammas(view) == pytest.approx(expected)


def test_combiner_means_the_combiner_where_no_layer_has_the_name(images):
    net = network("block", "logits")
    pairs = {name: (10.0, GAMMA) for name in ("block", "logits")} | {"combiner": (3.0, GAMMA)}
    model = DNR(net, ["block", "logits"], hyperparameters=pairs, stacking_folds=2)
    assert fitted(model, images).combiner.C == 3.0
    assert list(model.selection) == ["block", "logits", "combiner"]
    with pytest.raises(ValueError, match=r"named after one of \['block', 'logits', 'combiner'\]"):
        DNR(net, ["block", "logits"], hyperparameters={".combiner": (1.0, 1.0)})


def test_layers_that_fit_chooses_may_be_called_combiner(images):
    net = network("conv", "combiner").append(nn.ReLU()).append(nn.Linear(3, 3))
    model = DNR(net, hyperparameters={"combiner": (7.0, GAMMA)}, C_grid=[1.0], gamma_grid=[1.0])
    model.fit(images, torch.arange(30) % 3)
    assert "combiner" in model.layers
    assert model.base_svms[model.layers.index("combiner")].C == 7.0


class Combined(nn.Module):
    """A reduction with a part that is called combiner."""

    def __init__(self):
        super().__init__()
        self.combiner = nn.Linear(144, 5)

    def forward(self, output):
        return self.combiner(output.flatten(1))


def test_a_reduction_with_a_part_called_combiner_makes_no_combiner(images, tmp_path):
    net, reduction = network("conv", "svm"), Combined()
    pairs = {"conv": (10.0, GAMMA)}
    model = fitted(NR(net, "conv", reduction=reduction, hyperparameters=pairs), images)
    model.save(tmp_path / "nr")
    again = NR.load(tmp_path / "nr", net, layers={"conv": Combined()})
    assert again.combiner is None
    assert torch.equal(again(images), model(images))


class Named(nn.Module):
    """A plain network whose layers are called like what attacks and reports look for."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh())
        self.smoothed, self.scores = nn.Linear(8, 8), nn.Linear(8, 3)
        self.threshold = nn.Tanh()

    def forward(self, x):
        return self.scores(self.threshold(self.smoothed(self.net(x))))


def stay(model, inputs, labels, eps, start):
    return start


SMOOTHED = Attack(stay, needs="smoothed")


def test_layers_called_like_methods_are_not_called_as_such(images):
    net, labels = Named(), torch.arange(30) % 3
    with pytest.raises(ValueError, match=r"model must have a method smoothed\(factor\), got Named"):
        smoothed_pgd(net, images, labels, 0.1)
    attacks = {"pgd on smoothed views": SMOOTHED} | {"none": Attack(stay)}
    curve = security_evaluation(net, images[:6], labels[:6], [0.0, 0.1], attacks=attacks)
    assert curve.settings["left_out"] == ["pgd on smoothed views"]
