"""Fits of which a large share of samples is free: rounds of active sets, and who takes over."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from property_examples import up_to
from svm_oracles import check_solution, gram, held, libsvm, noisy

from torchdnr.kernels import scale_gamma
from torchdnr.svm import RBFSVM, solve_dual, solver
from torchdnr.svm.active_set import solve_by_active_sets
from torchdnr.svm.dual import ACTIVE_SET, DESCENT, HANDED_OVER, Points, dual_bounds
from torchdnr.svm.folds import stratified_folds
from torchdnr.svm.free_share import MANY_FREE, many_are_free
from torchdnr.svm.kernel_rows import KernelRows
from torchdnr.svm.model_selection import FoldedFits
from torchdnr.svm.nystroem import LowRank

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture
def always(monkeypatch):
    """Try active sets first, whatever the problem."""
    monkeypatch.setattr(solver, "many_are_free", lambda *_: True)


def zoo(seed, largest=3000):
    """Make a random problem of three columns: kernel, targets, C per sample."""
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return torch.rand((), generator=generator).item()

    n, d = int(50 * (largest / 50) ** draw()), int(1 + 20 * draw())
    C, multiple, noise = 10 ** (7 * draw() - 3), 2.0 ** (12 * draw() - 6), 0.5 * draw()
    x = torch.randn(n, d, generator=generator)
    if draw() < 0.3:  # all samples twice, with other labels
        x[n // 2 :] = x[: n - n // 2].clone()
    if draw() < 0.2:
        x = x.round()
    y = torch.stack(
        [x[:, 0] + x[:, -1].square() > 0.7, x.square().sum(dim=1) > d, x[:, 0] > 1.2], dim=1
    )
    y ^= torch.rand(y.shape, generator=generator) < noise
    targets = y.double() * 2 - 1
    targets[0], targets[1] = 1.0, -1.0
    weight, kind = torch.ones(n, dtype=torch.float64), draw()
    if kind < 0.3:
        weight = torch.rand(n, generator=generator).double()
        weight[torch.rand(n, generator=generator) < 0.2] = 0.0
        weight[torch.rand(n, generator=generator) < 0.05] = 1e3
    elif kind < 0.6:
        weight[torch.arange(n) % 5 == 4] = 0.0
    weight[:2] = 1.0
    kernel = gram(x if draw() < 0.7 else x.double(), multiple * scale_gamma(x))
    return (kernel + kernel.T) / 2, targets, (C * weight).unsqueeze(1).expand_as(targets)


def assert_optimal(kernel, targets, limits, *solutions):
    """Compare with LIBSVM at the same tolerance, besides the certificates computed afresh."""
    for solution in solutions:
        check_solution(kernel, targets, limits, solution)
    for column in range(targets.shape[1]):
        kept = limits[:, column] > 0
        part = kernel.double()[kept][:, kept].contiguous().numpy()
        y, C = targets[kept, column].numpy(), limits[kept, column].numpy()
        expected, _ = libsvm(part, y, C, tol=1e-3)
        for solution in solutions:
            # Descent may stop further up where C is large and the kernel all but singular.
            excess = 1e-6 if solution.method[column] == ACTIVE_SET else 1e-5
            assert solution.objective[column].item() <= expected + excess * abs(expected)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("seed", range(14))
def test_a_zoo_of_problems_is_solved_by_active_sets_or_who_takes_over(always, seed):
    kernel, targets, limits = zoo(seed, largest=400)
    solution = solve_dual(kernel, targets, limits)
    assert set(solution.method) <= {ACTIVE_SET, HANDED_OVER}
    assert_optimal(kernel, targets, limits, solution)


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("seed", range(100, 300))  # half of them of fewer than 400 samples
def test_a_larger_zoo_is_solved_by_the_rule_and_by_active_sets_first(monkeypatch, seed):
    kernel, targets, limits = zoo(seed)
    by_the_rule = solve_dual(kernel, targets, limits)
    monkeypatch.setattr(solver, "many_are_free", lambda *_: True)
    assert_optimal(kernel, targets, limits, by_the_rule, solve_dual(kernel, targets, limits))


def mostly_free(n=1200, classes=3, d=8, multiple=4.0, noise=0.3):
    """Make overlapping clusters of which nearly all samples are free at C = 10."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(n) % classes
    x = torch.randn(classes, d, generator=generator)[labels] + torch.randn(
        n, d, generator=generator
    )
    wrong = torch.rand(n, generator=generator) < noise
    labels = torch.where(wrong, (labels + 1) % classes, labels)
    targets = torch.where(labels.unsqueeze(1) == torch.arange(classes), 1.0, -1.0).double()
    return x, labels, targets, gram(x, multiple * scale_gamma(x))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("C", [1.0, 10.0, 1e4])
