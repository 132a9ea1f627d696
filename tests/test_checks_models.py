"""Models that spoil an evaluation trip the check that names the reason; a healthy one passes."""

import copy
import json

import pytest
import torch
from torch import nn

from torchdnr import DNR
from torchdnr.attacks import boundary_walk
from torchdnr.attacks.noise import noise
from torchdnr.attacks.pgd import pgd
from torchdnr.evaluation import Attack, security_evaluation
from torchdnr.evaluation.checks import CHECKS, run_checks

EPS = [0, 0.25, 0.4, 2.0]
SMALL = {
    "samples": 10,
    "recorded": 1,
    "steps": 10,
    "draws": 10,
    "noise_draws": 100,
    "queries": 50,
}
PAIRS = {"hidden": (10.0, 0.05), "last": (10.0, 0.1), "combiner": (1.0, 0.1)}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 24)
        self.hidden = nn.Tanh()
        self.second = nn.Linear(24, 12)
        self.last = nn.Tanh()
        self.logits = nn.Linear(12, 3)

    def forward(self, x):
        return self.logits(self.last(self.second(self.hidden(self.first(x)))))


def blobs(n, seed):
    centers = 0.2 + 0.6 * torch.rand(3, 6, generator=torch.Generator().manual_seed(5))
    labels = torch.arange(n) % 3
    noise = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    return (centers[labels] + 0.08 * noise).clamp(0, 1), labels


TRAIN, CALIBRATION, TEST = blobs(120, 1), blobs(120, 2), blobs(24, 3)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(120):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(TRAIN[0]), TRAIN[1]).backward()
        optimizer.step()
    return net


@pytest.fixture(scope="module")
def dnr(net):
    model = DNR(net, ["hidden", "last"], hyperparameters=PAIRS).fit(*TRAIN)
    return model.calibrate(CALIBRATION[0])


def line_up(walk=True):
    def descend(model, inputs, labels, eps, start):
        return pgd(model, inputs, labels, eps, steps=15, start=start, init_inputs=TRAIN[0])

    def approach(model, inputs, labels, eps, start):
        return boundary_walk(model, inputs, labels, TRAIN[0], steps=50)

    attacks = {"PGD": Attack(descend)}
    return attacks | ({"walk": Attack(approach, minimum_norm=True)} if walk else {})


def evaluate(model, attacks=None, **options):
    attacks = line_up() if attacks is None else attacks
    shared = {"attacks": attacks, "init_inputs": TRAIN[0]}
    curve = security_evaluation(model, *TEST, EPS, progress=False, **shared)
    return run_checks(model, *TEST, curve, **shared, **(SMALL | options))


class Wrapped(nn.Module):
    """A classifier with something before its inputs or after its scores."""

    def __init__(self, model, before=None, after=None):
        super().__init__()
        self.model, self.before, self.after = model, before, after
        self.reject_index = model.reject_index

    def forward(self, x):
        output = self.model(x if self.before is None else self.before(x))
        return output if self.after is None else self.after(output)


def test_a_healthy_classifier_passes_every_check(dnr, net):
    net.train()
    report = evaluate(dnr)
    assert net.training and not any(module._forward_hooks for module in net.modules())
    assert [check.name for check in report.checks] == list(CHECKS)
    assert report.names("pass") == list(CHECKS), str(report)
    assert report.status == "pass"
    net.eval()


def levels(x):
    return (7 * x).round() / 7


def straight_through(x):
    return x + (levels(x) - x).detach()


def noisy(x):
    return x + 0.05 * torch.randn_like(x)


def sharp_sigmoid(output):
    return torch.sigmoid(1000 * (output - output[:, -1:]))


def sharp_softmax(output):
    return torch.softmax(1000 * output, dim=1)


GRADIENT = ["differentiable", "zero gradient", "true gradient"]
OF_THE_MODEL = [*GRADIENT, "deterministic", "unbounded scores", "stored points"]
BROKEN = {
    "no gradient": ({"before": lambda x: levels(x).detach()}, "differentiable"),
    "zero gradient": ({"before": levels}, "zero gradient"),
    "straight-through": ({"before": straight_through}, "true gradient"),
    "random": ({"before": noisy}, "deterministic"),
    "sharp sigmoid": ({"after": sharp_sigmoid}, "unbounded scores"),
    "sharp softmax": ({"after": sharp_softmax}, "unbounded scores"),
}


