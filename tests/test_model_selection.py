import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from property_examples import up_to
from sklearn.datasets import load_digits
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from sklearn.multiclass import OneVsRestClassifier
from sklearn.svm import SVC

from torchdnr.kernels import scale_gamma, squared_distances
from torchdnr.svm import RBFSVM, ConvergenceWarning, grid_search, out_of_fold_scores, solve_dual
from torchdnr.svm.model_selection import stratified_folds
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
    best = max(  # ties: the smallest C, then the largest gamma
        (round(len(x) * search.accuracy[row, column].item()), -row, column)
        for row in range(len(search.C_grid))
        for column in range(len(search.gamma_grid))
    )
    row, column = -best[1], best[2]
    assert (search.C, search.gamma) == (search.C_grid[row], search.gamma_grid[column])
    assert search.accuracy[row, column] == search.accuracy.max()


def test_ties_go_to_the_smallest_C_and_then_to_the_largest_gamma():
    x = torch.cat([torch.randn(20, 2) - 20, torch.randn(20, 2) + 20])
    search = grid_search(x, (x[:, 0] > 0).long(), C_grid=[1, 10], gamma_grid=[0.1, 0.3], folds=4)
    assert (search.accuracy == 1).all()
    assert search.C == 1.0 and search.gamma == pytest.approx(0.3 * scale_gamma(x))


def test_the_result_can_be_written_as_json_and_given_distances_change_nothing():
    x, y = digits(n=80)
    options = {"C_grid": [1.0], "gamma_grid": [0.5, 2.0], "folds": 3}
    search = grid_search(x, y, **options)
    as_json = search.to_dict()
    assert json.loads(json.dumps(as_json)) == as_json
    assert as_json["accuracy"] == search.accuracy.tolist()
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
