"""`newton_blocks` against two-variable updates, and the parts that both solvers stand on."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from property_examples import up_to
from svm_oracles import gram

from torchdnr.svm.dual import Points, to_double
from torchdnr.svm.free_systems import multiply
from torchdnr.svm.newton import newton_blocks
from torchdnr.svm.working_set import (
    common_sample,
    first_sets,
    largest_violators,
    make_feasible,
    select_working_sets,
    solve_blocks,
)

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def blocks(count=6, size=30, seed=0, C=2.0, gamma=0.4, at_bounds=False):
    """Return random blocks in the middle of a descent: kernels, F, b, bounds."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, size, 4, generator=generator, dtype=torch.float64)
    kernels = torch.stack([gram(one, gamma) for one in x])
    y = (torch.rand(count, size, generator=generator) < 0.5).double() * 2 - 1
    y[:, :2] = torch.tensor([1.0, -1.0])
    lower, upper = (y * C).clamp_max(0), (y * C).clamp_min(0)
    share = torch.rand(count, size, generator=generator, dtype=torch.float64)
    b = lower + (share.round() if at_bounds else share) * (upper - lower)
    outside = torch.randn(count, size, generator=generator, dtype=torch.float64)  # other samples
    gradient = torch.bmm(kernels, b.unsqueeze(2)).squeeze(2) - y + 0.3 * outside
    return kernels, gradient, b, lower, upper


def newton(kernels, gradient, b, lower, upper, damping=1e-2, tol=1e-6, most=30):
    like = torch.ones_like(gradient[:, 0])
    steps = torch.full((len(b),), most, device=b.device)
    return newton_blocks(
        kernels,
        Points(gradient, b, lower, upper),
        0 * like,
        damping * like,
        tol * like,
        steps,
    )


def updates(kernels, gradient, b, lower, upper, tol=1e-10):
    tols = torch.full_like(gradient[:, 0], tol)
    most = torch.full((len(b),), 200_000, device=b.device)
    return solve_blocks(kernels, Points(gradient, b, lower, upper), tols, most)


def damped(kernels, damping):
    return kernels + damping * torch.eye(kernels.shape[1], dtype=kernels.dtype)


@given(
    seed=st.integers(0, 10_000),
    C=st.sampled_from([0.1, 2.0, 100.0]),
    gamma=st.sampled_from([0.1, 0.4, 50.0]),
    at_bounds=st.booleans(),
)
@up_to(25)
def test_solved_blocks_are_those_of_two_variable_updates(seed, C, gamma, at_bounds):
    block = blocks(4, 20, seed, C, gamma, at_bounds)
    damping = 1e-2
    point, solved, steps = newton(*block, damping=damping)
    kernels, gradient, b, lower, upper = block
    expected, _ = updates(damped(kernels, damping), gradient, b, lower, upper)
    # Strongly convex: a violation of 1e-6 moves a point by that over the damping at the most.
    room = 1e-6 / damping * 20**0.5 + 1e-9 * C
    assert ((point - expected).abs().amax(dim=1) <= room)[solved].all()
    assert (point.sum(dim=1) - b.sum(dim=1)).abs().max() <= 1e-9 * C
    assert (1 <= steps).all() and (steps <= 30).all()


def test_nearly_all_blocks_are_solved_in_few_steps():
    for C in (0.1, 2.0, 100.0):
        _, solved, steps = newton(*blocks(40, 60, seed=3, C=C))
        assert solved.double().mean() >= 0.9
        assert steps[solved].double().mean() <= 10


def test_blocks_in_float32_are_solved_to_its_precision():
    block = blocks(10, 40, seed=1)
    exact, both, _ = newton(*block, damping=1e-2)
    rough, solved, _ = newton(*(t.float() for t in block), damping=1e-2, tol=1e-3)
    assert rough.dtype == torch.float32 and (both & solved).sum() >= 8
    difference = (rough.double() - exact).abs().amax(dim=1)[both & solved]
    assert difference.max() <= 1e-3 / 1e-2 * 40**0.5


def test_float32_factors_give_float64_answers_whatever_the_damping():
    kernels, *points = blocks(10, 100, seed=1, C=2.0)
    for damping in (1e-1, 1e-3, 1e-6):
        exact, both, _ = newton(kernels, *points, damping=damping, tol=1e-3)
        rough, solved, _ = newton(kernels.float(), *points, damping=damping, tol=1e-3)
        assert rough.dtype == torch.float64 and (both & solved).sum() >= 8
        change, other = (t - points[1] for t in (exact, rough))
        assert (rough.sum(dim=1) - points[1].sum(dim=1)).abs().max() <= 1e-12
        # They differ where hardly anything depends on it: the objectives are the same.
        fall, least = (
            (points[0] * c).sum(1) + (c * multiply(damped(kernels, damping), c)).sum(1) / 2
            for c in (other, change)
        )
        worth = (fall - least)[both & solved] / least.abs()[both & solved]
        assert worth.abs().max() <= 1e-9


