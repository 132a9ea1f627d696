import json
import math
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from torchdnr.attacks import line_search_pgd
from torchdnr.attacks.projections import project
from torchdnr.evaluation import (
    WithThreshold,
    accuracy_under_attack,
    measure_detection,
    plot_roc,
    plot_threshold_sweep,
    predict_labels,
    rejection_rate,
    threshold_sweep,
    thresholds_at_rates,
)

THETAS = [-0.1, 0.05, 0.1, 0.2, 0.3]


class Sides(nn.Module):
    """Two classes told apart at x_0 = 0.5; the score is the distance from there."""

    reject_index = 2

    def __init__(self, theta=0.1):
        super().__init__()
        self.theta = theta
        self.dropout = nn.Dropout(0.5)
        self.weight = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        side = self.dropout(x[:, :1] - 0.5) * self.weight
        return torch.cat([-side, side, side.new_full(side.shape, self.theta)], dim=1)


def step_over(model, inputs, labels, eps, theta=None):
    """Go to the other side, just as far as theta asks for, or back where it is out of reach."""
    theta = model.threshold if theta is None else theta
    target = 0.5 + (theta + 1e-6) * (1 - 2 * labels.to(inputs))
    points = torch.cat([target[:, None], inputs[:, 1:]], dim=1).clamp(0, 1)
    return project(points, inputs, eps, 2, (0, 1))


@pytest.fixture
def data():
    inputs = torch.rand(80, 2, dtype=torch.float64)
    labels = (inputs[:, 0] > 0.5).long()
    labels[:4] = 1 - labels[:4]
    return inputs, labels


def sweep(data, attack=None, model=None, thresholds=THETAS, **options):
    inputs, labels = data
    model = Sides().eval() if model is None else model
    points = {eps: step_over(model, inputs, labels, eps, 0.1) for eps in (0.3, 0.2)}
    return threshold_sweep(model, inputs, labels, points, thresholds, attack=attack, **options)


def values(rates):
    return [rate.value for rate in rates]


def test_view_replaces_the_threshold_and_nothing_else(data):
    model = Sides().train()
    view = WithThreshold(model, 0.25)
    with torch.no_grad():
        output = view(data[0])
    assert output.dtype == torch.float64 and (output[:, 2] == 0.25).all()
    assert view.reject_index is not None and model.theta == 0.1 and model.training
    plain = WithThreshold(lambda x: x, 0.5)  # two scores, no threshold
    assert torch.equal(plain(data[0])[:, :2], data[0]) and plain(data[0]).shape == (80, 3)
    found = line_search_pgd(view, *data, 0.3, steps=2)
    assert found.shape == data[0].shape and model.training and model.dropout.training


def test_fixed_points_give_the_metrics_at_each_threshold(data):
    inputs, labels = data
    found = sweep(data)
    model = Sides().eval()
    wrong_before = (labels != (inputs[:, 0] > 0.5).long()).double()
    assert found.eps == [0.2, 0.3] and found.thresholds == THETAS
    for column, theta in enumerate(THETAS):
        view = WithThreshold(model, theta)
        clean = predict_labels(view(inputs), True)
        assert found.false_rejection_rate[column].value == rejection_rate(clean)
        assert found.clean_accuracy[column].value == accuracy_under_attack(clean, labels, 0)
        evading = torch.zeros(80, dtype=torch.bool)
        for points in (inputs, step_over(model, inputs, labels, 0.2, 0.1)):
            predictions = predict_labels(view(points), True)
            evading |= (predictions != labels) & (predictions >= 0)
        assert found.accuracy[0][column].value == pytest.approx(1 - evading.double().mean().item())
        assert found.accuracy[0][column].n == 80
    assert found.reattacked_accuracy is None and found.reattacked_rejection_rate is None
    assert wrong_before.sum() == 4


