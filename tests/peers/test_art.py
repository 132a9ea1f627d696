import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("art", reason="needs adversarial-robustness-toolbox: pip install -e '.[peers]'")

from art.attacks.evasion import ProjectedGradientDescent
from art.defences.detector.evasion import EvasionDetector
from art.estimators.classification import PyTorchClassifier

from torchdnr.adapters import ARTDetector, attack_per_label, for_label, with_reject

EPS = 2.0


def shown(view, classes=10):
    shape = (1, 28, 28)
    options = {"clip_values": (0.0, 1.0), "device_type": "cpu"}
    return PyTorchClassifier(view, nn.CrossEntropyLoss(), shape, classes, **options)


def pgd(classifier):
    options = {"norm": 2, "eps": EPS, "eps_step": 0.3, "max_iter": 15, "verbose": False}
    return ProjectedGradientDescent(classifier, **options)


def test_pgd_per_label_succeeds_where_we_say_so(victim):
    def run(view, inputs, labels):
        classifier = shown(view)
        found = pgd(classifier).generate(inputs.numpy(), labels.numpy())
        told = classifier.predict(found).argmax(axis=1) != labels.numpy()
        with torch.no_grad():
            output = victim.model(torch.from_numpy(found))
        own = torch.maximum(output.gather(1, labels[:, None])[:, 0], output[:, -1])
        others = output[:, :-1].scatter(1, labels[:, None], -torch.inf).amax(dim=1)
        assert np.array_equal(told, (others > own).numpy())
        return torch.from_numpy(found)

    points = attack_per_label(run, victim.model, victim.inputs, victim.labels)
    assert victim.evading(points).sum() >= victim.evading(victim.inputs).sum() + 3
    assert ((points - victim.inputs).flatten(1).norm(dim=1) <= EPS * 1.0001).all()


def test_one_batch_with_the_view_of_the_labels(victim):
    classifier = shown(for_label(victim.model, victim.labels))
    found = pgd(classifier).generate(victim.inputs.numpy(), victim.labels.numpy())
    told = classifier.predict(found).argmax(axis=1) != victim.labels.numpy()
    assert np.array_equal(told, victim.evading(torch.from_numpy(found)).numpy())
    assert told.sum() >= victim.evading(victim.inputs).sum() + 3


def test_plain_view_counts_rejected_inputs_as_successes(victim):
    classifier = shown(with_reject(victim.model), 11)
    found = pgd(classifier).generate(victim.inputs.numpy(), victim.labels.numpy())
    told = torch.from_numpy(classifier.predict(found).argmax(axis=1)) != victim.labels
    points = torch.from_numpy(found)
    wrongly = told & ~victim.evading(points)
    assert wrongly.any() and victim.rejected(points)[wrongly].all()


def test_detector_says_what_is_rejected(victim):
    detector = ARTDetector(victim.model)
    noise = torch.rand(32, 1, 28, 28)
    inputs = torch.cat([victim.inputs, noise])
    report, is_adversarial = detector.detect(inputs.numpy(), batch_size=5)
    assert isinstance(detector, EvasionDetector)
    assert is_adversarial.dtype == bool
    assert np.array_equal(is_adversarial, victim.rejected(inputs).numpy())
    assert np.array_equal(report["scores"] >= 0, is_adversarial)
    assert 0 < is_adversarial.sum() < len(inputs)


def test_fit_of_the_detector_takes_arrays_and_one_hot_labels(victim):
    from torchdnr import NR

    chosen = {"logits": (10.0, 0.01)}
    x, y = victim.pool.numpy(), victim.pool_labels.numpy()
    scores = []
    for labels in (y, np.eye(10)[y]):
        model = NR(victim.model.net, "logits", hyperparameters=chosen)
        detector = ARTDetector(model)
        detector.fit(x, labels, batch_size=64, nb_epochs=1)
        model.set_threshold(0.0)
        scores.append(detector.detect(victim.inputs.numpy())[0]["scores"])
    assert np.array_equal(*scores)
    assert len(np.unique(scores[0])) > 1
