import math

import pytest
import torch

from torchdnr.decisions import REJECT
from torchdnr.evaluation import (
    accuracy_under_attack,
    evasion_rate,
    predict_labels,
    rejection_rate,
    wilson_interval,
)

LABELS = torch.tensor([0, 1, 2, 0])
PREDICTIONS = torch.tensor([0, REJECT, 1, REJECT])


def test_a_reject_is_an_error_without_attack_only():
    assert accuracy_under_attack(PREDICTIONS, LABELS, 0) == 0.25
    assert accuracy_under_attack(PREDICTIONS, LABELS, 1e-9) == 0.75
    assert rejection_rate(PREDICTIONS) == 0.5
    assert evasion_rate(PREDICTIONS, LABELS) == 0.25


def test_under_attack_accuracy_and_evasion_add_up_to_one():
    predictions = torch.randint(-1, 4, (500,))
    labels = torch.randint(0, 4, (500,))
    total = accuracy_under_attack(predictions, labels, 0.5) + evasion_rate(predictions, labels)
    assert total == pytest.approx(1)


def test_a_tie_with_the_threshold_rejects():
    output = torch.tensor([[0.5, 0.2, 0.5], [0.2, 0.6, 0.5], [-2.0, -1.0, 0.5]])
    assert predict_labels(output, reject=True).tolist() == [REJECT, 1, REJECT]
    assert predict_labels(output, reject=False).tolist() == [0, 1, 2]


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_wilson_interval_is_where_the_score_test_just_accepts(rate):
    n, z = 40, 1.959963984540054
    for end in wilson_interval(rate, n):
        if 0 < end < 1:
            assert abs(rate - end) == pytest.approx(z * math.sqrt(end * (1 - end) / n))
    low, high = wilson_interval(rate, n)
    assert 0 <= low <= rate <= high <= 1 and low < high


def test_metrics_refuse_what_makes_no_sense():
    with pytest.raises(ValueError, match="eps must be >= 0, got -1"):
        accuracy_under_attack(PREDICTIONS, LABELS, -1)
    with pytest.raises(ValueError, match=r"both be \(n,\)"):
        accuracy_under_attack(PREDICTIONS, LABELS[:2], 1)
    with pytest.raises(ValueError, match="n >= 1"):
        rejection_rate(PREDICTIONS[:0])
    with pytest.raises(ValueError, match=r"rate in \[0, 1\]"):
        wilson_interval(1.5, 10)
