"""An evaluation that is too weak, or whose points are wrong, trips the check that says so.

On a linear model with a reject band the samples that can be evaded are known in closed form.
"""

import copy
import json
import math

import pytest
import torch
from torch import nn

from torchdnr.evaluation import Attack, SecurityCurve, security_evaluation
from torchdnr.evaluation.checks import CHECKS, Check, CheckReport, run_checks
from torchdnr.evaluation.checks.context import choose_eps
from torchdnr.resources import default_batch_size

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
EPS = [0, 0.1, 0.2, 0.3, 0.4]
BAND = 0.05
SMALL = {"recorded": 3, "steps": 10, "draws": 5, "noise_draws": 50, "queries": 100}


class Linear(nn.Module):
    """Two classes told apart at x_0 = 0.5, rejected within 0.05 of it."""

    reject_index = 2

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        side = (x[:, :1] - 0.5) * self.weight
        return torch.cat([-side, side, side.new_full(side.shape, BAND)], dim=1)


def idle(model, inputs, labels, eps, start):
    """Look at the input and do nothing."""
    model(inputs)
    return start


def best(model, inputs, labels, eps, start):
    """Step straight to the other side, to the edge of the ball."""
    points = inputs.clone()
    points[:, 0] += 0.999999 * eps * (1 - 2 * labels.to(inputs))
    points = points.clamp(0, 1)
    model(points)
    return points


def forgetful(model, inputs, labels, eps, start):
    """Find the best point and return the last one."""
    best(model, inputs, labels, eps, start)
    return idle(model, inputs, labels, eps, inputs)


def slow(model, inputs, labels, eps, start):
    """Creep towards the other side in equal steps that are too few."""
    points = inputs.clone()
    for _ in range(10):
        points[:, 0] += 0.001 * (1 - 2 * labels.to(inputs))
        model(points)
    return points


@pytest.fixture(params=DEVICES)
def data(request):
    x = torch.rand(40, 4)
    x[:, 0] = torch.where(x[:, 0] > 0.5, x[:, 0] * 0.8 + 0.2, x[:, 0] * 0.8)  # off the border
    return x.to(request.param), (x[:, 0] > 0.5).long().to(request.param)


def evadable(data, eps):
    """Count samples with an accepted point of the other class within eps."""
    return ((data[0][:, 0].double() - 0.5).abs() + BAND < eps).cpu()


def evaluate(data, attack, model=None, **options):
    model = Linear().to(data[0].device) if model is None else model
    attacks = {"the attack": attack if isinstance(attack, Attack) else Attack(attack)}
    curve = security_evaluation(model, *data, EPS, attacks=attacks, progress=False)
    return model, curve, {"attacks": attacks, **SMALL, **options}


def check(data, attack, model=None, **options):
    model, curve, options = evaluate(data, attack, model, **options)
    return run_checks(model, *data, curve, **options)


def scores_alone(x):
    return torch.cat([0.5 - x[:, :1], x[:, :1] - 0.5], dim=1)


WEAKER = ["converged", "single step", "transfer", "adaptive attack"]


@pytest.mark.parametrize("norm", [2, math.inf])
def test_every_weaker_attack_finds_what_an_idle_evaluation_missed(data, norm):
    only = [*WEAKER, "noise control", "black-box attack", "unbounded attack", "chance at large eps"]
    model = Linear().to(data[0].device)
    attacks = {"idle": Attack(idle)}
    curve = security_evaluation(model, *data, EPS, norm=norm, attacks=attacks, progress=False)
    options = {"surrogate": scores_alone, "samples": 40, "only": only, **SMALL}
    report = run_checks(model, *data, curve, attacks=attacks, **options)
    assert report.names("fail") == [name for name in CHECKS if name in only], str(report)
    missed = int(evadable(data, 0.4).sum())
    for name in WEAKER:
        assert report[name].counts["evaded"] == missed
        assert report[name].counts["accuracy_drop"] == pytest.approx(missed / 40)
    for name in ("noise control", "black-box attack"):
        assert 0 < report[name].counts["evaded"] <= missed
    assert report["unbounded attack"].counts["evaded"] == 0
    assert report["unbounded attack"].counts["evaded_from_the_input"] == 40


