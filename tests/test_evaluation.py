import json
import math

import pytest
import torch
from torch import nn

from torchdnr.attacks.projections import project
from torchdnr.decisions import REJECT
from torchdnr.evaluation import (
    BOUNDARY_WALK,
    LINE_SEARCH_PGD,
    Attack,
    SecurityCurve,
    evasion_rate,
    security_evaluation,
)
from torchdnr.evaluation.judging import CountedModel

EPS = [0, 0.1, 0.2, 0.4, 0.8, 1.6]


class Classifier(nn.Module):
    """Two classes told apart at x_0 = 0.5; inputs with x_1 > 0.8 or on the border are rejected."""

    reject_index = 2

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        side = self.dropout(x[:, :1] - 0.5) * self.weight
        accepted = torch.cat([-side, side, side.new_full(side.shape, 0.05)], dim=1)
        return torch.where(x[:, 1:] > 0.8, accepted + torch.tensor([0, 0, 9.0]), accepted)


def move(model, inputs, labels, eps, start):
    """Step straight to the other side, as far as eps goes."""
    model(inputs.clone().requires_grad_()).sum().backward()
    step = torch.zeros_like(inputs)
    step[:, 0] = eps * (1 - 2 * labels.to(inputs))
    return project(inputs + step, inputs, eps, 2, (0, 1))


def erratic(model, inputs, labels, eps, start):
    """Evade well at small eps only, and go to be rejected elsewhere."""
    if eps < 0.5:
        return move(model, inputs, labels, eps, start)
    return project(inputs + torch.tensor([0.0, 1.0]), inputs, eps, 2, (0, 1))


def jump(model, inputs, labels, eps, start):
    """Find the nearest point on the other side for half of the inputs."""
    points = inputs.clone()
    points[:, 0] = 0.5 + 0.0501 * (1 - 2 * labels.to(inputs))
    points[::2] = inputs[::2]
    return points


LINE_UP = {
    "move": Attack(move),
    "erratic": Attack(erratic),
    "jump": Attack(jump, minimum_norm=True, settings={"steps": 3}),
}


@pytest.fixture
def data():
    inputs = torch.rand(19, 2)
    inputs[:, 1] *= 0.9
    labels = (inputs[:, 0] > 0.5).long()
    labels[:2] = 1 - labels[:2]  # wrong without any attack
    return inputs, labels


def evaluate(data, attacks=None, **options):
    options = {"batch_size": 7, "progress": False} | options
    attacks = LINE_UP if attacks is None else attacks
    return security_evaluation(
        Classifier(), *data, options.pop("eps", EPS), attacks=attacks, **options
    )


def same(one, two):
    assert torch.equal(one.predictions, two.predictions)
    assert torch.equal(one.adversarial, two.adversarial)
    assert torch.equal(one.evasion_norm, two.evasion_norm)
    for name, attack in one.attacks.items():
        assert torch.equal(attack.predictions, two.attacks[name].predictions)
        assert attack.forwards == two.attacks[name].forwards
        assert attack.mean_norm == two.attacks[name].mean_norm


def test_the_worst_case_is_pointwise_and_never_recovers(data):
    curve = evaluate(data)
    evaded = (curve.predictions != REJECT) & (curve.predictions != curve.labels)
    either = torch.zeros(19, dtype=torch.bool)
    for index, eps in enumerate(EPS):
        either |= evaded[0]
        for attack in curve.attacks.values():
            row = attack.predictions[index]
            if eps > 0:
                either |= (row != REJECT) & (row != curve.labels)
        assert torch.equal(evaded[index], either)
    assert curve.accuracy[1:] == sorted(curve.accuracy[1:], reverse=True)
    assert curve.accuracy[0] < curve.accuracy[1]  # rejects count as errors at eps = 0 only
    assert curve.accuracy[-1] < 0.3
    for attack in curve.attacks.values():  # what evades is not attacked again
        assert attack.accuracy[1:] == sorted(attack.accuracy[1:], reverse=True)


