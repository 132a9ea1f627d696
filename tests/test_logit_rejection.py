from copy import deepcopy

import pytest
import torch
from small_models import make_images, small_network
from torch import nn

from torchdnr import REJECT, LogitRejection
from torchdnr.attacks import boundary_walk
from torchdnr.decisions import NotFittedError, evades
from torchdnr.models import TrainingSettings, train_network
from torchdnr.rejection import consistent_prediction_rejection
from torchdnr.rejection.consistency import PredictionInconsistency


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    net = small_network()
    net.dropout.p = 0.0
    x = make_images(90)
    settings = TrainingSettings(epochs=30, lr=5e-3, momentum=0.9, batch_size=30, optimizer="adamw")
    return train_network(net, x, torch.arange(90) % 3, settings, progress=False)


@pytest.fixture
def net(trained):
    return deepcopy(trained)


def images(n=60, seed=1):
    torch.manual_seed(seed)
    return make_images(n)


def test_scores_are_logits_odds_or_what_is_above_the_class_that_rejects(net):
    x = images(12)
    logits = net(x).double()
    assert torch.equal(LogitRejection(net).scores(x), net(x))
    p = logits.softmax(dim=1)
    odds = LogitRejection(net, head="softmax").scores(x)
    assert torch.allclose(odds.double(), (p / (1 - p)).log(), atol=1e-5)
    above = LogitRejection(net, head="class").scores(x)
    assert torch.equal(above, net(x)[:, :2] - net(x)[:, 2:])


@pytest.mark.parametrize("head", ["logit", "softmax"])
def test_calibrate_rejects_the_share_asked_for(net, head):
    model = LogitRejection(net, head=head).calibrate(images(), 0.25)
    predicted, scores = model.predict(images(), return_scores=True)
    assert (predicted == REJECT).sum() == 15
    assert torch.equal(scores, model.scores(images()))
    kept = predicted != REJECT
    assert torch.equal(predicted[kept], net(images())[kept].argmax(dim=1))
    assert torch.equal(model(images()), torch.cat([scores, model.threshold.expand(60, 1)], dim=1))


def test_calibrate_by_error_promises_it(net):
    labels = net(images(300)).argmax(dim=1)
    model = LogitRejection(net).calibrate(images(300), labels, max_error=0.05)
    assert (model.predict(images(300)) != REJECT).sum() > 200


def test_the_network_stays_in_its_mode(net):
    net.dropout.p = 0.5
    net.train()
    model = LogitRejection(net)
    model.calibrate(images())
    model.predict(images())
    assert net.training and model.training
    assert torch.equal(model.predict(images()), model.predict(images()))  # no dropout


def test_a_saved_one_is_loaded_onto_the_same_weights_only(net, tmp_path):
    path = tmp_path / "logits.safetensors"
    model = LogitRejection(net, head="softmax", batch_size=7).calibrate(images())
    model.save(path)
    loaded = LogitRejection.load(path, net)
    assert (loaded.head, loaded.batch_size) == ("softmax", 7)
    assert torch.equal(loaded(images()), model(images()))
    with pytest.raises(ValueError, match="other weights"):
        LogitRejection.load(path, small_network())
    LogitRejection.load(path, small_network(), strict=False)


def test_attacks_evade_its_decision(net):
    x = images()
    model = LogitRejection(net).calibrate(x, 0.2)
    labels = torch.arange(60) % 3
    walked = boundary_walk(model, x, labels, x, steps=20, starts=4, neighbours=8)
    assert evades(model(walked), labels, reject=True).all()


def test_what_is_missing_is_said(net):
    with pytest.raises(NotFittedError, match="calibrate"):
        LogitRejection(net)(images())
    with pytest.raises(ValueError, match="no head 'logits'"):
        LogitRejection(net, head="logits")


@pytest.mark.parametrize("norm", [2, float("inf")])
def test_the_gradient_leads_through_the_perturbation(norm):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    score = PredictionInconsistency(net, 0.2, norm=norm)
    x = (0.3 + 0.4 * torch.rand(4, 1, 4, 4, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(score, (x,))
    with torch.no_grad():
        assert torch.allclose(score(x.detach()), score(x))


@pytest.mark.parametrize("norm", [2, float("inf")])
def test_a_linear_prediction_is_consistent_as_far_as_its_distance_says(norm):
    """A linear margin falls by eps times the dual norm of its weights, away from the box."""
    torch.manual_seed(0)
    layer = nn.Linear(16, 2).double()
    net = nn.Sequential(nn.Flatten(), layer)
    x = torch.full((5, 1, 4, 4), 0.5, dtype=torch.float64)
    weights = layer.weight[0] - layer.weight[1]
    margin = (net(x)[:, 0] - net(x)[:, 1]).abs()
    dual = weights.abs().sum() if norm == float("inf") else weights.norm()
    score = PredictionInconsistency(net, 0.1, norm=norm)(x)
    assert torch.allclose(score, 0.1 * dual - margin, atol=1e-9)


def test_an_inconsistent_prediction_is_rejected_and_attacks_adapt(net):
    x = images()
    labels = torch.arange(60) % 3
    model = consistent_prediction_rejection(net, 0.05).calibrate(x, 0.2)
    assert (model.predict(x) == REJECT).sum() == 12
    walked = boundary_walk(model, x, labels, x, steps=20, starts=4, neighbours=8)
    assert evades(model(walked), labels, reject=True).float().mean() > 0.9
    with pytest.raises(ValueError, match="eps > 0"):
        consistent_prediction_rejection(net, 0)


def test_odds_of_a_sure_network_are_finite_and_have_gradients():
    logits = torch.tensor([[60.0, 0.0, -5.0], [0.0, 0.0, 0.0]], requires_grad=True)
    model = LogitRejection(nn.Identity(), head="softmax")
    scores = model.scores(logits)
    expected = [60.0, -60.0, -65.0]
    assert scores[0].tolist() == pytest.approx(expected, abs=0.01)
    assert torch.allclose(scores[1], torch.tensor(0.5).log().expand(3))
    assert torch.autograd.grad(scores.sum(), logits)[0].isfinite().all()


def test_a_flat_network_has_a_score_and_inference_mode_one_too(net):
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    nn.init.zeros_(flat[1].weight)
    score = PredictionInconsistency(flat, 50.0)
    assert score(images()).isfinite().all()
    with torch.inference_mode():
        assert score(images()).isfinite().all()
        assert PredictionInconsistency(net, 0.1)(images()).isfinite().all()
