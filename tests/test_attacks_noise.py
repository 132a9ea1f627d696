"""Random noise: where it draws, and that it finds what is easy to find."""

import math

import pytest
import torch
from attack_promises import (
    EPS,
    NORMS,
    Bumps,
    blind,
    check_budget,
    check_chunks,
    check_model_is_unchanged,
    check_seed,
    check_success,
    check_targeted,
    measure,
    not_worse,
    sizes,
)

from torchdnr.attacks import evades, noise
from torchdnr.attacks.noise import _at_any_distance, _at_surface
from torchdnr.attacks.projections import Region


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keeps_to_ball_and_box(norm, dtype):
    check_budget(noise, norm, dtype)


def test_promises():
    def attack(*args, **options):
        return noise(*args, draws=20, **options)

    check_chunks(attack, exact=False)
    check_model_is_unchanged(attack)
    check_seed(attack)


@pytest.mark.parametrize("norm", NORMS)
def test_finds_in_the_plane_what_brute_force_finds(norm):
    check_success(lambda *args, **options: noise(*args, draws=250, **options), norm)


def test_finds_targets():
    check_targeted(lambda *args, **options: noise(*args, draws=250, **options))


@pytest.mark.parametrize("norm", NORMS)
def test_surface_draws_are_at_the_surface(norm):
    center = torch.full((200, 3), 0.5, dtype=torch.float64)
    eps = torch.linspace(0.01, 0.3, 200, dtype=torch.float64)
    region = Region(center, eps, norm, (0.0, 1.0))
    points = _at_surface(region, torch.Generator().manual_seed(0))
    torch.testing.assert_close(sizes(points, center, norm), eps, rtol=1e-9, atol=0)
    if norm == math.inf:
        assert ((points - center).abs() > 0.999 * eps[:, None]).all()  # corners
    inside = sizes(_at_any_distance(region, torch.Generator().manual_seed(0)), center, norm) / eps
    for quantile in (0.25, 0.5, 0.75):
        assert inside.quantile(quantile).sub(quantile).abs() < 0.12


def test_an_infinite_eps_is_the_box():
    model = Bumps().eval()
    inputs, labels = model.samples(10)
    points = noise(model, inputs, labels, math.inf, draws=400)
    assert torch.isfinite(points).all() and points.min() >= 0 and points.max() <= 1
    assert evades(model(points), labels, True).all()


def test_more_draws_are_never_worse_and_gradients_are_not_needed():
    model = Bumps().eval()
    inputs, labels = model.samples()
    few = noise(blind(model), inputs, labels, EPS[2], draws=10, reject=True)
    many = noise(blind(model), inputs, labels, EPS[2], draws=60, reject=True)
    quantised = blind(model)
    quantised.reject_index = 3
    assert not_worse(measure(quantised, many, labels), measure(quantised, few, labels))
    assert evades(model(many), labels, True).sum() > evades(model(few), labels, True).sum() > 0


def test_starts_and_restarts_count():
    model = Bumps().eval()
    inputs, labels = model.samples(10)
    start = noise(model, inputs, labels, 0.4, draws=200)
    kept = noise(model, inputs, labels, 0.4, draws=1, start=start)
    assert not_worse(measure(model, kept, labels), measure(model, start, labels))
    once = noise(model, inputs, labels, 0.2, draws=5)
    often = noise(model, inputs, labels, 0.2, draws=5, restarts=20)
    assert evades(model(often), labels, True).sum() > evades(model(once), labels, True).sum()


def test_bad_options_are_refused():
    inputs, labels = torch.rand(2, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="draws must be >= 1, got 0"):
        noise(lambda x: x, inputs, labels, 0.1, draws=0)
