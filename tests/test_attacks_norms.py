"""What PGD, APGD, FMN, DDN and the older attacks promise in every norm, targeted or not."""

import math

import pytest
import torch
from attack_toys import NORMS, RBFMap
from test_attacks import problem

from torchdnr.attacks import (
    apgd,
    boundary_walk,
    ddn,
    evades,
    fmn,
    line_search_pgd,
    pgd,
    primal_dual,
)
from torchdnr.attacks.directions import steepest
from torchdnr.attacks.projections import Region, random_points
from torchdnr.decisions import succeeds

RADIUS = {1: 0.9, 2: 0.6, math.inf: 0.4}


def minimum(attack):
    return lambda model, x, y, pool, norm, eps, **options: attack(
        model, x, y, pool, eps=eps, **({"norm": norm} if attack is not ddn else {}), **options
    )


def fixed(attack):
    return lambda model, x, y, pool, norm, eps, **options: attack(
        model, x, y, eps, norm=norm, init_inputs=pool, **options
    )


ATTACKS = {
    "pgd": fixed(pgd),
    "apgd": fixed(apgd),
    "line_search_pgd": fixed(line_search_pgd),
    "fmn": minimum(fmn),
    "primal-dual": minimum(primal_dual),
    "ddn": minimum(ddn),
    "boundary_walk": minimum(boundary_walk),
}
CASES = [(name, norm) for name in ATTACKS for norm in NORMS if name != "ddn" or norm == 2]
each = pytest.mark.parametrize(("name", "norm"), CASES)
one_norm = pytest.mark.parametrize("name", ATTACKS)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stays_in_ball_and_box_with_an_eps_per_row(name, norm, dtype):
    model, inputs, labels, pool = problem(dtype)
    eps = torch.linspace(0, 1.5 * RADIUS[norm], 9, dtype=dtype)
    found = ATTACKS[name](model, inputs, labels, pool, norm, eps, steps=8)
    assert found.dtype == dtype and found.shape == inputs.shape
    assert found.min() >= 0 and found.max() <= 1
    change = (found.double() - inputs.double()).flatten(1)
    assert (torch.linalg.vector_norm(change, norm, dim=1) <= eps.double() * (1 + 1e-6)).all()
    assert torch.equal(found[0], inputs[0])
    assert evades(model(found), labels, True).any()


@each
def test_a_batch_of_several_eps_gives_what_each_gives_alone(name, norm):
    model, inputs, labels, pool = problem()
    radii = RADIUS[norm] * torch.tensor([0.5, 1.0]).double()
    attack = ATTACKS[name]
    eps = radii.repeat_interleave(9)
    double = (torch.cat([inputs] * 2), torch.cat([labels] * 2))
    joint = attack(model, *double, pool, norm, eps, steps=6)
    for index, radius in enumerate(radii.tolist()):
        alone = attack(model, inputs, labels, pool, norm, radius, steps=6)
        torch.testing.assert_close(joint[9 * index :][:9], alone, atol=1e-8, rtol=0)


@one_norm
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_targeted_means_accepted_as_the_target(name, seed):
    toy = RBFMap(seed=seed)
    inputs, labels, pool = toy.samples(n=20)
    targets = (labels + 1) % 3
    options = {"starts": 6} if name in ("fmn", "ddn") else {}
    found = ATTACKS[name](toy, inputs, labels, pool, 2, 0.8, targets=targets, **options)
    reached = succeeds(toy(found), targets, True, targeted=True)
    assert reached.double().mean() >= 0.9
    assert (toy(found)[reached, :3].argmax(dim=1) == targets[reached]).all()


@one_norm
def test_same_seed_same_result_and_the_model_is_unchanged(name):
    model, inputs, labels, pool = problem()
    model.train()
    runs = [
        ATTACKS[name](model, inputs, labels, pool, 2, 0.3, steps=5, restarts=2, seed=seed)
        for seed in (3, 3)
    ]
    assert torch.equal(*runs)
    assert model.training and model.centers.requires_grad and model.centers.grad is None


