"""One class as the target of all, and evaluations with a target or a mask."""

import math
from functools import partial

import pytest
import torch
from attack_promises import Bumps

from torchdnr.attacks import (
    EnsembleAttack,
    apgd,
    boundary_walk,
    fmn,
    line_search_pgd,
    pgd,
    primal_dual,
    square,
)
from torchdnr.decisions import predict_labels
from torchdnr.evaluation import security_evaluation
from torchdnr.evaluation.checks import run_checks
from torchdnr.evaluation.line_up import build_line_up

ATTACKS = {
    "pgd": partial(pgd, steps=15),
    "apgd": partial(apgd, steps=15),
    "line search": partial(line_search_pgd, steps=8),
    "square": partial(square, queries=100),
    "ensemble": EnsembleAttack({"pgd": partial(pgd, steps=8), "apgd": partial(apgd, steps=15)}),
    "walk": boundary_walk,
    "fmn": fmn,
    "primal-dual": primal_dual,
}


def toy():
    model = Bumps(gamma=30.0).eval()
    inputs, labels = model.samples(40)
    return model, inputs[:16], labels[:16], inputs[16:]


@pytest.mark.parametrize("name", ATTACKS)
def test_one_class_for_all_is_that_class_for_each_and_its_own_samples_are_left(name):
    model, inputs, labels, pool = toy()
    last = pool if name in ("walk", "fmn", "primal-dual") else 0.4
    own = labels == 1
    assert own.any() and not own.all()
    for_all = ATTACKS[name](model, inputs, labels, last, targets=1)
    assert torch.equal(for_all[own], inputs[own])
    wanted = torch.ones_like(labels[~own])
    alone = ATTACKS[name](model, inputs[~own], labels[~own], last, targets=wanted)
    reached = predict_labels(model(for_all), True) == 1
    if name != "square":  # which draws for each sample of its batch in turn
        torch.testing.assert_close(for_all[~own], alone)
    assert reached[~own].float().mean() > 0.5
    with pytest.raises(ValueError, match="targets must be a class >= 0"):
        ATTACKS[name](model, inputs, labels, last, targets=-1)
    with pytest.raises(ValueError, match="below the 3 classes"):
        ATTACKS[name](model, inputs, labels, last, targets=3)


@pytest.mark.parametrize("tensor", [False, True])
def test_an_evaluation_with_a_target_counts_what_is_accepted_as_it(tensor):
    model, inputs, labels, pool = toy()
    targets = torch.where(labels == 1, 2, 1) if tensor else 1
    line_up = build_line_up(["boundary-walk", "pgd"], pool)
    curve = security_evaluation(
        model, inputs, labels, [0, 0.2, 0.4], attacks=line_up, targets=targets, progress=False
    )
    with torch.no_grad():
        predictions = torch.stack([predict_labels(model(p), True) for p in curve.adversarial])
    wanted = (predictions == targets) & (labels != targets)
    assert torch.equal(predictions, curve.predictions)
    assert curve.evasion_rate == wanted.double().mean(dim=1).tolist()
    assert curve.evasion_rate[-1] > 0.4
    assert torch.equal(curve.evasion_norm.isfinite(), curve.evasion_norm < math.inf)
    if not tensor:
        own = labels == 1
        assert torch.equal(curve.adversarial[-1][own], inputs[own])
        assert curve.evasion_norm[own].isinf().all()
    with pytest.raises(ValueError, match="curve must be of an evaluation without targets"):
        run_checks(model, inputs, labels, curve, progress=False)


@pytest.mark.slow
def test_an_evaluation_with_a_mask_changes_nothing_else_and_so_do_its_checks():
    model = Bumps(gamma=6.0, theta=0.2, d=8).eval()
    inputs, labels = model.samples(40)
    inputs, labels, pool = inputs[:8], labels[:8], inputs[8:]
    mask = torch.ones(8)
    mask[5:] = 0
    evaluate = partial(security_evaluation, model, inputs, labels, [0.3, 0.8], progress=False)
    masked = evaluate(mask=mask, init_inputs=pool)
    assert torch.equal(masked.adversarial[..., 5:], inputs[:, 5:].expand(2, 8, 3))
    free = evaluate(init_inputs=pool)
    assert 0 < masked.evasion_rate[-1] <= free.evasion_rate[-1]
    assert (masked.evasion_norm >= free.evasion_norm * 0.98).all()
    options = {"samples": 4, "recorded": 2, "steps": 10, "queries": 50, "noise_draws": 50}
    report = run_checks(
        model, inputs, labels, masked, mask=mask, init_inputs=pool, progress=False, **options
    )
    checks = {check.name: check for check in report.checks}
    assert "within a mask" in checks["unbounded attack"].message
    for name in ("single step", "converged", "noise control", "stored points", "silent success"):
        assert checks[name].status == "pass", checks[name]


def test_targets_and_masks_may_be_arrays_or_lists_everywhere():
    model, inputs, labels, pool = toy()
    targets, mask = torch.where(labels == 1, 2, 1), torch.ones_like(inputs[0], dtype=torch.bool)
    mask.flatten()[0] = False
    line_up = build_line_up(["pgd"], pool)

    def curve(**options):
        return security_evaluation(
            model, inputs, labels, [0, 0.4], attacks=line_up, progress=False, **options
        )

    expected = curve(targets=targets, mask=mask).adversarial[1]
    for kind in (torch.Tensor.numpy, torch.Tensor.tolist):
        got = curve(targets=kind(targets), mask=kind(mask)).adversarial[1]
        assert torch.equal(got, expected)
    one = curve(targets=1).adversarial[1]
    assert torch.equal(curve(targets=torch.tensor(1).numpy()[()]).adversarial[1], one)
    with pytest.raises(ValueError, match="below the 3 classes"):
        curve(targets=7)


class NoEmptyBatch(torch.nn.Module):
    """A network that cannot reshape a batch of no images, and never errs."""

    def forward(self, images):
        flat = images.view(images.shape[0], -1)
        return torch.stack([flat.sum(dim=1) * 0 + 1, flat.sum(dim=1) * 0], dim=1)


@pytest.mark.parametrize("attack", [fmn, boundary_walk, primal_dual])
@pytest.mark.parametrize("levels", [None, 256])
def test_a_network_is_never_called_without_images(attack, levels):
    inputs = torch.full((3, 1, 4, 4), 128 / 255)
    labels = torch.zeros(3, dtype=torch.int64)
    with pytest.warns(UserWarning, match="found no evading point for 3 of 3"):
        points = attack(NoEmptyBatch(), inputs, labels, inputs, levels=levels)
    assert torch.equal(points, inputs)
