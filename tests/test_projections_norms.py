"""Projections on l1 and l-infinity balls within the box, against slow oracles."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from property_examples import up_to

from torchdnr.attacks.projections import NORMS, project, project_box, project_l1, project_linf

BOUNDS = (0.0, 1.0)


def l1_by_bisection(points, center, eps):
    """The same point by 100 bisections of lambda, on which the moves depend monotonically."""
    step = points - center
    room = torch.where(step > 0, 1 - center, center)

    def moved(shift):
        return torch.minimum((step.abs() - shift[:, None]).clamp_min(0), room)

    low, high = torch.zeros(len(points)).double(), step.abs().amax(dim=1)
    for _ in range(100):
        middle = (low + high) / 2
        fits = moved(middle).sum(dim=1) <= eps
        low, high = torch.where(fits, low, middle), torch.where(fits, middle, high)
    fits = moved(torch.zeros_like(low)).sum(dim=1) <= eps
    return center + moved(torch.where(fits, 0, high)) * step.sign()


@given(
    seed=st.integers(0, 10_000),
    d=st.sampled_from([1, 2, 17, 300]),
    spread=st.sampled_from([1e-3, 0.3, 30.0]),
    ties=st.booleans(),
)
@up_to(40)
def test_project_l1_matches_bisection(seed, d, spread, ties):
    generator = torch.Generator().manual_seed(seed)
    center = torch.rand(8, d, generator=generator).double()
    center = torch.where(torch.rand(8, d, generator=generator) < 0.3, center.round(), center)
    step = torch.randn(8, d, generator=generator).double()
    points = center + spread * (step.sign() if ties else step**3)
    eps = torch.rand(8, generator=generator).double() * d / 4
    projected = project_l1(points, center, eps, BOUNDS)
    assert projected.min() >= 0 and projected.max() <= 1
    assert ((projected - center).abs().sum(dim=1) <= eps * (1 + 1e-14) + 1e-16 * d).all()
    expected = l1_by_bisection(points, center, eps)
    torch.testing.assert_close(projected, expected, atol=1e-11, rtol=0)


def test_project_l1_without_box_is_soft_thresholding():
    """Duchi et al.: (3, 1) on the ball of radius 2 is (2, 0); (3, 2) on radius 3 is (2, 1)."""
    center = torch.zeros(2, 2).double()
    points = torch.tensor([[3.0, 1.0], [-3.0, 2.0]]).double()
    projected = project_l1(points, center, torch.tensor([2.0, 3.0]).double(), (-10.0, 10.0))
    expected = torch.tensor([[2.0, 0.0], [-2.0, 1.0]]).double()
    torch.testing.assert_close(projected, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("norm", [1, math.inf])
def test_project_matches_a_general_solver(norm):
    from scipy.optimize import LinearConstraint, minimize

    center, points = torch.rand(1, 5).double(), 2 * torch.randn(1, 5).double()
    eps = 0.7 if norm == 1 else 0.2
    # variables (z, u) with |z - center| <= u, and sum u <= eps or u <= eps
    eye = torch.eye(5).double()
    rows = torch.cat([torch.cat([eye, -eye], 1), torch.cat([-eye, -eye], 1)])
    upper = torch.cat([center[0], -center[0]])
    last = torch.cat([torch.zeros(1, 5), torch.ones(1, 5)], 1).double()
    if norm == 1:
        rows, upper = torch.cat([rows, last]), torch.cat([upper, torch.tensor([eps]).double()])
    found = minimize(
        lambda v: ((v[:5] - points[0].numpy()) ** 2).sum(),
        torch.cat([center[0], torch.zeros(5).double()]).numpy(),
        bounds=[BOUNDS] * 5 + [(0, eps)] * 5,
        constraints=LinearConstraint(rows.numpy(), ub=upper.numpy()),
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 1000},
    )
    projected = project(points, center, eps, norm, BOUNDS)
    torch.testing.assert_close(projected[0], torch.tensor(found.x[:5]), atol=1e-5, rtol=0)


def test_project_linf_is_two_clips():
    center, points = torch.rand(6, 2, 3).double(), torch.randn(6, 2, 3).double()
    eps = torch.rand(6).double() / 2
    limit = eps.view(-1, 1, 1)
    expected = torch.minimum(torch.maximum(points, center - limit), center + limit).clamp(0, 1)
    torch.testing.assert_close(project_linf(points, center, eps, BOUNDS), expected)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [0.03, 1.0, 40.0])
def test_budget_holds_in_float64_and_projecting_twice_changes_nothing(norm, dtype, eps):
    center = torch.rand(50, 3, 8, 8, dtype=dtype)
    points = center + 10 * torch.randn_like(center)
    once = project(points, center, eps, norm, BOUNDS)
    change = (once.double() - center.double()).flatten(1)
    assert (torch.linalg.vector_norm(change, norm, dim=1) <= eps * (1 + 1e-7)).all()
    assert once.dtype == dtype and once.shape == points.shape
    assert once.min() >= 0 and once.max() <= 1
    assert torch.equal(project(once, center, eps, norm, BOUNDS), once)


@pytest.mark.parametrize("norm", NORMS)
def test_zero_and_infinite_radii_and_points_inside(norm):
    center = torch.rand(4, 5)
    points = (center + 0.01 * torch.randn(4, 5)).clamp(0, 1)
    far = center + 5 * torch.randn(4, 5)
    assert torch.equal(project(points, center, 0.5, norm, BOUNDS), points)
    assert torch.equal(project(far, center, 0.0, norm, BOUNDS), center)
    assert torch.equal(project(far, center, math.inf, norm, BOUNDS), project_box(far, BOUNDS))
    mixed = project(far, center, torch.tensor([0.0, 0.1, 0.1, math.inf]), norm, BOUNDS)
    assert torch.equal(mixed[0], center[0])
    assert torch.equal(mixed[3], project_box(far, BOUNDS)[3])


@pytest.mark.parametrize("norm", NORMS)
def test_huge_and_tiny_steps_stay_finite(norm):
    center = torch.full((2, 4), 0.5)
    points = center + torch.tensor([[1e30], [1e-30]])
    assert torch.isfinite(project(points, center, 0.3, norm, BOUNDS)).all()
