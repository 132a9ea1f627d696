"""Objectives and success, row by row against the definitions."""

import math

import pytest
import torch

from torchdnr.attacks import OBJECTIVES, evades, split_scores
from torchdnr.attacks.objectives import NEGATIVE_IF_SUCCESSFUL, find_objective
from torchdnr.decisions import succeeds

LABELS = torch.tensor([0, 0, 0, 0, 0])
SCORES = torch.tensor(
    [
        [2.0, 1.0, 0.0],  # accepted, right
        [1.0, 2.0, 0.0],  # accepted, wrong
        [0.2, 0.4, 0.0],  # rejected, another class leads
        [0.4, 0.2, 0.0],  # rejected, the true class leads
        [0.0, 0.5, 0.1],  # tie with theta: rejected
    ]
)
THETA = torch.full((5,), 0.5)
OUTPUT = torch.cat([SCORES, THETA[:, None]], dim=1)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("paper", [1.0, -1.0, -0.2, 0.2, -0.5]),
        ("decision", [1.0, -1.0, 0.1, 0.3, 0.0]),
        ("secml", [1.0, -1.0, 0.1, 0.3, 0.0]),
    ],
)
def test_objectives_by_hand(name, expected):
    torch.testing.assert_close(OBJECTIVES[name](SCORES, THETA, LABELS), torch.tensor(expected))


def test_secml_differs_from_decision_where_accepted_with_a_low_true_score():
    scores, theta, labels = torch.tensor([[0.0, 2.0]]), torch.tensor([0.5]), torch.tensor([0])
    assert OBJECTIVES["secml"](scores, theta, labels).item() == -2.0
    assert OBJECTIVES["decision"](scores, theta, labels).item() == -1.5


@pytest.mark.parametrize("name", ["paper", "decision", "secml"])
def test_without_threshold_all_are_equation_2(name):
    labels = torch.randint(0, 4, (50,))
    scores = torch.randn(50, 4)
    others = scores.masked_fill(torch.nn.functional.one_hot(labels, 4).bool(), -torch.inf)
    expected = scores[torch.arange(50), labels] - others.amax(dim=1)
    assert torch.equal(OBJECTIVES[name](scores, None, labels), expected)


def test_evades_means_is_evasion():
    assert evades(OUTPUT, LABELS, reject=True).tolist() == [False, True, False, False, False]
    assert evades(SCORES, LABELS, reject=False).tolist() == [False, True, True, False, True]
    assert evades(torch.full((1, 3), torch.nan), LABELS[:1], reject=False).tolist() == [False]


@pytest.mark.parametrize("reject", [True, False])
def test_targeted_decision_is_negative_iff_accepted_as_the_target(reject):
    output, wanted = torch.randn(2000, 5), torch.randint(0, 4, (2000,))
    scores, theta = split_scores(output, reject)
    accepted = True if theta is None else scores.amax(dim=1) > theta
    expected = accepted & (scores.argmax(dim=1) == wanted)
    assert torch.equal(succeeds(output, wanted, reject, targeted=True), expected)
    assert torch.equal(OBJECTIVES["decision"](scores, theta, wanted, targeted=True) < 0, expected)


@pytest.mark.parametrize("reject", [True, False])
@pytest.mark.parametrize("targeted", [True, False])
def test_log_sum_exp_is_the_decision_objective_with_smooth_maxima(reject, targeted):
    output, labels = torch.randn(200, 5).double(), torch.randint(0, 4, (200,))
    scores, theta = split_scores(output, reject)
    smooth = OBJECTIVES["log-sum-exp"](scores, theta, labels, targeted)
    hard = OBJECTIVES["decision"](scores, theta, labels, targeted)
    for row, (values, label) in enumerate(zip(output.tolist(), labels.tolist(), strict=True)):
        tau = 0.1 * (max(values) - min(values))
        named, others = [values[label]], values[: scores.shape[1]]
        del others[label]
        toward, against = (named, others) if targeted else (others, named)
        against = against + values[scores.shape[1] :]  # theta stands against the attacker
        maxima = [
            tau * math.log(sum(math.exp(v / tau) for v in side)) for side in (against, toward)
        ]
        assert smooth[row].item() == pytest.approx(maxima[0] - maxima[1], abs=1e-9)
        sides = len(against), len(toward)
        assert abs(smooth[row].item() - hard[row].item()) <= tau * math.log(max(sides))


@pytest.mark.parametrize("targeted", [True, False])
def test_cross_entropy_is_that_of_pytorch(targeted):
    output, labels = torch.randn(200, 5).double(), torch.randint(0, 4, (200,))
    scores, theta = split_scores(output, True)
    value = OBJECTIVES["cross-entropy"](scores, theta, labels, targeted)
    if targeted:
        expected = torch.nn.functional.cross_entropy(output, labels, reduction="none")
    else:  # the true class has max(s_y, theta)
        logits = scores.clone()
        row = torch.arange(200)
        logits[row, labels] = torch.maximum(scores[row, labels], theta)
        expected = -torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("reject", [True, False])
def test_evades_is_the_sign_of_the_decision_objective_and_agrees_with_the_rule(reject):
    output, labels = torch.randn(2000, 5), torch.randint(0, 4, (2000,))
    scores, theta = split_scores(output, reject)
    accepted = True if theta is None else scores.amax(dim=1) > theta
    expected = accepted & (scores.argmax(dim=1) != labels)
    assert torch.equal(evades(output, labels, reject), expected)
    assert torch.equal(OBJECTIVES["decision"](scores, theta, labels) < 0, expected)


def test_unknown_objective_lists_the_choices():
    with pytest.raises(ValueError, match="no objective 'eq2'; choose from: paper, decision, secml"):
        find_objective("eq2")


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("reject", [False, True])
def test_the_sign_alone_tells_success_with_ties_nan_and_infinities_too(reject, targeted):
    torch.manual_seed(0)
    values = torch.tensor([0.0, -0.0, 0.5, 1e-45, math.nan, math.inf, -math.inf])
    output = values[torch.randint(0, 7, (5_000, 4 + reject))]
    labels = torch.randint(0, 4, (5_000,))
    expected = succeeds(output, labels, reject, targeted)
    assert expected.any() and not expected.all()
    assert NEGATIVE_IF_SUCCESSFUL
    for objective in NEGATIVE_IF_SUCCESSFUL:
        value = objective(*split_scores(output, reject), labels, targeted)
        assert torch.equal(value < 0, expected)
