import sys

import pytest
import torch
from small_process import run_apart
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from torchdnr import DNR, NR
from torchdnr.adapters import attack_all_targets
from torchdnr.attacks import boundary_walk, pgd
from torchdnr.evaluation import measure, security_evaluation, stratified_curve, threshold_sweep
from torchdnr.evaluation.line_up import build_line_up
from torchdnr.features.extraction import extract
from torchdnr.rejection import LogitRejection, WithReject
from torchdnr.resources import Cost, default_batch_size, record_costs, stage


def test_nothing_is_recorded_unless_asked_for():
    with stage("outside"):
        pass
    with record_costs() as costs:
        pass
    assert costs == {}


def test_one_name_is_one_entry():
    with record_costs() as costs:
        for _ in range(3):
            with stage("a"):
                pass
    assert costs["a"].calls == 3
    assert costs["a"].seconds >= 0
    assert set(costs["a"].to_dict()) == {"seconds", "peak_memory_mib", "calls"}


MEASURED = """
import torch
from torchdnr.resources import process_peak_mib, record_costs, stage

def fill(mib):
    return torch.ones(mib * 2**18).sum()  # freed at once

before = process_peak_mib()
with record_costs() as costs:
    with stage("outer"), stage("inner"):
        fill(int(before) + 20)
    with stage("below"):
        fill(20)
    with stage("again"), stage("outer"):  # may have needed more than the first time
        pass
print("before", before)
for name, cost in costs.items():
    print(name, cost.peak_memory_mib)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="has no getrusage")
def test_memory_of_a_stage_is_known_where_it_raises_the_peak_of_the_process():
    peaks = dict(line.split() for line in run_apart(MEASURED).splitlines())
    assert peaks["below"] == peaks["again"] == peaks["outer"] == "None"
    assert float(peaks["inner"]) > float(peaks["before"]) + 10


def test_memory_is_unknown_where_the_system_does_not_measure_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    with record_costs() as costs, stage("a"):
        pass
    assert costs["a"].peak_memory_mib is None


def test_costs_add_up_and_an_unknown_peak_stays_unknown():
    known, unknown = Cost(1.0, 5.0, 1), Cost(2.0, None, 3)
    assert known.plus(Cost(2.0, 7.0, 1)) == Cost(3.0, 7.0, 2)
    assert known.plus(unknown) == unknown.plus(known) == Cost(3.0, None, 4)


def test_a_stage_that_fails_is_recorded_all_the_same():
    with record_costs() as costs, pytest.raises(KeyError), stage("a"):
        raise KeyError
    assert costs["a"].calls == 1
    with stage("b"):  # the recorder is gone
        pass
    assert set(costs) == {"a"}


def test_fit_and_calibrate_tell_their_stages():
    torch.manual_seed(0)
    images = torch.rand(60, 1, 4, 4)
    labels = torch.arange(60) % 2
    images[labels == 1, :, :2] *= 0.2
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
    model = DNR(
        net, ["0", "1"], hyperparameters={"1": (1.0, 0.1)}, C_grid=(1.0,), gamma_grid=(1.0,)
    )
    with record_costs() as costs:
        model.fit(images, labels)
        model.calibrate(images, 0.1)
    calls = {name: cost.calls for name, cost in costs.items()}
    # Layer "0" and the combiner are searched, layer "1" is not; both layers are stacked.
    assert calls == {"features": 1, "search": 2, "fit": 1, "stacking": 2, "threshold": 1}


@pytest.mark.parametrize(
    ("shape", "expected", "elsewhere"),
    [
        ((1, 28, 28), 256, 256),
        ((3, 32, 32), 85, 256),
        ((3, 64, 64), 21, 256),
        ((3, 224, 224), 16, 20),
        ((3, 2000, 2000), 1, 1),
        ((0,), 256, 256),
    ],
)
def test_a_batch_is_smaller_where_images_are_larger(shape, expected, elsewhere):
    assert default_batch_size(torch.empty(3, *shape)) == expected
    assert default_batch_size(torch.empty(0, *shape)) == 256  # nothing to do
    assert default_batch_size(torch.empty(3, *shape, device="meta")) == elsewhere


class Linear(nn.Module):
    """Says whether the first value is above 0.5, and keeps how many rows it saw at once."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def forward(self, inputs):
        self.rows.append(len(inputs))
        value = inputs.flatten(1)[:, 0] - 0.5
        return torch.stack([-value, value], dim=1)


