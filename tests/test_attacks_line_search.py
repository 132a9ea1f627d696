"""The line-search attack finds optima that are known, and keeps the best it has seen."""

import pytest
import torch
from attack_toys import RBFMap
from test_attacks import problem

from torchdnr.attacks import OBJECTIVES, evades, line_search_pgd, split_scores
from torchdnr.evaluation.judging import CountedModel


def measure(model, points, labels, objective):
    output = model(points)
    values = OBJECTIVES[objective](*split_scores(output, True), labels)
    return evades(output, labels, True), values


def not_worse(new, old):
    return ((new[0] & ~old[0]) | ((new[0] == old[0]) & (new[1] <= old[1] + 1e-12))).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reaches_the_optimum_of_a_linear_model(dtype):
    weight = torch.randn(4, 30, dtype=dtype)
    inputs = 0.5 + 0.03 * torch.randn(12, 30, dtype=dtype)
    labels, eps = (inputs @ weight.T).argmax(dim=1), 0.3  # too small to meet the box
    adversarial = line_search_pgd(
        lambda x: x @ weight.T, inputs, labels, eps, init_inputs=torch.rand(200, 30, dtype=dtype)
    )
    start = inputs @ weight.T
    margins = start.gather(1, labels[:, None]) - start
    lowered = margins - eps * (weight[labels][:, None] - weight).norm(dim=2)
    optimum = lowered.scatter(1, labels[:, None], torch.inf).amin(dim=1)
    reached = OBJECTIVES["paper"](adversarial @ weight.T, None, labels)
    before = OBJECTIVES["paper"](start, None, labels)
    assert (reached >= optimum - 1e-4).all()
    assert ((reached - optimum) <= 0.01 * (before - optimum)).all()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_never_worse_than_its_start_nor_with_more_steps(objective):
    model, inputs, labels, pool = problem()
    kept = measure(model, inputs, labels, objective)
    for steps in (0, 1, 2, 3, 5, 9, 17):
        adversarial = line_search_pgd(
            model, inputs, labels, 0.5, objective=objective, steps=steps, init_inputs=pool
        )
        new = measure(model, adversarial, labels, objective)
        assert not_worse(new, kept)
        kept = new


def test_warm_start_gives_no_evasion_back_as_eps_grows():
    model, inputs, labels, pool = problem()
    start, kept = None, measure(model, inputs, labels, "paper")
    for eps in (0.2, 0.4, 0.6, 0.8):
        start = line_search_pgd(model, inputs, labels, eps, steps=4, start=start, init_inputs=pool)
        new = measure(model, start, labels, "paper")
        assert not_worse(new, kept)
        kept = new
    assert kept[0].any()


def test_second_start_gets_over_the_flat_region():
    # exp(-600 d^2) underflows in float32: no gradient leads from one class to another
    model, inputs, labels, pool = problem(torch.float32, gamma=600.0)
    alone = line_search_pgd(model, inputs, labels, 1.0)
    double = line_search_pgd(model, inputs, labels, 1.0, init_inputs=pool)
    assert evades(model(alone), labels, True).sum() <= 3
    assert evades(model(double), labels, True).all()


def test_tiny_gradients_are_followed():
    def tiny(x):
        return 1e-30 * torch.stack([x[:, 0], x[:, 1]], dim=1)

    inputs = torch.tensor([[0.7, 0.3]])
    adversarial = line_search_pgd(tiny, inputs, torch.tensor([0]), 0.5)
    torch.testing.assert_close(adversarial, torch.tensor([[0.3464, 0.6536]]), atol=1e-3, rtol=0)


def test_stopped_samples_leave_the_batch():
    rows = []

    def model(x):
        rows.append(len(x))
        return torch.stack([x[:, 0], x[:, 1]], dim=1)

    inputs = torch.tensor([[0.7, 0.3], [0.6, 0.2]])
    line_search_pgd(model, inputs, torch.tensor([0, 0]), 0.2, steps=1000)
    assert sum(rows) < 1000


