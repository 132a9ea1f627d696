"""On any device that is not the CPU: nothing stays behind there, and loops hardly wait for it."""

from functools import partial

import pytest
import torch
from accelerator import accelerator, waits
from small_models import LAYERS, fitted, make_images, options, small_network
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torchdnr import DNR, NR, RBFSVM
from torchdnr.adapters import attack_all_targets
from torchdnr.attacks import (
    EnsembleAttack,
    apgd,
    boundary_walk,
    ddn,
    fmn,
    line_search_pgd,
    lowest_confidence,
    multi_target,
    noise,
    orthogonal_pgd,
    pgd,
    primal_dual,
    smoothed_pgd,
    square,
    transfer,
)
from torchdnr.evaluation import (
    auroc_difference,
    measure,
    median_of,
    risk_coverage,
    roc_curve,
    security_evaluation,
    stratified_curve,
    threshold_sweep,
)
from torchdnr.evaluation.checks import run_checks
from torchdnr.evaluation.line_up import build_line_up
from torchdnr.models.training import TrainingSettings, train_network
from torchdnr.resources import default_device, has_float64
from torchdnr.svm import grid_search, solve_dual


class WithTheta(nn.Module):
    """Linear scores of three classes, and a threshold: cheap to attack."""

    reject_index = 3

    def __init__(self):
        super().__init__()
        self.scores = nn.Linear(64, 3)

    def forward(self, images):
        scores = self.scores(images.flatten(1))
        return torch.cat([scores, scores.new_full((len(scores), 1), -0.1)], dim=1)


IMAGES, LABELS = make_images(30), torch.arange(30) % 3


def on(device, kind=DNR):
    """Fit a classifier on a device, and return it with images and labels there."""
    torch.manual_seed(0)
    layers = LAYERS if kind is DNR else LAYERS[-1]
    names = [*LAYERS, "combiner"] if kind is DNR else [layers]
    model = kind(small_network().to(device), layers, **options(*names))
    images = IMAGES.to(device)
    return fitted(model, images), images, LABELS.to(device)


@pytest.fixture(scope="module")
def on_cpu():
    """What the CPU finds: a classifier, and its output."""
    model, images, _ = on(torch.device("cpu"))
    return model, model(images).detach()


@pytest.mark.parametrize("float64", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_classifier_is_fitted_used_saved_and_loaded_on_any_device(on_cpu, tmp_path, float64):
    with accelerator(float64=float64) as device:
        model, images, _ = on(device)
        assert any("svm/newton.py" in what for what in waits) == float64  # else on the CPU
        parts = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        assert {tensor.device for tensor in parts.values()} == {device}
        output, labels = model(images), model.predict(images)
        assert output.device == labels.device == device
        model.save(tmp_path / "dnr")
        net = model.net.to(device)
        assert torch.equal(DNR.load(tmp_path / "dnr", net)(images).cpu(), output.cpu())
        svm = model.base_svms[1]
        svm.save(tmp_path / "svm")
        assert RBFSVM.load(tmp_path / "svm").to(device)(images[:, 0, 0, :3]).device == device
    # Two of the solver's ways to the optimum; theta lies among the scores.
    torch.testing.assert_close(output.detach().cpu(), on_cpu[1], rtol=0, atol=1e-2)


@pytest.mark.filterwarnings("ignore::torchdnr.svm.compression.CompressionWarning")
@pytest.mark.parametrize("float64", [True, False])
def test_a_classifier_fitted_on_the_cpu_moves_to_a_device_and_is_compressed_there(on_cpu, float64):
    model, expected = on_cpu
    smaller = model.compress(IMAGES, factor=2, steps=2, joint_steps=2).calibrate(IMAGES, 0.2)
    try:
        with accelerator(float64=float64) as device:
            there = model.to(device)
            torch.testing.assert_close(there(IMAGES.to(device)).cpu(), expected, rtol=0, atol=1e-4)
            again = there.compress(IMAGES.to(device), factor=2, steps=2, joint_steps=2)
            assert again.threshold.device == again.base_svms[0].center.device == device
            scores = again.scores(IMAGES.to(device)).cpu()
    finally:
        model.to("cpu")
    torch.testing.assert_close(scores, smaller.scores(IMAGES), rtol=0, atol=1e-3)


def test_an_svm_of_a_device_without_float64_says_what_to_do():
    with accelerator(float64=False) as device:
        assert not has_float64(device) and default_device().type == "cpu"
        features, labels = IMAGES.flatten(1).to(device), LABELS.to(device)
        for fit in (RBFSVM(1.0).fit, grid_search):
            with pytest.raises(ValueError, match=r"which pretend:0 does not have: call .cpu\(\)"):
                fit(features, labels)
        with pytest.raises(ValueError, match="fitted in float64"):
            solve_dual(torch.eye(3).to(device), torch.ones(3, 1).to(device), 1.0)


def test_loaders_and_the_training_of_a_network_know_any_device():
    with accelerator() as device:
        assert default_device().type == device.type
        loader = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=10)
        net = small_network()
        train_network(net, IMAGES, LABELS, TrainingSettings(1, 0.01, 0.9, 10), device=device)
        assert next(net.parameters()).device == device
        searched = NR(net, "logits", C_grid=(1.0,), gamma_grid=(1.0,), folds=2).fit(loader)
        assert searched.calibrate(DataLoader(IMAGES.flip(-1), batch_size=7)).threshold.isfinite()


