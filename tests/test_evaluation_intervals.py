import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from property_examples import up_to
from scipy import stats

from torchdnr.evaluation import median_of, share, wilson_interval
from torchdnr.evaluation.metrics import quantile_ranks, square_and_add

YES, NO = True, False


def test_share_of_a_part_rests_on_the_part():
    which = torch.tensor([YES, YES, NO, NO, YES])
    among = torch.tensor([YES, YES, YES, NO, NO])
    found = share(which, among)
    assert (found.value, found.n) == (2 / 3, 3)
    assert (found.low, found.high) == wilson_interval(2 / 3, 3)
    assert share(which).value == 0.6 and share(which).n == 5
    assert found.to_dict() == {"value": 2 / 3, "low": found.low, "high": found.high, "n": 3}


def test_share_of_nothing_is_unknown():
    found = share(torch.tensor([YES, NO]), torch.tensor([NO, NO]))
    assert math.isnan(found.value) and (found.low, found.high, found.n) == (0, 1, 0)


@up_to(60)
@given(st.integers(0, 50), st.integers(1, 50), st.floats(0.5, 0.99))
def test_share_interval_is_the_wilson_interval_of_scipy(hits, n, confidence):
    hits = min(hits, n)
    found = share(torch.arange(n) < hits, confidence=confidence)
    expected = stats.binomtest(hits, n).proportion_ci(confidence, method="wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0 <= found.low <= found.value <= found.high <= 1


@up_to(50)
@given(st.integers(1, 400), st.floats(0.05, 0.95), st.sampled_from([0.8, 0.95, 0.99]))
def test_quantile_ranks_are_those_of_the_binomial_distribution(n, q, confidence):
    low, high = quantile_ranks(n, q, confidence)
    tail = (1 - confidence) / 2
    below = stats.binom(n, q)
    assert low == 0 or below.cdf(low - 1) <= tail * (1 + 1e-9)
    assert below.cdf(low) > tail * (1 - 1e-9)  # one rank higher would be too narrow
    assert high == n + 1 or below.sf(high - 1) <= tail * (1 + 1e-9)
    assert below.sf(high - 2) > tail * (1 - 1e-9)


def test_median_interval_is_that_of_scipy():
    values = torch.rand(101, dtype=torch.float64)
    found = median_of(values)
    expected = stats.quantile_test(values.numpy(), p=0.5).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.value == values.median() and found.n == 101


def test_median_with_infinite_values_and_few_samples():
    found = median_of(torch.tensor([1.0, math.inf, 2.0, math.inf]))
    assert (found.value, found.low, found.high, found.n) == (math.inf, 0.0, math.inf, 4)
    found = median_of(torch.tensor([1.0] * 20 + [math.inf] * 10))
    assert (found.value, found.low, found.high) == (1.0, 1.0, math.inf)


@up_to(60)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=60))
def test_median_lies_in_its_interval_and_scales(values):
    values = torch.tensor(values, dtype=torch.float64)
    found, twice = median_of(values), median_of(2 * values)
    assert found.low <= found.value <= found.high
    assert (twice.low, twice.value) == (2 * found.low, 2 * found.value)


def test_square_and_add_by_hand():
    assert square_and_add(0.5, (0.2, 0.9), (0.1, 0.8)) == pytest.approx((0.0, 1.0))
    assert square_and_add(0.5, (0.4, 0.6), (0.5, 0.5)) == pytest.approx((0.4, 0.6))


def test_intervals_refuse_what_makes_no_sense():
    with pytest.raises(ValueError, match="which must be bool"):
        share(torch.tensor([1.0]))
    with pytest.raises(ValueError, match="among must be bool like which"):
        share(torch.tensor([YES]), torch.tensor([YES, NO]))
    with pytest.raises(ValueError, match="no NaN"):
        median_of(torch.tensor([1.0, math.nan]))
    with pytest.raises(ValueError, match="q and confidence"):
        quantile_ranks(10, 1.0)
