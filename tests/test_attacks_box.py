"""Where the box lets most pixels move no further, steps go along those that can move."""

import math

import pytest
import torch
from torch import nn

from torchdnr.attacks import (
    apgd,
    boundary_walk,
    ddn,
    fmn,
    line_search_pgd,
    multi_target,
    orthogonal_pgd,
    pgd,
    primal_dual,
    smoothed_pgd,
)
from torchdnr.decisions import evades

BLACK, GREY, MARGIN, STRENGTH = 360, 40, 2.0, 0.3
LABELS = torch.zeros(4, dtype=torch.int64)


class MostlyBlack(nn.Module):
    """Two classes by a linear score, whose gradient is nearly all in pixels that are black."""

    def __init__(self):
        super().__init__()
        grey = STRENGTH * torch.tensor([1.0, -1.0]).repeat(GREY // 2)
        self.register_buffer("weight", torch.cat([torch.ones(BLACK), grey]))

    def forward(self, images):
        score = images.flatten(1) @ self.weight + MARGIN
        return torch.stack([score, torch.zeros_like(score)], dim=1)

    def smoothed(self, factor):
        return self


def images():
    return torch.cat([torch.zeros(4, BLACK), torch.full((4, GREY), 0.5)], dim=1)


def nearest_norm(norm):
    """Norm of the nearest evasion: black pixels cannot get darker, and grey ones are all alike."""
    return MARGIN / (STRENGTH * GREY) * GREY ** (1 / norm if norm < math.inf else 0.0)


@pytest.mark.parametrize("norm", [2, math.inf])
@pytest.mark.parametrize(
    "attack",
    [
        pgd,
        apgd,
        line_search_pgd,
        orthogonal_pgd,
        multi_target,
        smoothed_pgd,
    ],
)
def test_attacks_within_eps_move_the_pixels_that_the_box_lets_move(attack, norm):
    model, eps = MostlyBlack(), 1.02 * nearest_norm(norm)
    moved = attack(model, images(), LABELS, eps, norm=norm, steps=20)
    assert evades(model(moved), LABELS, reject=False).all()


@pytest.mark.parametrize("norm", [2, math.inf])
@pytest.mark.parametrize("attack", [boundary_walk, fmn, ddn, primal_dual])
def test_minimum_norm_attacks_find_the_nearest_evasion_where_most_pixels_are_black(attack, norm):
    if attack is ddn and norm != 2:
        pytest.skip("ddn knows the l2 norm alone")
    model = MostlyBlack()
    far = images()
    far[:, BLACK:] = torch.where(model.weight[BLACK:] > 0, 0.0, 1.0)
    far[:, :BLACK:3] = 0.01  # not on the straight way
    moved = attack(model, images(), LABELS, far, norm=norm, steps=100)
    assert evades(model(moved), LABELS, reject=False).all()
    norms = torch.linalg.vector_norm(moved - images(), norm, dim=1)
    assert (norms <= 1.02 * nearest_norm(norm)).all()
