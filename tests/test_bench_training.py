"""The benchmark of training against attacks: its thresholds."""

from types import SimpleNamespace

import torch
from torch import nn

from benchmarks.training.__main__ import calibrated
from benchmarks.training.variants import VARIANTS, Variant
from torchdnr import LogitRejection
from torchdnr.decisions import predict_labels


def rejecting(seed):
    """Make a linear network that rejects by its largest logit."""
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    with torch.no_grad():
        net[1].weight.copy_(torch.randn(3, 16, generator=generator))
    return LogitRejection(net)


def test_a_matched_threshold_leaves_as_many_images_right_as_the_other_has(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(200, 1, 4, 4, generator=generator)
    with torch.no_grad():
        labels = rejecting(0).scores(images).argmax(dim=1)  # the other is right on some
    monkeypatch.setitem(VARIANTS, "other", Variant(lambda study: rejecting(1)))
    monkeypatch.setitem(VARIANTS, "one", Variant(lambda study: rejecting(0), matched="other"))
    study = SimpleNamespace(threshold=(images, labels))

    def right(name):
        return int((predict_labels(calibrated(study, name)(images), True) == labels).sum())

    assert 0 < right("one") == right("other") < 180
