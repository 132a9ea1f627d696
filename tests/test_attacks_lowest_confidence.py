import math

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize
from torch import nn

from torchdnr.attacks.lowest_confidence import lowest_confidence

WIDE = (-9.0, 9.0)
NORMS = pytest.mark.parametrize("norm", [1, 2, math.inf])


class Linear(nn.Module):
    """Scores W x + b; with theta a last column of it."""

    def __init__(self, weight, bias, theta=None):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.theta, self.reject_index = theta, None if theta is None else len(weight)
        self.dropout = nn.Dropout(0.5)  # random unless the attack sets evaluation mode

    def forward(self, x):
        scores = self.dropout(x.flatten(1) @ self.weight.T + self.bias)
        if self.theta is None:
            return scores
        return torch.cat([scores, scores.new_full((len(x), 1), self.theta)], dim=1)


def best_score(model, x):
    model.eval()
    return model(x).detach()[:, : len(model.weight)].max(dim=1).values


def length(x, norm):
    return torch.linalg.vector_norm(x.double().flatten(1), norm, dim=1)


@NORMS
def test_finds_the_least_score_of_one_plane(norm):
    weight = torch.tensor([[0.5, -1.0, 2.0], [0.5, -1.0, 2.0]], dtype=torch.float64)
    model = Linear(weight, torch.tensor([0.0, -1.0], dtype=torch.float64), theta=0.3)
    inputs = torch.rand(5, 3, dtype=torch.float64)
    points = lowest_confidence(model, inputs, 0.7, norm=norm, bounds=WIDE, restarts=0, steps=60)
    dual = {1: 2.0, 2: math.sqrt(5.25), math.inf: 3.5}[norm]
    expected = best_score(model, inputs) - 0.7 * dual
    torch.testing.assert_close(best_score(model, points), expected, atol=2e-3, rtol=0)
    assert (length(points - inputs, norm) <= 0.7 * (1 + 1e-9)).all()


def least_maximum(weight, bias, center, eps, norm, bounds):
    """Solve min_x max_k w_k x + b_k in ball and box by linear programming, or SLSQP for l2."""
    c, d = weight.shape
    if norm == 2:
        start = [*center, max(weight @ center + bias)]
        constraints = [
            {"type": "ineq", "fun": lambda v: v[-1] - weight @ v[:-1] - bias},
            {"type": "ineq", "fun": lambda v: eps**2 - ((v[:-1] - center) ** 2).sum()},
        ]
        box = [bounds] * d + [(None, None)]
        found = minimize(lambda v: v[-1], start, bounds=box, constraints=constraints, tol=1e-12)
        return found.fun
    cost = [0.0] * d + [1.0] + [0.0] * d  # of x, t and |x - center|
    eye, zero = np.eye(d), np.zeros((d, 1))
    above = np.hstack([weight, -np.ones((c, 1)), np.zeros((c, d))])
    rows = [above, np.hstack([eye, zero, -eye]), np.hstack([-eye, zero, -eye])]
    limits = [-bias, center, -center]
    if norm == 1:
        rows.append(np.hstack([0 * center, [0.0], 0 * center + 1])[None])
        limits.append(np.array([eps]))
    size = (0, eps if norm == math.inf else None)
    box = [bounds] * d + [(None, None)] + [size] * d
    return linprog(cost, A_ub=np.vstack(rows), b_ub=np.hstack(limits), bounds=box).fun


@NORMS
def test_comes_close_to_the_least_maximum_of_several_planes_in_ball_and_box(norm):
    generator = torch.Generator().manual_seed(3)
    weight, bias = torch.randn(4, 6, generator=generator), torch.randn(4, generator=generator)
    model = Linear(weight.double(), bias.double())
    inputs = torch.rand(6, 6, generator=generator, dtype=torch.float64)
    eps = {1: 0.8, 2: 0.5, math.inf: 0.3}[norm]
    points = lowest_confidence(model, inputs, eps, norm=norm, restarts=0, steps=150)
    for row in range(6):
        least = least_maximum(
            weight.double().numpy(), bias.double().numpy(), inputs[row].numpy(), eps, norm, (0, 1)
        )
        reached = best_score(model, points[row : row + 1]).item()
        start = best_score(model, inputs[row : row + 1]).item()
        assert least - 1e-6 <= reached <= least + 0.03 * (start - least) + 1e-9