def test_the_rule_chooses_active_sets_where_many_are_free_and_they_succeed(C, device):
    _, _, targets, kernel = mostly_free()
    solution = solve_dual(kernel.to(device), targets.to(device), C)
    assert solution.method == (ACTIVE_SET,) * 3
    coef = solution.dual_coef.abs()
    assert ((coef > 0) & (coef < C)).double().mean() > MANY_FREE
    symmetric = ((kernel + kernel.T) / 2).to(device)
    again = solve_dual(symmetric, targets.to(device), C)
    assert_optimal(symmetric.cpu(), targets, torch.full_like(targets, C), again)


def test_the_rule_leaves_other_problems_to_descent():
    x, _, targets, kernel = mostly_free()
    few = gram(x, 0.1 * scale_gamma(x))
    assert set(solve_dual(few, targets, 1.0).method) == {DESCENT}
    small = slice(0, 900)
    assert set(solve_dual(kernel[small, small], targets[small], 10.0).method) == {DESCENT}
    kernel = kernel.double()
    rows_give_way = solve_dual(held(kernel, 1199), targets, 10.0)
    assert set(rows_give_way.method) == {DESCENT}
    all_held = solve_dual(held(kernel, 1200), targets, 10.0)
    assert set(all_held.method) == {ACTIVE_SET} and all_held.kernel_rows == 1200
    torch.testing.assert_close(all_held.objective, rows_give_way.objective, rtol=1e-6, atol=0)


def test_the_rule_looks_at_a_start_and_at_the_memory_first():
    _, _, targets, kernel = mostly_free()
    rows, y = KernelRows.dense(kernel), targets.T.contiguous()
    lower, upper = (t.T.contiguous() for t in dual_bounds(targets, 10.0))
    zero = torch.zeros_like(y)
    assert many_are_free(rows, y, Points(-y, zero, lower, upper))
    few = zero.clone()
    few[:, :20] = y[:, :20]
    assert not many_are_free(rows, y, Points(-y, few, lower, upper))
    rows.largest_set = 100  # as where memory is short
    assert not many_are_free(rows, y, Points(-y, zero, lower, upper))


def test_a_machine_says_how_it_was_fitted():
    x, labels, targets, kernel = mostly_free(1000)
    svm = RBFSVM(10.0, 4 * scale_gamma(x)).fit(x, labels)
    assert svm.solution.method == (ACTIVE_SET,) * 3
    expected = solve_dual(held(kernel, 999), targets, 10.0)
    assert set(expected.method) == {DESCENT}
    torch.testing.assert_close(svm(x).double(), expected.scores, rtol=0, atol=2e-3)


