import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from property_examples import up_to
from sklearn.datasets import load_breast_cancer, load_digits
from svm_oracles import gram, libsvm, noisy

from torchdnr.kernels import scale_gamma
from torchdnr.svm import ConvergenceWarning, solve_dual
from torchdnr.svm.multiclass import one_vs_rest

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def load(name):
    x, y = {"digits": load_digits, "breast_cancer": load_breast_cancer}[name](return_X_y=True)
    x, y = x[:900], y[:900]  # more than a working set holds
    x = (x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0), 1)
    return torch.tensor(x), torch.tensor(y)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "C", "multiple"),
    [
        # Most digits are support vectors then: one C has to do in the quick run.
        pytest.param(name, C, multiple, marks=[pytest.mark.slow] * (multiple == 4.0 and C != 10.0))
        for name in ("digits", "breast_cancer")
        for C in (0.1, 1.0, 10.0, 100.0)
        for multiple in (0.25, 1.0, 4.0)
    ],
)
def test_solutions_are_those_of_libsvm(name, C, multiple, device):
    x, y = load(name)
    targets = one_vs_rest(y, int(y.max()) + 1)
    kernel = gram(x, multiple * scale_gamma(x))
    solution = solve_dual(kernel.to(device), targets.to(device), C)
    decisions = kernel.double() @ (solution.dual_coef.cpu()) + solution.intercept.cpu()
    assert solution.converged.all() and (solution.violation <= 1e-3).all()
    for column in range(targets.shape[1]):
        objective, expected = libsvm(kernel.numpy(), targets[:, column].numpy(), C)
        assert solution.objective[column].item() == pytest.approx(objective, rel=1e-6)
        assert np.abs(decisions[:, column].numpy() - expected).max() < 2e-3


@given(
    seed=st.integers(0, 10_000),
    C=st.sampled_from([0.03, 1.0, 100.0]),
    gamma=st.sampled_from([0.01, 0.3, 5.0]),
)
@up_to(25)
def test_solutions_are_feasible_and_their_certificate_is_true(seed, C, gamma):
    x, targets = noisy(seed=seed)
    kernel = gram(x, gamma)
    solution = solve_dual(kernel, targets, C)
    coef, target = solution.dual_coef[:, 0], targets[:, 0]
    alpha = coef * target
    assert abs(coef.sum()) < 1e-9 * C and (alpha >= 0).all() and (alpha <= C).all()
    gradient = kernel @ coef - target  # the certificate again, by its definition
    up = (-gradient)[((target > 0) & (alpha < C)) | ((target < 0) & (alpha > 0))].max()
    down = (-gradient)[((target < 0) & (alpha < C)) | ((target > 0) & (alpha > 0))].min()
    assert up - down <= 1e-3
    assert solution.violation.item() == pytest.approx(max((up - down).item(), 0.0), abs=1e-9)
    hinge = (1 - target * (kernel @ coef + solution.intercept)).clamp_min(0)
    primal = coef @ kernel @ coef / 2 + C * hinge.sum()
    gap, rounding = (primal + solution.objective).item(), 1e-12 * primal.item()
    assert solution.duality_gap.item() == pytest.approx(gap, abs=rounding)
    assert solution.duality_gap >= -1e-9
    best, _ = libsvm(kernel.numpy(), target.numpy(), C)
    assert solution.objective.item() <= best + 1e-5 * abs(best)


def test_float32_kernels_give_the_float64_solution():
    x, y = load("breast_cancer")
    targets, kernel = one_vs_rest(y, 2), gram(x, scale_gamma(x))
    exact = solve_dual(kernel, targets, 100.0)
    rough = solve_dual(kernel.float(), targets, 100.0)
    difference = kernel.double() @ (exact.dual_coef - rough.dual_coef)
    assert rough.converged.all()
    assert (difference + exact.intercept - rough.intercept).abs().max() < 2e-3


def test_a_problem_does_not_depend_on_its_neighbours():
    x, targets = noisy(n=300)
    kernel = gram(x, 0.5)
    others = [noisy(n=300, seed=k)[1] for k in range(1, 5)]
    together = solve_dual(kernel, torch.cat([*others, targets], dim=1), 10.0)
    alone = solve_dual(kernel, targets, 10.0)
    torch.testing.assert_close(together.dual_coef[:, -1:], alone.dual_coef, rtol=0, atol=1e-9)
    assert together.steps[-1] == alone.steps[0]


def test_more_samples_than_a_working_set_and_duplicates():
    x, targets = noisy(n=700, noise=0.1)
    x[350:], targets[350:] = x[:350], targets[:350]
    kernel = gram(x, 0.3)
    solution = solve_dual(kernel, targets, 10.0)
    objective, _ = libsvm(kernel.numpy(), targets[:, 0].numpy(), 10.0)
    assert solution.objective.item() == pytest.approx(objective, rel=1e-6)


