import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from property_examples import up_to
from scipy import stats
from sklearn import metrics as sk

from torchdnr.evaluation import auroc, fpr_at_tpr, roc_curve, wilson_interval

SCORES = st.lists(st.integers(-5, 5), min_size=1, max_size=30)  # many ties


def groups(negatives, positives):
    return torch.tensor(negatives, dtype=torch.float64), torch.tensor(
        positives, dtype=torch.float64
    )


def for_sklearn(negatives, positives):
    labels = torch.cat([torch.zeros(len(negatives)), torch.ones(len(positives))])
    return labels.numpy(), torch.cat([negatives, positives]).numpy()


def test_curve_and_area_by_hand():
    negatives, positives = groups([0, 1, 1], [1, 2])
    roc = roc_curve(negatives, positives)
    assert roc.thresholds.tolist() == [math.inf, 2, 1, 0]
    assert roc.true_positive_rate.tolist() == [0, 0.5, 1, 1]
    assert roc.false_positive_rate.tolist() == pytest.approx([0, 0, 2 / 3, 1])
    assert auroc(negatives, positives).value == pytest.approx(5 / 6)  # 3 + (1 + 2 / 2) of 6
    assert fpr_at_tpr(negatives, positives, 0.5).value == 0
    assert fpr_at_tpr(negatives, positives, 0.51).value == pytest.approx(2 / 3)


@up_to(60)
@given(SCORES, SCORES)
def test_curve_and_area_are_those_of_scikit_learn(negatives, positives):
    negatives, positives = groups(negatives, positives)
    labels, scores = for_sklearn(negatives, positives)
    expected = sk.roc_curve(labels, scores, drop_intermediate=False)
    for ours, theirs in zip(roc_curve(negatives, positives), expected, strict=True):
        assert ours.tolist() == pytest.approx(theirs.tolist(), abs=1e-12)
    found = auroc(negatives, positives)
    assert found.value == pytest.approx(sk.roc_auc_score(labels, scores), abs=1e-12)
    assert 0 <= found.low <= found.value <= found.high <= 1


@up_to(60)
@given(SCORES, SCORES, st.sampled_from([0.05, 0.5, 0.9, 0.95, 1.0]))
def test_fpr_is_the_least_at_which_the_curve_reaches_the_tpr(negatives, positives, tpr):
    negatives, positives = groups(negatives, positives)
    labels, scores = for_sklearn(negatives, positives)
    fpr, true, _ = sk.roc_curve(labels, scores, drop_intermediate=False)
    found = fpr_at_tpr(negatives, positives, tpr)
    assert found.value == pytest.approx(fpr[true >= tpr - 1e-12].min(), abs=1e-12)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.n == len(negatives)


@up_to(60)
@given(SCORES, SCORES)
def test_only_the_order_of_the_scores_counts(negatives, positives):
    first, second = groups(negatives, positives)
    assert auroc(first, second) == auroc(first.exp(), second.exp())
    assert auroc(first, second).value == pytest.approx(auroc(-second, -first).value, abs=1e-12)
    swapped = auroc(second, first).value
    assert auroc(first, second).value + swapped == pytest.approx(1, abs=1e-12)


def delong_by_definition(negatives, positives):
    """Variance of the area from the table of all pairs."""
    pairs = (positives[:, None] > negatives).double() + (positives[:, None] == negatives) / 2
    of_positives, of_negatives = pairs.mean(dim=1), pairs.mean(dim=0)
    return of_positives.var() / len(positives) + of_negatives.var() / len(negatives)


def test_interval_is_delongs_on_the_logit_scale():
    negatives = torch.randn(40, dtype=torch.float64).round(decimals=1)
    positives = (torch.randn(25, dtype=torch.float64) + 1).round(decimals=1)
    found = auroc(negatives, positives)
    se = delong_by_definition(negatives, positives).sqrt().item()
    half = stats.norm.ppf(0.975) * se / (found.value * (1 - found.value))
    for end, sign in ((found.low, -1), (found.high, 1)):
        logit = math.log(end / (1 - end)) - math.log(found.value / (1 - found.value))
        assert logit == pytest.approx(sign * half)
    # DeLong's variance is close to that of the bootstrap
    generator = torch.Generator().manual_seed(0)
    areas = [
        auroc(
            negatives[torch.randint(40, (40,), generator=generator)],
            positives[torch.randint(25, (25,), generator=generator)],
        ).value
        for _ in range(500)
    ]
    assert torch.tensor(areas).std().item() == pytest.approx(se, rel=0.15)


@pytest.mark.parametrize("size", [1, 5, 50])
def test_perfect_separation_is_not_certain(size):
    found = auroc(torch.zeros(size), torch.ones(200))
    assert found.value == found.high == 1
    exact = 0.025 ** (1 / size)  # the area at which k pairs are in order with probability 2.5 %
    assert found.low == pytest.approx(exact if size > 1 else 0)
    reverse = auroc(torch.ones(size), torch.zeros(200))
    assert reverse.low == reverse.value == 0
    assert reverse.high == pytest.approx(1 - exact if size > 1 else 1)


def test_equal_scores_tell_as_little_as_a_coin():
    found = auroc(torch.zeros(30), torch.zeros(20))
    assert (found.low, found.high) == wilson_interval(0.5, 20) and found.value == 0.5


def coverage(measure, truth, m, n, shift, repeats=400):
    generator = torch.Generator().manual_seed(1)
    draw = {"generator": generator, "dtype": torch.float64}
    hits = 0
    for _ in range(repeats):
        found = measure(torch.randn(m, **draw), torch.randn(n, **draw) + shift)
        hits += found.low <= truth <= found.high
    return hits / repeats


@pytest.mark.parametrize("shift", [0.5, 2.0])
@pytest.mark.parametrize("sizes", [(40, 60), (200, 30)])
def test_intervals_cover_the_truth_as_often_as_they_say(shift, sizes):
    area = stats.norm.cdf(shift / math.sqrt(2))
    assert coverage(auroc, area, *sizes, shift) >= 0.92
    rate = stats.norm.sf(shift + stats.norm.ppf(0.2))  # the threshold that 80 % exceed

    def fpr80(negatives, positives):
        return fpr_at_tpr(negatives, positives, 0.8)

    assert coverage(fpr80, rate, *sizes, shift) >= 0.92


@up_to(30)
@given(SCORES, SCORES)
def test_float32_scores_give_the_same(negatives, positives):
    double = groups(negatives, positives)
    single = [group.float() for group in double]
    assert auroc(*single) == auroc(*double)
    assert fpr_at_tpr(*single) == fpr_at_tpr(*double)


def test_refuses_what_makes_no_sense():
    ok = torch.rand(3)
    with pytest.raises(ValueError, match="negatives must be"):
        auroc(ok[:0], ok)
    with pytest.raises(ValueError, match="positives must be floating point without NaN"):
        roc_curve(ok, torch.tensor([math.nan]))
    with pytest.raises(ValueError, match="positives must be like negatives"):
        roc_curve(ok, ok.double())
    with pytest.raises(ValueError, match=r"tpr must be in \(0, 1\]"):
        fpr_at_tpr(ok, ok, 0.0)