@pytest.mark.parametrize("device", DEVICES)
def test_a_block_does_not_depend_on_its_neighbours(device):
    block = [t.to(device) for t in blocks(8, 30, seed=2)]
    point, solved, steps = newton(*block)
    for k in range(8):
        alone = newton(*(t[k : k + 1] for t in block))
        torch.testing.assert_close(alone[0][0], point[k], atol=1e-11, rtol=0)
        assert alone[1][0] == solved[k] and alone[2][0] == steps[k]


@pytest.mark.parametrize("device", DEVICES)
def test_padded_entries_change_nothing(device):
    kernels, *rest = (t.to(device) for t in blocks(5, 25, seed=4))
    garbage = torch.rand(5, 32, 32, dtype=torch.float64, device=device)
    garbage[:, :25, :25] = kernels
    padded = [torch.nn.functional.pad(t, (0, 7)) for t in rest]
    expected, got = newton(kernels, *rest), newton(garbage, *padded)
    torch.testing.assert_close(got[0][:, :25], expected[0], atol=1e-11, rtol=0)
    assert (got[0][:, 25:] == 0).all()
    assert torch.equal(got[1], expected[1]) and torch.equal(got[2], expected[2])


@pytest.mark.parametrize("most", [1, 2, 4])
def test_newton_steps_are_limited_block_by_block(most):
    *_, steps = newton(*blocks(20, 60, seed=5, C=100.0), most=most)
    assert steps.max() == most
    kernels, *points = blocks(2, 60, seed=5, C=100.0)
    like = torch.ones(2, dtype=torch.float64)
    limits = torch.tensor([1, 3])
    *_, steps = newton_blocks(kernels, Points(*points), 0 * like, 1e-2 * like, 1e-6 * like, limits)
    assert (steps <= limits).all() and steps[1] > 1