def counted(run):
    """Count the waits of a call on the device."""
    waits.clear()
    run()
    return sum(waits.values())


STEPS = {
    "pgd": lambda *given, steps: pgd(*given, 1.0, steps=steps),
    "pgd, l1": lambda *given, steps: pgd(*given, 9.0, steps=steps, norm=1),
    "pgd, l-infinity": lambda *given, steps: pgd(*given, 0.1, steps=steps, norm=torch.inf),
    "apgd": lambda *given, steps: apgd(*given, 1.0, steps=steps, restarts=1),
    "apgd, l1": lambda *given, steps: apgd(*given, 9.0, steps=steps, norm=1),
    "orthogonal": lambda *given, steps: orthogonal_pgd(*given, 1.0, steps=steps),
    "multi-target": lambda *given, steps: multi_target(*given, 1.0, steps=steps),
    "lowest confidence": lambda model, x, y, steps: lowest_confidence(
        model, x, 1.0, steps=steps, restarts=1
    ),
    "noise": lambda *given, steps: noise(*given, 1.0, draws=steps),
    "transfer": lambda model, *given, steps: transfer(
        pgd, model, model, *given, 1.0, steps=steps, shares=1
    ),
    "boundary walk": lambda *given, steps: boundary_walk(
        *given, IMAGES.to(given[1].device), steps=steps, starts=3
    ),
    "ddn": lambda *given, steps: ddn(*given, IMAGES.to(given[1].device), steps=steps),
    "fmn": lambda *given, steps: fmn(*given, IMAGES.to(given[1].device), steps=steps),
    "primal-dual": lambda *given, steps: primal_dual(
        *given, IMAGES.to(given[1].device), steps=steps
    ),
    "ensemble": lambda *given, steps: EnsembleAttack(
        {"pgd": partial(pgd, steps=steps), "apgd": partial(apgd, steps=steps)}
    )(*given, 1.0),
    "mask": lambda *given, steps: pgd(*given, 1.0, steps=steps, mask=given[1][0] > 0.5),
    "one class for all": lambda *given, steps: apgd(*given, 1.0, steps=steps, targets=1),
}


@pytest.mark.filterwarnings("ignore:found no evading point")
@pytest.mark.parametrize("name", STEPS)
def test_the_steps_of_an_attack_wait_for_nothing(name):
    with accelerator() as device:
        given = WithTheta().to(device), IMAGES[:4].to(device), LABELS[:4].to(device)
        few, many = (counted(lambda n=n: STEPS[name](*given, steps=n)) for n in (3, 6))
    assert few == many <= 40, dict(waits)


@pytest.mark.parametrize("norm", [1, 2, torch.inf])
def test_a_step_of_the_line_search_waits_twice(norm):
    with accelerator() as device:
        given = WithTheta().to(device), IMAGES[:4].to(device), LABELS[:4].to(device), 0.3
        few, many = (
            counted(lambda n=n: line_search_pgd(*given, norm=norm, steps=n)) for n in (3, 6)
        )
    assert many - few <= 2 * 3, dict(waits)


@pytest.mark.slow
def test_the_search_by_squares_waits_once_in_some_tens_of_queries():
    with accelerator() as device:
        given = WithTheta().to(device), IMAGES[:2].to(device), LABELS[:2].to(device), 1.0
        few, many = (counted(lambda n=n: square(*given, queries=n)) for n in (25, 50))
    assert many - few <= 1, dict(waits)


@pytest.mark.slow
def test_attacks_on_a_classifier_of_svms_mix_no_devices():
    with accelerator() as device:
        model, images, labels = on(device, NR)
        given = model, images[:4], labels[:4]
        for attacked in (
            pgd(*given, 1.0, steps=2),
            smoothed_pgd(*given, 1.0, factors=(4.0, 2.0), steps=2),
            line_search_pgd(*given, 1.0, steps=2, init_inputs=images),
        ):
            assert attacked.device == device and attacked.shape == images[:4].shape
        few, many = (
            counted(lambda n=n: smoothed_pgd(*given, 1.0, factors=(4.0, 2.0), steps=n))
            for n in (2, 4)
        )
        assert few == many