def test_an_optimal_evaluation_passes(data):
    report = check(data, best, surrogate=scores_alone, eps=0.3, samples=32)
    assert set(report.names("skipped")) == {"components"}, str(report)
    assert report.names("fail") == []
    assert report.names("warn") == [], str(report)
    assert report.settings["eps"] == 0.3
    assert report.settings["unevaded"] == min(32, int((~evadable(data, 0.3)).sum()))

    s, t, k, n = 32, SMALL["steps"], len(EPS), len(data[0])  # the cost keeps to its bound
    each = 2 * SMALL["draws"] + SMALL["noise_draws"] + SMALL["queries"]
    bound = s * (each + 11 * t + 1900 + 1) + SMALL["recorded"] * 2 + (k + 1) * n + n
    assert 0 < report.forwards <= bound
    assert 0 < report.backwards <= s * (11 * t + 1300)


def test_a_success_that_is_not_returned_is_silent(data):
    only = ["silent success"]
    report = check(data, forgetful, only=only, recorded=40)
    possible = int((evadable(data, 0.4)[:40]).sum())
    assert report.status == "fail" and "the attack" in report["silent success"].message
    rows = report.settings["unevaded"]
    assert 0 < report["silent success"].counts["silent"] <= min(possible, rows)
    assert check(data, best, only=only).status == "pass"


def test_a_nearer_success_that_is_not_returned_is_silent(data):
    def wasteful(model, inputs, labels, eps, start):
        points = inputs.clone()
        points[:, 0] = 0.5 + 1.01 * BAND * (1 - 2 * labels.to(inputs))
        model(points)
        far = points.clone()
        far[:, 0] = 1 - labels.to(inputs)
        model(far)
        return far

    attack = Attack(wasteful, minimum_norm=True)
    report = check(data, attack, only=["silent success"], eps=0.1)
    assert report["silent success"].counts == {"runs": 3, "silent": 3}


def test_an_attack_that_never_asks_the_model_is_recorded_too(data):
    def blind(model, inputs, labels, eps, start):
        return inputs

    report = check(data, blind, only=["silent success", "incomplete optimisation"])
    assert report["silent success"].counts == {"runs": 3, "silent": 0}
    assert report["incomplete optimisation"].counts["stuck"] == 3


def test_what_evades_a_smoothed_view_alone_is_no_silent_success(data):
    class Smooth(Linear):
        def smoothed(self, factor):
            return lambda x: self(1 - x)  # what is right for the model is wrong for this view

    def smooth(model, inputs, labels, eps, start):
        model.smoothed(2)(inputs)
        return idle(model, inputs, labels, eps, start)

    model = Smooth().to(data[0].device)
    report = check(data, smooth, model, only=["silent success"])
    assert report["silent success"].counts == {"runs": 3, "silent": 0}


def test_samples_recorded_in_one_call_are_told_apart():
    """What an attack did on one sample is not held against it on another."""
    calls = []

    def forgets_class_1(model, inputs, labels, eps, start):
        calls.append(len(inputs))
        points = best(model, inputs, labels, eps, start)
        return torch.where((labels == 1)[:, None], inputs, points)

    x = torch.linspace(0, 1, 24).view(6, 4)  # farther apart than two balls reach
    x[:, 0] = torch.tensor([0.3, 0.7, 0.3, 0.7, 0.3, 0.7])
    data = x, (x[:, 0] > 0.5).long()
    model, curve, options = evaluate(data, idle)
    options |= {"recorded": 6, "samples": 6, "eps": 0.3, "only": ["silent success"]}
    options["attacks"] = {"forgetful": Attack(forgets_class_1)}
    report = run_checks(model, *data, curve, **options)
    assert report["silent success"].counts == {"runs": 6, "silent": 3}
    assert sum(calls) == 6 and len(calls) < 6


def test_an_attack_that_still_gains_at_the_end_is_incomplete(data):
    report = check(data, slow, only=["incomplete optimisation"])
    assert report["incomplete optimisation"].counts == {"runs": 3, "falling": 3, "stuck": 0}
    assert report.status == "fail"
    report = check(data, idle, only=["incomplete optimisation"])
    assert report["incomplete optimisation"].counts == {"runs": 3, "falling": 0, "stuck": 3}


@pytest.mark.parametrize(("restarts", "falling"), [(0, 3), (1, 0)])
def test_an_attack_with_restarts_is_complete_when_its_last_run_is(data, restarts, falling):
    def twice(model, inputs, labels, eps, start):
        points = inputs.clone()
        for step in range(100):
            if 50 <= step < 96:  # the second run creeps nearer, and is done
                points[:, 0] += 0.001 * (1 - 2 * labels.to(inputs))
            model(points)
        return points

    attack = Attack(twice, settings={"restarts": restarts})
    report = check(data, attack, only=["incomplete optimisation"], eps=0.1)
    assert report["incomplete optimisation"].counts["falling"] == falling


