"""Projections: the nearest feasible point, by comparison with a slow oracle."""

import math

import pytest
import torch
from accelerator import accelerator, on_accelerator
from hypothesis import given
from hypothesis import strategies as st
from property_examples import up_to

from torchdnr.attacks import projections
from torchdnr.attacks.projections import project, project_box

BOUNDS = (0.0, 1.0)


@pytest.fixture(params=["cpu", "accelerator"])
def project_l2(request):
    """The projection on a CPU, and on a device where a look at a value makes the host wait."""
    if request.param == "cpu":
        yield projections.project_l2
    else:
        with accelerator():
            yield on_accelerator(projections.project_l2)


def by_bisection(points, center, eps):
    """The same point by 80 bisections of mu: norms grow with mu."""
    step = points - center

    def moved(mu):
        return (mu[:, None] * step).clamp(BOUNDS[0] - center, BOUNDS[1] - center)

    low, high = torch.zeros(len(points)).double(), torch.ones(len(points)).double()
    for _ in range(80):
        middle = (low + high) / 2
        fits = moved(middle).norm(dim=1) <= eps
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    whole = moved(torch.ones_like(low)).norm(dim=1) <= eps
    return center + moved(torch.where(whole, 1, low))


@given(
    seed=st.integers(0, 10_000),
    d=st.sampled_from([1, 2, 17, 300]),
    spread=st.sampled_from([1e-3, 0.3, 30.0]),
    heavy=st.booleans(),
)
@up_to(30)
def test_project_l2_matches_bisection(seed, d, spread, heavy):
    generator = torch.Generator().manual_seed(seed)
    center = torch.rand(8, d, generator=generator).double()
    center = torch.where(torch.rand(8, d, generator=generator) < 0.3, center.round(), center)
    step = torch.randn(8, d, generator=generator).double()
    points = center + spread * (step**5 if heavy else step)
    eps = 2 * torch.rand(8, generator=generator).double() * math.sqrt(d) / 4
    projected = projections.project_l2(points, center, eps, BOUNDS)
    assert (projected >= 0).all() and (projected <= 1).all()
    assert ((projected - center).norm(dim=1) <= eps + 1e-15).all()
    torch.testing.assert_close(projected, by_bisection(points, center, eps), atol=1e-12, rtol=0)


def test_project_l2_matches_a_general_solver(project_l2):
    from scipy.optimize import minimize

    center, points = torch.rand(1, 6).double(), 3 * torch.randn(1, 6).double()
    found = minimize(
        lambda z: ((z - points[0].numpy()) ** 2).sum(),
        center[0].numpy(),
        bounds=[BOUNDS] * 6,
        constraints={"type": "ineq", "fun": lambda z: 0.49 - ((z - center[0].numpy()) ** 2).sum()},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    projected = project_l2(points, center, 0.7, BOUNDS)
    torch.testing.assert_close(projected[0], torch.tensor(found.x), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [0.1, 1.0, 3.0])
def test_budget_holds_in_float64_and_projecting_twice_changes_nothing(dtype, eps, project_l2):
    center = torch.rand(50, 3, 8, 8, dtype=dtype)
    points = center + 10 * torch.randn_like(center)
    once = project_l2(points, center, eps, BOUNDS)
    assert ((once.double() - center.double()).flatten(1).norm(dim=1) <= eps * (1 + 1e-12)).all()
    assert once.dtype == dtype and once.shape == points.shape
    assert torch.equal(project_l2(once, center, eps, BOUNDS), once)


def test_points_inside_are_unchanged(project_l2):
    center = torch.rand(20, 5)
    points = (center + 0.01 * torch.randn(20, 5)).clamp(0, 1)
    assert torch.equal(project_l2(points, center, 0.5, BOUNDS), points)
    assert torch.equal(project_l2(center, center, 0.0, BOUNDS), center)


def test_each_row_has_its_own_eps_and_zero_and_infinity_are_allowed(project_l2):
    center, points = torch.full((3, 4), 0.5), torch.full((3, 4), 5.0)
    projected = project_l2(points, center, torch.tensor([0.0, 0.5, math.inf]), BOUNDS)
    expected = torch.tensor([[0.5] * 4, [0.75] * 4, [1.0] * 4])
    torch.testing.assert_close(projected, expected, atol=1e-6, rtol=0)


def test_huge_and_tiny_steps(project_l2):
    center = torch.full((2, 4), 0.5)
    points = center + torch.tensor([[1e30], [1e-30]])
    expected = torch.tensor([[0.65], [0.5]]).expand(2, 4)
    torch.testing.assert_close(project_l2(points, center, 0.3, BOUNDS), expected)


def test_project_names_the_norms_it_knows():
    x = torch.rand(2, 3)
    assert torch.equal(project(x + 1, x, math.inf, 2, BOUNDS), project_box(x + 1, BOUNDS))
    with pytest.raises(ValueError, match="no norm 3; choose from: 1, 2, inf"):
        project(x, x, 1.0, 3, BOUNDS)


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e6])
def test_project_l2_in_float32_is_the_nearest_point_but_for_rounding(scale, project_l2):
    center = torch.rand(40, 50).round(decimals=1).clamp(0, 1)
    points = center + scale * torch.randn(40, 50) ** 3
    eps = (points.clamp(0, 1) - center).norm(dim=1) * torch.rand(40)
    projected = project_l2(points, center, eps, BOUNDS)
    exact = by_bisection(points.double(), center.double(), eps.double())
    # Where nearly all coordinates are clipped, the few free ones take up the rounding of all.
    assert ((projected - exact).abs() <= 1e-4 * eps[:, None] + 3e-7).all()


@pytest.mark.parametrize("eps", [1e-3, 1e-2, 0.1])
def test_small_budgets_hold_in_float64_too(eps, project_l2):
    center = torch.rand(1000, 784)
    projected = project_l2(center + torch.randn(1000, 784), center, eps, BOUNDS)
    norms = (projected.double() - center.double()).norm(dim=1)
    assert (norms <= eps).all() and (norms >= eps * (1 - 1e-5) - 3e-7).all()


def test_project_l2_of_a_row_does_not_depend_on_the_others(project_l2):
    center = torch.rand(30, 20)
    points = center + torch.randn(30, 20)
    eps = 2 * torch.rand(30)
    together = project_l2(points, center, eps, BOUNDS)
    for row in range(30):
        rows = slice(row, row + 1)
        assert torch.equal(
            project_l2(points[rows], center[rows], eps[rows], BOUNDS)[0], together[row]
        )


def test_both_ways_through_the_code_end_at_the_same_points():
    center = torch.rand(60, 30)
    points, eps = center + torch.randn(60, 30), 3 * torch.rand(60)
    on_cpu = projections.project_l2(points, center, eps, BOUNDS)
    with accelerator():
        elsewhere = on_accelerator(projections.project_l2)(points, center, eps, BOUNDS)
    torch.testing.assert_close(elsewhere, on_cpu)
