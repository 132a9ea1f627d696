import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from property_examples import up_to
from scipy import stats
from sklearn.metrics import roc_auc_score

from torchdnr.evaluation import auroc, auroc_difference

DOUBLE = {"dtype": torch.float64}


def two_scores(m, n, generator=None):
    """Draw two correlated scores of m negatives and n positives; the second is better."""
    common = torch.randn(m + n, generator=generator, **DOUBLE)
    scores = []
    for shift in (0.5, 1.2):
        score = common + torch.randn(m + n, generator=generator, **DOUBLE)
        score[m:] += shift
        scores.append((score[:m], score[m:]))
    return scores


def area_by_scikit_learn(negatives, positives):
    labels = [0] * len(negatives) + [1] * len(positives)
    return roc_auc_score(labels, torch.cat([negatives, positives]).numpy())


def test_value_and_interval_are_those_of_the_table_of_all_pairs():
    first, second = two_scores(30, 20)
    found = auroc_difference(first, second)
    expected = area_by_scikit_learn(*first) - area_by_scikit_learn(*second)
    assert found.value == pytest.approx(expected, abs=1e-12)
    tables = [(pos[:, None] > neg).double() for neg, pos in (first, second)]
    apart = tables[0] - tables[1]
    variance = apart.mean(dim=1).var() / 20 + apart.mean(dim=0).var() / 30
    half = stats.norm.ppf(0.975) * math.sqrt(variance.item())
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half))
    assert found.n == 50


def test_the_interval_covers_the_truth_as_often_as_it_says():
    generator = torch.Generator().manual_seed(3)
    truth = stats.norm.cdf(0.5 / 2) - stats.norm.cdf(1.2 / 2)
    found = [auroc_difference(*two_scores(60, 40, generator)) for _ in range(300)]
    hits = sum(one.low <= truth <= one.high for one in found)
    assert 0.92 <= hits / 300 <= 0.98
    # Areas of the same samples vary together: the interval is narrower than if they did not.
    first, second = two_scores(60, 40, generator)
    single = [auroc(*groups) for groups in (first, second)]
    apart = math.hypot(*(one.high - one.low for one in single))
    paired = auroc_difference(first, second)
    assert paired.high - paired.low < 0.9 * apart


SCORES = st.lists(st.integers(-3, 3), min_size=3, max_size=3)


@up_to(60)
@given(SCORES, SCORES, SCORES, SCORES)
def test_to_swap_the_scores_turns_the_interval_round(a, b, c, d):
    a, b, c, d = (torch.tensor(values, **DOUBLE) for values in (a, b, c, d))
    there, back = auroc_difference((a, b), (c, d)), auroc_difference((c, d), (a, b))
    assert (back.value, back.low, back.high) == pytest.approx(
        (-there.value, -there.high, -there.low)
    )
    assert -1 <= there.low <= there.value <= there.high <= 1


def test_two_perfect_scores_are_not_certainly_equal():
    perfect = torch.zeros(25), torch.ones(40)
    found = auroc_difference(perfect, perfect)
    reach = 1 - auroc(*perfect).low
    assert found.value == 0
    assert (found.low, found.high) == pytest.approx((-reach, reach))
    alone = auroc_difference((torch.zeros(1), torch.ones(9)), (torch.zeros(1), torch.ones(9)))
    assert (alone.low, alone.high) == (-1, 1)


def test_refuses_scores_of_other_samples():
    with pytest.raises(ValueError, match="3 negatives and 4 positives, got 3 and 5"):
        auroc_difference((torch.rand(3), torch.rand(4)), (torch.rand(3), torch.rand(5)))
    with pytest.raises(ValueError, match="without NaN"):
        auroc_difference((torch.rand(3), torch.rand(4)), (torch.rand(3), torch.rand(4) / 0 - 1e99))
