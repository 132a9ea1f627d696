"""The benchmark of training against attacks: its thresholds, and what its files are merged to."""

from types import SimpleNamespace

import torch
from torch import nn

from benchmarks.training.__main__ import KIND, calibrated, examined_path, points_path, transferred
from benchmarks.training.variants import VARIANTS, Variant
from torchdnr import LogitRejection
from torchdnr.decisions import predict_labels
from torchdnr.files import save_tensors, write_json


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


def test_points_of_others_and_examinations_are_merged(monkeypatch, tmp_path):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(20, 1, 4, 4, generator=generator)
    with torch.no_grad():
        labels = rejecting(0).scores(images).argmax(dim=1)
    study = SimpleNamespace(folder=tmp_path, norm=2.0, threshold=(images, labels))
    moved = torch.rand(20, 1, 4, 4, generator=generator).round() * 0.4 - 0.2
    nearer = (images + moved).clamp(0, 1)  # some of them evade
    for name, seed, norm, points in (("one", 0, 9.0, images), ("other", 1, 9.0, nearer)):
        monkeypatch.setitem(VARIANTS, name, Variant(lambda study, seed=seed: rejecting(seed)))
        result = {"norms": [norm] * 20, "eps": [0.0, 1.0], "kept": [1.0, 1.0]}
        write_json(tmp_path / f"{name}.json", result)
        save_tensors(points_path(study, name), {"points": points}, {}, kind=KIND)
    write_json(examined_path(study, "one"), {"checks": {"fail": []}})
    merged = transferred(study, images, labels)
    assert merged["one"]["examined"] == {"checks": {"fail": []}}
    assert "examined" not in merged["other"]
    model = calibrated(study, "one")
    predicted = predict_labels(model(nearer), True)
    evading = (predicted >= 0) & (predicted != labels)
    assert merged["one"]["transfer"] == int(evading.sum()) > 0
    assert merged["one"]["kept"][1] == 1 - evading.double().mean().item()
