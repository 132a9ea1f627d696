"""Every attack of the line-up, on a small trained network and its NR: more eps finds no less."""

import math
from functools import cache, partial

import pytest
import torch
from attack_toys import digits

from torchdnr import NR
from torchdnr.attacks import evades
from torchdnr.evaluation.line_up import ATTACKS, FULL, build_line_up, choose_attacks

SIZES = (0.2, 0.5, 1.0, 8.0, 255.0)
FEW = {"steps": 12, "queries": 60, "draws": 30, "starts": 2, "neighbours": 6, "restarts": 0}


@cache
def rejecting():
    """NR on features of the trained network; it rejects a fifth of what it was fitted on."""
    net, *_, pool = digits()
    scale = net[:3](pool).var().item() * 576
    model = NR(net, "2", hyperparameters={"2": (10.0, 1 / scale)})
    labels = net(pool).argmax(dim=1)
    return model.fit(pool, labels).calibrate(pool, 0.2)


@pytest.mark.parametrize("name", choose_attacks([FULL], math.inf))
def test_what_is_evaded_stays_evaded_as_eps_grows(name):
    _, images, labels, pool = digits()
    images, labels, model = images[:6], labels[:6], rejecting()
    line_up = build_line_up([name], pool, norm=math.inf, surrogate=model.scores, options=FEW)
    (attack,) = line_up.values()
    run = partial(attack.run, model, images, labels, start=images)
    if ATTACKS[name].minimum_norm:  # serves every eps with one call
        points = run(eps=math.inf)
        size = (points - images).flatten(1).abs().amax(dim=1)
        assert evades(model(points), labels, True).all() and (size <= 1).all()
        return
    points = [run(eps=eps) for eps in SIZES]
    assert all(torch.equal(more, points[2]) for more in points[3:])  # beyond the box is nothing
    evading = torch.stack([evades(model(one), labels, True) for one in points])
    print(name, evading.sum(dim=1).tolist())
    assert (evading[1:] >= evading[:-1]).all() and evading[-1].any()