def test_bad_options_are_refused():
    inputs, labels = torch.rand(2, 3), torch.tensor([0, 1])
    attack = lambda **options: line_search_pgd(lambda x: x, inputs, labels, 1.0, **options)  # noqa: E731
    with pytest.raises(ValueError, match="step_size must be > 0 and finite, got 0"):
        attack(step_size=0)
    with pytest.raises(ValueError, match="tol must be >= 0, got nan"):
        attack(tol=float("nan"))
    with pytest.raises(ValueError, match="no objective 'x'; choose from"):
        attack(objective="x")
    with pytest.raises(ValueError, match=r"start must have the shape \(2, 3\), got \(1, 3\)"):
        attack(start=inputs[:1])


def test_no_forward_is_larger_than_the_batch_size():
    sizes = []

    def model(x):
        sizes.append(len(x))
        return torch.cat([x, 1 - x], dim=1)

    inputs = torch.full((9, 1), 0.9)
    labels = torch.zeros(9, dtype=torch.int64)
    line_search_pgd(model, inputs, labels, 0.3, init_inputs=torch.rand(20, 1), batch_size=16)
    assert max(sizes) <= 16


def test_an_early_stop_finds_the_same_evasions_for_fewer_forwards():
    toy = RBFMap(seed=3)
    inputs, labels, pool = toy.samples(n=24)
    evading, forwards = [], []
    for early_stop in (False, True):
        model = CountedModel(toy)
        points = line_search_pgd(
            model, inputs, labels, 0.1, init_inputs=pool, early_stop=early_stop, step_size=0.01
        )
        evading.append(evades(toy(points), labels, True))
        forwards.append(model.forwards)
    assert evading[0].any() and not evading[0].all()
    assert torch.equal(*evading)
    assert forwards[1] < 0.9 * forwards[0]


def test_a_later_step_tries_sizes_near_the_last_one_that_improved():
    rows = []

    def model(x):
        if not torch.is_grad_enabled():
            rows.append(len(x))
        return torch.stack([5 - x.square().sum(dim=1), x[:, 0]], dim=1)

    inputs = torch.full((1, 40), 0.9)
    line_search_pgd(model, inputs, torch.tensor([0]), 4.0, steps=6, step_size=0.05)
    first, later = max(rows), sorted(rows)[-3]
    assert first >= 8
    assert later <= first / 2


def all_sizes(model, inputs, labels, eps, sizes, steps=20):
    """Descend on the paper's objective, and try all sizes in every step."""
    here = inputs.clone()
    measured = measure(model, here, labels, "paper")
    for _ in range(steps):
        point = here.clone().requires_grad_()
        value = OBJECTIVES["paper"](*split_scores(model(point), True), labels)
        slope = -torch.autograd.grad(value.sum(), point)[0]
        blocked = (slope > 0) & (point >= 1) | (slope < 0) & (point <= 0)
        slope = torch.nn.functional.normalize(torch.where(blocked, 0, slope))
        for size in sizes:
            change = here + size * slope - inputs
            change *= (eps / change.norm(dim=1, keepdim=True)).clamp_max(1)
            trial = (inputs + change).clamp(0, 1)  # in ball and box, if not the nearest there
            new = measure(model, trial, labels, "paper")
            lower = new[1] < measured[1]
            point = torch.where(lower[:, None], trial, point.detach())
            measured = measured[0] | new[0], torch.where(lower, new[1], measured[1])
        here = point.detach()
    return measured[0]


def test_it_evades_as_often_as_a_search_of_all_sizes_in_every_step():
    toy = RBFMap(seed=3)
    inputs, labels, _ = toy.samples(n=60)
    found, expected = 0, 0
    for eps in (0.05, 0.1, 0.2, 0.4):
        expected += all_sizes(toy, inputs, labels, eps, 0.01 * 2.0 ** torch.arange(-5, 11)).sum()
        points = line_search_pgd(toy, inputs, labels, eps, step_size=0.01, early_stop=True)
        found += evades(toy(points), labels, True).sum()
    assert expected > 100
    assert found >= 0.99 * expected