def test_points_are_where_they_should_be_and_do_what_is_claimed(data):
    inputs, _ = data
    curve = evaluate(data)
    model = Classifier().eval()
    assert torch.equal(curve.adversarial[0], inputs)
    for points, predictions, eps in zip(curve.adversarial, curve.predictions, EPS, strict=True):
        assert (points - inputs).norm(dim=1).max() <= eps * (1 + 1e-6)
        assert points.min() >= 0 and points.max() <= 1
        output = model(points)
        accepted = output[:, :2].amax(1) > output[:, 2]
        assert torch.equal(predictions, torch.where(accepted, output[:, :2].argmax(1), REJECT))


def test_a_minimum_norm_attack_runs_once_and_counts_where_its_norm_allows(data):
    inputs, labels = data
    calls = []

    def counted(model, inputs, labels, eps, start):
        calls.append(eps)
        return jump(model, inputs, labels, eps, start)

    curve = evaluate(data, {"jump": Attack(counted, minimum_norm=True)})
    assert calls == [math.inf]
    points = jump(None, inputs, labels, math.inf, inputs)
    output = Classifier().eval()(points)
    evades = (output[:, :2].amax(1) > output[:, 2]) & (output[:, :2].argmax(1) != labels)
    clean = curve.predictions[0]
    clean_error = (clean != REJECT) & (clean != labels)
    norm = (points - inputs).norm(dim=1)
    for predictions, eps in zip(curve.predictions[1:], EPS[1:], strict=True):
        expected = (evades & (norm <= eps)) | clean_error
        assert evasion_rate(predictions, labels) == pytest.approx(expected.float().mean().item())
    best = torch.where(clean_error, 0.0, torch.where(evades, norm, torch.inf)).double()
    assert torch.allclose(curve.evasion_norm, best)
    evaded = best.isfinite()
    assert torch.equal(curve.nearest[~evaded], inputs[~evaded])
    assert torch.allclose((curve.nearest - inputs).norm(dim=1)[evaded].double(), best[evaded])
    assert curve.median_evasion_norm == best.median()


def test_a_fixed_eps_attack_goes_on_with_what_does_not_evade_yet(data):
    calls = []

    def recorded(model, inputs, labels, eps, start):
        points = move(model, inputs, labels, eps, start)
        calls.append((inputs, start, points))
        return points

    inputs, labels = data
    curve = evaluate(data, {"move": Attack(recorded)}).attacks["move"]
    assert len(calls) == len(EPS) - 1
    evading = (curve.predictions != REJECT) & (curve.predictions != labels)
    for index, (attacked, start, _) in enumerate(calls):
        assert torch.equal(attacked, inputs[~evading[index]])
        if index == 0:
            assert torch.equal(start, attacked)
        else:
            still = ~evading[index][~evading[index - 1]]
            assert torch.equal(start, calls[index - 1][2][still])
    assert curve.forwards == [0] + [len(attacked) for attacked, *_ in calls]
    assert curve.backwards == curve.forwards
    assert 0 < curve.forwards[-1] < curve.forwards[1]


def test_a_stopped_evaluation_goes_on_where_it_was(data, tmp_path):
    path = tmp_path / "new folder" / "steps.safetensors"
    calls = []

    def failing(model, inputs, labels, eps, start):
        calls.append(eps)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return move(model, inputs, labels, eps, start)

    line_up = {"jump": LINE_UP["jump"], "move": Attack(failing)}
    with pytest.raises(KeyboardInterrupt):
        evaluate(data, line_up, checkpoint=path)
    resumed = evaluate(data, line_up, checkpoint=path)
    assert calls == [0.1, 0.2, 0.4, 0.8, 0.8, 1.6]
    same(resumed, evaluate(data, {"jump": LINE_UP["jump"], "move": LINE_UP["move"]}))
    again = evaluate(data, line_up, checkpoint=path)
    assert len(calls) == 6 and again.seconds == resumed.seconds