@pytest.mark.parametrize(("given", "most"), [(None, 16), (20, 20)])
def test_a_model_sees_no_more_large_images_at_once_than_the_batch_size(given, most):
    inputs = torch.full((24, 3, 80, 80), 0.25)
    labels, pool = torch.zeros(24, dtype=torch.int64), torch.full((2, 3, 80, 80), 0.75)
    for attack in (pgd, boundary_walk):
        model = Linear()
        options = {"eps": 1.0} if attack is pgd else {}
        options |= {} if given is None else {"batch_size": given}
        attack(model, inputs, labels, init_inputs=pool, steps=2, **options)
        assert max(model.rows) == most
    model = Linear()
    options = {} if given is None else {"batch_size": given}
    curve = security_evaluation(model, inputs, labels, [0], progress=False, **options)
    assert max(model.rows) == curve.settings["batch_size"] == most


class Seen(nn.Module):
    """Passes images on, and keeps how many it saw at once."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def forward(self, inputs):
        self.rows.append(len(inputs))
        return inputs


@pytest.mark.parametrize(
    ("given", "most"), [(None, 16), pytest.param(20, 20, marks=pytest.mark.slow)]
)
def test_classifiers_and_evaluations_see_no_more_at_once_either(given, most):
    inputs, labels = torch.rand(40, 3, 80, 80), torch.arange(40) % 2
    size = {} if given is None else {"batch_size": given}
    seen = Seen()
    net = nn.Sequential(seen, nn.AvgPool2d(80), nn.Flatten())
    net.append(nn.Linear(3, 2))
    nr = NR(net, "2", hyperparameters={"2": (1.0, 1.0)}, **size)
    logits = LogitRejection(net, **size)
    detector = WithReject(net, lambda images: images.flatten(1).mean(dim=1), 0.5, **size)
    nr.fit(inputs, labels)
    extract(nr.features, inputs, **size)
    for model in (nr, logits, detector):
        model.calibrate(inputs).predict(inputs)
    assert max(seen.rows) == most
    seen.rows.clear()
    options = {"attacks": build_line_up(["noise"], inputs), **size}
    curve = security_evaluation(net, inputs, labels, [0, 0.1], **options)
    measure(net, inputs, curve, calibration=(inputs, labels), **size)
    points = curve.adversarial[1]
    stratified_curve(nr, inputs, labels, points, 0.1, reject_options={"steps": 1}, **size)
    threshold_sweep(net, inputs, labels, {0.1: points}, [0.1], **size)
    attack_all_targets(lambda view, images, wanted: images, net, inputs, labels, **size)
    assert max(seen.rows) == most


class Largest(TorchDispatchMode):
    """Keep how many values the largest tensor has."""

    values = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if torch.is_tensor(result):
            self.values = max(self.values, result.numel())
        return result


@pytest.mark.slow
def test_memory_of_a_minimum_norm_attack_does_not_grow_with_the_inputs():
    pool = torch.rand(500, 1, 28, 28)
    pool[:, 0, 0, 0] = 0.75
    labels = torch.zeros(256, dtype=torch.int64)
    inputs = torch.full((256, 1, 28, 28), 0.25)  # with the pool 100 million values
    with Largest() as largest:
        found = boundary_walk(Linear(), inputs, labels, pool, neighbours=500, steps=1)
    assert 1 << 25 < largest.values <= 1 << 26
    assert (Linear()(found).argmax(dim=1) == 1).all()
