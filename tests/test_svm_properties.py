"""`solve_dual` on anything: invariances, degenerate and extreme problems, starts, failing Newton.

Every solution goes through `check_solution`, which recomputes feasibility and the KKT violation in
float64; comparisons between two solutions allow what their tolerances allow.
"""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from property_examples import up_to
from svm_oracles import check_solution, gram, held, libsvm, noisy

from torchdnr.svm import ConvergenceWarning, solve_dual
from torchdnr.svm.dual import certify, dual_bounds
from torchdnr.svm.kernel_rows import KernelRows
from torchdnr.svm.newton import newton_blocks
from torchdnr.svm.projected_gradient import (
    SMALLEST,
    bounded_start,
    project,
    projected_gradient,
    uniform_start,
)
from torchdnr.svm.solver import SolverState, descend
from torchdnr.svm.working_set import FIRST_SAMPLES

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
SEEDS, CS, GAMMAS = st.integers(0, 10_000), [1e-3, 0.1, 1.0, 30.0, 1e6], [1e-8, 1e-2, 0.3, 1e4]
FINE = 1e-7
"""Tolerance at which decision values are compared to 1e-5: here the kernels are well-conditioned
enough, or decisions that unique."""


def many(n, problems, noise=0.25):
    x, first = noisy(n)
    others = [noisy(n, seed=k, noise=noise)[1] for k in range(1, problems)]
    return x, torch.cat([first, *others], dim=1)


@given(seed=SEEDS, C=st.sampled_from(CS), gamma=st.sampled_from(GAMMAS), n=st.integers(2, 90))
@up_to(60)
def test_any_problem_gets_a_true_certificate(seed, C, gamma, n):
    x, targets = noisy(n, seed=seed)
    kernel = gram(x, gamma)
    check_solution(kernel, targets, C, solve_dual(kernel, targets, C, max_steps=20_000))


@given(seed=SEEDS, C=st.sampled_from([0.1, 1.0, 30.0]), gamma=st.sampled_from([0.1, 0.5, 3.0]))
@up_to(25)
def test_order_and_signs_of_the_samples_do_not_matter(seed, C, gamma):
    x, targets = noisy(90, seed=seed)
    kernel, order = gram(x, gamma), torch.randperm(90)
    one = solve_dual(kernel, targets, C, tol=FINE)
    moved = solve_dual(kernel[order][:, order], targets[order], C, tol=FINE)
    flipped = solve_dual(kernel, -targets, C, tol=FINE)
    for other, scores in ((moved, one.scores[order]), (flipped, -one.scores)):
        torch.testing.assert_close(other.scores, scores, rtol=0, atol=1e-5)
        torch.testing.assert_close(other.objective, one.objective, rtol=1e-8, atol=0)
    objective, decisions = libsvm(kernel.numpy(), targets[:, 0].numpy(), C)
    assert one.objective.item() == pytest.approx(objective, rel=1e-6)
    assert (one.scores[:, 0] - torch.tensor(decisions)).abs().max() < 1e-4


@given(seed=SEEDS, C=st.sampled_from([0.1, 1.0, 100.0]), fold=st.integers(0, 3))
@up_to(25)
def test_a_masked_fold_is_the_fit_on_the_other_samples(seed, C, fold):
    x, targets = noisy(90, seed=seed)
    kernel, kept = gram(x, 0.3), torch.arange(90) % 4 != fold
    targets[kept.nonzero()[:2, 0]] = torch.tensor([[1.0], [-1.0]]).double()
    limits = C * kept.double().unsqueeze(1)
    masked = solve_dual(kernel, targets, limits, tol=FINE)
    check_solution(kernel, targets, limits, masked, tol=FINE)
    subset = solve_dual(kernel[kept][:, kept], targets[kept], C, tol=FINE)
    torch.testing.assert_close(masked.objective, subset.objective, rtol=1e-8, atol=0)
    torch.testing.assert_close(masked.scores[kept], subset.scores, rtol=0, atol=1e-5)
    expected = kernel[:, kept] @ subset.dual_coef + subset.intercept  # held out: predicted
    torch.testing.assert_close(masked.scores, expected, rtol=0, atol=1e-5)


