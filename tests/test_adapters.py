"""The views that attack libraries see decide as the model does; the loops keep the best points."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from torchdnr.adapters import (
    as_classifier,
    attack_all_targets,
    attack_per_label,
    for_label,
    for_target,
    suspicion,
    with_reject,
)
from torchdnr.adapters.suspicion import suspicion_of_array
from torchdnr.attacks import evades
from torchdnr.decisions import REJECT, predict_with_rejection

CLASSES = 5
ROWS = 500_000
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


class Given(nn.Module):
    """Returns its input: scores and threshold that a test chooses."""

    def __init__(self, reject=True):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        if reject:
            self.reject_index = CLASSES

    def forward(self, inputs):
        return inputs


class Linear(nn.Module):
    """Linear scores of three classes in the plane, and a threshold."""

    def __init__(self, threshold=0.05, dtype=torch.float64):
        super().__init__()
        angle = torch.arange(3, dtype=torch.float64) * 2 * torch.pi / 3
        self.weight = nn.Parameter(torch.stack([angle.cos(), angle.sin()], dim=1).to(dtype))
        self.dropout = nn.Dropout(0.5)
        self.threshold, self.reject_index = threshold, 3

    def forward(self, inputs):
        scores = self.dropout((inputs - 0.5) @ self.weight.T)
        return torch.cat([scores, scores.new_full((len(scores), 1), self.threshold)], dim=1)


def random_rows(dtype, reject=True):
    """Draw scores, with ties of every kind in half of the rows, and labels."""
    generator = torch.Generator().manual_seed(0)
    shape = ROWS, CLASSES + reject
    rows = torch.randn(shape, generator=generator, dtype=dtype)
    half = ROWS // 2
    rows[:half] = torch.randint(-1, 2, (half, shape[1]), generator=generator).to(dtype)
    # One rounding apart: the next number to either side.
    side = torch.where(torch.rand(shape, generator=generator) < 0.5, -torch.inf, torch.inf)
    moved = torch.nextafter(rows, side.to(dtype))
    keep = torch.rand(shape, generator=generator) < 0.5
    quarter = ROWS // 4
    rows[:quarter] = torch.where(keep, rows, moved)[:quarter]
    rows[:quarter][rows[:quarter].abs() < 0.5] = 0  # nothing smaller than normal numbers
    return rows, torch.randint(CLASSES, (ROWS,), generator=generator)


@DTYPES
@pytest.mark.parametrize("reject", [True, False])
def test_argmax_for_a_label_differs_from_it_iff_is_evasion(dtype, reject):
    rows, labels = random_rows(dtype, reject)
    model = Given(reject)
    expected = evades(rows, labels, reject)
    assert torch.equal(for_label(model, labels)(rows).argmax(dim=1) != labels, expected)
    for label in range(CLASSES):
        own = labels == label
        logits = for_label(model, label)(rows[own])
        assert logits.shape == (own.sum(), CLASSES)
        assert torch.equal(logits.argmax(dim=1) != label, expected[own])
        # Libraries that compare margins instead of asking argmax see the same.
        others = logits.scatter(1, labels[own][:, None], -torch.inf).amax(dim=1)
        assert torch.equal(logits[:, label] <= others, expected[own])
    assert 0.1 < expected.float().mean() < 0.9


@DTYPES
@pytest.mark.parametrize("reject", [True, False])
def test_some_target_is_reached_iff_is_evasion(dtype, reject):
    rows, labels = random_rows(dtype, reject)
    reached = torch.zeros(ROWS, dtype=torch.bool)
    ties = torch.zeros(ROWS, dtype=torch.bool)
    best = rows[:, :CLASSES].amax(dim=1)
    for wanted in range(CLASSES):
        view = for_target(Given(reject), wanted)(rows)
        assert view.shape == rows.shape
        hit = view.argmax(dim=1) == wanted
        others = rows.scatter(1, torch.full((ROWS, 1), wanted), -torch.inf).amax(dim=1)
        assert torch.equal(hit, rows[:, wanted] > others)
        reached |= hit & (labels != wanted)
        ties |= (rows[:, wanted] == best) & (others == best) & (labels != wanted)
    expected = evades(rows, labels, reject)
    assert not (reached & ~expected).any()
    assert torch.equal(reached | (ties & expected), expected)  # two wrong classes, level
    assert reached.float().mean() > 0.1


@DTYPES
def test_the_column_of_rejection_wins_iff_rejected(dtype):
    rows, _ = random_rows(dtype)
    predicted = predict_with_rejection(rows[:, :-1], rows[:, -1])
    winner = with_reject(Given())(rows).argmax(dim=1)
    assert torch.equal(winner == CLASSES, predicted == REJECT)
    assert torch.equal(winner[winner < CLASSES], predicted[predicted != REJECT])
    assert not torch.equal(rows.argmax(dim=1) == CLASSES, predicted == REJECT)  # the raw output


def test_views_change_nothing_but_ties():
    rows = torch.randn(1000, CLASSES + 1, dtype=torch.float64)
    labels = torch.randint(CLASSES, (1000,))
    assert torch.equal(with_reject(Given())(rows), rows)
    assert torch.equal(for_target(Given(), 2)(rows), rows)
    assert torch.equal(as_classifier(Given())(rows), rows[:, :-1])
    expected = rows[:, :-1].clone()
    own = torch.maximum(rows.gather(1, labels[:, None])[:, 0], rows[:, -1])
    expected[torch.arange(1000), labels] = own
    assert torch.equal(for_label(Given(), labels)(rows), expected)


VIEWS = pytest.mark.parametrize(
    "make",
    [as_classifier, with_reject, lambda model: for_label(model, 1), lambda m: for_target(m, 1)],
    ids=["as_classifier", "with_reject", "for_label", "for_target"],
)


@VIEWS
def test_views_are_what_libraries_ask_for(make):
    model = Linear().eval()
    view = make(model)
    assert next(view.parameters()) is model.weight
    assert not view.training  # a library that restores the mode leaves the model in evaluation
    inputs = torch.rand(7, 2, dtype=torch.float64)
    with torch.no_grad():
        first = view(inputs)
        before = first.clone()
        first[torch.arange(7), 0] = -torch.inf  # AutoAttack's square writes into the logits
        assert torch.equal(view(inputs), before)
        kept = model(inputs)
        view(inputs).fill_(0)
        assert torch.equal(model(inputs), kept)
    rows = torch.randn(2, CLASSES + 1)
    make(Given())(rows).zero_()
    assert rows.abs().sum() > 0  # even where the model returns what it was given


@VIEWS
def test_views_are_differentiable(make):
    view = make(Linear().eval())
    inputs = torch.rand(6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(view, inputs)


def test_gradient_ignores_the_true_class_while_the_input_is_rejected():
    model = Linear(threshold=10.0).eval()
    inputs = torch.rand(6, 2, dtype=torch.float64, requires_grad=True)
    own = for_label(model, 1)(inputs)[:, 1]
    assert torch.equal(own, torch.full_like(own, 10.0))
    assert torch.autograd.grad(own.sum(), inputs)[0].abs().max() == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: for_label(lambda x: x, 0), "model must be a torch.nn.Module, got function"),
        (lambda: with_reject(Given(reject=False)), "without reject_index"),
        (lambda: for_label(Given(), -1), "labels must be a class >= 0"),
        (lambda: for_label(Given(), torch.zeros(3)), "labels must be a class .*float32"),
        (lambda: for_target(Given(), -1), "target must be a class >= 0, got -1"),
        (
            lambda: for_label(Given(), torch.tensor([0, 1]))(torch.zeros(3, 6)),
            "given 2 labels and then 3 inputs",
        ),
    ],
)
def test_views_refuse_what_they_cannot_show(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def plane(n=60):
    """Points in the plane with the class that ``Linear`` gives them, accepted or not."""
    inputs = torch.rand(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return inputs, Linear().eval()(inputs)[:, :3].argmax(dim=1)


def step_along_gradient(sign):
    """Make a one-step l2 attack that moves against (+1) or towards (-1) the given classes."""

    def attack(view, inputs, classes):
        assert len(classes.unique()) == 1 and not view.training
        inputs = inputs.clone().requires_grad_()
        loss = nn.functional.cross_entropy(view(inputs), classes, reduction="sum")
        gradient = torch.autograd.grad(loss, inputs)[0]
        gradient = gradient / gradient.norm(dim=1, keepdim=True).clamp_min(1e-12)
        return (inputs + sign * 0.4 * gradient).clamp(0, 1).detach()

    return attack


def test_attack_per_label_keeps_order_and_modes():
    inputs, labels = plane()
    model = Linear().train()
    found = attack_per_label(step_along_gradient(1), model, inputs, labels)
    model.eval()
    for row in range(len(inputs)):
        view, one = for_label(model, int(labels[row])), slice(row, row + 1)
        alone = step_along_gradient(1)(view, inputs[one], labels[one])
        torch.testing.assert_close(found[one], alone)
    assert evades(model(found), labels, reject=True).any()
    model.train()
    attack_per_label(step_along_gradient(1), model, inputs, labels)
    assert model.training and model.dropout.training


def test_attack_all_targets_keeps_the_nearest_evading_point():
    inputs, labels = plane()
    model = Linear().eval()
    attack = step_along_gradient(-1)
    found = attack_all_targets(attack, model, inputs, labels)
    best = torch.full((len(inputs),), torch.inf, dtype=torch.float64)
    for wanted in range(3):
        points = attack(for_target(model, wanted), inputs, torch.full_like(labels, wanted))
        size = (points - inputs).norm(dim=1)
        good = evades(model(points), labels, reject=True) & (labels != wanted)
        best = torch.where(good & (size < best), size, best)
    evading = evades(model(found), labels, reject=True)
    assert torch.equal(evading, best.isfinite()) and 0 < evading.sum() < len(inputs)
    torch.testing.assert_close((found - inputs).norm(dim=1)[evading], best[evading])


def test_attack_all_targets_returns_evading_inputs_as_they_are():
    inputs, labels = plane()
    model = Linear(threshold=0.2).eval()
    wrong = (labels + 1) % 3
    evading = evades(model(inputs), wrong, reject=True)
    assert 0 < evading.sum() < len(inputs)
    found = attack_all_targets(step_along_gradient(-1), model, inputs, wrong)
    assert torch.equal(found[evading], inputs[evading])


def test_attack_all_targets_never_ends_above_the_input():
    inputs, labels = plane()

    def useless(view, inputs, targets):
        return torch.full_like(inputs, 0.5)  # all scores level, and rejected

    model = Linear().eval()
    found = attack_all_targets(useless, model, inputs, labels)

    def margin(points):
        output = model(points)
        own = torch.maximum(output.gather(1, labels[:, None])[:, 0], output[:, 3])
        return own - output[:, :3].scatter(1, labels[:, None], -torch.inf).amax(dim=1)

    assert (margin(found) <= margin(inputs)).all()
    assert (margin(found) < margin(inputs)).any()


@pytest.mark.parametrize("loop", [attack_per_label, attack_all_targets])
def test_loops_refuse_what_does_not_fit(loop):
    inputs, labels = plane()
    model = Linear().eval()
    with pytest.raises(ValueError, match=r"attack must return a tensor .* got tuple"):
        loop(lambda view, x, y: (x, x), model, inputs, labels)
    with pytest.raises(ValueError, match=r"attack must return a tensor .* got \(1, 2\)"):
        loop(lambda view, x, y: x[:1], model, inputs, labels)
    with pytest.raises(ValueError, match="labels must be int64"):
        loop(lambda view, x, y: x, model, inputs, labels.int())
    with pytest.raises(ValueError, match="labels must be below the 3 classes"):
        loop(lambda view, x, y: x, model, inputs, labels + 3)


def test_suspicion_says_what_is_rejected():
    inputs, _ = plane()
    model = Linear(threshold=0.2).train()
    by_batch = suspicion_of_array(model, inputs.numpy(), 7)
    assert model.training and model.dropout.training
    model.eval()
    output = model(inputs)
    rejected = output[:, :3].amax(dim=1) <= output[:, 3]
    assert 0 < rejected.sum() < len(inputs)
    assert torch.equal(suspicion(model, inputs) >= 0, rejected)
    assert torch.equal(by_batch >= 0, rejected)
    expected = (output[:, 3] - output[:, :3].amax(dim=1)).detach()
    torch.testing.assert_close(by_batch, expected)


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("AcceptedMisclassification", "foolbox"),
        ("ARTDetector", "adversarial-robustness-toolbox"),
        ("RejectionDetector", "pytorch-ood"),
    ],
)
def test_a_missing_package_is_named(name, package, monkeypatch):
    import torchdnr.adapters as adapters

    for module in ("foolbox", "art", "pytorch_ood"):
        monkeypatch.setitem(sys.modules, module, None)  # import fails, installed or not
    parts = "foolbox.", "art.", "pytorch_ood."
    for loaded in [key for key in sys.modules if key.startswith(parts)]:
        monkeypatch.delitem(sys.modules, loaded)
    for own in ("foolbox_criterion", "art_detector", "pytorch_ood_detectors"):
        monkeypatch.delitem(sys.modules, f"torchdnr.adapters.{own}", raising=False)
    with pytest.raises(ImportError, match=rf"needs {package}.*torchdnr\[peers\]"):
        getattr(adapters, name)
    assert name in dir(adapters)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = adapters.nothing


@pytest.mark.slow
def test_importing_the_adapters_imports_no_other_library():
    code = (
        "import sys, torchdnr.adapters, torchdnr.rejection; "
        "print(sorted({'foolbox', 'art', 'pytorch_ood', 'eagerpy'} & set(sys.modules)))"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"
