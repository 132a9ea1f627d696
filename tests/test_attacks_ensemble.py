"""Ensembles of attacks: the worst case per sample, and which member reached it."""

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

from torchdnr.attacks import EnsembleAttack, apgd, evades, noise, orthogonal_pgd, pgd, square

QUICK = EnsembleAttack({"pgd": partial(pgd, steps=5), "apgd": partial(apgd, steps=8)})
RANDOM = EnsembleAttack({"noise": partial(noise, draws=10), "pgd": partial(pgd, steps=5)})


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keeps_to_ball_and_box(norm, dtype):
    check_budget(QUICK, norm, dtype)


def test_promises():
    check_chunks(QUICK)
    check_model_is_unchanged(QUICK)
    check_seed(RANDOM)


@pytest.mark.parametrize("norm", NORMS)
def test_finds_in_the_plane_what_brute_force_finds(norm):
    members = {
        "apgd": partial(apgd, steps=40),
        "orthogonal": partial(orthogonal_pgd, steps=40),
        "noise": partial(noise, draws=100),
    }
    check_success(EnsembleAttack(members), norm, share=0.95)


def test_finds_targets():
    check_targeted(EnsembleAttack({"pgd": pgd, "noise": partial(noise, draws=100)}))


@pytest.mark.parametrize("targeted", [False, True])
def test_is_at_least_as_strong_per_sample_as_each_member(targeted):
    model = Bumps().eval()
    inputs, labels = model.samples()
    targets = (labels + 1) % 3 if targeted else None
    members = {
        "pgd": partial(pgd, steps=10),
        "apgd": partial(apgd, steps=10),
        "orthogonal": partial(orthogonal_pgd, steps=10),
        "large steps": partial(pgd, steps=10, step_size=0.2),
    }
    found = EnsembleAttack(members).run(model, inputs, labels, EPS[2], targets=targets)
    evading, values = measure(model, found.points, labels, targets)
    assert torch.equal(found.evading, evading)
    torch.testing.assert_close(found.values, values)
    for member in members.values():
        alone = measure(
            model, member(model, inputs, labels, EPS[2], targets=targets), labels, targets
        )
        assert (evading | ~alone[0]).all()
        assert (evading | (values <= alone[1] + 1e-9)).all()


def test_the_winner_is_the_member_that_found_the_point():
    model = Bumps().eval()
    inputs, labels = model.samples()
    members = {"weak": partial(noise, draws=3), "pgd": partial(pgd, steps=10), "apgd": apgd}
    found = EnsembleAttack(members).run(model, inputs, labels, EPS[2])
    kept = measure(model, inputs, labels)
    winner = torch.full_like(labels, -1)
    for number, member in enumerate(members.values()):
        rows = (~kept[0]).nonzero()[:, 0]  # those that do not evade yet, and no others
        points = member(model, inputs[rows], labels[rows], EPS[2])
        new = measure(model, points, labels[rows])
        lower = (new[0] & ~kept[0][rows]) | ((new[0] == kept[0][rows]) & (new[1] < kept[1][rows]))
        winner[rows[lower]] = number
        for old, values in zip(kept, new, strict=True):
            old[rows[lower]] = values[lower]
    assert torch.equal(found.winner, winner) and found.names == ("weak", "pgd", "apgd")
    counts = {name: int((winner == number).sum()) for number, name in enumerate(members)}
    assert found.wins() == counts and sum(counts.values()) == len(inputs)


