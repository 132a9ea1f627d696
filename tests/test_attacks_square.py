"""Square attack: windows and patterns as in the paper, budgets, success without gradients."""

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

from torchdnr.attacks import evades, square
from torchdnr.attacks.projections import Region
from torchdnr.attacks.square import (
    _next_length,
    _patterns,
    _some_local,
    _window_sides,
    changed_window,
    first_pattern,
)


def generator():
    return torch.Generator().manual_seed(0)


def images(norm, shape=(3, 20, 14), n=6):
    center = torch.full((n, *shape), 0.5, dtype=torch.float64)
    return Region(center, torch.linspace(0.05, 0.4, n, dtype=torch.float64), norm, (0.0, 1.0))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keeps_to_ball_and_box(norm, dtype):
    check_budget(lambda *args, **options: square(*args, queries=60, **options), norm, dtype)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(3, 20, 14), (1, 4, 30), (2, 1, 9), (40,), (5, 6)])
def test_keeps_to_ball_and_box_on_images_of_any_shape(norm, shape):
    inputs = torch.rand(4, *shape, generator=generator())
    weight = torch.randn(3, inputs[0].numel(), generator=generator())
    labels = (inputs.flatten(1) @ weight.T).argmax(dim=1)
    eps = {1: 3.0, 2: 0.8, math.inf: 0.05}[norm] * torch.tensor([1.0, 0.5, 2.0, 0.0])
    points = square(lambda x: x.flatten(1) @ weight.T, inputs, labels, eps, norm=norm, queries=20)
    assert points.shape == inputs.shape and points.min() >= 0 and points.max() <= 1
    assert (sizes(points, inputs, norm) <= eps.double() * (1 + 5e-7)).all()
    assert torch.equal(points[3], inputs[3])


def test_promises():
    def attack(*args, **options):
        return square(*args, queries=30, **options)

    check_chunks(attack, exact=False)
    check_model_is_unchanged(attack)
    check_seed(attack)


@pytest.mark.parametrize("norm", NORMS)
def test_finds_in_the_plane_most_of_what_brute_force_finds(norm):
    check_success(lambda *args, **options: square(*args, queries=300, **options), norm)


def test_finds_targets():
    check_targeted(lambda *args, **options: square(*args, queries=600, **options))


def test_pulled_trials_find_what_lies_inside_the_ball():
    model = Bumps().eval()
    inputs, labels = model.samples()
    images = inputs.view(-1, 1, 1, 2)  # flat inputs are tried inside the ball as it is

    def flat(x):
        return model(x.flatten(1))

    options = {"norm": math.inf, "queries": 200, "reject": True}
    found = [
        evades(flat(square(flat, images, labels, 0.2, pull=pull, **options)), labels, True)
        for pull in (0.0, 0.25)
    ]
    assert found[0].sum() < 0.75 * found[1].sum()


def test_attacks_a_model_without_gradient():
    model = Bumps().eval()
    inputs, labels = model.samples()
    points = square(blind(model), inputs, labels, EPS[2], queries=100, reject=True)
    quantised = blind(model)
    assert evades(quantised(points), labels, True).sum() >= 8
    quantised.reject_index = 3
    assert not_worse(measure(quantised, points, labels), measure(quantised, inputs, labels))


@pytest.mark.parametrize(("norm", "share"), [(math.inf, 0.9), (2, 0.5), (1, 0.3)])
def test_comes_near_the_optimum_of_a_linear_model(norm, share):
    weight = torch.randn(1, 8, 8, generator=generator(), dtype=torch.float64)
    weight = torch.nn.functional.avg_pool2d(weight, 3, 1, 1)  # smooth, as the attack expects
    eps = {1: 2.0, 2: 0.5, math.inf: 0.05}[norm]
    inputs = torch.full((6, 1, 8, 8), 0.5, dtype=torch.float64)

    def model(x):
        score = (x - 0.5).flatten(1) @ weight.flatten()
        return torch.stack([score + 100, -score], dim=1)  # never evades

    labels = torch.zeros(6, dtype=torch.int64)
    points = square(model, inputs, labels, eps, norm=norm, queries=400)
    dual = {1: math.inf, 2: 2, math.inf: 1}[norm]
    optimum = eps * torch.linalg.vector_norm(weight.flatten(), dual)
    assert (100 - (model(points)[:, 0]) >= share * optimum).all()
    assert (100 - (model(points)[:, 0]) <= optimum * (1 + 1e-9)).all()


def test_queries_are_counted_and_rows_that_evade_leave():
    model = Bumps().eval()
    inputs, labels = model.samples(10)
    model.rows = 0
    square(model, inputs, labels, 0.0, queries=60, norm=2)
    assert model.rows == 1 + 10 + 60 * 10  # look at the output, inputs, queries
    model.rows = 0
    square(model, inputs, labels, math.inf, queries=300)
    assert model.rows < 0.7 * 300 * 10


@pytest.mark.parametrize("norm", NORMS)
def test_first_pattern_spends_the_radius(norm):
    region = images(norm)
    move = first_pattern(region, generator()) - region.center
    torch.testing.assert_close(sizes(move, torch.zeros_like(move), norm), region.eps)
    if norm == math.inf:  # vertical stripes of one sign per channel
        assert (move == move[:, :, :1]).all()
        assert (move.abs() - region.eps[:, None, None, None]).abs().max() < 1e-12
        assert move[0, :, 0].sign().unique(dim=0).shape[0] > 1
    else:
        assert (move != 0).flatten(1).any(dim=1).all()


