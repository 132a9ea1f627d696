import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from property_examples import up_to

from torchdnr.decisions import REJECT
from torchdnr.evaluation import (
    AttackCurve,
    SecurityCurve,
    accuracy_under_attack,
    attack_costs,
    attack_rates,
    decision_rates,
    evasion_rate,
    median_evasion_norm,
    rejection_rate,
    wilson_interval,
)

LABELS = torch.tensor([0, 1, 2, 0])
CLEAN = torch.tensor([0, REJECT, 1, 0])
PREDICTIONS = torch.tensor([0, REJECT, 1, REJECT])


def test_rates_by_hand():
    rates = decision_rates(PREDICTIONS, LABELS, 0.5)
    assert (
        rates.accuracy.value == 0.75
        and decision_rates(PREDICTIONS, LABELS, 0).accuracy.value == 0.25
    )
    assert (rates.rejection.value, rates.evasion.value) == (0.5, 0.25)
    assert (rates.error_if_accepted.value, rates.error_if_accepted.n) == (0.5, 2)
    assert (rates.rejection_if_not_right.value, rates.rejection_if_not_right.n) == (2 / 3, 3)
    assert (rates.rejection.low, rates.rejection.high) == wilson_interval(0.5, 4)
    nothing = decision_rates(LABELS, LABELS, 1.0).rejection_if_not_right
    assert math.isnan(nothing.value) and nothing.n == 0


@up_to(60)
@given(st.integers(0, 1000), st.sampled_from([0.0, 0.5]))
def test_rates_are_the_metrics(seed, eps):
    generator = torch.Generator().manual_seed(seed)
    predictions = torch.randint(-1, 3, (30,), generator=generator)
    labels = torch.randint(0, 3, (30,), generator=generator)
    rates = decision_rates(predictions, labels, eps)
    assert rates.accuracy.value == pytest.approx(accuracy_under_attack(predictions, labels, eps))
    assert rates.rejection.value == pytest.approx(rejection_rate(predictions))
    assert rates.evasion.value == pytest.approx(evasion_rate(predictions, labels))
    for rate in rates:
        assert math.isnan(rate.value) or 0 <= rate.low <= rate.value <= rate.high <= 1


def curve():
    shared = {"eps": [0.0, 0.5], "labels": LABELS, "mean_norm": [0.0, 0.4]}
    predictions = torch.stack([CLEAN, PREDICTIONS])
    alone = AttackCurve(
        **shared,
        predictions=predictions,
        minimum_norm=False,
        seconds=[0.0, 2.0],
        forwards=[0, 40],
        backwards=[0, 8],
        violations=[0, 1],
    )
    return SecurityCurve(
        **shared,
        predictions=predictions,
        name="DNR",
        norm=2.0,
        rejects=True,
        attacks={"walk": alone},
        evasion_norm=torch.tensor([math.inf, math.inf, 0.3, 0.5], dtype=torch.float64),
        settings={},
        environment={},
        seconds=2.0,
    )


def test_costs_by_hand():
    (row,) = attack_costs({"DNR": curve()})
    assert row["classifier"] == "DNR" and row["attack"] == "walk"
    assert (row["samples"], row["positive_eps"], row["violations"]) == (4, 1, 1)
    assert (row["seconds"], row["forwards"], row["backwards"]) == (2.0, 40, 8)
    per_sample = [row[f"{key}_per_sample"] for key in ("seconds", "forwards", "backwards")]
    assert per_sample == [0.5, 10, 2]
    assert row["largest_eps"] == 0.5 and row["evasion"]["value"] == 0.25
    assert attack_costs({}) == []


def test_rates_of_every_attack_and_of_the_worst_case():
    rows = attack_rates({"DNR": curve()})
    assert [(row["attack"], row["eps"]) for row in rows] == [
        ("walk", 0.0),
        ("walk", 0.5),
        (None, 0.0),
        (None, 0.5),
    ]
    assert rows[0]["rejection"]["value"] == 0.25 and rows[0]["accuracy"]["value"] == 0.5
    assert rows[3]["accuracy"]["value"] == 0.75


def test_median_evasion_norm_has_the_value_of_the_curve():
    found = median_evasion_norm(curve())
    assert found.value == curve().median_evasion_norm == math.inf
    assert (found.low, found.high, found.n) == (0.0, math.inf, 4)


def test_rates_refuse_what_makes_no_sense():
    with pytest.raises(ValueError, match=r"both be \(n,\)"):
        decision_rates(PREDICTIONS, LABELS[:2], 1)
    with pytest.raises(ValueError, match="eps must be >= 0"):
        decision_rates(PREDICTIONS, LABELS, -1)