def test_a_higher_threshold_and_a_smaller_eps_are_never_less_accurate(data):
    found = sweep(data, step_over)
    for rates in (found.accuracy, found.reattacked_accuracy):
        for row in rates:
            assert values(row) == sorted(values(row))
        assert all(one >= two for one, two in zip(values(rates[0]), values(rates[1]), strict=True))
    assert values(found.false_rejection_rate) == sorted(values(found.false_rejection_rate))


def test_attacking_again_finds_what_geometry_allows(data):
    inputs, labels = data
    found = sweep(data, step_over)
    side = (inputs[:, 0] - 0.5) * (2 * labels.to(inputs) - 1)  # < 0: wrong before
    for row, eps in enumerate([0.2, 0.3]):
        for column, theta in enumerate(THETAS):
            evaded = -side + eps > max(theta, 0) + 1e-6  # below 0 nothing is rejected
            expected = 1 - evaded.double().mean().item()
            assert found.reattacked_accuracy[row][column].value == pytest.approx(expected)
            assert found.accuracy[row][column].value >= expected - 1e-12
    last = values(found.accuracy[1])[-1], values(found.reattacked_accuracy[1])[-1]
    assert last[0] >= last[1]


def test_only_samples_that_do_not_evade_yet_are_attacked_again(data):
    counts = []

    def attack(model, inputs, labels, eps):
        counts.append(len(inputs))
        return step_over(model, inputs, labels, eps)

    found = sweep(data, attack, thresholds=[0.1])
    assert counts == [round(80 * row[0].value) for row in found.accuracy]
    assert found.accuracy[0][0].value == found.reattacked_accuracy[0][0].value


def test_points_outside_the_ball_are_put_back(data):
    with pytest.warns(UserWarning, match="attack at eps = 0.2"):
        found = sweep(data, lambda model, x, y, eps: 1 - x)
    assert values(found.reattacked_accuracy[0])[2] >= values(sweep(data, step_over).accuracy[0])[2]


def test_thresholds_at_rates_reject_that_many():
    scores = torch.randn(200, 3)
    thetas = thresholds_at_rates(scores, [0.1, 0.0, 0.25, 0.1])
    assert len(thetas) == 3 and thetas == sorted(thetas)
    best = scores.max(dim=1).values
    assert [int((best <= theta).sum()) for theta in thetas] == [0, 20, 50]


def test_panels_of_a_sweep_share_the_widest_axis(data, tmp_path):
    wide = sweep(data)
    rates = [replace(rate, value=rate.value / 9) for rate in wide.false_rejection_rate]
    narrow = replace(wide, false_rejection_rate=rates)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "error", UserWarning
        )  # a line beyond its panel leaves the figure without a layout
        plot_threshold_sweep({"narrow": narrow, "wide": wide}, tmp_path / "sweep.png")


