"""An eps beyond the farthest corner of the box: attacks are as strong as at that corner."""

import math
from functools import partial

import pytest
import torch
from attack_promises import Bumps
from torch import nn

from torchdnr.attacks import (
    EnsembleAttack,
    apgd,
    evades,
    line_search_pgd,
    lowest_confidence,
    multi_target,
    noise,
    orthogonal_pgd,
    pgd,
    smoothed_pgd,
    square,
    transfer,
)
from torchdnr.decisions import REJECT
from torchdnr.evaluation import security_evaluation
from torchdnr.evaluation.line_up import build_line_up

QUICK = [math.inf, *(pytest.param(norm, marks=pytest.mark.slow) for norm in (1, 2))]
FEW = {"steps": 4}  # enough where the strength of an attack does not matter
ATTACKS = {
    "pgd": partial(pgd, **FEW),
    "apgd": partial(apgd, **FEW),
    "line search": partial(line_search_pgd, **FEW),
    "noise": noise,
    "orthogonal": partial(orthogonal_pgd, **FEW),
    "square": partial(square, queries=50),
    "smoothed": partial(smoothed_pgd, **FEW),
    "multi-target": partial(multi_target, attack=pgd, **FEW),
    "multi-target APGD": partial(multi_target, attack=apgd, **FEW),
    "ensemble": EnsembleAttack({"pgd": partial(pgd, **FEW), "apgd": partial(apgd, **FEW)}),
    "random starts": partial(pgd, random_start=True, restarts=2, **FEW),
}


def reach(inputs, norm):
    """Norm of the largest perturbation that the box [0, 1] permits, ``(n,)``."""
    return torch.linalg.vector_norm(torch.maximum(inputs, 1 - inputs).flatten(1), norm, dim=1)


@pytest.mark.parametrize("norm", QUICK)
@pytest.mark.parametrize("name", ATTACKS)
def test_an_eps_beyond_the_box_gives_the_points_of_an_eps_at_its_edge(name, norm):
    model = Bumps().eval()
    inputs, labels = model.samples(10)
    inputs[0] = 0.0  # a corner, farthest from the opposite one
    attack = partial(ATTACKS[name], model, inputs, labels, norm=norm)
    at_edge = attack(eps=(1 + 1e-9) * reach(inputs, norm))
    for eps in (8.0, 255.0, math.inf):
        assert torch.equal(attack(eps=eps), at_edge)


@pytest.mark.parametrize("norm", QUICK)
def test_transfer_and_the_search_for_rejection_reach_as_far_whatever_lies_beyond(norm):
    model = Bumps().eval()
    inputs, labels = model.samples(10)
    edge = (1 + 1e-9) * reach(inputs, norm)
    crafted = partial(transfer, pgd, model, model, inputs, labels, norm=norm, **FEW)
    shy = partial(lowest_confidence, model, inputs, norm=norm, **FEW)
    for attack in (crafted, shy):
        at_edge = attack(eps=edge)
        assert all(torch.equal(attack(eps=eps), at_edge) for eps in (8.0, 255.0, math.inf))


@pytest.mark.parametrize("attack", [multi_target, pgd, orthogonal_pgd])
@pytest.mark.parametrize(
    ("norm", "sizes", "options"),
    [
        pytest.param(1, (1, 2, 8, 64, 1e3), {}, marks=pytest.mark.slow),
        pytest.param(2, (0.5, 1, 2, 8, 100), {}, marks=pytest.mark.slow),
        pytest.param(math.inf, (0.3, 0.5, 1, 8, 255), {}, marks=pytest.mark.slow),
        (math.inf, (0.3, 0.5, 1, 8, 255), {"steps": 30}),
    ],
)
def test_more_eps_never_finds_less(attack, norm, sizes, options):
    model = Bumps(gamma=3.0, d=16).eval()
    inputs, labels = model.samples(12)
    found = numbers_evaded(partial(attack, norm=norm, **options), model, inputs, labels, sizes)
    assert found == sorted(found) and found[-1] >= 9


def numbers_evaded(attack, model, inputs, labels, sizes):
    points = (attack(model, inputs, labels, eps) for eps in sizes)
    return [int(evades(model(adversarial), labels, True).sum()) for adversarial in points]


def test_along_a_curve_a_sample_that_is_evaded_stays_evaded():
    model = Bumps(gamma=3.0, d=16).eval()
    inputs, labels = model.samples(12)
    line_up = build_line_up(["pgd", "apgd-multi-target", "fmn"], inputs, norm=math.inf)
    eps = [0.1, 0.3, 0.5, 1, 8, 255]
    curve = security_evaluation(
        model, inputs, labels, eps, norm=math.inf, attacks=line_up, progress=False
    )
    for one in (curve, *curve.attacks.values()):
        evading = (one.predictions != REJECT) & (one.predictions != labels)
        assert (evading[1:] >= evading[:-1]).all() and evading[-1].any()
    assert curve.evasion_rate[-1] == 1.0


class Few(nn.Module):
    """RBF scores of three classes on a convolution's maps, and theta: few places are accepted."""

    reject_index = 3

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layers = nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2), nn.ReLU()
        self.net = nn.Sequential(*layers, nn.Flatten()).requires_grad_(False)
        self.kinds, classes = torch.rand(3, 1, 8, 8), torch.arange(30) % 3
        images = (self.kinds[classes] + 0.1 * torch.randn(30, 1, 8, 8)).clamp(0, 1)
        self.centers = self.net(images)
        self.gamma = 8 / self.centers.var(dim=0).sum()
        self.coefs = 1.2 * nn.functional.one_hot(classes, 3) - 0.4

    def forward(self, x):
        square = torch.cdist(self.net(x), self.centers).square()
        scores = torch.exp(-self.gamma * square) @ self.coefs
        return torch.cat([scores, scores.new_full((len(x), 1), 0.35)], dim=1)

    def samples(self, n):
        labels, generator = torch.arange(n) % 3, torch.Generator().manual_seed(5)
        noise = torch.randn(n, 1, 8, 8, generator=generator)
        return (self.kinds[labels] + 0.1 * noise).clamp(0, 1), labels


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("norm", "sizes", "options"),
    [
        pytest.param(2, (1.5, 3, 6, 20), {}, marks=SLOW),
        pytest.param(math.inf, (0.25, 0.5, 1, 8), {}, marks=SLOW),
        (math.inf, (0.25, 0.5, 8), {"steps": 25}),
    ],
)
@pytest.mark.parametrize(
    "attack", [pgd, apgd, *(pytest.param(a, marks=SLOW) for a in (orthogonal_pgd, multi_target))]
)
def test_more_eps_never_finds_less_where_little_is_accepted(attack, norm, sizes, options):
    model = Few()
    inputs, labels = model.samples(16)
    found = numbers_evaded(partial(attack, norm=norm, **options), model, inputs, labels, sizes)
    assert found == sorted(found) and found[-1] > found[0]


def test_smaller_balls_cost_nothing_at_an_eps_far_from_the_edge_of_the_box():
    model = Bumps().eval()
    inputs, labels = model.samples(10)
    model.rows = 0
    pgd(model, inputs, labels, 0.1, norm=math.inf, steps=7, step_size=1e-9)
    assert model.rows == 1 + 10 * (1 + 7 + 1)  # a check, the inputs, the steps, the last points