@given(seed=SEEDS, zeros=st.sampled_from([0.0, 0.3]), spread=st.sampled_from([0.5, 3.0]))
@up_to(25)
def test_weighted_samples_are_those_of_libsvm(seed, zeros, spread):
    generator = torch.Generator().manual_seed(seed)
    x, targets = noisy(80, seed=seed)
    limits = 10 ** (spread * (2 * torch.rand(80, 1, generator=generator, dtype=torch.float64) - 1))
    limits[2:] *= torch.rand(78, 1, generator=generator) >= zeros
    kernel, used = gram(x, 0.3), limits[:, 0] > 0
    solution = solve_dual(kernel, targets, limits, tol=1e-6)
    check_solution(kernel, targets, limits, solution, tol=1e-6)
    assert (solution.dual_coef[~used] == 0).all()
    small = kernel[used][:, used].numpy()
    objective, _ = libsvm(small, targets[used, 0].numpy(), limits[used, 0].numpy())
    assert solution.objective.item() == pytest.approx(objective, rel=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("n", "problems"), [(60, 100), pytest.param(120, 300, marks=pytest.mark.slow)]
)
def test_one_of_many_problems_is_solved_as_if_alone(n, problems, device):
    # Batches change the order of summation only: 1e-14 was seen here.
    x, targets = many(n, problems)
    x, targets = x.to(device), targets.to(device)
    kernel = gram(x, 0.5)
    together = solve_dual(kernel, targets, 10.0)
    check_solution(kernel, targets, 10.0, together)
    for k in range(0, problems, 23):
        alone = solve_dual(kernel, targets[:, k : k + 1], 10.0)
        torch.testing.assert_close(alone.objective[0], together.objective[k], rtol=1e-9, atol=0)
        torch.testing.assert_close(
            alone.dual_coef[:, 0], together.dual_coef[:, k], rtol=0, atol=1e-8
        )
        assert alone.steps[0] == together.steps[k]