class Bumps(nn.Module):
    """RBF scores of two classes: flat far from the centres."""

    reject_index = 2

    def forward(self, x):
        centers = x.new_tensor([[0.2] * 4, [0.7] * 4])
        scores = torch.exp(-6 * (x.flatten(1)[:, None] - centers).square().sum(dim=2))
        return torch.cat([scores, scores.new_full((len(x), 1), 0.1)], dim=1)


def confidence(x):
    return Bumps()(x)[:, :2].max(dim=1).values


@NORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keeps_to_ball_and_box_with_an_eps_per_row(norm, dtype):
    inputs = torch.rand(6, 1, 2, 2, dtype=dtype)
    eps = torch.linspace(0, 0.8, 6, dtype=dtype)
    points = lowest_confidence(Bumps(), inputs, eps, norm=norm, steps=15, restarts=2)
    assert points.shape == inputs.shape and points.dtype == dtype
    assert points.min() >= 0 and points.max() <= 1
    assert (length(points - inputs, norm) <= eps.double() * (1 + 1e-6)).all()
    assert torch.equal(points[0], inputs[0])
    assert (confidence(points) <= confidence(inputs)).all()
    assert (confidence(points)[3:] < confidence(inputs)[3:]).all()


def test_is_reproducible_and_independent_of_the_batch():
    inputs = torch.rand(7, 4, dtype=torch.float64)
    options = {"eps": 0.3, "steps": 12, "restarts": 2}
    points = lowest_confidence(Bumps(), inputs, **options)
    assert torch.equal(points, lowest_confidence(Bumps(), inputs, **options))
    chunked = lowest_confidence(Bumps(), inputs, batch_size=2, **options)
    torch.testing.assert_close(chunked, points, atol=1e-9, rtol=0)
    alone = lowest_confidence(Bumps(), inputs[4:5], **options)
    torch.testing.assert_close(alone[0], points[4], atol=1e-9, rtol=0)
    other = lowest_confidence(Bumps(), inputs, seed=1, **options)
    assert not torch.equal(other, points)


def test_more_effort_and_a_warm_start_are_never_worse():
    inputs = torch.rand(8, 4, dtype=torch.float64)
    one = lowest_confidence(Bumps(), inputs, 0.2, steps=6, restarts=0)
    many = lowest_confidence(Bumps(), inputs, 0.2, steps=6, restarts=3)
    assert (confidence(many) <= confidence(one)).all()
    start = one
    for eps in (0.2, 0.25, 0.5):
        warm = lowest_confidence(Bumps(), inputs, eps, steps=3, restarts=0, start=start)
        assert (confidence(warm) <= confidence(start)).all()
        start = warm
    none = lowest_confidence(Bumps(), inputs, 0.2, steps=0, restarts=0)
    assert torch.equal(none, inputs)


def test_a_restart_leaves_a_flat_place():
    """At the top of a bump the gradient is zero: only a random start moves."""
    inputs = torch.full((2, 4), 0.7)
    stuck = lowest_confidence(Bumps(), inputs, 0.4, steps=10, restarts=0)
    assert torch.equal(stuck, inputs)
    moved = lowest_confidence(Bumps(), inputs, 0.4, steps=10, restarts=1)
    assert (confidence(moved) < 0.5 * confidence(inputs)).all()


def test_leaves_the_model_unchanged():
    model = Linear(torch.randn(3, 4), torch.randn(3)).train()
    lowest_confidence(model, torch.rand(2, 4), 0.1, steps=2)
    assert model.training and model.dropout.training
    assert model.weight.grad is None and model.weight.requires_grad


def test_a_step_size_is_a_length_and_half_of_eps_by_default():
    inputs = 0.3 + 0.3 * torch.rand(5, 4, dtype=torch.float64)
    default = lowest_confidence(Bumps(), inputs, 0.3, steps=7)
    assert torch.equal(lowest_confidence(Bumps(), inputs, 0.3, steps=7, step_size=0.15), default)
    eps = torch.full((5,), 0.3, dtype=torch.float64)
    one = lowest_confidence(Bumps(), inputs, eps, steps=1, step_size=0.01, restarts=0)
    torch.testing.assert_close(length(one - inputs, 2), torch.full_like(eps, 0.01))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": -1.0}, "eps must be >= 0"),
        ({"restarts": -1}, "restarts must be >= 0"),
        ({"steps": -1}, "steps must be >= 0"),
        ({"step_size": 0.0}, "step_size must be > 0"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\)"),
        ({"norm": 3}, "no norm 3"),
        ({"start": torch.zeros(2, 3)}, "start must have the shape"),
    ],
)
def test_refuses_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        lowest_confidence(Bumps(), torch.rand(2, 4), **{"eps": 0.1, "steps": 1} | options)
