import json
import math
import warnings
from collections import OrderedDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from property_examples import up_to
from sklearn.datasets import load_digits
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from sklearn.multiclass import OneVsRestClassifier
from sklearn.svm import SVC
from torch import nn

from torchdnr import DNR, REJECT
from torchdnr.kernels import scale_gamma, squared_distances
from torchdnr.svm import (
    RBFSVM,
    ConvergenceWarning,
    SelectionWarning,
    grid_search,
    model_selection,
    out_of_fold_scores,
    solve_dual,
)
from torchdnr.svm.dual import ACTIVE_SET, DESCENT, HANDED_OVER
from torchdnr.svm.folds import stratified_folds
from torchdnr.svm.multiclass import one_vs_rest

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def digits(n=160, noise=0.6):
    """Return digits with so much noise that accuracies differ over the grid."""
    x, y = load_digits(n_class=4, return_X_y=True)
    x = torch.tensor(x[:n] / 16)
    return x + noise * torch.randn(x.shape, generator=torch.Generator().manual_seed(5)), (
        torch.tensor(y[:n])
    )


@given(
    counts=st.lists(st.integers(0, 30), min_size=1, max_size=6),
    folds=st.integers(2, 6),
    seed=st.integers(0, 1000),
)
@up_to(60)
def test_folds_share_each_class_and_all_samples_evenly(counts, folds, seed):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
    present = [count for count in counts if count]
    if not present or min(present) < folds:
        with pytest.raises(ValueError, match="at least as many samples as folds"):
            stratified_folds(labels, folds, seed)
        return
    fold = stratified_folds(labels, folds, seed)
    assert fold.shape == labels.shape
    for members in [fold] + [fold[labels == k] for k in labels.unique()]:
        sizes = torch.bincount(members, minlength=folds)
        assert len(sizes) == folds and sizes.max() - sizes.min() <= 1
    assert torch.equal(fold, stratified_folds(labels, folds, seed))


def test_folds_follow_the_seed_and_not_the_global_generator():
    labels = torch.arange(300) % 3
    first = stratified_folds(labels, 5, seed=1)
    torch.rand(7)
    assert torch.equal(first, stratified_folds(labels, 5, seed=1))
    assert not torch.equal(first, stratified_folds(labels, 5, seed=2))
    before = torch.get_rng_state()
    stratified_folds(labels, 5)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_accuracy_table_is_that_of_scikit_learn_on_the_same_folds(dtype, device):
    x, y = digits()
    C_grid, multiples, folds = (10.0, 0.1, 1.0), (30.0, 0.25), 3
    search = grid_search(
        x.to(device, dtype),
        y.to(device),
        C_grid=C_grid,
        gamma_grid=multiples,
        folds=folds,
        seed=2,
    )
    assert search.C_grid == (0.1, 1.0, 10.0) and search.not_converged == 0
    assert search.gamma_grid == pytest.approx([m * scale_gamma(x) for m in (0.25, 30.0)], rel=1e-5)
    cv = PredefinedSplit(stratified_folds(y, folds, seed=2).numpy())
    expected = torch.zeros(3, 2, dtype=torch.float64)
    for row, C in enumerate(search.C_grid):
        for column, gamma in enumerate(search.gamma_grid):
            machine = OneVsRestClassifier(SVC(C=C, gamma=gamma, tol=1e-6))
            predicted = cross_val_predict(machine, x.numpy(), y.numpy(), cv=cv)
            expected[row, column] = (torch.tensor(predicted) == y).double().mean()
    assert expected.max() - expected.min() > 0.1  # the comparison means something
    torch.testing.assert_close(search.accuracy, expected, atol=1.01 / len(x), rtol=0)
    assert search.accuracy[search.C_grid.index(search.C)].max() == search.accuracy.max()


def chosen_by_hand(search, n, scale):
    """Return what the rule of grid_search says, from its table alone."""
    top = search.accuracy.max().item()
    likely = (top * n + 2) / (n + 4)
    good = [
        (C, gamma)
        for row, C in enumerate(search.C_grid)
        for column, gamma in enumerate(search.gamma_grid)
        if search.accuracy[row, column] >= top - (likely * (1 - likely) / (n + 4)) ** 0.5
    ]

    def far(value):
        return round(abs(math.log(value)), 9)

    return min(good, key=lambda point: (far(point[0]), far(point[1] / scale), -point[0], -point[1]))


@pytest.mark.parametrize(
    "noise", [0.8, *(pytest.param(n, marks=pytest.mark.slow) for n in (0.4, 1.2))]
)
def test_of_points_within_one_standard_error_the_one_nearest_C_1_and_gamma_scale_is_chosen(noise):
    x, y = digits(80, noise)
    search = grid_search(x, y, folds=2)
    expected = chosen_by_hand(search, len(x), scale_gamma(x))
    assert (search.C, search.gamma) == pytest.approx(expected, rel=1e-6)
    assert search.reason.startswith(f"C = {search.C:g}, gamma = {search.gamma:.4g}, ")


