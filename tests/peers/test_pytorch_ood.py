import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("pytorch_ood", reason="needs pytorch-ood: pip install -e '.[peers]'")

from pytorch_ood.api import Detector, ModelNotSetException, RequiresFittingException
from pytorch_ood.detector import EnergyBased, Mahalanobis
from pytorch_ood.metrics import OODMetrics
from sklearn.metrics import roc_auc_score

from torchdnr import NR
from torchdnr.adapters import RejectionDetector, SVMDetector
from torchdnr.attacks import line_search_pgd
from torchdnr.rejection import WithReject


@pytest.fixture
def mixed(victim):
    """Digits, and outliers: noise as dark as they are, marked as pytorch-ood marks them."""
    noise = torch.rand(64, 1, 28, 28) * victim.inputs.mean() * 2
    inputs = torch.cat([victim.inputs, noise])
    return inputs, torch.cat([victim.labels, torch.full((64,), -1)])


def test_scores_are_higher_for_outliers_and_the_metrics_agree(victim, mixed):
    inputs, labels = mixed
    detector = RejectionDetector(victim.model)
    with torch.no_grad():
        score = detector(inputs)
        output = victim.model(inputs)
    assert isinstance(detector, Detector)
    assert torch.equal(score, output[:, -1] - output[:, :-1].amax(dim=1))
    assert torch.equal(score >= 0, victim.rejected(inputs))
    found = OODMetrics().update(score, labels).compute()["AUROC"]
    assert found == pytest.approx(roc_auc_score(labels < 0, score), abs=1e-6)
    assert found > 0.7


def test_fit_leaves_outliers_out_and_needs_no_threshold_to_rank(victim, mixed):
    inputs, _ = mixed
    options = {"hyperparameters": {"logits": (10.0, 0.01)}}
    model = NR(victim.model.net, "logits", **options)
    images = torch.cat([victim.pool, torch.rand(50, 1, 28, 28)])
    labels = torch.cat([victim.pool_labels, torch.full((50,), -1)])
    detector = RejectionDetector(model).fit(DataLoader(TensorDataset(images, labels), 64))
    expected = NR(victim.model.net, "logits", **options).fit(victim.pool, victim.pool_labels)
    with torch.no_grad():
        score = detector.predict(inputs)
        best = expected.scores(inputs).amax(dim=1)
        torch.testing.assert_close(score, -best, atol=2e-3, rtol=0)  # two solves to tolerance
        model.set_threshold(0.25)
        torch.testing.assert_close(detector.predict(inputs), score + 0.25)


def test_svm_on_features_of_any_encoder(victim, mixed):
    inputs, labels = mixed
    encoder = victim.model.net[:-1]
    detector = SVMDetector(encoder, C=10.0, gamma="scale")
    with pytest.raises(RequiresFittingException):
        detector.predict(inputs)
    with torch.no_grad():
        features = encoder(victim.pool)
        assert detector.fit_features(features, victim.pool_labels) is detector
        score = detector.predict(inputs)
        assert torch.equal(score, detector.predict_features(encoder(inputs)))
    assert roc_auc_score(labels < 0, score) > 0.7
    with pytest.raises(ModelNotSetException, match="has no encoder"):
        SVMDetector().predict(inputs)
    images = torch.cat([victim.pool, torch.rand(50, 1, 28, 28)])
    marked = torch.cat([victim.pool_labels, torch.full((50,), -1)])
    loader = DataLoader(TensorDataset(images, marked), 64)
    again = SVMDetector(encoder, C=10.0, gamma="scale").fit(loader)
    with torch.no_grad():
        torch.testing.assert_close(again.predict(inputs), score, atol=2e-3, rtol=0)


def test_their_detectors_become_a_reject_option(victim):
    inputs, net = victim.pool[:200], victim.model.net
    mahalanobis = Mahalanobis(net[:-1])
    with torch.no_grad():
        mahalanobis.fit_features(net[:-1](victim.pool), victim.pool_labels)
    for detector in (EnergyBased(net), mahalanobis):
        with torch.no_grad():
            score = detector(inputs)
            threshold = score.quantile(0.9).item()
        model = WithReject(net, detector, threshold)
        predicted = model.predict(inputs)
        assert torch.equal(predicted == -1, score > threshold)
        assert (predicted == -1).sum() == 20
        assert torch.equal(predicted[predicted >= 0], net(inputs).argmax(dim=1)[predicted >= 0])
    # Mahalanobis has no gradient to offer: that is said, not passed over.
    with pytest.warns(UserWarning, match="no gradient leads through score_fn"):
        model(inputs[:2].clone().requires_grad_())


def test_our_attack_goes_around_their_detector(victim):
    net = victim.model.net
    detector = EnergyBased(net)
    with torch.no_grad():
        threshold = detector(victim.pool).quantile(0.9).item()
    model = WithReject(net, detector, threshold).eval()
    options = {"eps": 3.0, "steps": 15, "objective": "decision", "init_inputs": victim.pool}
    points = line_search_pgd(model, victim.inputs, victim.labels, **options)
    with torch.no_grad():
        accepted = detector(points) <= threshold
        wrong = net(points).argmax(dim=1) != victim.labels
        before = (detector(victim.inputs) <= threshold) & (
            net(victim.inputs).argmax(dim=1) != victim.labels
        )
    assert (accepted & wrong).sum() >= before.sum() + 3