@pytest.mark.parametrize("float64", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_security_evaluation_runs_on_any_device(float64):
    with accelerator(float64=float64) as device:
        model, images, labels = on(device, NR)
        names = ["line-search-pgd", "boundary-walk", "apgd"]
        attacks = build_line_up(names, images, norm=2, batch_size=32, options={"steps": 2})
        curve = security_evaluation(
            model, images[:2], labels[:2], [0, 1.0], attacks=attacks, init_inputs=images
        )
    assert len(curve.accuracy) == 2 and all(0 <= rate <= 1 for rate in curve.accuracy)
    assert curve.adversarial.device.type == "cpu"


@pytest.mark.filterwarnings("ignore:found no evading point")
def test_what_is_measured_on_a_device_without_float64_is_what_a_cpu_measures():
    torch.manual_seed(0)
    model = WithTheta()
    inputs, labels, step = IMAGES[:6], LABELS[:6], {"steps": 2, "starts": 1, "neighbours": 1}

    attacks = build_line_up(["boundary-walk", "pgd"], inputs, options=step)
    curve = security_evaluation(model, inputs, labels, [0, 6.0], attacks=attacks, progress=False)

    def measured(images, labels):
        attacks = build_line_up(["pgd"], images, options={"steps": 2})
        given = model.to(images.device), images, labels
        few = {"noise_draws": 2, "recorded": 1, "init_inputs": images, "reference": {3.0: 0.5}}
        few["only"] = ["silent success", "converged", "noise control", "plausible at eps / 2"]
        checks = run_checks(*given, curve, attacks=attacks, **few).to_dict()["checks"]
        assert not [check for check in checks if "errors" in check["counts"]]
        points, output = curve.adversarial[1], model(images).detach()
        best, worst = output[:, 0], output[:, 1]
        groups = (best[:3], best[3:]), (worst[:3], worst[3:])
        found = attack_all_targets(lambda view, x, _: (x + 0.1).clamp(0, 1), *given)
        return {
            "measures": measure(*given[:2], curve, calibration=(images, labels)).to_dict(),
            "stratified": stratified_curve(
                *given, points, 6.0, reject_options={"steps": 1, "restarts": 0}
            ).to_dict(),
            "sweep": threshold_sweep(*given, {6.0: points}, [-0.2, 0.1]).to_dict(),
            "risk": risk_coverage(output, labels, True).to_dict(),
            "roc": [rates.cpu().tolist() for rates in roc_curve(*groups[0])],
            "areas": auroc_difference(*groups).to_dict(),
            "median": median_of(best).to_dict(),
            "targets": found.cpu().tolist(),
        }

    expected = measured(inputs, labels)
    with accelerator(float64=False) as device:
        found = measured(inputs.to(device), labels.to(device))
    for name, numbers in expected.items():
        assert close(found[name], numbers), name


def close(one, two):
    """Compare results as JSON has them, numbers up to rounding."""
    if isinstance(two, dict):
        return one.keys() == two.keys() and all(close(one[key], two[key]) for key in two)
    if isinstance(two, list):
        return len(one) == len(two) and all(map(close, one, two))
    return (
        one == pytest.approx(two, abs=1e-4, nan_ok=True) if isinstance(two, float) else one == two
    )


def test_a_step_of_newtons_method_waits_twice_and_an_outer_step_little_more_often():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 5, generator=generator)
    y = (x[:, 0] + x[:, 1].square() > 0.7).long()
    with accelerator() as device:
        svm = RBFSVM(10.0, 0.3)
        total = counted(lambda: svm.fit(x.to(device), y.to(device)))
    newton = sum(n for what, n in waits.items() if "svm/newton.py" in what)
    steps = sum(n for what, n in waits.items() if "nonzero svm/newton.py" in what)
    assert steps > 0 and newton <= 2 * steps + 2
    assert total <= 9 * steps + 40, dict(waits)
    scores = RBFSVM(10.0, 0.3).fit(x, y)(x[:9])
    torch.testing.assert_close(svm.cpu()(x[:9]), scores, rtol=0, atol=2e-3)


def test_rounds_of_active_sets_wait_as_often_for_many_problems_as_for_one():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 8, generator=generator)
    y = torch.where(torch.rand(1000, 1, generator=generator) < 0.5, 1.0, -1.0).double()
    kernel = torch.exp(-0.5 * torch.cdist(x, x).square())
    solutions = []

    def solve(targets):
        solutions.append(solve_dual(kernel.to(targets.device), targets, 10.0))

    with accelerator() as device:
        one, eight = y.to(device), y.repeat(1, 8).to(device)
        few, many = counted(lambda: solve(one)), counted(lambda: solve(eight))
        assert set(solutions[1].method) == {"active set"}
        assert solutions[0].method == solutions[1].method[:1]
        rounds = int(solutions[0].steps[0])
    assert 2 < rounds and many <= few + 2, dict(waits)
    assert few <= 25 * rounds + 100, dict(waits)
    expected = solve_dual(kernel, y, 10.0)
    torch.testing.assert_close(solutions[0].objective.cpu(), expected.objective, rtol=1e-6, atol=0)