def two_clouds(distance):
    """Return 40 samples of two classes, that many standard deviations apart."""
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    x[20:, 0] += distance
    return x, torch.arange(40) // 20


def test_where_the_whole_grid_ties_C_is_1_and_a_warning_says_that_nothing_else_decided():
    x, y = two_clouds(40)
    with pytest.warns(
        SelectionWarning, match="does not tell its points apart: .* of 20 in 20"
    ) as record:
        search = grid_search(x, y, folds=4)
    assert (search.accuracy == 1).all() and record[0].filename == __file__
    assert search.C == 1.0 and search.gamma == pytest.approx(scale_gamma(x))


def test_a_best_point_at_an_end_of_its_grid_is_warned_of():
    x, y = digits()
    with pytest.warns(SelectionWarning, match="end of the gamma grid alone, .*extend gamma_grid"):
        grid_search(x, y, C_grid=[1.0, 10.0], gamma_grid=[0.5, 60.0, 200.0], folds=3)
    with warnings.catch_warnings():  # a grid of two has nothing but ends
        warnings.simplefilter("error")
        grid_search(x, y, C_grid=[1.0, 10.0], gamma_grid=[0.5, 200.0], folds=3)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_noise_is_rejected_where_classes_are_so_far_apart_that_every_point_of_the_grid_ties(seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(600) % 4
    images = 0.3 * torch.rand(600, 1, 8, 8, generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):  # a bright quarter each
        image[0, label // 2 * 4 :, label % 2 * 4 :][:4, :4] += 0.6
    torch.manual_seed(seed)
    net = nn.Sequential(OrderedDict(conv=nn.Conv2d(1, 8, 3), act=nn.ReLU(), flat=nn.Flatten()))
    net.add_module("fc1", nn.Linear(288, 32))
    net.add_module("act1", nn.ReLU())
    net.add_module("fc2", nn.Linear(32, 4))
    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(40):
        loss = nn.functional.cross_entropy(net(images[:300]), labels[:300])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    noise = torch.rand(1000, 1, 8, 8, generator=generator)
    with pytest.warns(SelectionWarning):
        grid = {"C_grid": [0.01, 1.0, 100.0], "gamma_grid": [1.0]}
        model = DNR(net.eval(), ["act1", "fc2"], folds=2, **grid).fit(images[:300], labels[:300])
    model.calibrate(images[300:], 0.10)
    assert (model.predict(noise) == REJECT).all()


def test_the_result_can_be_written_as_json_and_given_distances_change_nothing():
    x, y = digits(n=80)
    options = {"C_grid": [1.0], "gamma_grid": [0.5, 2.0], "folds": 3}
    search = grid_search(x, y, **options)
    as_json = search.to_dict()
    assert json.loads(json.dumps(as_json)) == as_json
    assert as_json["accuracy"] == search.accuracy.tolist()
    assert as_json["method"] == {name: counts.tolist() for name, counts in search.method.items()}
    center = torch.full((64,), 3.0, dtype=x.dtype)  # any centre gives the same distances
    again = grid_search(x, y, distances=squared_distances(x, x, center), **options)
    assert torch.equal(again.accuracy, search.accuracy)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_out_of_fold_scores_are_those_of_machines_fitted_on_the_other_folds(dtype, device):
    x, y = (t.to(device) for t in digits())
    x = x.to(dtype)
    scores = out_of_fold_scores(x, y, C=5.0, gamma=0.05, folds=4, seed=7)
    assert scores.shape == (len(x), 4) and scores.dtype == dtype and scores.device == x.device
    fold = stratified_folds(y, 4, seed=7)
    for k in range(4):
        out = fold == k
        by_hand = RBFSVM(C=5.0, gamma=0.05).fit(x[~out], y[~out])(x[out])
        assert (scores[out] - by_hand).abs().max() < 2e-3
    seen = RBFSVM(C=5.0, gamma=0.05).fit(x, y)(x)
    assert (scores - seen).abs().max() > 0.5  # a leak would show


def test_features_with_a_gradient_leave_no_graph_behind():
    x, y = digits(n=60)
    free = x.clone().requires_grad_()
    scores = out_of_fold_scores(free, y, C=1.0, gamma=0.05, folds=3)
    assert not scores.requires_grad
    assert torch.equal(scores, out_of_fold_scores(x, y, C=1.0, gamma=0.05, folds=3))
    kernel = (-0.05 * squared_distances(free, x, x.mean(0))).exp()
    assert not solve_dual(kernel, one_vs_rest(y, 4), 1.0).objective.requires_grad


@pytest.mark.filterwarnings("ignore::torchdnr.svm.ConvergenceWarning")  # those of other fits
def test_missed_tolerances_are_counted_and_warned_of():
    x, y = digits(n=60)
    with pytest.warns(ConvergenceWarning, match="of 12 dual problems"):
        search = grid_search(x, y, C_grid=[10.0], gamma_grid=[1.0], folds=3, max_steps=1)
    assert 0 < search.not_converged <= 12 + 4
    assert (search.svm.solution.steps <= 1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"folds": 1}, "folds must be >= 2, got 1"),
        ({"folds": 12}, "as many samples as folds = 12, got a class with 10"),
        ({"C_grid": []}, "grids must hold numbers > 0"),
        ({"C_grid": [0.0, 1.0]}, "grids must hold numbers > 0"),
        ({"gamma_grid": [-1.0]}, "grids must hold numbers > 0"),
        ({"labels": torch.zeros(40).long()}, "at least two classes"),
        ({"features": torch.full((40, 2), torch.nan)}, "features must be finite"),
    ],
)
def test_wrong_searches_are_refused(options, message):
    arguments = {"features": torch.randn(40, 2), "labels": torch.arange(40) % 4, **options}
    with pytest.raises(ValueError, match=message):
        grid_search(arguments.pop("features"), arguments.pop("labels"), **arguments)