@one_norm
def test_more_restarts_are_never_worse(name):
    toy = RBFMap(seed=1)
    inputs, labels, _ = toy.samples(n=20)
    pool = inputs if name == "boundary_walk" else None
    with pytest.warns() if name == "ddn" else torch.no_grad():
        few, many = (
            ATTACKS[name](toy, inputs, labels, pool, 2, 0.25, steps=10, restarts=restarts)
            for restarts in (0, 4)
        )
    assert (evades(toy(many), labels, True) >= evades(toy(few), labels, True)).all()


@pytest.mark.parametrize("attack", [pgd, apgd])
def test_a_random_start_is_no_loss_of_the_input_itself(attack):
    model, inputs, labels, _ = problem()
    wrong = (labels + 1) % 3
    found = attack(model, inputs, wrong, 0.0, random_start=True, steps=3)
    assert torch.equal(found, inputs)


@one_norm
@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.tensor([1, 1]), "other than the true ones"),
        (torch.tensor([1]), r"targets must be int64 \(n,\) with n = 2"),
        (torch.tensor([1.0, 0.0]), "targets must be int64"),
    ],
)
def test_bad_targets_are_refused(name, targets, message):
    inputs, labels = torch.tensor([[0.8, 0.2], [0.1, 0.7]]), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=message):
        ATTACKS[name](lambda x: x, inputs, labels, torch.eye(2), 2, 0.5, targets=targets)


@pytest.mark.parametrize("norm", NORMS)
def test_steepest_is_a_unit_step_that_no_other_beats(norm):
    gradient = torch.randn(20, 6).double()
    unit = gradient / gradient.norm(dim=1, keepdim=True)
    points = torch.full((20, 6), 0.5).double()
    share = 1 / 6 if norm == 1 else 1.0
    step = steepest(unit, points, norm, (0.0, 1.0), share)
    torch.testing.assert_close(torch.linalg.vector_norm(step, norm, dim=1), torch.ones(20).double())
    others = torch.randn(500, 1, 6).double()
    others = others / torch.linalg.vector_norm(others, norm, dim=2, keepdim=True)
    assert ((step * unit).sum(1) >= (others * unit).sum(2).amax(0) - 1e-12).all()


def test_steepest_l1_leaves_coordinates_at_the_box_alone():
    direction = torch.tensor([[0.9, 0.3, -0.2, 0.1]])
    points = torch.tensor([[1.0, 0.5, 0.5, 0.5]])
    step = steepest(direction, points, 1, (0.0, 1.0), 0.5)
    assert torch.equal(step, torch.tensor([[0.0, 0.5, -0.5, 0.0]]))


@pytest.mark.parametrize("norm", NORMS)
def test_random_points_fill_the_ball(norm):
    center = torch.full((4000, 3), 0.5).double()
    region = Region(center, torch.full((4000,), 0.3).double(), norm, (0.0, 1.0))
    points = random_points(region, torch.Generator().manual_seed(0))
    length = torch.linalg.vector_norm(points - center, norm, dim=1)
    assert (length <= 0.3 + 1e-12).all()
    # uniform in the ball: the length to the power of d is uniform
    share = (length / 0.3) ** 3
    expected = torch.linspace(0.1, 0.9, 9).double()
    torch.testing.assert_close(share.quantile(expected), expected, atol=0.03, rtol=0)
    assert ((points - center).mean(0).abs() < 0.01).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("steps", [4, 5, 23])
def test_pgd_until_evasion_evades_the_same_rows_with_fewer_forwards(norm, steps):
    toy = RBFMap()
    inputs, labels, pool = toy.samples(n=40)
    eps = torch.linspace(0.02, 0.4, 40).double()
    rows = []

    def counted(x):
        rows.append(len(x))
        return toy(x)

    found, forwards = {}, {}
    for stop in (False, True):
        rows.clear()
        options = {"norm": norm, "steps": steps, "init_inputs": pool, "reject": True}
        points = pgd(counted, inputs, labels, eps, until_evasion=stop, **options)
        found[stop], forwards[stop] = evades(toy(points), labels, True), sum(rows)
    assert found[True].any() and torch.equal(found[True], found[False])
    assert forwards[True] < forwards[False] or steps < 5
