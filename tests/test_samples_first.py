"""Tests of layers whose samples are not in the first dimension, where lengths hide it."""

import pytest
import torch
from torch import nn

from torchdnr import DNR, NR
from torchdnr.files import digest

N = 12
"""Images of a batch, and rows of an image: what each layer sees as its sequence."""
OPTIONS = {"hyperparameters": {name: (10.0, 0.1) for name in ("mix", "head")}}


class Rows(nn.Module):
    """Classify images of 12 x 8 by a layer over their rows, samples first or not."""

    def __init__(self, mix, batch_first):
        super().__init__()
        self.mix, self.batch_first, self.head = mix, batch_first, nn.Linear(8, 3)

    def forward(self, x):
        z = x[:, 0] if self.batch_first else x[:, 0].transpose(0, 1)
        z = self.mix(z, z, z)[0] if isinstance(self.mix, nn.MultiheadAttention) else self.mix(z)[0]
        return self.head(z.mean(dim=1 if self.batch_first else 0))


def make(kind, batch_first):
    if kind == "attention":
        return Rows(nn.MultiheadAttention(8, 2, batch_first=batch_first), batch_first)
    return Rows(nn.LSTM(8, 8, batch_first=batch_first), batch_first)


class Last(nn.Module):
    """A reduction for layers with the sequence first."""

    def forward(self, output):
        return output[-1]


@pytest.fixture
def data():
    labels = torch.arange(36) % 3
    return torch.rand(36, 1, N, 8) * (labels + 1)[:, None, None, None] / 3, labels


def batches(images, labels, size):
    return list(zip(images.split(size), labels.split(size), strict=True))


@pytest.mark.parametrize("size", [1, 2, 3, N, 36])
@pytest.mark.parametrize("kind", ["attention", "lstm"])
def test_a_layer_with_its_sequence_first_is_refused_however_long_the_batch(kind, size, data):
    model = NR(make(kind, batch_first=False), "mix", **OPTIONS | {"hyperparameters": {}})
    with pytest.raises(ValueError, match=r"layer 'mix' must .*, got \(12, \d+, 8\); .*batch_first"):
        model.fit(batches(*data, size))
    assert not model.svms.is_fitted


def test_the_same_layer_with_its_samples_first_is_taken(data):
    images, labels = data
    for kind in ("attention", "lstm"):
        net = make(kind, batch_first=True)
        model = NR(net, "mix", hyperparameters={"mix": (10.0, 0.1)})
        model.fit(batches(images, labels, N))
        whole = NR(net, "mix", hyperparameters={"mix": (10.0, 0.1)}).fit(images, labels)
        torch.testing.assert_close(model.scores(images), whole.scores(images))


def test_a_module_that_finds_the_samples_reduces_such_a_layer(data, tmp_path):
    images, labels = data
    net = make("lstm", batch_first=False)
    model = DNR(net, {"mix": Last(), "head": "flatten"}, **OPTIONS | {"C_grid": [1.0]})
    model.fit(batches(images, labels, N)).calibrate(images)
    assert model.features.sizes["mix"]["features"] == 8
    sequence = net.mix(images[:, 0].transpose(0, 1))[0][-1]
    torch.testing.assert_close(model.features(images)["mix"], sequence)
    # Row by row, whatever the batch.
    one_by_one = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(one_by_one, model(images), rtol=1e-4, atol=1e-4)
    model.save(tmp_path / "dnr")
    again = DNR.load(tmp_path / "dnr", net, layers={"mix": Last()})
    assert torch.equal(again(images), model(images))


class FromBatch(nn.Module):
    """A reduction that takes the sequence for the samples."""

    def forward(self, output):
        return output.flatten(1)[:, :8]


def test_a_module_that_takes_another_dimension_for_the_samples_is_refused(data):
    net = make("lstm", batch_first=False)
    model = NR(net, "mix", reduction=FromBatch())
    with pytest.raises(ValueError, match=r"reduction of layer 'mix' .* n = 2, got \(12, 8\)"):
        model.fit(batches(*data, N))


def test_the_trial_costs_one_small_batch_and_changes_nothing(data):
    images, labels = data
    net, seen = make("lstm", batch_first=True), []
    before = digest(net.state_dict())
    handle = net.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    NR(net, "head", hyperparameters={"head": (10.0, 0.1)}).fit(images, labels)
    handle.remove()
    assert sorted(seen) == [2, 36, 36]  # the trial, the sample of all, and the features
    assert digest(net.state_dict()) == before
