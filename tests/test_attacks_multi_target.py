"""Multi-target: every other class in turn, the most promising first."""

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
    measure,
    not_worse,
)

from torchdnr.attacks import evades, multi_target, pgd

QUICK = partial(pgd, steps=8)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keeps_to_ball_and_box(norm, dtype):
    check_budget(partial(multi_target, attack=QUICK), norm, dtype)


def test_promises():
    check_chunks(partial(multi_target, attack=QUICK))
    check_model_is_unchanged(partial(multi_target, attack=QUICK))
    check_seed(partial(multi_target, attack=QUICK, random_start=True))


@pytest.mark.parametrize("norm", NORMS)
def test_finds_in_the_plane_most_of_what_brute_force_finds(norm):
    check_success(partial(multi_target, attack=partial(pgd, restarts=2)), norm)


def watched(calls):
    """Return an attack that notes what it is given and finds nothing."""

    def attack(model, inputs, labels, eps, *, targets, start, **options):
        calls.append((inputs, labels, eps, targets, start, options))
        return inputs

    return attack


def test_classes_come_by_their_score_and_never_the_true_one():
    weight = torch.randn(5, 8, dtype=torch.float64)
    inputs = torch.rand(20, 8, dtype=torch.float64)
    labels = torch.arange(20) % 5

    def model(x):
        return x @ weight.T + 100 * torch.nn.functional.one_hot(labels[: len(x)], 5)

    calls = []
    multi_target(model, inputs, labels, 0.1, attack=watched(calls), extra=7)
    order = torch.stack([call[3] for call in calls], dim=1)
    expected = model(inputs).argsort(dim=1, descending=True)[:, 1:]
    assert torch.equal(order, expected)
    assert all(call[5]["extra"] == 7 and call[5]["reject"] is False for call in calls)
    calls.clear()
    multi_target(model, inputs, labels, 0.1, attack=watched(calls), classes=2)
    assert torch.equal(torch.stack([call[3] for call in calls], dim=1), expected[:, :2])


def test_nan_scores_take_no_class_away():
    def model(x):
        scores = torch.stack([x[:, 0], x[:, 1], x[:, 0] * torch.nan, -x[:, 1]], dim=1)
        return scores + 0 * x[:, :1]

    calls = []
    inputs = torch.tensor([[0.9, 0.1], [0.1, 0.9]])
    multi_target(model, inputs, torch.tensor([0, 1]), 0.1, attack=watched(calls))
    order = torch.stack([call[3] for call in calls], dim=1)
    assert order.sort(dim=1).values.tolist() == [[1, 2, 3], [0, 2, 3]]


def test_a_row_that_evades_is_not_attacked_again():
    model = Bumps().eval()
    inputs, labels = model.samples()
    eps = torch.linspace(0, 0.4, len(inputs), dtype=torch.float64)
    rows, start = [], inputs.clone()

    def attack(model, inputs, labels, eps, **options):
        rows.append((inputs, labels, eps, options["start"]))
        return pgd(model, inputs, labels, eps, **options)

    points = multi_target(model, inputs, labels, eps, attack=attack, start=start)
    evading = evades(model(points), labels, True)
    assert len(rows[0][0]) == len(inputs) > len(rows[1][0]) > 0
    assert (~evading).sum() < len(rows[1][0])
    where = torch.stack([(inputs == row).all(dim=1).nonzero()[0, 0] for row in rows[1][0]])
    assert torch.equal(labels[where], rows[1][1]) and torch.equal(eps[where], rows[1][2])
    assert torch.equal(start[where], rows[1][3])


def test_is_at_least_as_strong_as_the_attack_on_each_class():
    model = Bumps().eval()
    inputs, labels = model.samples()
    points = multi_target(model, inputs, labels, EPS[2], attack=QUICK)
    got = measure(model, points, labels)
    for step in (1, 2):
        targets = (labels + step) % 3
        alone = QUICK(model, inputs, labels, EPS[2], targets=targets)
        assert (got[0] | ~evades(model(alone), labels, True)).all()
    assert not_worse(got, measure(model, inputs, labels))


def test_gets_where_the_untargeted_attack_is_trapped():
    # class 1 leads at the input but is never accepted; class 2 is, further on
    def model(x):
        one = 0.3 - (x[:, 0] - 0.55).abs()
        two = 1.6 * x[:, 1] - 0.6
        return torch.stack([torch.full_like(one, 0.29), one, two, torch.full_like(one, 0.4)], dim=1)

    inputs, labels = torch.tensor([[0.5, 0.5]]), torch.tensor([0])
    assert not evades(model(pgd(model, inputs, labels, 0.4, reject=True)), labels, True).any()
    points = multi_target(model, inputs, labels, 0.4, reject=True)
    assert evades(model(points), labels, True).all()


def test_bad_options_are_refused():
    inputs, labels = torch.rand(2, 3), torch.tensor([0, 1])
    for change, message in (
        ({"classes": 0}, "classes must be >= 1, got 0"),
        ({"targets": labels}, "targets are chosen by multi_target"),
        ({"start": inputs[:1]}, "start must have the shape"),
    ):
        with pytest.raises(ValueError, match=message):
            multi_target(lambda x: x, inputs, labels, 0.1, **change)