def test_a_curve_that_recovers_is_not_monotone(data):
    model, curve, options = evaluate(data, best)
    assert run_checks(model, *data, curve, only=["monotone curve"], **options).status == "pass"
    evading = (curve.predictions[2] != curve.labels) & (curve.predictions[2] != -1)
    rows = evading.nonzero()[:3, 0]
    alone = copy.deepcopy(curve)
    alone.attacks["the attack"].predictions[-1, rows] = -1
    report = run_checks(model, *data, alone, only=["monotone curve"], **options)
    counts = report["monotone curve"].counts
    assert report.status == "warn" and (counts["worst_case"], counts["attacks"]) == (0, 3)
    curve.predictions[3, rows] = curve.labels[rows]
    report = run_checks(model, *data, curve, only=["monotone curve"], **options)
    assert report.status == "fail" and report["monotone curve"].counts["worst_case"] == 3


def test_stored_points_are_measured_and_asked_again(data):
    model, curve, options = evaluate(data, best, only=["stored points"])
    good = run_checks(model, *data, curve, **options)["stored points"]
    assert good.status == "pass" and good.counts["points"] == 5 * 40
    curve.adversarial[1, :2, 1] += 0.3  # of no effect on the decision
    curve.adversarial[4, 2, 3] = 1.2
    curve.predictions[2, 5] = {0: 1, 1: 0, -1: 0}[curve.predictions[2, 5].item()]
    bad = run_checks(model, *data, curve, **options)["stored points"]
    assert bad.status == "fail"
    high = int((curve.adversarial[1, :2, 1] > 1).sum())
    reach = ((curve.adversarial[4, 2] - data[0][2].cpu()).norm() > 0.4).item()
    assert bad.counts["outside_ball"] == 2 + reach
    assert bad.counts["outside_box"] == 1 + high
    assert bad.counts["decision_changed"] == 1


def test_a_decision_on_the_threshold_counts_as_rounding(data):
    model, curve, options = evaluate(data, idle, only=["stored points"])
    inputs = data[0].clone()
    inputs[0, 0] = 0.5 + BAND  # accepted or not by a hair
    labels = (inputs[:, 0] > 0.5).long()
    model, curve, options = evaluate((inputs, labels), idle, only=["stored points"])
    curve.predictions[:, 0] = torch.where(curve.predictions[:, 0] == -1, 1, -1)
    report = run_checks(model, inputs, labels, curve, **options)
    assert report.status == "warn"
    assert report["stored points"].counts["decision_changed_by_rounding"] == 5


def test_a_curve_that_ends_too_early_only_warns(data):
    model = Linear().to(data[0].device)
    attacks = {"best": Attack(best)}
    options = {"attacks": attacks, **SMALL, "only": ["chance at large eps"]}
    curve = security_evaluation(model, *data, [0, 0.1], attacks=attacks, progress=False)
    report = run_checks(model, *data, curve, **options)
    assert report.status == "warn"
    assert report["chance at large eps"].counts["chance"] == 0.5
    assert report["chance at large eps"].counts["accuracy_without_bound"] == 0


def test_half_eps_is_compared_with_a_reference(data):
    model, curve, options = evaluate(data, idle, only=["plausible at eps / 2"])
    right = (data[0][:, 0] - 0.5).abs() > BAND  # accepted
    robust = right.double().mean().item()
    report = run_checks(model, *data, curve, reference={0.05: 0.9, 0.2: 0.3}, **options)
    counts = report["plausible at eps / 2"].counts
    assert report.status == "warn" and counts["eps"] == 0.4
    assert counts["robust_accuracy"] == pytest.approx(robust)
    assert counts["reference_at_half_eps"] == 0.3
    same = run_checks(model, *data, curve, reference={0.2: 0.99}, **options)
    assert same.status == "pass"
    none = run_checks(model, *data, curve, reference={0.7: 0.3}, **options)
    assert none.status == "skipped" and "half" in none.checks[0].message
    _, other, _ = evaluate(data, best)
    report = run_checks(model, *data, curve, reference=other, **options)
    counts = report["plausible at eps / 2"].counts
    at_half = (other.evasion_norm > counts["eps"] / 2).double().mean().item()
    assert counts["reference_at_half_eps"] == at_half < 1
    other.evasion_norm = torch.full_like(other.evasion_norm, 0.19)
    report = run_checks(model, *data, curve, reference=other, **options)
    assert report.status == "warn" and report.checks[0].counts["eps"] == 0.4


def test_a_classifier_without_rejection_skips_what_is_about_rejection(data):
    only = ["adaptive attack", "components", "plausible at eps / 2", "zero gradient"]
    report = check(data, best, scores_alone, only=only)
    assert {"adaptive attack", "components", "plausible at eps / 2"} == set(report.names("skipped"))
    assert report["adaptive attack"].message == "Did not run: the model does not reject."


