import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from property_examples import up_to
from sklearn.metrics import roc_auc_score

from torchdnr.decisions import REJECT
from torchdnr.evaluation import (
    detection_scores,
    measure_detection,
    rejection_scores,
    robust_error,
    robust_errors,
    share,
    threshold_at_tpr,
)
from torchdnr.evaluation.judging import decide, worst_predictions
from torchdnr.rejection import rejection_threshold

# two classes, theta = 0.5; clean: right, right but rejected, wrong, right
CLEAN = torch.tensor([[0.9, 0.1, 0.5], [0.4, 0.2, 0.5], [0.2, 0.8, 0.5], [0.1, 0.7, 0.5]])
LABELS = torch.tensor([0, 0, 0, 1])
# first attack: wrong and accepted, wrong and rejected, wrong, still right
FIRST = torch.tensor([[0.1, 0.6, 0.5], [0.0, 0.5, 0.5], [0.2, 0.9, 0.5], [0.2, 0.6, 0.5]])
# second attack: wrong with a higher score, right, right, wrong and rejected
SECOND = torch.tensor([[0.1, 0.7, 0.5], [0.6, 0.5, 0.5], [0.8, 0.2, 0.5], [0.3, 0.2, 0.5]])
BOTH = torch.stack([FIRST, SECOND])


def close(values, expected):
    assert values.tolist() == pytest.approx(expected)


def test_decisions_by_hand():
    decisions = decide(BOTH, True)
    assert decisions.classes.tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
    # 0.5 against theta = 0.5: a tie rejects
    assert decisions.accepted.tolist() == [[True, False, True, True], [True, True, True, False]]
    assert decide(BOTH, True, 0.65).accepted.sum() == 3
    assert decide(BOTH[..., :2], False).accepted.all()
    assert worst_predictions(BOTH, LABELS, True).tolist() == [1, REJECT, 1, REJECT]
    assert worst_predictions(BOTH, LABELS, True, 0.2).tolist() == [1, 1, 1, 0]
    assert worst_predictions(BOTH[..., :2], LABELS, False).tolist() == [1, 1, 1, 0]


def test_rejection_scores_are_positive_or_zero_where_rejected():
    close(rejection_scores(CLEAN, True), [-0.4, 0.1, -0.3, -0.2])
    close(rejection_scores(CLEAN[:, :2], False), [-0.9, -0.4, -0.8, -0.7])
    rejected = ~decide(BOTH, True).accepted
    assert torch.equal(rejection_scores(BOTH, True) >= 0, rejected)


def test_who_is_counted():
    negatives, positives = detection_scores(CLEAN, FIRST, LABELS, True)
    close(negatives, [-0.4, 0.1, -0.2])
    close(positives, [-0.1, 0.0])  # the third was wrong before, the fourth is right
    negatives, positives = detection_scores(CLEAN, BOTH, LABELS, True)
    close(positives, [-0.2, 0.0, 0.2])  # the least rejected success of each sample
    negatives, positives = detection_scores(
        CLEAN, BOTH, LABELS, True, adversarials="all", cleans="all"
    )
    close(negatives, [-0.4, 0.1, -0.3, -0.2])
    close(positives, [-0.2, -0.1, -0.4, -0.1])


def test_detection_by_hand_and_as_json():
    found = measure_detection(CLEAN, BOTH, LABELS, True)
    pairs = [(-0.2, 0.0, 0.2), (-0.4, 0.1, -0.2)]
    scores = torch.tensor(pairs[1] + pairs[0]).round(decimals=4)
    assert found.auroc.value == pytest.approx(roc_auc_score([0] * 3 + [1] * 3, scores), abs=1e-6)
    assert found.detected.value == pytest.approx(2 / 3) and found.detected.n == 3
    assert found.false_rejection.value == pytest.approx(1 / 3)
    # to accept every right clean input theta must be below 0.4: all but the last are accepted
    assert found.accepted_at_tpr[0.99].value == pytest.approx(2 / 3)
    content = json.loads(json.dumps(found.to_dict(), allow_nan=True))
    assert content["accepted_at_tpr"]["0.99"]["n"] == 3
    without = measure_detection(CLEAN[:, :2], BOTH[..., :2], LABELS, False)
    assert without.detected is None and without.auroc.value == pytest.approx(found.auroc.value)
    assert without.to_dict()["detected"] is None


def random_outputs(seed, n=40, attacks=3):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-4, 5, (attacks + 1, n, 4), generator=generator).double()
    labels = torch.randint(0, 3, (n,), generator=generator)
    return scores[0], scores[1:], labels


