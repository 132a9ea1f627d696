"""Selective and orthogonal PGD: the two gradients, what is projected, and what is found."""

import math
from functools import partial

import pytest
import torch
from attack_promises import (
    EPS,
    NORMS,
    Bumps,
    check_budget,
    check_chunks,
    check_model_is_unchanged,
    check_seed,
    check_success,
    check_targeted,
    measure,
    not_worse,
)

from torchdnr.attacks import evades, orthogonal_pgd, pgd
from torchdnr.attacks.objectives import decision_objective
from torchdnr.attacks.orthogonal import PROJECTED, _orthogonalised, _slopes_at
from torchdnr.attacks.target import Target

VARIANTS = [(projected, selective) for projected in PROJECTED for selective in (True, False)]


def slopes(model, inputs, labels, targeted=False, margin=0.0):
    target = Target(model, decision_objective, True, 4, targeted)
    return _slopes_at(target, inputs, labels, margin)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keeps_to_ball_and_box(norm, dtype):
    check_budget(partial(orthogonal_pgd, steps=10), norm, dtype)


def test_promises():
    check_chunks(partial(orthogonal_pgd, steps=10))
    check_model_is_unchanged(partial(orthogonal_pgd, steps=10))
    check_seed(partial(orthogonal_pgd, steps=10, random_start=True))


@pytest.mark.parametrize("norm", NORMS)
def test_finds_in_the_plane_most_of_what_brute_force_finds(norm):
    attack = partial(orthogonal_pgd, steps=50, restarts=3, random_start=True)
    check_success(attack, norm)
    check_success(partial(attack, selective=True, projected="none"), norm)


def test_the_default_is_stronger_than_pgd_on_rbf_scores():
    model = Bumps(gamma=8.0, d=10).eval()
    inputs, labels = model.samples()
    options = {"eps": 0.6, "steps": 50}
    plain = evades(model(pgd(model, inputs, labels, **options)), labels, True)
    both = evades(model(orthogonal_pgd(model, inputs, labels, **options)), labels, True)
    assert plain.sum() < 0.85 * both.sum() and both.sum() >= 0.9 * len(inputs)


def test_finds_targets():
    check_targeted(partial(orthogonal_pgd, restarts=2, random_start=True))


@pytest.mark.parametrize("targeted", [False, True])
def test_gradients_are_those_of_the_two_margins(targeted):
    model = Bumps(gamma=20.0).eval()
    inputs, labels = model.samples(10)
    classes = (labels + 1) % 3 if targeted else labels
    found = slopes(model, inputs, classes, targeted)
    for row in range(len(inputs)):
        x = inputs[row : row + 1].clone().requires_grad_()
        s, k = model(x)[0], classes[row]
        others = torch.stack([s[j] for j in range(3) if j != k]).max()
        by_class = others - s[k] if targeted else s[k] - others
        by_rejection = model.theta - (s[k] if targeted else others)
        for value, direction in ((by_class, found.by_class), (by_rejection, found.by_rejection)):
            gradient = torch.autograd.grad(value, x, retain_graph=True)[0][0]
            torch.testing.assert_close(direction[row], -gradient / gradient.norm())
        torch.testing.assert_close(found.values[row], torch.maximum(by_class, by_rejection))
        assert found.evading[row] == (max(by_class, by_rejection) < 0)
        assert found.crossed[row] == (by_class < 0)


def test_one_forward_a_step_serves_both_gradients():
    model = Bumps().eval()
    inputs, labels = model.samples(10)
    model.rows = 0
    orthogonal_pgd(model, inputs, labels, 0.0, steps=7)
    assert model.rows == 1 + 10 + 7 * 10 + 10  # look at the output, inputs, steps, last point


