"""Every attack against exact optima: a linear model with a reject band, RBF maps on a fine grid."""

from functools import lru_cache, partial

import pytest
import torch
from attack_toys import NORMS, LinearBand, RBFMap

from torchdnr.attacks import (
    EnsembleAttack,
    apgd,
    boundary_walk,
    ddn,
    evades,
    fmn,
    line_search_pgd,
    multi_target,
    orthogonal_pgd,
    pgd,
    primal_dual,
    square,
    transfer,
)

# As many starts as the walk; steps that fit a plane one wide, where 1 would cross it at once.
MINIMUM_NORM = {
    "boundary walk": boundary_walk,
    "FMN": partial(fmn, steps=200, starts=20, neighbours=60, step_size=0.2),
    "DDN": partial(ddn, steps=200, starts=20, neighbours=60),
    "primal-dual": partial(primal_dual, starts=20, neighbours=60),
}
FIXED_EPS = {
    "PGD": partial(pgd, restarts=2),
    "APGD": partial(apgd, restarts=2),
    "line-search PGD, Eq. 2": partial(line_search_pgd, restarts=2),
    "line-search PGD, decision": partial(line_search_pgd, objective="decision", restarts=2),
    "multi-target APGD": partial(multi_target, restarts=2),
    "selective PGD": partial(orthogonal_pgd, projected="none", selective=True, restarts=2),
    "orthogonal PGD": partial(orthogonal_pgd, restarts=5),
    "Square attack": partial(square, queries=2000),
    "transfer from the model itself": lambda toy, *given, **options: transfer(
        pgd, toy, toy, *given, **{"restarts": 2} | options
    ),
    "ensemble": EnsembleAttack({"PGD": pgd, "APGD": partial(apgd, restarts=2)}),
}
SLOW = pytest.mark.slow
BASIC = {"PGD", "APGD", "line-search PGD, decision"}  # on which the others build
QUICK = {1: BASIC, 2: FIXED_EPS.keys() - {"Square attack"}, float("inf"): BASIC}
GRID_SIDE = 1000
CELL = 1 / GRID_SIDE / 20  # of the finest grid: it misses the optimum by up to that
FEW, MANY = 12, 40  # samples of each toy
CASES = [
    (name, norm) for name in MINIMUM_NORM for norm in NORMS if not (name == "DDN" and norm != 2)
]


def sizes(points, inputs, norm):
    return torch.linalg.vector_norm((points.double() - inputs.double()).flatten(1), norm, dim=1)


@lru_cache
def rbf_problem(seed, norm, n):
    toy = RBFMap(seed=seed)
    inputs, labels, pool = toy.samples(n)
    return toy, inputs, labels, pool, toy.optimum(inputs, labels, norm, side=GRID_SIDE)


@pytest.mark.parametrize(("name", "norm"), CASES)
@pytest.mark.parametrize(
    ("dtype", "n"),
    [
        (torch.float64, FEW),
        *(pytest.param(dtype, MANY, marks=SLOW) for dtype in (torch.float32, torch.float64)),
    ],
)
def test_minimum_norm_attacks_cross_a_reject_band_at_its_nearest_point(name, norm, dtype, n):
    toy = LinearBand(dtype=dtype)
    inputs, labels, pool = toy.samples(n)
    found = MINIMUM_NORM[name](toy, inputs, labels, pool, **({} if norm == 2 else {"norm": norm}))
    assert found.dtype == dtype
    assert evades(toy(found), labels, True).all()
    ratio = sizes(found, inputs, norm) / toy.optimum(inputs, norm).double()
    assert (ratio <= 1.02).all() and (ratio >= 1 - 1e-4).all()


@pytest.mark.parametrize(("name", "norm"), CASES)
@pytest.mark.parametrize(
    ("seed", "n"), [(0, FEW), *(pytest.param(seed, MANY, marks=SLOW) for seed in (0, 1, 2))]
)
def test_minimum_norm_attacks_find_the_nearest_point_of_an_rbf_map(name, norm, seed, n):
    toy, inputs, labels, pool, optimum = rbf_problem(seed, norm, n)
    found = MINIMUM_NORM[name](toy, inputs, labels, pool, **({} if norm == 2 else {"norm": norm}))
    assert evades(toy(found), labels, True).all()
    norms = sizes(found, inputs, norm)
    assert (norms <= 1.02 * optimum + CELL).all()


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        pytest.param(name, norm, marks=() if name in QUICK[norm] else SLOW)
        for name in FIXED_EPS
        for norm in NORMS
    ],
)
@pytest.mark.parametrize(
    ("seeds", "n"),
    [pytest.param((0,), FEW, id="few"), pytest.param((0, 1, 2), MANY, id="many", marks=SLOW)],
)
def test_fixed_eps_attacks_succeed_where_success_exists(name, norm, seeds, n):
    evading, count = 0, 0
    for seed in seeds:
        toy, inputs, labels, pool, optimum = rbf_problem(seed, norm, n)
        eps = 1.02 * optimum + CELL
        found = FIXED_EPS[name](toy, inputs, labels, eps, norm=norm, init_inputs=pool)
        evading += int(evades(toy(found), labels, True).sum())
        assert (sizes(found, inputs, norm) <= eps * (1 + 1e-9)).all()
        count += len(inputs)
        few = (0.98 * optimum - CELL).clamp_min(0)
        found = FIXED_EPS[name](toy, inputs, labels, few, norm=norm, restarts=0)
        assert not evades(toy(found), labels, True).any()  # nothing is there to be found
    toy = LinearBand()
    inputs, labels, pool = toy.samples(n)
    eps = 1.02 * toy.optimum(inputs, norm)
    found = FIXED_EPS[name](toy, inputs, labels, eps, norm=norm, init_inputs=pool)
    evading += int(evades(toy(found), labels, True).sum())
    count += len(inputs)
    assert count - evading <= min(3, count // 24)  # of 24 one, of 80 or 160 three


@pytest.mark.parametrize("norm", NORMS)
def test_fmn_crosses_a_linear_band_from_the_inputs_alone(norm):
    toy = LinearBand()
    inputs, labels, _ = toy.samples()
    found = fmn(toy, inputs, labels, norm=norm)
    assert evades(toy(found), labels, True).all()
    assert (sizes(found, inputs, norm) <= 1.02 * toy.optimum(inputs, norm)).all()
