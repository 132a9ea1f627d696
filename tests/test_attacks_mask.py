"""A mask says what of an input an attack may change, to the last bit."""

import math
from functools import partial

import pytest
import torch
from attack_promises import Bumps, sizes
from attack_toys import DUAL, LinearBand

from torchdnr.attacks import (
    EnsembleAttack,
    apgd,
    boundary_walk,
    ddn,
    evades,
    fmn,
    line_search_pgd,
    lowest_confidence,
    multi_target,
    noise,
    orthogonal_pgd,
    pgd,
    primal_dual,
    smoothed_pgd,
    square,
    transfer,
)

NORMS = (1, 2, math.inf)
QUICK = [2, *(pytest.param(norm, marks=pytest.mark.slow) for norm in (1, math.inf))]


def transferred(model, inputs, labels, eps, **options):
    return transfer(pgd, model, model, inputs, labels, eps, **options)


STRONG = {
    "pgd": pgd,
    "apgd": apgd,
    "line search": line_search_pgd,
    "orthogonal": orthogonal_pgd,
    "multi-target": multi_target,
}
NEAREST = {"walk": boundary_walk, "fmn": fmn, "ddn": ddn, "primal-dual": primal_dual}
FEW = {"steps": 8}  # enough where the strength of an attack does not matter
SHORT = {
    "pgd": partial(pgd, **FEW),
    "apgd": partial(apgd, **FEW),
    "line search": partial(line_search_pgd, **FEW),
    "noise": noise,
    "orthogonal": partial(orthogonal_pgd, **FEW),
    "square": partial(square, queries=20),
    "smoothed": partial(smoothed_pgd, **FEW),
    "multi-target": partial(multi_target, **FEW),
    "transfer": partial(transferred, **FEW),
    "ensemble": EnsembleAttack({"pgd": partial(pgd, **FEW), "apgd": partial(apgd, **FEW)}),
    "chain": EnsembleAttack(
        {"pgd": partial(pgd, steps=5), "square": partial(square, queries=20)}, chain=True
    ),
    "random starts": partial(pgd, random_start=True, restarts=2, **FEW),
    **{name: partial(attack, **FEW) for name, attack in NEAREST.items()},
}
NEAREST_BY_NORM = [(name, norm) for name in NEAREST for norm in NORMS if name != "ddn" or norm == 2]


def toy(n=10):
    """Inputs in eight dimensions, some at bounds, a pool, and a mask of their own for each."""
    model = Bumps(gamma=6.0, theta=0.2, d=8).eval()
    inputs, labels = model.samples(n + 30)
    mask = torch.rand(n, 8, generator=torch.Generator().manual_seed(2)) < 0.6
    mask[:, 0] = True
    return model, inputs[:n], labels[:n], inputs[n:], mask


def check_mask_holds(points, inputs, mask):
    assert torch.equal(torch.where(mask, inputs, points), inputs)
    assert ((points != inputs) & mask).any()
    assert points.min() >= 0 and points.max() <= 1


@pytest.mark.parametrize("norm", QUICK)
@pytest.mark.parametrize("name", [name for name in SHORT if name not in NEAREST])
def test_outside_the_mask_points_are_the_inputs_exactly(name, norm):
    model, inputs, labels, pool, mask = toy()
    eps = {1: 1.5, 2: 0.6, math.inf: 0.3}[norm]
    start = pool[: len(inputs)]  # far, and unlike the inputs everywhere
    for more in ({}, {"start": start, "init_inputs": pool}):
        points = SHORT[name](model, inputs, labels, eps, norm=norm, mask=mask, **more)
        check_mask_holds(points, inputs, mask)
        assert (sizes(points, inputs, norm) <= eps * (1 + 1e-12)).all()


@pytest.mark.parametrize(("name", "norm"), NEAREST_BY_NORM)
def test_nearest_points_and_points_to_be_rejected_keep_to_the_mask_too(name, norm):
    model, inputs, labels, pool, mask = toy()
    points = NEAREST[name](model, inputs, labels, pool, norm=norm, mask=mask, restarts=1)
    check_mask_holds(points, inputs, mask)
    assert evades(model(points), labels, True).sum() >= 4
    shy = lowest_confidence(model, inputs, 0.4, norm=norm, mask=mask, **FEW)
    check_mask_holds(shy, inputs, mask)


@pytest.mark.parametrize("name", SHORT)
def test_a_mask_of_ones_is_no_mask(name):
    model, inputs, labels, pool, _ = toy()
    attack, last = SHORT[name], pool if name in NEAREST else 0.3
    plain = attack(model, inputs, labels, last)
    for ones in (torch.ones(8), torch.ones(10, 8, dtype=torch.bool), torch.ones(10, 8).int()):
        assert torch.equal(attack(model, inputs, labels, last, mask=ones), plain)


@pytest.mark.parametrize(("name", "norm"), NEAREST_BY_NORM)
def test_the_nearest_evasion_of_a_linear_model_within_the_mask_is_found(name, norm):
    """Distance |margin| / ||w on the mask||_dual, by Hoelder's inequality."""
    model = LinearBand(d=12)
    inputs, labels, pool = model.samples(10)
    mask = torch.arange(12) % 3 != 0
    free = model.weight * mask
    margin = model(inputs)[:, 0].abs() + model.theta
    optimum = margin / torch.linalg.vector_norm(free, DUAL[norm])
    points = NEAREST[name](model, inputs, labels, pool, norm=norm, mask=mask, steps=300)
    assert evades(model(points), labels, True).all()
    found = sizes(points, inputs, norm)
    assert (found >= optimum * (1 - 1e-6)).all()
    assert (found <= optimum * (1.1 if norm == 1 else 1.02)).all()


@pytest.mark.parametrize("name", STRONG)
def test_within_the_mask_a_little_more_than_the_least_eps_is_enough(name):
    model = LinearBand(d=12)
    inputs, labels, _ = model.samples(10)
    mask = torch.arange(12) < 3
    margin = model(inputs)[:, 0].abs() + model.theta
    for norm in NORMS:
        least = margin / torch.linalg.vector_norm(model.weight * mask, DUAL[norm])
        attack = partial(STRONG[name], model, inputs, labels, norm=norm, mask=mask)
        assert evades(model(attack(eps=1.03 * least)), labels, True).all()
        assert not evades(model(attack(eps=0.99 * least)), labels, True).any()


def test_a_mask_broadcasts_over_channels_and_images():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 2, 4, 4, generator=generator)
    weight = torch.randn(32, 3, generator=generator)
    model, labels = (lambda x: x.flatten(1) @ weight), torch.zeros(3, dtype=torch.int64)
    patch = torch.zeros(4, 4)
    patch[1:3, 1:3] = 1
    results = [
        pgd(model, images, labels, 0.5, mask=mask)
        for mask in (patch, patch[None], patch.expand(2, 4, 4).bool(), patch.expand(3, 1, 4, 4))
    ]
    assert all(torch.equal(result, results[0]) for result in results)
    check_mask_holds(results[0], images, patch.bool().expand(3, 2, 4, 4))
    with pytest.raises(ValueError, match=r"mask must be .* one input, \(2, 4, 4\).* got \(5,\)"):
        pgd(model, images, labels, 0.5, mask=torch.ones(5))
    with pytest.raises(ValueError, match="mask must be bool or hold 0 and 1"):
        pgd(model, images, labels, 0.5, mask=0.5 * patch)