def by_noise(model, inputs, labels, eps, start):
    return noise(model, inputs, labels, eps, draws=10)


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_model_fails_the_check_that_names_it(dnr, case):
    parts, name = BROKEN[case]
    report = evaluate(Wrapped(dnr, **parts), {"noise": Attack(by_noise)}, only=OF_THE_MODEL)
    assert report[name].status == "fail", str(report)
    assert report[name].advice
    also = {
        "random": {"true gradient", "stored points"},
        "sharp sigmoid": {"zero gradient"},
        "sharp softmax": {"zero gradient", "true gradient"},
    }
    assert set(report.names("fail")) - {name} <= also.get(case, set()), str(report)
    assert report.status == "fail"


def test_what_needs_a_gradient_is_skipped_with_its_reason_where_there_is_none(dnr):
    model = Wrapped(dnr, before=torch.Tensor.detach)
    only = [*GRADIENT, "converged", "noise control"]
    report = evaluate(model, {"noise": Attack(by_noise)}, only=only)
    assert report.names("skipped") == ["zero gradient", "true gradient", "converged"]
    for name in report.names("skipped"):
        assert "differentiable" in report[name].message and report[name].counts["errors"] == 1
    assert report["noise control"].status in ("pass", "warn", "fail")


def test_vanishing_gradients_of_a_huge_gamma_are_found(net):
    pairs = {name: (10.0, 1e4) for name in PAIRS}
    model = DNR(net, ["hidden", "last"], hyperparameters=pairs).fit(*TRAIN)
    model.calibrate(CALIBRATION[0])
    only = ["zero gradient", "components", "unbounded attack", "unbounded scores"]
    report = evaluate(model, line_up(walk=False), only=only)
    assert report["zero gradient"].status == "fail"
    assert report["components"].status in ("warn", "fail")
    assert "Gradients vanish in: SVM on hidden" in report["components"].message
    assert report["components"].counts["network: no gradient"] == 0
    assert report["unbounded attack"].status == "fail"
    assert report["unbounded scores"].status == "pass"


def test_probabilities_that_do_not_saturate_only_warn(dnr):
    model = Wrapped(dnr, after=lambda output: output.softmax(dim=1))
    report = evaluate(model, {"noise": Attack(by_noise)}, only=OF_THE_MODEL)
    assert report.names("warn") == ["unbounded scores"]
    assert report["unbounded scores"].counts["probabilities"] == 1
    assert report.names("fail") == []


def test_a_rugged_loss_is_unstable_and_a_steep_one_is_not(dnr):
    def rugged(output):
        return torch.cat(
            [output[:, :-1] + 0.5 * torch.sin(5000 * output[:, :-1]), output[:, -1:]], 1
        )

    line = {"noise": Attack(by_noise)}
    only = ["unstable loss"]
    assert evaluate(Wrapped(dnr, after=rugged), line, only=only).status == "fail"
    assert evaluate(Wrapped(dnr, after=lambda out: 1e3 * out), line, only=only).status == "pass"


def test_the_size_of_the_batch_must_not_matter(dnr):
    class ByBatch(nn.Module):
        reject_index = dnr.reject_index

        def forward(self, x):
            return dnr(x) + 0.2 * x.mean()

    report = evaluate(ByBatch(), {"noise": Attack(by_noise)}, only=["deterministic"])
    counts = report["deterministic"].counts
    assert report.status == "fail" and "batch" in report["deterministic"].message
    assert counts["difference"] == 0 and counts["difference_by_batch"] > 1e-3


def test_dropout_in_evaluation_mode_is_not_random(dnr):
    model = Wrapped(dnr, before=nn.Dropout(0.3)).train()
    report = evaluate(model, {"noise": Attack(by_noise)}, only=["deterministic"])
    assert report.status == "pass" and model.before.training


def test_the_same_seed_gives_the_same_report(dnr):
    only = ["unstable loss", "noise control", "black-box attack", "true gradient"]
    line = {"noise": Attack(by_noise)}
    reports = [evaluate(copy.deepcopy(dnr), line, only=only, seed=3) for _ in range(2)]
    results = [report.to_dict()["checks"] for report in reports]
    for entry in results[0] + results[1]:
        del entry["seconds"]
    one, two = map(json.dumps, results)
    assert one == two