def test_nothing_left_to_evade_skips_the_weaker_attacks(data):
    def across(model, inputs, labels, eps, start):
        points = inputs.clone()
        points[:, 0] = 1 - labels.to(inputs)
        return points

    model = Linear().to(data[0].device)
    attacks = {"across": Attack(across)}
    curve = security_evaluation(model, *data, [0, 2], attacks=attacks, progress=False)
    report = run_checks(model, *data, curve, attacks=attacks, **SMALL)
    assert {"converged", "single step", "noise control"} <= set(report.names("skipped"))
    assert "evades every sample" in report["converged"].message
    assert report["unbounded attack"].status == report["chance at large eps"].status == "pass"


def test_a_loaded_curve_has_no_points_and_says_so(data, tmp_path):
    model, curve, options = evaluate(data, best)
    curve.save(tmp_path / "curve.json")
    loaded = SecurityCurve.load(tmp_path / "curve.json")
    report = run_checks(model, *data, loaded, only=["stored points", "single step"], **options)
    assert report["stored points"].status == "skipped"
    assert report["single step"].status == "pass"


def test_a_check_that_breaks_off_is_listed_and_warns(data):
    def broken(model, inputs, labels, eps, start):
        raise KeyError("weights")

    model, curve, options = evaluate(data, best)
    options |= {"attacks": {"broken": Attack(broken)}, "only": ["silent success", "single step"]}
    report = run_checks(model, *data, curve, **options)
    assert report["silent success"].status == "skipped"
    assert "KeyError" in report["silent success"].message
    assert report.status == "warn"


@pytest.mark.parametrize(("n", "samples", "recorded"), [(12, 4, 1), (70, 7, 2), (400, 32, 10)])
def test_the_checks_follow_the_size_of_the_evaluation(n, samples, recorded):
    x = torch.rand(n, 4)
    data = x, (x[:, 0] > 0.5).long()
    model, curve, options = evaluate(data, best)
    del options["recorded"]
    settings = run_checks(model, *data, curve, only=["deterministic"], **options).settings
    assert (settings["samples"], settings["recorded"]) == (samples, recorded)


@pytest.mark.slow
def test_the_checks_of_a_small_evaluation_cost_less_than_it(data):
    inputs, labels = (part[:20] for part in data)
    model, rows = Linear().to(inputs.device), []
    model.register_forward_hook(lambda _, given, output: rows.append(len(given[0])))
    curve = security_evaluation(model, inputs, labels, EPS, init_inputs=data[0], progress=False)
    spent = sum(rows)
    report = run_checks(model, inputs, labels, curve, init_inputs=data[0], surrogate=scores_alone)
    assert report.names("fail") == [], str(report)
    assert sum(rows) - spent < 0.5 * spent


def test_each_check_tells_its_cost(data):
    only = ["noise control", "transfer", "monotone curve"]
    report = check(data, best, surrogate=scores_alone, samples=5, eps=0.1, only=only)
    noise, crafted = report["noise control"], report["transfer"]
    assert noise.forwards >= 5 * SMALL["noise_draws"] and noise.backwards == 0
    assert crafted.backwards == 2 * 5 * SMALL["steps"]  # on the surrogate, for two objectives
    assert report["monotone curve"].forwards == 0
    assert all(entry.seconds > 0 for entry in report.checks)
    assert sum(entry.forwards for entry in report.checks) <= report.forwards
    assert f"{crafted.seconds:.1f} s)" in str(report) or crafted.seconds < 0.05


def test_what_a_minimum_norm_attack_evaded_needs_no_attack_without_bound(data):
    def across(model, inputs, labels, eps, start):
        calls.append(eps)
        points = inputs.clone()
        points[:, 0] = 1 - labels.to(inputs)
        return points

    calls = []
    model, curve, options = evaluate(data, Attack(across, minimum_norm=True))
    before = len(calls)
    report = run_checks(model, *data, curve, only=["unbounded attack"], **options)
    assert len(calls) == before
    counts = report["unbounded attack"].counts
    assert report.status == "pass" and counts["samples"] == counts["evaded"] == len(data[0])