def test_a_rejected_sample_goes_on_and_one_that_evades_is_finished():
    def model(x):  # 0 below 0.4, rejected up to 0.6, class 1 above
        f = x[:, 0] - 0.5
        return torch.stack([-f, f, torch.full_like(f, 0.1)], dim=1)

    seen = []

    def put(value):
        def member(model, inputs, labels, eps, **options):
            seen.append(len(inputs))
            return torch.full_like(inputs, value)

        return member

    inputs, labels = torch.tensor([[0.1], [0.3]]), torch.tensor([0, 0])
    eps = torch.tensor([0.3, 0.6])
    attack = EnsembleAttack({"band": put(0.5), "beyond": put(0.9), "never": put(0.0)})
    found = attack.run(model, inputs, labels, eps, reject=True)
    assert seen == [2, 2, 1]  # both were rejected at 0.5; then the second one evades
    assert found.evading.tolist() == [False, True] and found.winner[1] == 1
    torch.testing.assert_close(found.points, torch.tensor([[0.4], [0.9]]))


def test_rows_without_an_improvement_have_no_winner():
    inputs, labels = torch.tensor([[0.9, 0.1], [0.2, 0.9]]), torch.tensor([0, 0])
    attack = EnsembleAttack({"nothing": lambda model, inputs, *_, **options: inputs})
    found = attack.run(lambda x: x, inputs, labels, 0.1)
    assert found.winner.tolist() == [-1, -1] and found.wins() == {"nothing": 0}
    assert found.evading.tolist() == [False, True] and torch.equal(found.points, inputs)


@pytest.mark.parametrize("chain", [False, True])
def test_members_start_where_they_should(chain):
    model = Bumps().eval()
    inputs, labels = model.samples(10)
    start, starts = inputs + 0.001, []

    def member(model, inputs, labels, eps, start, **options):
        starts.append(start)
        return pgd(model, inputs, labels, eps, start=start, steps=1)

    attack = EnsembleAttack({"one": member, "two": member}, chain=chain)
    found = attack.run(model, inputs, labels, 0.01, start)
    assert not found.evading.any()
    if not chain:
        assert torch.equal(starts[0], start) and torch.equal(starts[1], start)
        return
    assert torch.equal(starts[1], pgd(model, inputs, labels, 0.01, start=starts[0], steps=1))
    assert (found.values < measure(model, starts[1], labels)[1]).any()


def test_never_worse_than_the_start():
    model = Bumps().eval()
    inputs, labels = model.samples(20)
    start = pgd(model, inputs, labels, 0.2)
    points = EnsembleAttack({"noise": partial(noise, draws=2)})(model, inputs, labels, 0.2, start)
    assert not_worse(measure(model, points, labels), measure(model, start, labels))


def test_options_reach_every_member():
    given = []

    def member(model, inputs, labels, eps, **options):
        given.append(options)
        return inputs

    attack = EnsembleAttack({"one": member, "two": member})
    attack(lambda x: x, torch.tensor([[0.9, 0.1]]), torch.tensor([0]), 0.1, norm=1, seed=5)
    expected = {"norm": 1, "seed": 5, "bounds": (0.0, 1.0), "batch_size": 256, "reject": False}
    assert given == [expected | {"start": None, "targets": None}] * 2


def test_works_on_a_model_without_gradient():
    model = Bumps().eval()
    inputs, labels = model.samples(20)

    def hidden(x):
        with torch.no_grad():
            return model(x)

    members = {"square": partial(square, queries=40), "noise": partial(noise, draws=40)}
    points = EnsembleAttack(members)(hidden, inputs, labels, EPS[2], reject=True)
    assert evades(model(points), labels, True).sum() >= 10


def test_bad_options_are_refused():
    inputs, labels = torch.rand(2, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="members must name at least one attack"):
        EnsembleAttack({})(lambda x: x, inputs, labels, 0.1)
    with pytest.raises(ValueError, match="start must have the shape"):
        EnsembleAttack({"pgd": pgd})(lambda x: x, inputs, labels, 0.1, inputs[:1])
    with pytest.raises(ValueError, match="an attack must return points like its inputs"):
        EnsembleAttack({"x": lambda *_, **options: None})(
            lambda x: x, torch.tensor([[0.9, 0.1]]), torch.tensor([0]), 0.1
        )