def test_sweep_as_json_and_as_figure(data, tmp_path):
    found = {"fixed": sweep(data), "again": sweep(data, step_over, settings={"seed": 1})}
    content = json.loads(json.dumps(found["again"].to_dict()))
    assert content["accuracy"][1][2] == found["again"].accuracy[1][2].to_dict()
    about = {"levels": None, "masked": False, "targeted": False}
    assert content["settings"] == {"samples": 80, "confidence": 0.95, **about, "seed": 1}
    plot_threshold_sweep(found, tmp_path / "sweep.png")
    plot_threshold_sweep({"fixed": found["fixed"]}, tmp_path / "one.png", operating_point=None)
    plot_threshold_sweep(found, tmp_path / "theta.png", over_threshold=True)
    inputs, labels = data
    model = Sides().eval()
    adversarial = model(step_over(model, inputs, labels, 0.3, 0.1)).detach()
    clean = model(inputs).detach()
    detections = {
        "with theta": measure_detection(clean, adversarial, labels, True),
        "without": measure_detection(clean[:, :2], adversarial[:, :2], labels, False),
    }
    plot_roc(detections, tmp_path / "roc.png")
    for name in ("sweep", "one", "theta", "roc"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    for plot in (plot_roc, plot_threshold_sweep):
        with pytest.raises(ValueError, match="is empty"):
            plot({}, tmp_path / "none.png")


@pytest.mark.parametrize(
    ("points", "thresholds", "message"),
    [
        ({}, [0.1], "adversarial must have points"),
        ({0.0: torch.rand(80, 2)}, [0.1], "eps > 0"),
        ({0.1: torch.rand(3, 2)}, [0.1], "adversarial must be like clean"),
        (None, [], "thresholds must be finite"),
        (None, [math.nan], "thresholds must be finite"),
    ],
)
def test_refuses_what_makes_no_sense(data, points, thresholds, message):
    inputs, labels = data
    points = {0.1: inputs} if points is None else points
    with pytest.raises(ValueError, match=message):
        threshold_sweep(Sides(), inputs, labels, points, thresholds)
    with pytest.raises(ValueError, match="attack must return finite points"):
        sweep(data, lambda model, x, y, eps: x[:1] * math.nan)


def test_view_offers_smoothed_views_where_the_model_does(data):
    class Smoothable(Sides):
        def smoothed(self, factor):
            return lambda x: factor * self(x)

    assert not hasattr(WithThreshold(Sides(), 0.2), "smoothed")
    model = Smoothable().eval()
    smooth = WithThreshold(model, 0.2).smoothed(0.5)
    assert torch.equal(smooth(data[0])[:, :2], 0.5 * model(data[0])[:, :2])
    assert (smooth(data[0])[:, 2] == 0.2).all()


@pytest.mark.parametrize("each", [False, True])
def test_attacks_change_what_the_mask_lets_them_and_nothing_else(data, each):
    free = sweep(data, partial(line_search_pgd, steps=3))
    other = torch.tensor([[False, True]]).expand(80, 2) if each else torch.tensor([0, 1])
    with pytest.warns(UserWarning, match="adversarial at eps"):  # the given points move x_0
        held = sweep(data, partial(line_search_pgd, steps=3), mask=other)
    clean = Sides().eval()(data[0]).detach()
    for column, theta in enumerate(THETAS):
        best, classes = clean[:, :2].max(dim=1)
        right = ((classes == data[1]) | (best <= theta)).double().mean()
        assert held.accuracy[1][column].value == pytest.approx(right.item())
        assert held.reattacked_accuracy[1][column].value == pytest.approx(right.item())
    assert values(free.reattacked_accuracy[1])[2] < values(held.reattacked_accuracy[1])[2]
    one = sweep(data, partial(line_search_pgd, steps=3), mask=torch.tensor([True, False]))
    for rate in ("accuracy", "reattacked_accuracy"):  # x_0 alone decides
        assert [values(row) for row in getattr(one, rate)] == [
            values(row) for row in getattr(free, rate)
        ]


def test_with_a_target_only_what_is_accepted_as_it_counts(data):
    inputs = data[0]
    labels = (inputs[:, 0] > 0.5).long()
    given = []

    def attack(view, images, of_images, eps, targets, levels):
        given.append((targets, levels))
        return step_over(view, images, of_images, eps)

    levelled = (inputs * 255).round() / 255
    found = sweep((levelled, labels), attack, targets=1, levels=256)
    assert set(given) == {(1, 256)}
    zero = labels == 0
    alone = sweep((levelled[zero], labels[zero]), step_over)
    for row, of_zero in zip(found.reattacked_accuracy, alone.reattacked_accuracy, strict=True):
        for rate, one in zip(row, of_zero, strict=True):  # inputs of class 1 stay right
            evaded = (1 - one.value) * zero.sum().item()
            assert rate.value == pytest.approx(1 - evaded / 80)
    assert found.settings["targeted"] and found.settings["levels"] == 256
    with pytest.raises(ValueError, match="below the 2 classes of the model"):
        sweep((inputs, labels), targets=2)