@pytest.mark.parametrize("change", ["inputs", "labels", "model", "damage", "type"])
def test_a_foreign_checkpoint_is_told_and_not_used(data, tmp_path, change):
    path = tmp_path / "steps.safetensors"
    eps = [0, 0.2]
    evaluate(data, checkpoint=path, eps=eps)
    file = tmp_path / "steps-1-of-1.safetensors"
    inputs, labels = data
    model = Classifier()
    if change == "inputs":
        inputs = inputs * 0.99
    elif change == "labels":
        labels = 1 - labels
    elif change == "model":
        nn.init.constant_(model.weight, 1.01)
    elif change == "damage":
        file.write_bytes(file.read_bytes()[:-9])
    else:
        file.write_text("no checkpoint")
    options = {"attacks": LINE_UP, "batch_size": 7, "progress": False}
    with pytest.warns(UserWarning, match=r"does not belong to this evaluation.*starting again"):
        curve = security_evaluation(model, inputs, labels, eps, checkpoint=path, **options)
    same(curve, security_evaluation(model, inputs, labels, eps, **options))
    assert file.with_name(f"{file.name}.unused").exists()


def test_an_unwritable_checkpoint_fails_before_the_first_attack(data, tmp_path):
    (tmp_path / "file").write_text("")

    def never(*args):
        raise AssertionError("attacked")

    with pytest.raises(OSError, match="writable"):
        evaluate(data, {"never": Attack(never)}, checkpoint=tmp_path / "file" / "steps.safetensors")


def test_points_outside_are_projected_back_counted_and_told(data):
    def cheat(model, inputs, labels, eps, start):
        return move(model, inputs, labels, 3 * eps, start)

    with pytest.warns(UserWarning, match=r"cheat at eps = 0\.1: (\d+) of \1 points left the ball"):
        curve = evaluate(data, {"cheat": Attack(cheat)}, eps=[0, 0.1])
    assert curve.attacks["cheat"].violations[1] > 0
    assert (curve.adversarial[1] - data[0]).norm(dim=1).max() <= 0.1 * (1 + 1e-6)


def test_the_model_is_left_as_it_was_found(data):
    model = Classifier().train()
    model.dropout.eval()
    one = security_evaluation(model, *data, EPS, attacks=LINE_UP, progress=False)
    assert model.training and not model.dropout.training
    assert torch.equal(one.predictions, evaluate(data).predictions)
    assert not model._forward_hooks


def test_a_classifier_that_cannot_reject_is_evaluated_too(data):
    model = Classifier().eval()
    options = {"attacks": LINE_UP, "progress": False}
    curve = security_evaluation(lambda x: model(x)[:, :2], *data, EPS, **options)
    assert not curve.rejects and curve.rejection_rate == [0.0] * len(EPS)
    told = security_evaluation(lambda x: model(x), *data, EPS, reject=True, **options)
    assert told.rejects and told.rejection_rate[0] > 0


def test_one_sample_and_eps_zero_alone(data):
    curve = evaluate((data[0][5:6], data[1][5:6]), eps=[0])
    assert curve.accuracy in ([0.0], [1.0]) and len(curve.adversarial) == 1


def test_rows_sent_through_the_model_are_counted():
    model = CountedModel(nn.Linear(3, 2))
    x = torch.rand(5, 3, requires_grad=True)
    torch.autograd.grad(model(x).sum(), x)
    model(x.detach())
    with torch.no_grad():
        model(x[:2])
    assert (model.forwards, model.backwards) == (12, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": [0, 2, 1]}, "eps must be finite, >= 0 and increasing"),
        ({"eps": [-1, 1]}, "eps must be finite, >= 0 and increasing"),
        ({"eps": []}, "eps must be finite, >= 0 and increasing"),
        ({"eps": [math.nan]}, "eps must be finite, >= 0 and increasing"),
        ({"attacks": {}}, "attacks is empty"),
        ({"batch_size": 0}, "batch_size must be >= 1"),
        ({"norm": 7}, "no norm 7"),
        ({"init_inputs": torch.rand(3, 5)}, "init_inputs must have the shape"),
        ({"attacks": {"bad": Attack(lambda *_: torch.rand(3))}}, "bad must return finite points"),
        ({"attacks": {"bad": Attack(lambda m, x, *_: x / 0)}}, "bad must return finite points"),
    ],
)
def test_wrong_arguments_are_refused(data, change, message):
    with pytest.raises(ValueError, match=message):
        evaluate(data, **change)


