"""The pair of a classifier and a detector decides as the detector does, and is differentiable."""

import warnings

import pytest
import torch
from torch import nn

from torchdnr.attacks import evades, line_search_pgd
from torchdnr.attacks.objectives import decision_objective
from torchdnr.decisions import REJECT
from torchdnr.rejection.detector import WithReject, spacing


class Columns(nn.Module):
    """Returns some columns of its input: scores that a test chooses."""

    def __init__(self, columns):
        super().__init__()
        self.columns = columns

    def forward(self, inputs):
        return inputs[:, self.columns]


def pair_of_columns(threshold, scale=1.0):
    """Read four class scores and, in the last column, a detector's score."""
    return WithReject(Columns(slice(0, 4)), Columns(-1), threshold, scale=scale).eval()


def networks(seed=0):
    torch.manual_seed(seed)
    classifier = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    detector = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1), nn.Flatten(0)).double()
    with torch.no_grad():
        inputs = torch.rand(1000, 6, dtype=torch.float64)
        classifier[2].bias -= classifier(inputs).mean(dim=0)  # all classes occur
        detector[2].bias += 0.1 - detector(inputs).median()  # half are rejected above 0.1
    return classifier, detector


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_accepts_iff_the_score_does_not_exceed_the_threshold(dtype, scale):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(100_000, 5, generator=generator, dtype=dtype) * 100
    threshold = 0.3
    # On the threshold, and one rounding on either side of it.
    edge = torch.tensor(threshold, dtype=dtype)
    step = spacing(edge)
    near = torch.stack([edge - step, edge, edge + step])
    rows[:30_000, 4] = near[torch.randint(3, (30_000,), generator=generator)]
    rows[:100, :4] = 0.0  # ties, and no spacing of normal numbers around them
    output = pair_of_columns(threshold, scale)(rows)
    accepted = output[:, :4].amax(dim=1) > output[:, 4]
    assert torch.equal(accepted, ~(rows[:, 4] > threshold))
    assert torch.equal(output[:, :4], rows[:, :4])
    assert 0.1 < accepted.float().mean() < 0.9


def test_column_has_the_scaled_distance_to_the_threshold():
    rows = torch.tensor([[1.0, 3.0, 2.0, 0.0, 5.0], [1.0, 0.5, 0.0, 0.0, -1.0]])
    output = pair_of_columns(2.0, scale=0.5)(rows)
    assert output[:, 4].tolist() == [3.0 + 0.5 * 3.0, 1.0 - 0.5 * 3.0]


def test_a_nan_of_the_detector_rejects():
    rows = torch.tensor([[1.0, 3.0, 2.0, 0.0, torch.nan]])
    output = pair_of_columns(2.0)(rows)
    assert not (output[:, :4].amax(dim=1) > output[:, 4]).any()
    assert not evades(output, torch.tensor([0]), reject=True).any()