def test_a_sample_with_C_zero_is_held_out():
    x, targets = noisy()
    kernel, kept = gram(x, 0.3), torch.arange(80) % 4 != 0
    masked = solve_dual(kernel, targets, 10.0 * kept.double().unsqueeze(1))
    subset = solve_dual(kernel[kept][:, kept], targets[kept], 10.0)
    assert (masked.dual_coef[~kept] == 0).all()
    torch.testing.assert_close(masked.objective, subset.objective, rtol=1e-6, atol=0)


def test_a_warm_start_reaches_the_same_optimum_in_fewer_steps():
    x, targets = noisy(n=900)
    kernel = gram(x, 0.5)
    cold = solve_dual(kernel, targets, 11.0)
    warm = solve_dual(kernel, targets, 11.0, initial=solve_dual(kernel, targets, 10.0).dual_coef)
    torch.testing.assert_close(warm.objective, cold.objective, rtol=1e-6, atol=0)
    assert 2 * warm.steps < cold.steps  # 14 of 42 when this was written
    again = solve_dual(kernel, targets, 11.0, initial=cold.dual_coef)
    assert again.steps <= 1
    torch.testing.assert_close(again.scores, cold.scores, rtol=0, atol=1e-3)
    wild = solve_dual(kernel, targets, 11.0, initial=torch.randn(900, 1) * 100)
    torch.testing.assert_close(wild.objective, cold.objective, rtol=1e-6, atol=0)
    assert wild.dual_coef.sum().abs() < 1e-8


def test_too_few_steps_are_reported_not_hidden():
    x, targets = noisy()
    with pytest.warns(ConvergenceWarning, match=r"1 of 1 dual problems .* 0 \(violation"):
        solution = solve_dual(gram(x, 0.3), targets, 100.0, max_steps=3)
    assert not solution.converged.any() and (solution.violation > 1e-3).all()


def test_an_unbalanced_problem_without_free_samples_has_the_middle_intercept():
    x = torch.tensor([[0.0], [10.0], [20.0]], dtype=torch.float64)
    targets = torch.tensor([[1.0], [-1.0], [-1.0]], dtype=torch.float64)
    solution = solve_dual(gram(x, 1.0), targets, 0.1)
    assert solution.intercept.item() == pytest.approx(-0.9, abs=0.2)
    objective, _ = libsvm(gram(x, 1.0).numpy(), targets[:, 0].numpy(), 0.1)
    assert solution.objective.item() == pytest.approx(objective, rel=1e-6)


@pytest.mark.parametrize(
    ("kernel", "targets", "C", "message"),
    [
        (torch.eye(3)[:2], torch.ones(2, 1), 1.0, r"square \(n, n\), got \(2, 3\)"),
        (torch.eye(3), torch.ones(2, 1), 1.0, "with n = 3 rows of kernel"),
        (torch.eye(3) * torch.nan, torch.ones(3, 1), 1.0, "must be finite"),
        (torch.eye(3), torch.zeros(3, 1), 1.0, r"must be -1 or \+1"),
        (torch.eye(3), torch.ones(3, 1), 1.0, r"columns \[0\] .* one class only"),
        (torch.eye(3), torch.tensor([[1.0], [-1], [1]]), -1.0, "C must be finite and >= 0"),
    ],
)
def test_wrong_problems_are_refused(kernel, targets, C, message):
    with pytest.raises(ValueError, match=message):
        solve_dual(kernel, targets, C)


@pytest.mark.parametrize("C", [1e6, 1e8, 1e10, 1e12])
@pytest.mark.parametrize("gamma", [0.3, 2.0])
def test_a_bound_far_beyond_all_values_is_a_hard_margin(C, gamma):
    x, targets = noisy(200, noise=0.0)
    kernel = gram(x, gamma)
    solution = solve_dual(kernel, targets, C, max_steps=20_000)
    objective, _ = libsvm(kernel.numpy(), targets[:, 0].numpy(), C)
    assert solution.objective.item() == pytest.approx(objective, rel=1e-5)


@pytest.mark.parametrize(
    "initial", [torch.full((80, 1), torch.nan), torch.zeros(80), torch.zeros(79, 1)]
)
def test_a_start_of_the_wrong_kind_is_refused(initial):
    x, targets = noisy()
    with pytest.raises(ValueError, match=r"initial must be \(80, 1\) as targets and hold no NaN"):
        solve_dual(gram(x, 0.3), targets, 1.0, initial=initial)