@up_to(25)
@given(st.integers(0, 10_000))
def test_more_attacks_never_help_the_defence(seed):
    _, adversarial, labels = random_outputs(seed)
    counts = [
        (worst_predictions(adversarial[:k], labels, True) != REJECT)
        & (worst_predictions(adversarial[:k], labels, True) != labels)
        for k in (1, 2, 3)
    ]
    assert (counts[0] <= counts[1]).all() and (counts[1] <= counts[2]).all()


@up_to(25)
@given(st.integers(0, 10_000), st.floats(-5, 5))
def test_worst_predictions_are_those_found_one_by_one(seed, theta):
    _, adversarial, labels = random_outputs(seed)
    found = worst_predictions(adversarial, labels, True, theta)
    decisions = decide(adversarial, True, theta)
    evading = decisions.accepted & (decisions.classes != labels)
    assert torch.equal((found != REJECT) & (found != labels), evading.any(dim=0))
    for row, prediction in enumerate(found.tolist()):
        options = torch.where(decisions.accepted, decisions.classes, REJECT)[:, row]
        assert prediction in options.tolist()


def robust_error_by_loop(clean, adversarial, labels, theta):
    above = below = 0
    for row, label in enumerate(labels.tolist()):
        wrong = accepted = False
        for output in [clean, *adversarial]:
            best, predicted = output[row, :-1].max(dim=0)
            accepted |= best.item() > theta
            wrong |= best.item() > theta and predicted.item() != label
        above, below = above + wrong, below + accepted
    return (above / below if below else math.nan), below


@up_to(25)
@given(st.integers(0, 10_000), st.floats(-4.5, 4.5))
def test_robust_error_is_its_formula(seed, theta):
    clean, adversarial, labels = random_outputs(seed)
    found = robust_error(clean, adversarial, labels, True, threshold=theta)
    value, n = robust_error_by_loop(clean, adversarial, labels, theta)
    assert found.n == n and found.value == pytest.approx(value, nan_ok=True)
    if n:
        least = robust_error(clean, adversarial[:1], labels, True, threshold=theta)
        assert (found.value * found.n) >= (least.value * least.n) - 1e-9


def test_robust_error_by_hand():
    assert robust_error(CLEAN, CLEAN, LABELS, True).value == pytest.approx(1 / 3)
    found = robust_error(CLEAN, BOTH, LABELS, True)
    assert (found.value, found.n) == (2 / 4, 4)
    assert found == share(torch.tensor([True, False, True, False]))
    none = robust_error(CLEAN, BOTH, LABELS, True, threshold=2.0)
    assert math.isnan(none.value) and none.n == 0
    assert robust_error(CLEAN[:, :2], BOTH[..., :2], LABELS, False).value == 1.0


@up_to(40)
@given(st.integers(0, 10_000), st.sampled_from([0.01, 0.5, 0.95, 0.98, 0.99, 1.0]))
def test_threshold_is_the_highest_that_accepts_the_share(seed, tpr):
    clean, _, labels = random_outputs(seed)
    decisions = decide(clean, True)
    right = decisions.classes == labels
    theta = threshold_at_tpr(clean, labels, True, tpr)
    best = decisions.confidence[right]
    accepted = (best > theta).double().mean().item()
    assert accepted >= tpr - 1e-12
    stricter = best[best > theta].min()  # a higher theta that rejects the lowest accepted
    assert (best > stricter).double().mean().item() < tpr


def test_threshold_agrees_with_the_rejection_rate_on_distinct_scores():
    output, labels = torch.randn(200, 3), torch.zeros(200, dtype=torch.long)
    output[:, 0] += 9
    theta = threshold_at_tpr(output, labels, False, 0.95)
    assert theta == pytest.approx(rejection_threshold(output, 0.05).item())
    found = robust_errors(output, output, labels, False, calibration=(output, labels), tpr=[0.95])
    assert found[0.95].n == 190 and found[0.95].value == 0


def test_detection_refuses_what_makes_no_sense():
    with pytest.raises(ValueError, match="adversarials must be one of"):
        detection_scores(CLEAN, FIRST, LABELS, True, adversarials="some")
    with pytest.raises(ValueError, match="0 adversarial inputs are counted"):
        detection_scores(CLEAN, CLEAN, LABELS, True)
    with pytest.raises(ValueError, match="adversarial must be like clean"):
        measure_detection(CLEAN, FIRST[:2], LABELS, True)
    with pytest.raises(ValueError, match="labels must be int64"):
        robust_error(CLEAN, FIRST, LABELS[:2], True)
    with pytest.raises(ValueError, match="holds NaN"):
        robust_error(CLEAN, FIRST * math.nan, LABELS, True)
    with pytest.raises(ValueError, match="c >= 2"):
        decide(CLEAN[:, :2], True)
    with pytest.raises(ValueError, match="no clean input is given its true class"):
        threshold_at_tpr(CLEAN[2:3], LABELS[2:3], True, 0.9)
