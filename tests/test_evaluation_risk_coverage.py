"""The error among accepted inputs over the share accepted, against sums written out."""

import pytest
import torch
from matplotlib.image import imread

from torchdnr import WithReject
from torchdnr.evaluation import plot_risk_coverage, risk_coverage


def drawn(n, seed, levels=None):
    """Scores, in a few levels if asked for, so that many are equal; and labels."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(n, 3, generator=generator)
    labels = torch.where(torch.rand(n, generator=generator) < scores.amax(1), scores.argmax(1), 0)
    return (scores * levels).floor() / levels if levels else scores, labels


def by_hand(scores, labels):
    """(coverage, risk) at every threshold, and the mean risk over the inputs, each added last."""
    best, wrong = scores.amax(1).tolist(), (scores.argmax(1) != labels).tolist()
    points, area = [], 0.0
    for value in sorted(set(best), reverse=True):
        accepted = [w for b, w in zip(best, wrong, strict=True) if b >= value]
        points.append((len(accepted) / len(best), sum(accepted) / len(accepted)))
        area += best.count(value) * points[-1][1]
    return points, area / len(best)


@pytest.mark.parametrize("levels", [None, 5])
@pytest.mark.parametrize("n", [1, 7, 300])
def test_curve_and_area_are_those_written_out(n, levels):
    scores, labels = drawn(n, n, levels)
    points, area = by_hand(scores, labels)
    for output, reject in (
        (scores, False),
        (torch.cat([scores, torch.full((n, 1), 0.6)], 1), True),
    ):
        found = risk_coverage(output, labels, reject)
        torch.testing.assert_close(
            torch.stack([found.coverage, found.risk], 1), torch.tensor(points).double()
        )
        assert found.aurc == pytest.approx(area) and found.n == n
    accepted = scores.amax(1) > 0.6
    assert found.accepted.value == pytest.approx(accepted.double().mean().item())
    wrong = scores.argmax(1) != labels
    assert found.error.n == accepted.sum()
    if accepted.any():
        assert found.error.value == pytest.approx(wrong[accepted].double().mean().item())
    assert risk_coverage(scores, labels, False).error is None


def test_the_risk_at_a_coverage_is_that_of_the_smallest_group_that_reaches_it():
    scores = torch.tensor([[0.9], [0.8], [0.8], [0.1]]) * torch.tensor([1.0, 0.0])
    found = risk_coverage(scores, torch.tensor([0, 1, 0, 1]), False)
    risks = {0.25: 0, 0.3: 1 / 3, 0.75: 1 / 3, 0.8: 0.5, 1.0: 0.5}
    for coverage, risk in risks.items():
        assert found.at(coverage).value == pytest.approx(risk)
    assert (found.at(0.5).n, found.at(0.25).n) == (3, 1)
    with pytest.raises(ValueError, match=r"coverage must be in \(0, 1\]"):
        found.at(0)


def test_scores_that_tell_right_from_wrong_have_the_smaller_area():
    scores, labels = drawn(400, 0)
    classes = scores.argmax(1)
    wrong = classes != labels
    best = 3 + torch.where(wrong, 0.0, 1.0) + torch.rand(400)  # those that are wrong last
    areas = [
        risk_coverage(torch.nn.functional.one_hot(classes, 3) * b[:, None], labels, False).aurc
        for b in (best, 9 - best)
    ]
    m, n = int(wrong.sum()), 400
    assert areas[0] == pytest.approx(sum(k / (n - m + k) for k in range(1, m + 1)) / n)
    assert areas[1] > wrong.double().mean() > areas[0]
    assert risk_coverage(scores, classes, False).aurc == 0


def test_a_detector_orders_the_inputs_by_its_own_score():
    scores, labels = drawn(200, 3)
    suspicion = torch.rand(200)
    pair = WithReject(lambda x: x[:, :3], lambda x: x[:, 3], 0.5)
    found = risk_coverage(pair(torch.cat([scores, suspicion[:, None]], 1)), labels, True)
    order = suspicion.argsort()
    wrong = (scores.argmax(1) != labels)[order].double()
    expected = wrong.cumsum(0) / torch.arange(1, 201)
    assert found.aurc == pytest.approx(expected.mean().item(), abs=1e-4)
    assert found.accepted.value == (suspicion <= 0.5).double().mean()


def test_wrong_arguments_are_refused_and_the_figure_is_drawn(tmp_path):
    scores, labels = drawn(50, 1)
    with pytest.raises(ValueError, match="labels must be int64"):
        risk_coverage(scores, labels[:9], False)
    with pytest.raises(ValueError, match="curves is empty"):
        plot_risk_coverage({}, tmp_path / "a.png")
    curves = {
        "DNN": risk_coverage(scores, labels, False),
        "DNR": risk_coverage(torch.cat([scores, torch.full((50, 1), 0.6)], 1), labels, True),
        "all rejected": risk_coverage(torch.cat([scores, torch.ones(50, 1)], 1), labels, True),
    }
    plot_risk_coverage(curves, tmp_path / "a.png")
    assert imread(tmp_path / "a.png").std() > 0.05