def test_longer_attacks_go_on_from_the_nearest_points_of_the_evaluation(data):
    """Where there is no gradient at the inputs, and no sample of another class to start from."""

    class Flat(Linear):
        def forward(self, x):
            return super().forward(torch.where((x[:, :1] - 0.5).abs() < 0.1, x, x.detach()))

    def too_far(model, inputs, labels, eps, start):
        points = inputs + 0.6  # within the ball the line to it evades nowhere
        points[:, 0] = 0.58
        return points

    inputs = 0.2 * data[0][data[1] == 0]
    inputs[:, 0] += 0.2
    few = inputs, torch.zeros_like(data[1][: len(inputs)])
    attack = Attack(too_far, minimum_norm=True)
    model, curve, options = evaluate(few, attack, Flat().to(inputs.device), eps=0.4)
    assert curve.accuracy[-1] == 1 and curve.evasion_norm.isfinite().all()
    report = run_checks(model, *few, curve, only=["converged"], **options)
    assert report.status == "fail"
    assert report["converged"].counts["evaded"] == min(4, len(inputs))


def test_the_eps_with_most_at_stake_is_chosen(data):
    _, curve, _ = evaluate(data, best)
    chosen = choose_eps(curve, None)
    assert curve.eps[chosen] > 0
    distance = [abs(rate - 0.5) for rate in curve.accuracy[1:]]
    assert abs(curve.accuracy[chosen] - 0.5) == min(distance)


def test_arguments_that_do_not_fit_are_refused(data):
    model, curve, options = evaluate(data, best)
    inputs, labels = data
    with pytest.raises(ValueError, match="labels must be those of the curve"):
        run_checks(model, inputs, 1 - labels, curve, **options)
    with pytest.raises(ValueError, match="inputs must be like the points"):
        run_checks(model, inputs[:, :3], labels, curve, **options)
    with pytest.raises(ValueError, match="norm must be that of the curve"):
        run_checks(model, inputs, labels, curve, norm=1, **options)
    with pytest.raises(ValueError, match="eps must be one of those of the curve"):
        run_checks(model, inputs, labels, curve, eps=0.15, **options)
    with pytest.raises(ValueError, match="no check"):
        run_checks(model, inputs, labels, curve, only=["nonsense"], **options)
    with pytest.raises(ValueError, match="samples must be >= 1"):
        run_checks(model, inputs, labels, curve, **(options | {"samples": 0}))
    clean = security_evaluation(model, *data, [0], attacks=options["attacks"], progress=False)
    with pytest.raises(ValueError, match="no eps > 0"):
        run_checks(model, inputs, labels, clean, **options)


def test_the_report_puts_first_what_failed():
    checks = [
        Check("one", "pass", {"n": 1}, "All is well."),
        Check("two", "warn", {"n": 2}, "Something is odd. " * 12, "Look at it."),
        Check("three", "skipped", {}, "Did not run: no reason.", "Give a reason."),
        Check("four", "fail", {"n": 3}, "It is broken.", "Mend it."),
    ]
    report = CheckReport(checks, 10, 5, 1.0)
    text = str(report)
    assert "FAIL (1 fail, 1 warn, 1 pass, 1 skipped)" in text.splitlines()[0]
    places = [text.index(part) for part in ("It is broken", "Mend it", "Something", "All is well")]
    assert places == sorted(places)
    assert all(len(line) <= 100 for line in text.splitlines())
    assert "10 forwards, 5 backwards" in text
    content = json.loads(json.dumps(report.to_dict()))
    assert content["status"] == report.status == "fail"
    assert content["checks"][1]["counts"] == {"n": 2}
    assert CheckReport(checks[:2]).status == "warn"
    assert CheckReport(checks[:1]).status == "pass"
    assert CheckReport([checks[2]]).status == "skipped"
    with pytest.raises(KeyError, match="choose from: one, two"):
        report["five"]


def test_batches_of_large_inputs_are_small_by_default():
    inputs, seen = torch.rand(4, 3, 96, 96), []
    labels = torch.tensor([0, 1, 0, 1])

    def first_pixels(x):
        seen.append(len(x))
        side = 2 * torch.eye(2)[labels.repeat(len(x))[: len(x)]]
        return side + 0 * x.flatten(1)[:, :2]

    attacks = {"idle": Attack(idle, minimum_norm=True)}
    curve = security_evaluation(
        lambda x: torch.eye(2)[labels[: len(x)]], inputs, labels, [0.1], attacks=attacks
    )
    seen.clear()
    run_checks(first_pixels, inputs, labels, curve, attacks=attacks, only=["noise control"])
    assert max(seen) <= default_batch_size(inputs) < 64


def test_attacks_may_have_their_pool_as_an_array(data):
    inputs, _ = data

    def pooled(model, inputs, labels, eps, start, *, init_labels):
        assert isinstance(init_labels, torch.Tensor)
        return best(model, inputs, labels, eps, start)

    attack = Attack(pooled, pool=inputs.cpu().numpy())
    report = check(data, attack, only=["silent success"])
    assert report["silent success"].status == "pass"