def test_a_window_of_linf_is_a_square_of_one_sign_per_channel_elsewhere_in_each_row():
    region = images(math.inf, n=100)
    changed = changed_window(region.center, region, 16 / 280, generator()) - region.center
    where = changed != 0
    assert (where == where[:, :1]).all()  # the same window in all channels
    rows, columns = where[:, 0].any(dim=2).sum(dim=1), where[:, 0].any(dim=1).sum(dim=1)
    assert (rows == 4).all() and (columns == 4).all() and (where[:, 0].sum(dim=(1, 2)) == 16).all()
    first = where[:, 0].flatten(1).float().argmax(dim=1)
    assert len(first.unique()) > 40
    signs = torch.where(where, changed.sign(), 0).sum(dim=(2, 3))
    assert (signs.abs() == 16).all() and len(signs.unique(dim=0)) == 8
    assert len((first // 14).unique()) == 17 and len((first % 14).unique()) == 11  # every place


@pytest.mark.parametrize("norm", [1, 2])
def test_moved_mass_spends_the_whole_radius_and_leaves_the_rest_alone(norm):
    region = images(norm)
    points = first_pattern(region, generator())
    points = region.center + 0.7 * (points - region.center)
    changed = changed_window(points, region, 0.1, generator())
    # the part of the radius that lay idle is shared among the channels and used up
    torch.testing.assert_close(sizes(changed, region.center, norm), region.eps, rtol=1e-9, atol=0)
    same = (changed == points).flatten(1).float().mean(dim=1)
    assert (same >= 1 - 2 * 0.13).all() and (same < 1).all()


def test_patterns_are_those_of_the_paper():
    def peak(h1, h2):  # Eq. (2) of the paper, indices from 1, n rings of the longer side
        n = max(h1, h2) // 2
        eta = torch.zeros(h1, h2)
        for r in range(1, h1 + 1):
            for s in range(1, h2 + 1):
                ring = n - max(abs(r - h1 // 2 - 1), abs(s - h2 // 2 - 1))
                eta[r - 1, s - 1] = sum(1 / (n + 1 - k) ** 2 for k in range(ring + 1))
        return eta

    for side in (1, 2, 3, 5, 8):
        half = side // 2
        above = torch.cat([peak(half, side), -peak(side - half, side)])
        expected = torch.stack([above, above.T])
        torch.testing.assert_close(_patterns(side, side, like=torch.zeros(())), expected)


def test_sides_of_windows():
    assert _window_sides(0.8, 28, 28, 1) == (25, 25)
    assert _window_sides(1e-6, 28, 28, 1) == (1, 1)
    assert _window_sides(1e-6, 28, 28, 3) == (3, 3)
    assert _window_sides(0.5, 1, 100, 1) == (1, 50)
    assert _window_sides(0.5, 100, 4, 1) == (67, 3)
    assert _window_sides(1.0, 1, 1, 3) == (1, 1)
    assert _window_sides(1.0, 2, 2, 3) == (1, 1)


def test_bad_options_are_refused():
    inputs, labels = torch.rand(2, 3), torch.tensor([0, 1])
    for change, message in (
        ({"queries": 0}, "queries must be >= 1, got 0"),
        ({"coverage": 0.0}, r"coverage must be in \(0, 1\], got 0.0"),
        ({"pull": 2.0}, r"pull must be in \[0, 1\], got 2.0"),
    ):
        with pytest.raises(ValueError, match=message):
            square(lambda x: x, inputs, labels, 0.1, **change)


@pytest.mark.parametrize("norm", NORMS)
def test_local_steps_of_flat_inputs(norm):
    center = torch.full((4000, 6), 0.5, dtype=torch.float64)
    region = Region(center, torch.full((4000,), 0.2, dtype=torch.float64), norm, (0.0, 1.0))
    points = center + 0.01
    length = torch.full((4000,), 0.05, dtype=torch.float64)
    trial, local = _some_local(center, points, length, region, generator())
    assert 0.2 < local.double().mean() < 0.3
    assert torch.equal(trial[~local], center[~local])
    step = (trial - points)[local]
    if norm == 1:  # towards +-0.2 along one axis
        share = (1 - (trial[local] - center[local]).abs().sum(dim=1) / 0.2).abs()
        assert ((trial[local] - center[local]).abs().sum(dim=1) <= 0.2 + 1e-12).all()
        assert share.min() < 0.05  # up to the corner
        axis = step.abs().argmax(dim=1)
        assert set((axis * 2 + (step.gather(1, axis[:, None])[:, 0] > 0)).tolist()) == set(
            range(12)
        )
    else:
        expected = 0.05 / (1 if norm == math.inf else 6**0.5)
        assert abs(step.std() - expected) < 0.05 * expected


def test_length_of_local_steps_follows_success_within_bounds():
    eps = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0])
    length = torch.tensor([0.1, 0.1, 0.1, 0.9, 0.001])
    local = torch.tensor([True, True, False, True, True])
    success = torch.tensor([True, False, True, True, False])
    expected = torch.tensor([0.15, 0.1 / 1.5**0.25, 0.1, 1.0, 0.001])
    torch.testing.assert_close(_next_length(length, local, success, eps), expected)


@pytest.mark.slow
def test_finds_a_slope_after_a_long_plateau():
    weight = torch.nn.functional.normalize(torch.randn(12, generator=generator()), dim=0)
    asked = [0]

    def model(x):
        asked[0] += len(x)
        score = (x - 0.5) @ weight * (asked[0] > 20 * 1000)  # nothing to be seen at first
        return torch.stack([torch.full_like(score, 100), score], dim=1)  # never evades

    inputs, labels = torch.full((20, 12), 0.5), torch.zeros(20, dtype=torch.int64)
    points = square(model, inputs, labels, 0.3, queries=2500)
    assert (model(points)[:, 1] > 0.98 * 0.3).all()