@pytest.mark.parametrize("device", DEVICES)
def test_problems_of_all_kinds_share_a_batch(device):
    x, targets = many(150, 8)
    limits = torch.tensor([1e-3, 0.1, 1.0, 30.0, 1e3, 1e6, 1.0, 1.0]).double().expand(150, 8)
    limits = limits.clone()
    limits[75:, 6] = 0.0
    targets[:, 7] = -1.0
    targets[3, 7] = 1.0
    x, targets, limits = x.to(device), targets.to(device), limits.to(device)
    check_solution(gram(x, 0.4), targets, limits, solve_dual(gram(x, 0.4), targets, limits))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_problem_gives_the_same_bits(dtype, device):
    x, targets = many(700, 5)
    kernel, targets = gram(x, 0.3).to(device, dtype), targets.to(device)
    one, other = solve_dual(kernel, targets, 3.0), solve_dual(kernel, targets, 3.0)
    check_solution(kernel, targets, 3.0, one)
    for name in ("dual_coef", "intercept", "scores", "objective", "steps"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


@given(seed=SEEDS, C=st.sampled_from([0.1, 1.0, 1e3]), gamma=st.sampled_from([1e-2, 0.3, 1e4]))
@up_to(25)
def test_float32_kernels_are_solved_as_exactly_as_float64_ones(seed, C, gamma):
    x, targets = noisy(90, seed=seed)
    kernel = gram(x, gamma).float()
    rough, exact = solve_dual(kernel, targets, C), solve_dual(kernel.double(), targets, C)
    check_solution(kernel, targets, C, rough)
    # Two points within 1e-3 of optimal, each worth at most tol * sum of C.
    assert abs(rough.objective - exact.objective) <= 1e-3 * 90 * C
    fine = solve_dual(kernel, targets, C, tol=FINE)
    check_solution(kernel, targets, C, fine, tol=FINE)


EXTREMES = {
    "one sample per class": lambda: (torch.eye(2), torch.tensor([[1.0], [-1.0]])),
    "the same sample in both classes": lambda: (torch.ones(2, 2), torch.tensor([[1.0], [-1.0]])),
    "constant features": lambda: (torch.ones(60, 60), noisy(60)[1]),
    "constant features, balanced": lambda: (torch.ones(60, 60), alternating(60)),
    "identity": lambda: (torch.eye(60), noisy(60)[1]),
    "identity, balanced": lambda: (torch.eye(60), alternating(60)),
    "zero": lambda: (torch.zeros(60, 60), noisy(60)[1]),
    "contradictions": lambda: (gram(torch.cat([noisy(40)[0]] * 2), 0.3), contradicting()),
    "four of each": lambda: (gram(torch.cat([noisy(20)[0]] * 4), 0.3), noisy(20)[1].repeat(4, 1)),
    "rank 1": lambda: (linear(1), noisy(300)[1]),
    "rank 2": lambda: (linear(2), noisy(300)[1]),
    "rank 3": lambda: (linear(3), noisy(300)[1]),
    "large values": lambda: (1e6 * gram(noisy(60)[0], 0.3), noisy(60)[1]),
    "small values": lambda: (1e-6 * gram(noisy(60)[0], 0.3), noisy(60)[1]),
    "one positive": lambda: (gram(noisy(60)[0], 0.3), 2.0 * torch.eye(60)[:, 7:8] - 1),
}


def alternating(n):
    return (torch.arange(n) % 2 * 2.0 - 1).unsqueeze(1)


def contradicting():
    targets = noisy(40)[1]
    return torch.cat([targets, -targets])


def linear(rank):
    x = noisy(300)[0][:, :rank]
    return x @ x.T


@pytest.mark.parametrize("C", [1e-3, 1.0, 100.0, 1e6])
@pytest.mark.parametrize("name", EXTREMES)
def test_degenerate_problems_are_solved(name, C):
    kernel, targets = EXTREMES[name]()
    if name.startswith("rank") and C > 100:
        C = 100.0  # more takes thousands of two-variable updates
    solution = solve_dual(kernel.double(), targets, C, max_steps=20_000)
    check_solution(kernel, targets, C, solution)
    if C <= 1.0 and name not in ("zero", "large values"):
        objective, _ = libsvm(kernel.double().numpy(), targets[:, 0].numpy(), C)
        room = 1e-3 * C * len(targets)
        assert objective - 1e-6 * abs(objective) <= solution.objective.item() + 1e-12 * C
        assert solution.objective.item() <= objective + room


@pytest.mark.parametrize("C", [1e-3, 0.7, 1e6])
def test_two_samples_have_the_known_solution(C):
    kernel = torch.tensor([[1.0, 0.25], [0.25, 1.0]]).double()
    solution = solve_dual(kernel, torch.tensor([[1.0], [-1.0]]), C)
    alpha = min(C, 2 / (1 + 1 - 2 * 0.25))  # maximises 2 a - a^2 / 2 * 1.5
    expected = torch.tensor([[alpha], [-alpha]]).double()
    torch.testing.assert_close(solution.dual_coef, expected, rtol=1e-3, atol=0)
    assert solution.intercept.item() == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_label_noise_at_a_large_C_is_solved(seed):
    x, targets = noisy(400, d=8, seed=seed, noise=0.4)
    for gamma in (0.02, 0.2):
        kernel = gram(x, gamma)
        solution = solve_dual(kernel, targets, 100.0)
        check_solution(kernel, targets, 100.0, solution)
        objective, _ = libsvm(kernel.numpy(), targets[:, 0].numpy(), 100.0, tol=1e-4)
        assert solution.objective.item() == pytest.approx(objective, rel=1e-5)


def wild(kind, targets, C, generator):
    lower, upper = dual_bounds(targets, C)
    draw = torch.rand(targets.shape, generator=generator, dtype=torch.float64)
    return {
        "huge": (draw - 0.5) * 1e6 * C,
        "within": lower + draw * (upper - lower),
        "nearly at bounds": torch.where(draw < 0.5, lower, upper) * (1 - 1e-12),
        "just outside": torch.where(draw < 0.5, lower, upper) * (1 + 1e-12),
        "all at the upper bound": upper,
        "one class only": upper * draw,
        "infinite": torch.where(draw < 0.5, -torch.inf, torch.inf),
        "tiny": draw * 1e-300,
        "float32": (lower + draw * (upper - lower)).float(),
    }[kind]


KINDS = "huge|within|nearly at bounds|just outside|all at the upper bound|one class only|infinite"


@pytest.mark.parametrize("kind", [*KINDS.split("|"), "tiny", "float32"])
@given(seed=SEEDS, C=st.sampled_from([1e-3, 1.0, 100.0]))
@up_to(6)
def test_any_start_leads_to_the_optimum(kind, seed, C):
    x, targets = noisy(90, seed=seed)
    kernel = gram(x, 0.3)
    initial = wild(kind, targets, C, torch.Generator().manual_seed(seed))
    kept = initial.clone()
    solution = solve_dual(kernel, targets, C, tol=1e-5, initial=initial)
    check_solution(kernel, targets, C, solution, tol=1e-5)
    cold = solve_dual(kernel, targets, C, tol=1e-5)
    torch.testing.assert_close(solution.objective, cold.objective, rtol=1e-5, atol=0)
    assert torch.equal(initial, kept)


@pytest.mark.parametrize("device", DEVICES)
def test_a_start_at_the_optimum_takes_a_step_at_the_most(device):
    x, targets = many(200, 6)
    kernel, targets = gram(x, 0.3).to(device), targets.to(device)
    cold = solve_dual(kernel, targets, 10.0)
    again = solve_dual(kernel, targets, 10.0, initial=cold.dual_coef)
    assert (again.steps <= 1).all() and (cold.steps > 5).all()
    torch.testing.assert_close(again.scores, cold.scores, rtol=0, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("C", [1e-3, 0.01, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_problems_that_start_by_projected_gradients_are_those_of_libsvm(dtype, C, device):
    n = SMALLEST + 52
    x, targets = noisy(n)
    kernel = gram(x, 0.3).to(device, dtype)
    lower, upper = (t.T.contiguous() for t in dual_bounds(targets.to(device), C))
    start = bounded_start(KernelRows.dense(kernel), targets.T.to(device), lower, upper, 5e-4)
    assert (start is None) == (C == 1.0)
    solution = solve_dual(kernel, targets.to(device), C)
    check_solution(kernel, targets, C, solution)
    if dtype == torch.float64:
        objective, decisions = libsvm(kernel.cpu().numpy(), targets[:, 0].numpy(), C, tol=1e-5)
        assert solution.objective.item() == pytest.approx(objective, rel=1e-5)
        assert (solution.scores[:, 0].cpu() - torch.tensor(decisions)).abs().max() < 3e-3


@pytest.mark.parametrize("C", [1e-3, 0.01, 1.0, 100.0])
def test_three_positives_of_2100_are_found(C):
    n = SMALLEST + 52
    x, _ = noisy(n)
    targets = -torch.ones(n, 1, dtype=torch.float64)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    targets[order[FIRST_SAMPLES : FIRST_SAMPLES + 3]] = 1.0  # not in the common sample
    kernel = gram(x, 0.3)
    solution = solve_dual(kernel, targets, C)
    check_solution(kernel, targets, C, solution)
    objective, _ = libsvm(kernel.numpy(), targets[:, 0].numpy(), C, tol=1e-5)
    assert solution.objective.item() == pytest.approx(objective, rel=1e-4)


def test_starts_are_given_only_where_most_support_vectors_will_be_at_their_bounds():
    x, targets = many(SMALLEST, 2)
    kernel = gram(x, 0.3)
    lower, upper = dual_bounds(targets, torch.tensor([0.01, 10.0]).double())
    rows, arguments = KernelRows.dense(kernel), (targets.T, lower.T, upper.T)
    start = bounded_start(rows, *arguments, 5e-4)
    assert start[0].any() and not start[1].any()
    assert ((start >= lower.T) & (start <= upper.T)).all() and start.sum(dim=1).abs().max() < 1e-4

    def objective(b):
        return (b * rows.product(b) / 2 - targets.T * b).sum(dim=1)

    plain = uniform_start(lower.T, upper.T)
    assert plain.sum(dim=1).abs().max() < 1e-8
    best = solve_dual(kernel, targets[:, :1], 0.01).objective[0]
    assert best <= objective(start)[0] < best + 0.02 * (objective(plain)[0] - best)
    alone = bounded_start(rows, *(t[:1] for t in arguments), 5e-4)
    torch.testing.assert_close(alone[0], start[0], rtol=0, atol=1e-10)
    assert bounded_start(held(kernel, SMALLEST - 1), *arguments, 5e-4) is None  # no room


def test_samples_reach_a_bound_that_float32_rounds_down():
    C = 0.08
    x, targets = many(1200, 3)
    initial = torch.zeros_like(targets)
    solution = solve_dual(gram(x, 0.3).float(), targets, C, initial=initial)
    size = solution.dual_coef.abs()
    near = size > C * (1.0 - 1e-6)
    assert near.sum() > 100 and (size[near] == C).all()
    assert solution.converged.all()


def test_projected_gradients_lower_the_objective_and_stay_feasible():
    x, targets = many(300, 4)
    kernel, C = gram(x, 0.3), 0.05
    lower, upper = (t.T.contiguous() for t in dual_bounds(targets, C))
    rows, begin = KernelRows.dense(kernel), uniform_start(lower, upper)
    got = projected_gradient(rows, targets.T, begin, lower, upper, 1e-6, 30)
    assert ((got >= lower) & (got <= upper)).all() and got.sum(dim=1).abs().max() < 1e-5 * C * 300

    def objective(b):
        return (b * rows.product(b) / 2 - targets.T * b).sum(dim=1)

    best = solve_dual(kernel, targets, C).objective
    assert (objective(got) - best < 0.05 * (objective(begin) - best)).all()


@given(seed=SEEDS, n=st.integers(2, 60), size=st.sampled_from([1e-3, 1.0, 1e3]))
@up_to(40)
def test_projections_are_the_nearest_feasible_points(seed, n, size):
    generator = torch.Generator().manual_seed(seed)
    y = (torch.rand(3, n, generator=generator) < 0.5).double() * 2 - 1
    y[:, :2] = torch.tensor([1.0, -1.0])
    lower, upper = y.clamp_max(0), y.clamp_min(0)
    values = size * torch.randn(3, n, generator=generator, dtype=torch.float64)
    got, shift = project(values, lower, upper, torch.zeros(3).double())
    assert got.sum(dim=1).abs().max() <= 1e-5 * n
    # The KKT conditions of a projection: one shift, then clipping.
    expected = torch.minimum(torch.maximum(values - shift.unsqueeze(1), lower), upper)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def unsolved(_kernels, points, *_):
    dual_coef, count = points.dual_coef, len(points.dual_coef)
    flags = torch.zeros(count, dtype=torch.bool, device=dual_coef.device)
    return dual_coef.clone(), flags, torch.ones(count, dtype=torch.int64, device=dual_coef.device)


def garbage(*arguments):
    point, flags, steps = unsolved(*arguments)
    return 100 * torch.randn_like(point), flags, steps


def lying(*arguments):
    point, flags, steps = garbage(*arguments)
    return point, ~flags, steps


def idle(*arguments):
    point, flags, steps = unsolved(*arguments)
    return point, ~flags, steps


def broken(*arguments):
    point, flags, steps = unsolved(*arguments)
    return point * torch.nan, flags, steps


def descended(solve, kernel, targets, C, max_steps):
    """Solve dual problems where something else stands in for Newton's method on a working set."""
    lower, upper = dual_bounds(targets, torch.full_like(targets, C, dtype=torch.float64))
    rows = KernelRows.dense(kernel)
    state = SolverState.start(rows, targets, lower, upper, None, 0.5e-3, max_steps)
    state.solve = solve
    descend(state)
    dual_coef = state.dual_coef.T.contiguous()
    return certify(rows, targets, lower, upper, dual_coef, tol=1e-3, steps=state.steps)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "newton",
    [
        unsolved,
        *(pytest.param(f, marks=pytest.mark.slow) for f in (garbage, lying, idle, broken)),
    ],
)
def test_where_newton_fails_two_variable_updates_converge(newton, device):
    x, targets = many(300, 3)
    kernel, targets = gram(x, 0.3).to(device), targets.to(device)
    expected = solve_dual(kernel, targets, 3.0)
    solution = descended(newton, kernel, targets, 3.0, max_steps=20_000)
    check_solution(kernel, targets, 3.0, solution)
    torch.testing.assert_close(solution.objective, expected.objective, rtol=1e-4, atol=0)
    assert (solution.steps > expected.steps).all()


def test_problems_on_few_samples_each_are_solved_together():
    """However few rows of the kernel there are, all of them are held."""
    x, _ = many(80, 1)
    own = torch.eye(8, dtype=torch.float64).repeat_interleave(10, dim=0)
    targets = torch.where(torch.arange(80) % 2 == 0, 1.0, -1.0)[:, None].repeat(1, 8).double()
    lower, upper = dual_bounds(targets, own)
    rows = KernelRows.dense(gram(x, 0.3).double())
    state = SolverState.start(rows, targets, lower, upper, None, 0.5e-3, 1000)
    together = []

    def solve(kernels, *others):
        together.append(len(kernels))
        return newton_blocks(kernels, *others)

    state.solve = solve
    descend(state)
    assert together[0] == 8
    alone = solve_dual(gram(x, 0.3)[:10, :10], targets[:10, :1], 1.0, tol=1e-6)
    torch.testing.assert_close(state.dual_coef[0, :10], alone.dual_coef[:, 0], rtol=0, atol=5e-3)
    assert not state.dual_coef[0, 10:].any()


def test_a_kernel_that_is_positive_only_where_coefficients_sum_to_zero_is_solved():
    x, targets = many(80, 2)
    distances = -torch.cdist(x, x).square()  # as 2 x @ x.T where they do; Cholesky breaks down
    expected = solve_dual(2 * x @ x.T, targets, 0.3)
    solution = solve_dual(distances, targets, 0.3)
    check_solution(distances, targets, 0.3, solution)
    torch.testing.assert_close(solution.objective, expected.objective, rtol=1e-4, atol=0)


def quietly(kernel, targets, C, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        solution = solve_dual(kernel, targets, C, **options)
    told = any(issubclass(w.category, ConvergenceWarning) for w in caught)
    assert told == (not solution.converged.all())
    return solution


@pytest.fixture(scope="module")
def unlimited():
    x, targets = many(200, 3)
    kernel = gram(x, 0.05)
    return kernel, targets, solve_dual(kernel, targets, 100.0)


@pytest.mark.parametrize("most", range(1, 21))
def test_the_limit_of_steps_is_honoured_and_misses_are_told(unlimited, most):
    kernel, targets, full = unlimited
    solution = quietly(kernel, targets, 100.0, max_steps=most)
    assert (solution.steps <= most).all() and (solution.steps > 0).all()
    assert (solution.steps == most)[~solution.converged].all()
    assert torch.equal(solution.converged, solution.violation <= 1e-3)
    assert (solution.dual_coef.sum(dim=0).abs() <= 1e-9 * 100).all()
    enough = full.steps <= most  # a limit that is not reached changes nothing
    torch.testing.assert_close(
        solution.objective[enough], full.objective[enough], rtol=1e-9, atol=0
    )
    fallen = quietly(kernel, targets, 100.0, max_steps=most, initial=full.dual_coef)
    assert (fallen.steps <= 1).all() and fallen.converged.all()


@pytest.mark.parametrize("most", [1, 2, 3, 7, 20, 300])
def test_the_limit_of_steps_holds_for_two_variable_updates_too(most):
    x, targets = many(200, 3)
    solution = descended(unsolved, gram(x, 0.05), targets, 100.0, max_steps=most)
    assert (solution.steps == most).all() and not solution.converged.any()


@pytest.mark.parametrize("C", [0.1, 1.0, 100.0])
@pytest.mark.parametrize("name", ["random", "tanh", "minus identity"])
def test_indefinite_kernels_end_with_a_true_answer(name, C):
    x, targets = noisy(120)
    random = torch.randn(120, 120, generator=torch.Generator().manual_seed(1)).double()
    kernel = {
        "random": random + random.T,
        "tanh": torch.tanh(x @ x.T - 1),
        "minus identity": -torch.eye(120).double(),
    }[name]
    for most in (1, 4, 20, 5000):
        solution = quietly(kernel, targets, C, max_steps=most)
        b, y = solution.dual_coef[:, 0], targets[:, 0]
        alpha, level = b * y, y - kernel @ b
        assert ((alpha >= 0) & (alpha <= C)).all() and abs(b.sum()) <= 1e-9 * C
        up = level[torch.where(y > 0, alpha < C, alpha > 0)].max()
        down = level[torch.where(y > 0, alpha > 0, alpha < C)].min()
        true = max((up - down).item(), 0.0)
        assert solution.violation.item() == pytest.approx(true, rel=1e-9, abs=1e-9)
        assert solution.steps.item() <= most
        assert solution.converged.item() == (true <= 1e-3)
