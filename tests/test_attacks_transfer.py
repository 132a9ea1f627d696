"""Transfer: what is crafted on a surrogate, judged on the model."""

from functools import partial

import pytest
import torch
from attack_promises import (
    EPS,
    NORMS,
    Bumps,
    blind,
    brute_force,
    check_budget,
    check_chunks,
    check_model_is_unchanged,
    check_seed,
    measure,
    not_worse,
)

from torchdnr.attacks import evades, pgd, project, transfer

QUICK = partial(pgd, steps=8)


def itself(model, *args, **options):
    """Take the attacked model, or a copy in its place, for the surrogate."""
    return transfer(QUICK, model, model, *args, **options)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keeps_to_ball_and_box(norm, dtype):
    check_budget(itself, norm, dtype)


def test_promises():
    check_chunks(partial(itself, surrogate_reject=True))
    check_model_is_unchanged(itself)
    check_seed(partial(itself, random_start=True))


def test_points_of_a_surrogate_evade_a_model_without_gradient():
    model, surrogate = Bumps().eval(), Bumps(gamma=30.0, reject=False).eval()
    inputs, labels = model.samples()
    hidden = blind(model)
    points = transfer(pgd, surrogate, hidden, inputs, labels, EPS[2], reject=True, restarts=2)
    evading = evades(hidden(points), labels, True)
    possible = brute_force(hidden, inputs, labels, EPS[2], 2)
    assert 0.5 * possible.sum() <= evading.sum() <= possible.sum() + 1
    hidden.reject_index = 3
    assert not_worse(measure(hidden, points, labels), measure(hidden, inputs, labels))


def test_returns_the_best_of_all_candidates_on_the_model():
    model, surrogate = Bumps().eval(), Bumps(gamma=30.0, reject=False).eval()
    inputs, labels = model.samples()
    points = transfer(QUICK, surrogate, model, inputs, labels, EPS[2], shares=3)
    got = measure(model, points, labels)
    for objective in ("decision", "cross-entropy"):
        crafted = QUICK(surrogate, inputs, labels, EPS[2], objective=objective)
        for share in (1 / 3, 2 / 3, 1.0):
            point = project(inputs + share * (crafted - inputs), inputs, EPS[2], 2, (0.0, 1.0))
            assert not_worse(got, measure(model, point, labels))


def test_a_nearer_point_may_be_accepted_where_the_crafted_one_is_not():
    def surrogate(x):
        return torch.stack([0.5 - x[:, 0], x[:, 0] - 0.5], dim=1)

    def model(x):  # accepts class 1 about x = 0.6 only
        near = 0.1 - (x[:, 0] - 0.6).abs()
        return torch.stack([0.5 - x[:, 0], near, torch.zeros_like(near)], dim=1)

    inputs, labels = torch.tensor([[0.4]]), torch.tensor([0])
    for shares, expected in ((1, False), (4, True)):
        points = transfer(pgd, surrogate, model, inputs, labels, 0.4, shares=shares, reject=True)
        assert evades(model(points), labels, True).item() is expected


def test_a_surrogate_of_no_use_does_no_harm():
    model = Bumps().eval()
    inputs, labels = model.samples()

    def away(surrogate, inputs, labels, eps, **options):
        return torch.ones_like(inputs) * torch.inf  # far outside of the ball

    points = transfer(away, model, model, inputs, labels, 0.0)
    assert torch.equal(points, inputs)
    points = transfer(
        lambda *args, **_: torch.full_like(inputs, torch.nan), model, model, inputs, labels, 0.2
    )
    assert torch.equal(points, inputs)


def test_targets_are_passed_on_and_judged():
    model, surrogate = Bumps().eval(), Bumps(gamma=30.0, reject=False).eval()
    inputs, labels = model.samples()
    targets = (labels + 1) % 3
    points = transfer(pgd, surrogate, model, inputs, labels, 0.3, targets=targets, restarts=1)
    reached = measure(model, points, labels, targets)[0]
    possible = brute_force(model, inputs, labels, 0.3, 2, targets)
    assert reached.sum() >= 0.5 * possible.sum() > 0
    assert not (reached & ~possible).any()


def test_never_worse_than_the_start():
    model, surrogate = Bumps().eval(), Bumps(gamma=5.0).eval()
    inputs, labels = model.samples()
    start = pgd(model, inputs, labels, 0.2)
    points = transfer(QUICK, surrogate, model, inputs, labels, 0.2, start=start)
    assert not_worse(measure(model, points, labels), measure(model, start, labels))


def test_bad_options_are_refused():
    model = Bumps().eval()
    inputs, labels = model.samples(4)
    attack = partial(transfer, pgd, model, model, inputs, labels, 0.1)
    for change, message in (
        ({"objectives": ()}, "objectives must be >= 1, got 0"),
        ({"shares": 0}, "shares must be >= 1, got 0"),
        ({"start": inputs[:2]}, "start must have the shape"),
        ({"norm": 3}, "no norm 3"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"targets": labels}, "targets must be classes >= 0 other than the true ones"),
    ):
        with pytest.raises(ValueError, match=message):
            attack(**change)
    with pytest.raises(ValueError, match="an attack must return points like its inputs"):
        transfer(lambda *args, **_: inputs[:1], model, model, inputs, labels, 0.1)