@pytest.mark.parametrize("scale", [1.0, 7.0])
def test_gradients_are_exact(scale):
    model = WithReject(*networks(), threshold=0.1, scale=scale)
    inputs = torch.rand(5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(model, inputs)
    assert torch.autograd.gradgradcheck(model, inputs)


def test_gradient_is_the_detectors_where_the_class_is_wrong():
    classifier, detector = networks()
    model = WithReject(classifier, detector, threshold=0.1, scale=3.0)
    inputs = torch.rand(64, 6, dtype=torch.float64, requires_grad=True)
    output = model(inputs)
    labels = (output[:, :4].argmax(dim=1) + 1) % 4  # all wrong
    value = decision_objective(output[:, :4], output[:, 4], labels)
    suspicion = detector(inputs)
    rejected = suspicion > 0.1
    assert 0 < rejected.sum() < 64
    mine = torch.autograd.grad(value[rejected].sum(), inputs, retain_graph=True)[0]
    theirs = torch.autograd.grad(3.0 * suspicion[rejected].sum(), inputs)[0]
    torch.testing.assert_close(mine, theirs)


def test_decision_objective_is_negative_iff_is_evasion():
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(-2, 3, (100_000, 5), generator=generator).float()  # many ties
    labels = torch.randint(4, (100_000,), generator=generator)
    output = pair_of_columns(0.0)(rows)
    value = decision_objective(output[:, :4], output[:, 4], labels)
    true = rows.gather(1, labels[:, None])[:, 0]
    wrong = rows[:, :4].amax(dim=1) > true
    expected = wrong & (rows[:, 4] <= 0)
    assert torch.equal(value < 0, expected)
    assert torch.equal(evades(output, labels, reject=True), expected)
    assert 0.05 < expected.float().mean() < 0.95


def test_predict_rejects_and_leaves_the_modes_as_found():
    classifier, detector = networks()
    classifier = nn.Sequential(classifier, nn.Dropout(0.9)).train()
    model = WithReject(classifier, detector.eval(), threshold=0.1, batch_size=7)
    inputs = torch.rand(50, 6, dtype=torch.float64)
    predicted = model.predict(inputs)
    with torch.no_grad():
        expected = torch.where(detector(inputs) > 0.1, REJECT, classifier[0](inputs).argmax(dim=1))
    assert torch.equal(predicted, expected)
    assert 0 < (predicted == REJECT).sum() < 50
    assert classifier[1].training and not detector.training


def test_registers_the_parts_that_are_modules():
    classifier, detector = networks()
    model = WithReject(classifier, detector, threshold=0.1)
    assert {id(p) for p in model.parameters()} == {
        id(p) for part in (classifier, detector) for p in part.parameters()
    }
    inputs = torch.rand(3, 6)
    assert model.float()(inputs).dtype == torch.float32
    lone = WithReject(classifier, lambda x: x.sum(dim=1), threshold=0.1)
    assert len(list(lone.parameters())) == len(list(classifier.parameters()))


def test_reject_index_is_the_last_column():
    model = pair_of_columns(0.0)
    assert model.reject_index == -1  # nothing is known of the classes yet
    model(torch.zeros(1, 5))
    assert model.reject_index == 4


def test_own_attack_sees_the_detector():
    classifier, detector = networks()
    model = WithReject(classifier, detector, threshold=0.1).eval()
    inputs = torch.rand(40, 6, dtype=torch.float64)
    labels = classifier(inputs).argmax(dim=1)
    found = line_search_pgd(model, inputs, labels, eps=0.8, steps=20, objective="decision")
    evading = evades(model(found), labels, reject=True)
    assert evading.any()
    assert (detector(found)[evading] <= 0.1).all()
    assert (classifier(found).argmax(dim=1) != labels)[evading].all()


def test_warns_where_no_gradient_leads_to_the_detector():
    classifier, detector = networks()
    model = WithReject(classifier, lambda x: detector(x).detach(), threshold=0.1)
    inputs = torch.rand(3, 6, dtype=torch.float64, requires_grad=True)
    with pytest.warns(UserWarning, match="no gradient leads through score_fn"):
        model(inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            model(inputs)
        WithReject(classifier, detector, threshold=0.1)(inputs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classifier": 3}, "classifier must be callable, got int"),
        ({"threshold": float("nan")}, "threshold must be finite, got nan"),
        ({"scale": 0.0}, "scale must be finite and > 0, got 0"),
        ({"scale": float("inf")}, "scale must be finite and > 0, got inf"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
    ],
)
def test_refuses_what_it_cannot_use(changes, message):
    classifier, detector = networks()
    given = {"classifier": classifier, "score_fn": detector, "threshold": 0.1, **changes}
    with pytest.raises(ValueError, match=message):
        WithReject(**given)


def test_refuses_outputs_of_other_shapes():
    classifier, detector = networks()
    inputs = torch.rand(3, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"score_fn must return \(n,\) with n = 3 .* got \(3, 4\)"):
        WithReject(classifier, classifier, 0.1)(inputs)
    with pytest.raises(ValueError, match=r"classifier must return \(n, c\) .* got \(3,\)"):
        WithReject(detector, detector, 0.1)(inputs)
    with pytest.raises(ValueError, match="must lie in"):
        WithReject(classifier, detector, 0.1).predict(inputs + 1)