def test_wrong_data_and_a_broken_model_are_refused(data):
    inputs, labels = data
    with pytest.raises(ValueError, match="inputs must lie in"):
        evaluate((inputs * 255, labels))
    with pytest.raises(ValueError, match="labels must be below the 2 classes"):
        evaluate((inputs, labels + 1))
    with pytest.raises(ValueError, match="NaN for 19 of 19 samples, the first is number 0"):
        security_evaluation(
            lambda x: x / 0 * 0, inputs, labels, EPS, attacks=LINE_UP, progress=False
        )


def test_json_round_trip(data, tmp_path):
    curve = evaluate(
        data, name="toy", settings={"seed": 3, "radius": math.inf, "folder": tmp_path / "x"}
    )
    path = tmp_path / "curve.json"
    curve.save(path)
    loaded = SecurityCurve.load(path)
    for field in ("eps", "norm", "name", "rejects", "seconds", "environment", "mean_norm"):
        assert getattr(loaded, field) == getattr(curve, field)
    for rate in ("accuracy", "rejection_rate", "evasion_rate", "accuracy_interval"):
        assert getattr(loaded, rate) == getattr(curve, rate)
    assert torch.equal(loaded.evasion_norm, curve.evasion_norm)
    assert loaded.adversarial is None and loaded.nearest is None
    assert loaded.settings["seed"] == 3 and loaded.settings["radius"] == "inf"
    for name, attack in curve.attacks.items():
        other = loaded.attacks[name]
        assert torch.equal(attack.predictions, other.predictions)
        for field in ("seconds", "forwards", "backwards", "violations", "settings", "accuracy"):
            assert getattr(attack, field) == getattr(other, field)
    content = json.loads(path.read_text(), parse_constant=lambda _: pytest.fail("not strict JSON"))
    assert content["accuracy"] == curve.accuracy
    assert {"torch", "torchvision", "python", "platform", "device", "torchdnr", "threads"} <= set(
        content["environment"]
    )
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == path.read_text()


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 0}', '{"format": 1, "eps": [1]}'])
def test_a_damaged_json_file_is_refused(tmp_path, text):
    (tmp_path / "curve.json").write_text(text)
    with pytest.raises(ValueError, match=r"not a (JSON|security)"):
        SecurityCurve.load(tmp_path / "curve.json")


def test_the_default_line_up_breaks_a_toy_classifier_and_tells_its_settings(data):
    inputs, labels = (part[:12] for part in data)
    lower = inputs * torch.tensor([1.0, 0.8])  # nothing is near the corner that is rejected
    options = {"init_inputs": torch.rand(30, 2), "progress": False, "name": "toy"}
    curve = security_evaluation(Classifier(), lower, labels, [0, 0.6], **options)
    assert list(curve.attacks) == [LINE_SEARCH_PGD, BOUNDARY_WALK]
    assert list(curve.refinements) == ["APGD"]
    assert curve.accuracy[-1] == 0  # nothing is farther than 0.55 from the other side
    exact = ((0.5 - lower[:, 0]) * (1 - 2 * labels.to(lower)) + 0.05).clamp_min(0)
    assert (curve.evasion_norm - exact).abs().max() < 0.01
    for attack in curve.attacks.values():
        assert attack.settings["steps"] > 0 and attack.settings["norm"] == 2
        assert sum(attack.forwards) > 0 and sum(attack.violations) == 0
    assert curve.settings["init_inputs"] == 30 and curve.name == "toy"


def test_a_model_that_differs_off_the_clean_images_only_does_not_take_over_a_checkpoint(
    data, tmp_path
):
    inputs, labels = data
    inputs = (inputs * 255).round() / 255
    net = Classifier().eval()
    calls = []

    def counted(model, *arguments):
        calls.append(1)
        return jump(model, *arguments)

    line_up = {"jump": Attack(counted, minimum_norm=True)}
    options = {"attacks": line_up, "checkpoint": tmp_path / "steps", "progress": False}
    for model in (lambda x: net(x), lambda x: net(x)):
        security_evaluation(model, inputs, labels, EPS, reject=True, **options)
    assert len(calls) == 1
    with pytest.warns(UserWarning, match="another model"):
        security_evaluation(
            lambda x: net((x * 255).round() / 255), inputs, labels, EPS, reject=True, **options
        )
    assert len(calls) == 2