@pytest.mark.parametrize("device", DEVICES)
def test_products_from_the_left_are_those_from_the_right(device):
    kernels, gradient, *_ = (t.to(device) for t in blocks(3, 20, seed=7))
    expected = torch.bmm(kernels, gradient.unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(multiply(kernels, gradient), expected)


@pytest.mark.parametrize("C", [0.08, 0.1, 0.7, 1.0, 3.3])  # float32 rounds some down, others up
def test_values_at_a_rounded_bound_come_back_on_the_bound(C):
    lower = torch.tensor([[-C, 0.0, -C, 0.0]], dtype=torch.float64)
    upper = lower + C
    values = torch.tensor([[-C, C, 0.0, C / 3]], dtype=torch.float64)
    got = to_double(values.float(), lower, upper)
    assert torch.equal(got[:, :3], values[:, :3]) and got[0, 3] == values[0, 3].float()


def test_a_singular_kernel_is_solved_thanks_to_the_damping():
    _, gradient, b, lower, upper = blocks(4, 30, seed=6)
    point, solved, _ = newton(torch.ones(4, 30, 30, dtype=torch.float64), gradient, b, lower, upper)
    assert solved.any() and torch.isfinite(point).all()


def test_two_variable_updates_reach_their_tolerance_and_keep_the_sum():
    kernels, gradient, b, lower, upper = blocks(6, 30, seed=7, C=10.0)
    point, steps = updates(kernels, gradient, b, lower, upper, tol=1e-9)
    slope = gradient + torch.bmm(kernels, (point - b).unsqueeze(2)).squeeze(2)
    up = (-slope).masked_fill(point >= upper, -torch.inf).amax(dim=1)
    down = (-slope).masked_fill(point <= lower, torch.inf).amin(dim=1)
    assert (up - down <= 1.1e-9).all() and ((point >= lower) & (point <= upper)).all()
    assert (point.sum(dim=1) - b.sum(dim=1)).abs().max() < 1e-12 and (steps > 0).all()


@given(
    seed=st.integers(0, 10_000),
    size=st.integers(2, 40),
    spread=st.sampled_from([0.0, 6.0]),
    wildness=st.sampled_from([0.0, 1e-12, 1.0, 1e6]),
)
@up_to(60)
def test_settled_values_are_feasible_and_stay_on_their_bounds(seed, size, spread, wildness):
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return torch.rand(3, size, generator=generator, dtype=torch.float64)

    y = (draw() < 0.5).double() * 2 - 1
    limit = 10 ** (spread * (draw() - 0.5))
    lower, upper = (y * limit).clamp_max(0), (y * limit).clamp_min(0)
    feasible = lower + (1.5 * draw() - 0.25).clamp(0, 1) * (upper - lower)
    total = feasible.sum(dim=1)
    values = feasible + wildness * limit * (draw() - 0.5)
    settled = make_feasible(values, draw() - 0.5, lower, upper, total)
    assert ((settled >= lower) & (settled <= upper)).all()
    # What the sum of the bounds rounds to, and twice a slack of 1e-9 that cannot be undone.
    assert (settled.sum(dim=1) - total).abs().max() <= 1e-12 * limit.sum(dim=1).max()
    if wildness == 0.0:
        torch.testing.assert_close(settled, feasible, atol=3e-9 * limit.max().item(), rtol=0)
        held = (feasible == lower) | (feasible == upper)
        assert torch.equal(settled[held], feasible[held])


def test_a_missing_sum_is_taken_from_the_samples_that_win_most():
    lower, upper = torch.zeros(1, 4).double(), torch.ones(1, 4).double()
    cost = torch.tensor([[3.0, -2.0, 1.0, -1.0]]).double()
    settled = make_feasible(
        torch.zeros(1, 4).double(), cost, lower, upper, torch.tensor([1.5]).double()
    )
    assert settled.tolist() == [[0.0, 1.0, 0.0, 0.5]]
    settled = make_feasible(upper, cost, lower, upper, torch.tensor([2.5]).double())
    assert settled.tolist() == [[0.0, 1.0, 0.5, 1.0]]


@given(seed=st.integers(0, 10_000), largest=st.sampled_from([3, 7, 40, 128, 500]))
@up_to(30)
def test_working_sets_hold_the_worst_pair_within_their_limit(seed, largest):
    _, gradient, b, lower, upper = blocks(5, 200, seed, at_bounds=seed % 2 == 0)
    free = torch.rand(5, 200, generator=torch.Generator().manual_seed(seed)) < 0.1
    b = torch.where(free, (lower + upper) / 2, b)
    free = (b > lower) & (b < upper)
    up = (-gradient).masked_fill(b >= upper, -torch.inf).max(dim=1)
    down = (-gradient).masked_fill(b <= lower, torch.inf).min(dim=1)
    middle, points = (up.values + down.values) / 2, Points(gradient, b, lower, upper)
    index, valid = largest_violators(points, middle, largest)
    for k in range(5):
        chosen = index[k][valid[k]].tolist()
        assert len(set(chosen)) == len(chosen) <= largest
        pair = [i.item() for i in (up.indices[k], down.indices[k])]
        # Of free samples there may be too many for the set: one is there then, the other maybe.
        assert {i for i in pair if not free[k, i] or largest >= 200} <= set(chosen)
        assert set(pair) & set(chosen)
    pairs = select_working_sets(points, 20)
    for k in range(5):
        assert len(set(pairs[k].tolist())) == 20
        assert {up.indices[k].item(), down.indices[k].item()} <= set(pairs[k].tolist())


def test_first_sets_are_shared_by_fresh_problems_that_find_both_classes_there():
    y = torch.ones(3, 600).double()
    y[:2, ::2] = -1
    lower, upper = y.clamp_max(0), y.clamp_min(0)
    index = torch.tensor([[1, 2], [3, 4], [5, 6]])
    valid = torch.tensor([[True, True], [True, False], [True, True]])
    fresh = torch.tensor([True, False, True])
    outside = ~torch.isin(torch.arange(600), common_sample(600, y.device)[:100])
    lower[2, outside.nonzero()[0]] = -1.0
    chosen, flags = first_sets(lower, upper, index, valid, fresh, 100)
    assert flags[0].sum() == 100 and len(set(chosen[0].tolist())) == 100
    assert chosen[1][flags[1]].tolist() == [3]
    assert chosen[2][flags[2]].tolist() == [5, 6]  # one class only in the common sample


def test_free_samples_fill_what_no_violator_takes():
    generator = torch.Generator().manual_seed(0)
    gradient = 0.1 * torch.randn(2, 100, generator=generator, dtype=torch.float64)
    lower, upper = -torch.ones_like(gradient), torch.ones_like(gradient)
    b = 0.5 * torch.ones_like(gradient)  # all are free
    b[1, :10] = 1.0  # ten want to leave their bound, as they have the largest gradients
    gradient[1, :10] = torch.arange(10.0, 20.0, dtype=torch.float64)
    points, none = Points(gradient, b, lower, upper), torch.zeros(2, dtype=torch.float64)
    index, valid = largest_violators(points, none, 40)
    assert valid.sum(dim=1).tolist() == [40, 40]
    worst = gradient.abs().topk(40, dim=1).indices
    for chosen, belongs, expected in zip(index, valid, worst, strict=True):
        assert set(chosen[belongs].tolist()) == set(expected.tolist())