def test_projected_directions_are_orthogonal_and_go_down():
    model = Bumps(gamma=20.0, d=5).eval()
    inputs, labels = model.samples(20)
    found = slopes(model, inputs, labels)
    for projected in PROJECTED:
        by_class, by_rejection = _orthogonalised(found, projected)
        if projected in ("class", "both"):
            torch.testing.assert_close(
                (by_class * found.by_rejection).sum(1), torch.zeros(20).double()
            )
            assert ((by_class * found.by_class).sum(1) > 0).all()
        else:
            assert torch.equal(by_class, found.by_class)
        if projected in ("rejection", "both"):
            torch.testing.assert_close(
                (by_rejection * found.by_class).sum(1), torch.zeros(20).double()
            )
            assert ((by_rejection * found.by_rejection).sum(1) > 0).all()
        else:
            assert torch.equal(by_rejection, found.by_rejection)
        torch.testing.assert_close(by_class.norm(dim=1), torch.ones(20).double())


def test_a_projected_step_leaves_the_other_margin_alone_to_first_order():
    model = Bumps(gamma=20.0, d=5).eval()
    inputs, labels = model.samples(20)
    _, step = _orthogonalised(slopes(model, inputs, labels), "rejection")

    def class_margin(x):
        s = model(x)[:, :3]
        true = s.gather(1, labels[:, None])[:, 0]
        return true - s.scatter(1, labels[:, None], -torch.inf).amax(dim=1)

    with torch.no_grad():
        change = class_margin(inputs + 1e-6 * step) - class_margin(inputs)
    assert (change.abs() < 1e-9).all()


def test_parallel_gradients_are_followed_as_they_are():
    def mirrored(x):  # two classes of one-vs-rest: s_1 = -s_0
        f = x[:, 0] - x[:, 1]
        return torch.stack([f, -f, torch.full_like(f, 0.5)], dim=1)

    inputs = torch.tensor([[0.6, 0.4]])
    points = orthogonal_pgd(mirrored, inputs, torch.tensor([0]), 0.8, reject=True)
    assert evades(mirrored(points), torch.tensor([0]), True).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("projected", "selective"), VARIANTS)
def test_is_pgd_without_a_threshold(norm, projected, selective):
    model = Bumps(gamma=20.0, reject=False).eval()
    inputs, labels = model.samples(12)
    options = {"norm": norm, "steps": 12}
    expected = pgd(model, inputs, labels, 0.1, objective="decision", **options)
    points = orthogonal_pgd(
        model, inputs, labels, 0.1, projected=projected, selective=selective, **options
    )
    torch.testing.assert_close(points, expected, atol=1e-9, rtol=0)


# Here the sum of the rejection gradient and the class gradient projected on it is level in x_1.
@pytest.mark.parametrize(("projected", "selective"), [v for v in VARIANTS if v != ("class", False)])
def test_every_variant_crosses_a_band_that_rejects(projected, selective):
    # f = x_0 decides the class; only where x_1 is large as well is anything accepted
    def model(x):
        f, height = x[:, 0] - 0.5, x[:, 1] - 0.8
        return torch.stack([f + height, height - f, torch.zeros_like(f)], dim=1)

    inputs = torch.tensor([[0.7, 0.4]], dtype=torch.float64)
    labels = torch.tensor([0])
    points = orthogonal_pgd(
        model, inputs, labels, 0.5, projected=projected, selective=selective, reject=True
    )
    assert evades(model(points), labels, True).all()
    bound = 0.6 / math.sqrt(2)  # distance to the line x_1 - x_0 = 0.3, beyond which s_1 > 0
    nearest = orthogonal_pgd(model, inputs, labels, 0.99 * bound, projected=projected, reject=True)
    assert not evades(model(nearest), labels, True).any()


def test_never_worse_than_the_start():
    model = Bumps().eval()
    inputs, labels = model.samples(20)
    start = pgd(model, inputs, labels, EPS[2], restarts=2)
    points = orthogonal_pgd(model, inputs, labels, EPS[2], start=start, steps=5)
    assert not_worse(measure(model, points, labels), measure(model, start, labels))


def test_bad_options_are_refused():
    inputs, labels = torch.rand(2, 3), torch.tensor([0, 1])
    for change, message in (
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"step_size": 0.0}, "step_size must be > 0 and finite, got 0.0"),
        ({"projected": "x"}, "projected must be one of .* got 'x'"),
        ({"margin": -0.1}, r"margin must be in \[0, 1\), got -0.1"),
    ):
        with pytest.raises(ValueError, match=message):
            orthogonal_pgd(lambda x: x, inputs, labels, 0.1, **change)