def test_out_of_fold_scores_need_a_sample_of_each_class_in_each_fold():
    with pytest.raises(ValueError, match="add samples or use fewer folds"):
        out_of_fold_scores(torch.randn(8, 2), torch.arange(8) % 4, C=1.0, gamma=1.0, folds=3)


def spread_out(n=1200, c=3, noise=1.0):
    """Return clusters on which a tiny or a huge gamma is far worse than "scale"."""
    generator = torch.Generator().manual_seed(4)
    y = torch.arange(n) % c
    x = 2.0 * torch.randn(c, 6, generator=generator)[y]
    return (x + noise * torch.randn(n, 6, generator=generator)).double(), y


GRID = {"C_grid": (1e-3, 1.0), "gamma_grid": (1.0, 300.0), "folds": 2}


def test_pruned_points_are_marked_and_the_others_are_as_without(monkeypatch):
    monkeypatch.setattr(model_selection, "PART", 300)
    x, y = spread_out()
    whole, pruned = grid_search(x, y, **GRID), grid_search(x, y, **GRID, pruning=True)
    assert whole.pruned is None and "pruned" not in whole.to_dict()
    assert (pruned.C, pruned.gamma) == (whole.C, whole.gamma)
    top, least = whole.accuracy.max(), whole.accuracy.min()
    assert top - least > 0.2  # nothing is close
    assert 0 < pruned.pruned.sum() < pruned.pruned.numel()
    assert pruned.pruned[whole.accuracy == least].all()
    assert not pruned.pruned[whole.accuracy == top].any()
    assert torch.equal(pruned.accuracy[~pruned.pruned], whole.accuracy[~pruned.pruned])
    assert pruned.to_dict()["pruned"] == pruned.pruned.tolist()
    torch.testing.assert_close(pruned.svm(x), whole.svm(x), atol=5e-3, rtol=0)


def test_a_point_that_is_best_on_a_part_only_by_chance_prunes_no_equal_one(monkeypatch):
    monkeypatch.setattr(model_selection, "PART", 300)
    x, y = spread_out()
    search = grid_search(x, y, C_grid=(1.0, 1.01), gamma_grid=(1.0, 1.02), folds=2, pruning=True)
    assert not search.pruned.any()


@pytest.mark.parametrize("rare", [False, True])
def test_few_samples_or_a_small_class_leave_nothing_to_prune(monkeypatch, rare):
    monkeypatch.setattr(model_selection, "PART", 100 if rare else 1200)
    x, y = spread_out(600)
    if rare:
        y = torch.where((y == 2) & (torch.arange(600) > 8), 0, y)  # three samples are left
    whole, search = (grid_search(x, y, **GRID, pruning=on) for on in (False, True))
    assert not search.pruned.any() and torch.equal(search.accuracy, whole.accuracy)


def test_samples_of_weight_0_have_no_part_in_pruning(monkeypatch):
    monkeypatch.setattr(model_selection, "PART", 300)
    x, y = spread_out()
    wrong, nothing = (y + 1) % 3, torch.zeros(len(y))
    both, weight = torch.cat([x, x]), torch.cat([nothing + 1, nothing])
    alone = grid_search(x, y, **GRID, pruning=True)
    search = grid_search(both, torch.cat([y, wrong]), **GRID, pruning=True, sample_weight=weight)
    assert torch.equal(search.pruned, alone.pruned) and search.C == alone.C


def test_every_problem_of_the_table_says_what_solved_it(monkeypatch):
    monkeypatch.setattr(model_selection, "PART", 300)
    x, y = spread_out()
    grid = {"C_grid": (0.1, 10.0), "gamma_grid": (1.0, 16.0), "folds": 2}
    method = grid_search(x, y, **grid).method
    assert set(method) == {DESCENT, ACTIVE_SET, HANDED_OVER}
    assert all(counts.dtype == torch.int64 for counts in method.values())
    assert (sum(method.values()) == 3 + 2 * 3).all()  # classes, on all samples and without folds
    assert (method[DESCENT][:, 0] == 9).all()
    assert method[ACTIVE_SET][1, 1] == 9  # nearly all samples are free there
    pruned = grid_search(x, y, **GRID, pruning=True)
    assert torch.equal(sum(pruned.method.values()), 9 * ~pruned.pruned)
