"""The boundary walk finds minimum norms that are known."""

import pytest
import torch
from test_attacks import distances, problem

from torchdnr.attacks import boundary_walk, evades


def linear_problem(theta=None, dtype=torch.float64):
    weight = torch.randn(4, 20, dtype=dtype)

    def model(x):
        scores = (x - 0.5) @ weight.T
        if theta is None:
            return scores
        return torch.cat([scores, scores.new_full((len(x), 1), theta)], dim=1)

    inputs = 0.5 + 0.05 * torch.randn(10, 20, dtype=dtype)
    labels = ((inputs - 0.5) @ weight.T).argmax(dim=1)
    pool = (0.5 + 0.15 * torch.randn(300, 20, dtype=dtype)).clamp(0, 1)
    return model, weight, inputs, labels, pool


def nearest_evasion(weight, inputs, labels, theta):
    """Least norm with s_j >= s_y and s_j >= theta over all j: one or both planes are met."""
    scores, optimum = (inputs - 0.5) @ weight.T, []
    for row, true in zip(scores, labels, strict=True):
        norms = []
        for other in set(range(len(weight))) - {true.item()}:
            planes = torch.stack([weight[other] - weight[true], weight[other]])
            needed = torch.stack([row[true] - row[other], theta - row[other]])
            for active in ([0], [1], [0, 1]):
                a, b = planes[active], needed[active]
                delta = a.T @ torch.linalg.solve(a @ a.T, b)
                if (planes @ delta >= needed - 1e-9).all():
                    norms.append(delta.norm())
        optimum.append(min(norms))
    return torch.stack(optimum)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reaches_the_boundary_of_a_linear_model(dtype):
    model, weight, inputs, labels, pool = linear_problem(dtype=dtype)
    adversarial = boundary_walk(model, inputs, labels, pool, steps=100)
    scores = model(inputs)
    gaps = scores.gather(1, labels[:, None]) - scores
    planes = (weight[labels][:, None] - weight).norm(dim=2)
    optimum = (gaps / planes).scatter(1, labels[:, None], torch.inf).amin(dim=1)
    assert evades(model(adversarial), labels, False).all()
    assert (distances(adversarial, inputs) <= 1.01 * optimum).all()


def test_reaches_the_nearest_point_beyond_a_reject_band():
    model, weight, inputs, labels, pool = linear_problem(theta=1.5)
    adversarial = boundary_walk(model, inputs, labels, pool, steps=100, reject=True)
    optimum = nearest_evasion(weight, inputs, labels, 1.5)
    assert evades(model(adversarial), labels, True).all()
    assert (distances(adversarial, inputs) <= 1.02 * optimum).all()


def test_reaches_the_nearest_point_of_an_rbf_map():
    generator = torch.Generator().manual_seed(0)
    centers = 0.1 + 0.8 * torch.rand(12, 2, generator=generator, dtype=torch.float64)
    labels = torch.arange(3).repeat(4)
    coefs = 1.2 * torch.nn.functional.one_hot(labels, 3).double() - 0.4

    def model(x):
        scores = torch.exp(-60 * torch.cdist(x, centers).square()) @ coefs
        return torch.cat([scores, scores.new_full((len(x), 1), 0.35)], dim=1)

    axis = torch.linspace(0, 1, 700, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    best, classes = model(grid)[:, :3].max(dim=1)
    allowed = (classes != labels[:, None]) & (best > 0.35)
    optimum = torch.where(allowed, torch.cdist(centers, grid), torch.inf).amin(dim=1)
    pool = (centers.repeat(8, 1) + 0.04 * torch.randn(96, 2, generator=generator)).clamp(0, 1)
    adversarial = boundary_walk(model, centers, labels, pool, steps=100, reject=True)
    assert evades(model(adversarial), labels, True).all()
    assert (distances(adversarial, centers) <= 1.02 * optimum + 1e-3).all()


def test_gets_over_the_flat_region():
    model, inputs, labels, pool = problem(torch.float32, gamma=600.0)
    adversarial = boundary_walk(model, inputs, labels, pool, steps=20, eps=1.0)
    assert evades(model(adversarial), labels, True).all()


def test_more_steps_are_never_worse():
    model, inputs, labels, pool = problem()
    kept = torch.full((9,), torch.inf, dtype=torch.float64)
    for steps in (0, 1, 15, 30, 99, 100, 103):
        norms = distances(boundary_walk(model, inputs, labels, pool, steps=steps), inputs)
        assert (norms <= kept).all()
        kept = norms


@pytest.mark.parametrize("steps", [60, 70, 80])
def test_a_walk_ends_where_nothing_evades_straight_ahead_also_within_a_cycle(steps):
    model, _, inputs, labels, pool = linear_problem()
    adversarial = boundary_walk(model, inputs, labels, pool, steps=steps)
    assert evades(model(adversarial), labels, False).all()
    nearer = inputs + 0.998 * (adversarial - inputs)
    assert not evades(model(nearer), labels, False).any()


def test_evading_inputs_stay_and_farther_points_end_on_the_ball():
    model, inputs, labels, pool = problem()
    labels[0] = (labels[0] + 1) % 3
    free = boundary_walk(model, inputs, labels, pool, steps=100)
    assert torch.equal(free[0], inputs[0])
    eps = distances(free, inputs).median() * (1 + 1e-9)
    bounded = boundary_walk(model, inputs, labels, pool, steps=100, eps=eps)
    near = distances(free, inputs) <= eps
    assert torch.equal(bounded[near], free[near])
    assert not evades(model(bounded[~near]), labels[~near], True).any()
    torch.testing.assert_close(distances(bounded[~near], inputs[~near]), eps.expand(sum(~near)))


def test_inputs_without_a_start_are_counted_and_returned_as_they_are():
    model, inputs, labels, pool = problem()
    own = pool[labels == 0]
    with pytest.warns(UserWarning, match="no evading point for 3 of 9 inputs"):
        adversarial = boundary_walk(model, inputs, labels, own, steps=5)
    assert torch.equal(adversarial[labels == 0], inputs[labels == 0])


@pytest.mark.parametrize("targeted", [False, True])
def test_the_first_sample_of_the_pool_is_a_start_too(targeted):
    weight = torch.eye(3)
    inputs, labels = torch.tensor([[0.9, 0.1, 0.1]]), torch.tensor([0])
    pool = torch.tensor([[0.1, 0.8, 0.1], [0.8, 0.1, 0.1], [0.9, 0.2, 0.1]])
    targets = torch.tensor([1]) if targeted else None
    adversarial = boundary_walk(lambda x: x @ weight, inputs, labels, pool, targets=targets)
    assert (adversarial @ weight).argmax(dim=1).item() == 1


def test_restarts_work_with_a_pool_of_one_sample():
    inputs, labels = torch.tensor([[0.9, 0.1]]), torch.tensor([0])
    pool = torch.tensor([[0.1, 0.9]])
    adversarial = boundary_walk(lambda x: x, inputs, labels, pool, restarts=8, steps=5)
    assert adversarial.argmax(dim=1).item() == 1


def test_a_constant_added_to_all_scores_does_not_weaken_the_walk():
    torch.manual_seed(3)
    weight = torch.randn(6, 3)
    inputs, pool = torch.rand(5, 6), torch.rand(40, 6)
    labels = (inputs @ weight).argmax(1)
    norms = [
        (boundary_walk(lambda x, c=c: x @ weight + c, inputs, labels, pool) - inputs).norm(dim=1)
        for c in (0.0, 1e3)
    ]
    torch.testing.assert_close(norms[1], norms[0], rtol=0.01, atol=1e-3)
