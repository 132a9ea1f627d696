"""Tests of networks that return more than a tensor of scores, as those of other libraries do."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from small_models import fitted, make_images, options, small_network
from torch import Tensor, nn

from torchdnr import DNR, WithReject, default_layers
from torchdnr.adapters import for_label
from torchdnr.attacks import (
    apgd,
    boundary_walk,
    line_search_pgd,
    lowest_confidence,
    multi_target,
    noise,
    orthogonal_pgd,
    pgd,
    square,
    transfer,
)
from torchdnr.decisions import class_scores
from torchdnr.evaluation import build_line_up, security_evaluation
from torchdnr.evaluation.checks import run_checks
from torchdnr.models import TrainingSettings, train_network

Outputs = namedtuple("Outputs", ["logits", "aux_logits"])


@dataclass
class ImageClassifierOutput:
    """As transformers has it."""

    loss: None
    logits: Tensor


class ModelOutput(OrderedDict):
    """The base of all outputs of transformers: a dictionary with attributes."""

    def __getattr__(self, name):
        return self[name]


KINDS = {
    "dict": lambda z: {"loss": None, "logits": z},
    "torchvision's dict": lambda z: OrderedDict(out=z, aux=-z),
    "tuple": lambda z: (z, -z),
    "list": lambda z: [z],
    "named tuple": lambda z: Outputs(z, -z),
    "dataclass": lambda z: ImageClassifierOutput(None, z),
    "ModelOutput": lambda z: ModelOutput(hidden_states=-z, logits=z),
}


class Wrapped(nn.Module):
    def __init__(self, net, kind):
        super().__init__()
        self.inner, self.kind = net, kind

    def forward(self, x):
        return KINDS[self.kind](self.inner(x))


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    net = small_network()
    net.dropout = nn.Dropout(0.1)
    images, labels = make_images(60), torch.arange(60) % 3
    train_network(net, images, labels, SETTINGS, progress=False)
    return net, images, labels


SETTINGS = TrainingSettings(epochs=3, batch_size=10, lr=0.05, momentum=0.9)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_found_in_all_that_networks_return(kind):
    scores = torch.rand(2, 3)
    assert class_scores(KINDS[kind](scores)) is scores and class_scores(scores) is scores


@pytest.fixture(params=["dict", "tuple", "ModelOutput"])
def pair(request, trained):
    """The network that returns its scores, the same one that returns more, images, labels."""
    net, images, labels = trained
    return net, Wrapped(net, request.param), images[:6], labels[:6]


@pytest.mark.parametrize(
    "attack",
    [pgd, apgd, multi_target, line_search_pgd, orthogonal_pgd, noise, square],
    ids=lambda attack: attack.__name__,
)
def test_attacks_take_the_scores(trained, attack):
    attack = partial(attack, **{noise: {}, square: {"queries": 50}}.get(attack, {"steps": 10}))
    plain, images, labels = trained
    wrapped, images, labels = Wrapped(plain, "dict"), images[:6], labels[:6]
    found = [attack(net, images, labels, 0.2, norm=torch.inf) for net in (plain, wrapped)]
    assert torch.equal(*found) and not torch.equal(found[0], images)


def test_walks_and_transfers_take_the_scores(pair):
    plain, wrapped, images, labels = pair
    walked = [boundary_walk(net, images, labels, images, steps=5) for net in (plain, wrapped)]
    assert torch.equal(*walked)
    other = nn.Sequential(plain)
    assert torch.equal(
        transfer(pgd, plain, other, images, labels, 0.2),
        transfer(pgd, wrapped, wrapped, images, labels, 0.2),
    )


@torch.no_grad()
def test_detectors_and_views_take_the_scores(pair):
    plain, wrapped, images, _ = pair
    both = [WithReject(net, lambda x: x.flatten(1).std(dim=1), 0.2) for net in (plain, wrapped)]
    assert torch.equal(*(model(images) for model in both))
    assert torch.equal(*(model.predict(images) for model in both))
    assert torch.equal(*(for_label(net, 0)(images) for net in (plain, wrapped)))
    assert torch.equal(*(lowest_confidence(model, images, 0.1, steps=3) for model in both))


def test_evaluations_and_checks_take_the_scores(pair):
    plain, wrapped, images, labels = pair
    attacks = build_line_up(["line-search-pgd", "boundary-walk"], images, options={"steps": 5})
    curves = [
        security_evaluation(net, images, labels, [0, 0.5], attacks=attacks)
        for net in (plain, wrapped)
    ]
    assert curves[0].accuracy == curves[1].accuracy
    assert torch.equal(curves[0].adversarial, curves[1].adversarial)
    only = ["differentiable", "zero gradient", "deterministic", "unbounded scores"]
    for net, curve in zip((plain, wrapped), curves, strict=True):
        report = run_checks(net, images, labels, curve, only=only)
        assert {check.name: check.status for check in report.checks} == dict.fromkeys(only, "pass")


def test_training_and_the_choice_of_layers_take_the_scores(trained, pair):
    _, images, labels = trained
    wrapped, weights = pair[1], []
    for kind in (None, wrapped.kind):
        torch.manual_seed(3)
        net = small_network() if kind is None else Wrapped(small_network(), kind)
        train_network(net, images, labels, SETTINGS, progress=False)
        weights.append((net if kind is None else net.inner).logits.weight)
    assert torch.equal(*weights)
    layers = default_layers(trained[0], images)
    assert default_layers(wrapped, images) == {f"inner.{k}": v for k, v in layers.items()}
    names = [f"inner.{name}" for name in ("conv", "logits")]
    dnr = fitted(DNR(wrapped, names, **options(*names, "combiner")), images)
    assert dnr(images).shape == (60, 4)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({"scores": torch.ones(1, 3)}, r"got dict with keys \['scores'\]"),
        ({"logits": None}, r"got dict with keys \['logits'\]"),
        ((None, torch.ones(1, 3)), r"got tuple of \['NoneType', 'Tensor'\]"),
        ((), r"got tuple of \[\]"),
        (ImageClassifierOutput(None, None), "got ImageClassifierOutput; "),
        ([[0.1, 0.2]], r"got list of \['list'\]"),
    ],
)
def test_what_has_no_scores_is_named(output, message):
    class Net(nn.Module):
        def forward(self, x):
            return output

    images, labels = torch.rand(1, 1, 8, 8), torch.zeros(1, dtype=torch.int64)
    for call in (
        lambda: class_scores(output),
        lambda: pgd(Net(), images, labels, 0.1),
        lambda: security_evaluation(Net(), images, labels, [0.0, 0.1]),
        lambda: WithReject(Net(), lambda x: x.sum(dim=(1, 2, 3)), 0.1)(images),
    ):
        with pytest.raises(TypeError, match=f"model must return its scores: .*{message}"):
            call()


def test_a_loss_before_the_scores_is_not_taken_for_them():
    class Net(nn.Module):
        def forward(self, x):
            return x.mean(), x.flatten(1)

    images, labels = torch.rand(2, 1, 2, 2), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"model must return \(n, c\) .*got \(\)"):
        pgd(Net(), images, labels, 0.1)