def test_folds_start_from_all_samples_and_hold_out_what_they_should():
    x, labels, _, kernel = mostly_free()
    fold = stratified_folds(labels, 3, 0)
    fits = FoldedFits(KernelRows.dense(kernel.double()), labels, 3, fold, 1e-3)
    for C in (1.0, 10.0):
        scores = fits.advance(C)
    whole, parts, _ = fits._last
    assert set(whole.method + parts.method) == {ACTIVE_SET}
    assert (parts.dual_coef.view(len(x), 3, 3)[torch.arange(len(x)), fold] == 0).all()
    rest = fold != 0
    apart = solve_dual(kernel.double()[rest][:, rest], fits._targets[rest], 10.0, tol=1e-6)
    expected = kernel.double()[~rest][:, rest] @ apart.dual_coef + apart.intercept
    torch.testing.assert_close(scores[~rest], expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_a_problem_does_not_depend_on_its_neighbours(device):
    _, _, targets, kernel = mostly_free()
    hard = noisy(1200, seed=3)[1]
    kernel, targets, hard = (t.to(device) for t in (kernel.double(), targets, hard))
    together = solve_dual(kernel, torch.cat([hard, targets], dim=1), 10.0)
    alone = solve_dual(kernel, targets[:, 2:], 10.0)
    assert together.method[-1] == alone.method[0] == ACTIVE_SET
    torch.testing.assert_close(together.dual_coef[:, -1:], alone.dual_coef, rtol=0, atol=1e-6)
    assert together.steps[-1] == alone.steps[0]


def contradictions(n=600):
    """Put samples in pairs of one place and two labels: systems of free samples are singular."""
    x, targets = noisy(n // 2, noise=0.0)
    x, targets = torch.cat([x, x]), torch.cat([targets, -targets])
    return gram(x, 0.3), targets


@pytest.mark.filterwarnings("error")
def test_descent_takes_over_where_active_sets_are_known_to_fail(always):
    kernel, targets = contradictions()
    other = noisy(600, seed=2)[1]
    both = torch.cat([targets, other], dim=1)
    solution = solve_dual(kernel, both, 1e3)
    assert solution.method[0] == HANDED_OVER
    limits = torch.full_like(both, 1e3)
    assert_optimal(kernel, both, limits, solution)


def stands(kernel, targets, C, goal=5e-4, most=1000, start=None):
    lower, upper = (t.T.contiguous() for t in dual_bounds(targets, C))
    y = targets.T.contiguous()
    b = torch.zeros_like(y) if start is None else start
    points = Points(b @ kernel.double() - y, b, lower, upper)
    allowed = torch.full((len(y),), most)
    return points, *solve_by_active_sets(KernelRows.dense(kernel), y, points, goal, allowed)


@given(seed=st.integers(0, 10_000), C=st.sampled_from([0.03, 1.0, 1e4]))
@up_to(20)
def test_what_is_returned_is_feasible_no_worse_and_as_good_as_it_says(seed, C):
    kernel, targets, _ = zoo(seed, largest=200)
    before, after, solved, steps = stands(kernel.double(), targets, C)
    b = after.dual_coef
    assert ((b >= before.lower) & (b <= before.upper)).all()
    assert (b.sum(dim=1).abs() <= 1e-9 * C).all() and (steps >= 1).all()
    torch.testing.assert_close(after.gradient, b @ kernel.double() - targets.T)
    objective = (b * (after.gradient - targets.T)).sum(dim=1) / 2
    assert (objective <= 1e-12 * C).all()  # 0 at the start
    up = (-after.gradient).masked_fill(b >= before.upper, -torch.inf).amax(dim=1)
    down = (-after.gradient).masked_fill(b <= before.lower, torch.inf).amin(dim=1)
    assert torch.equal(up - down <= 5e-4, solved)


def test_rounds_are_limited_by_the_steps_of_a_problem():
    _, _, targets, kernel = mostly_free(300)
    *_, solved, steps = stands(kernel, targets, 10.0, most=2)
    assert (steps <= 2).all() and not solved.any()
    points, after, solved, steps = stands(kernel, targets, 10.0)
    assert solved.all() and (steps > 2).all()
    *_, solved, steps = stands(kernel, targets, 10.0, start=after.dual_coef)
    assert solved.all() and (steps == 0).all()
    assert (points.dual_coef == 0).all()  # what is given is left as it is


def test_all_samples_at_their_bounds_are_left_to_descent(always):
    x, targets = noisy(200)
    targets = torch.where(torch.arange(200) % 2 == 0, 1.0, -1.0).double().unsqueeze(1)
    kernel = gram(x, 0.01)
    solution = solve_dual(kernel, targets, 1e-5)
    assert_optimal(kernel, targets, torch.full_like(targets, 1e-5), solution)


def test_the_approximate_inverse_is_exact_for_low_rank_and_a_diagonal():
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(80, 5, generator=generator, dtype=torch.float64)
    low_rank = LowRank(factor, torch.tensor(0.3).double(), torch.tensor(1.0).double())
    free = torch.rand(4, 80, generator=generator) < 0.4
    vectors = torch.randn(4, 80, generator=generator, dtype=torch.float64) * free
    found = low_rank.inverse_between(free).times(vectors)
    kernel = factor @ factor.T + 0.3 * torch.eye(80, dtype=torch.float64)
    for k in range(4):
        f = free[k]
        expected = torch.linalg.solve(kernel[f][:, f], vectors[k, f])
        torch.testing.assert_close(found[k, f], expected)
        assert (found[k, ~f] == 0).all()


@pytest.mark.parametrize("n", [20, 700])
def test_a_low_rank_part_leaves_what_it_says_on_the_diagonal(n):
    x, _ = noisy(n)
    kernel = gram(x, 0.3)
    low_rank = LowRank.of(KernelRows.dense(kernel))
    rest = kernel.diagonal() - low_rank.basis.square().sum(dim=1)
    assert rest.mean().item() == pytest.approx(low_rank.rest.item(), abs=1e-3)
    error = np.linalg.eigvalsh((kernel - low_rank.basis @ low_rank.basis.T).numpy())
    assert error[-1] < 0.1 * np.linalg.eigvalsh(kernel.numpy())[-1] and error[0] > -1e-6
