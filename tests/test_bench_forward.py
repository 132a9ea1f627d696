"""benchmarks/cost/forward.py on few vectors: what is timed is what the shares and bounds say."""

import json
import shutil

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import RESULTS
from benchmarks.cost import forward
from benchmarks.cost.report import forward_page


def test_made_up_svms_score_as_the_float64_formula():
    case = forward.Case("MNISTNet", size=28)
    model, shape = forward.build_model(case, 60)
    assert shape == (1, 28, 28)
    assert [len(svm.support_vectors) for svm in (*model.base_svms, model.combiner)] == [60] * 4
    errors = forward.largest_errors(model, torch.rand(3, *shape))
    assert errors["rows"] == 3
    assert 0 < errors["scores"] < 1e-4 and 0 < errors["gradient"] < 1e-3
    # The rest is what DNR itself makes of these SVMs.
    images = torch.rand(3, *shape)
    features = model.features(images)
    svms = zip(model.base_svms, features.values(), strict=True)
    base = [forward.plain_scores(svm, z) for svm, z in svms]
    scores = forward.plain_scores(model.combiner, torch.cat(base, 1).float())
    assert scores.std(0).min() > 1e-4
    torch.testing.assert_close(model.scores(images).double(), scores, rtol=1e-4, atol=1e-4)


def test_the_comparison_sees_a_wrong_score():
    model, shape = forward.build_model(forward.Case("MNISTNet", size=28), 60)
    svm = model.base_svms[1]
    svm.forward, right = lambda features: right(features) * 1.01, svm.forward
    errors = forward.largest_errors(model, torch.rand(2, *shape))
    assert errors["scores"] == pytest.approx(0.01, rel=0.01)
    assert errors["gradient"] == pytest.approx(0.01, rel=0.01)


def test_the_difference_of_another_form_is_seen():
    model, shape = forward.build_model(forward.Case("MNISTNet", size=28), 60)
    images = torch.rand(2, *shape)
    assert forward.largest_differences(model, model, images) == {"scores": 0, "gradient": 0}
    found = forward.largest_differences(model, lambda x: 1.01 * model(x), images)
    assert found == pytest.approx({"scores": 0.01, "gradient": 0.01}, rel=0.01)


@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v3_small", "resnet18", "CIFAR10Net"])
def test_every_network_can_be_built(name):
    case = forward.Case(name, 3, 64 if name != "CIFAR10Net" else 32)
    model, shape = forward.build_model(case, 20)
    assert model(torch.rand(2, *shape)).shape == (2, 4)
    assert not model.net.training


@pytest.mark.slow
@pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "cl"))), reason="inductor needs a C++ compiler"
)
def test_a_small_case_is_measured_whole():
    case = forward.Case("MNISTNet", size=28)
    found = json.loads(json.dumps(forward.measure(case, 50, 2, batches=(2,))))
    assert found["features"] == {"relu_fc1": 200, "relu_fc2": 200, "logits": 10, "combiner": 30}
    entry = found["batches"]["2"]
    assert 0 <= max(entry["compiled_difference"].values()) < 1e-4
    for mode, rounds in (("forward", 6), ("gradient", 2)):
        measured = entry[mode]
        assert set(measured["seconds"]) == {
            *("network", "DNR", "network, channels_last", "DNR, channels_last"),
            *("network, compiled", "DNR, compiled"),
            *("kernels", "head", "products"),
        }
        assert all(len(values) == rounds for values in measured["all_seconds"].values())
        assert sum(measured["share"].values()) == pytest.approx(1)
        for form in ("DNR", "DNR, channels_last", "DNR, compiled"):
            low, high = measured[form]["quartiles"]
            assert low <= measured[form]["overhead"] <= high


def test_shares_and_overheads_of_known_times():
    seconds = {
        "network": [1.0, 2.0, 1.0],
        "DNR": [1.5, 3.0, 1.1],
        "kernels": [0.2] * 3,
        "head": [0.1] * 3,
        "products": [0.25, 0.5, 0.25],
    }
    found = forward.shares(seconds)
    assert found["DNR"]["overhead"] == pytest.approx(0.5)
    assert found["DNR"]["quartiles"] == pytest.approx([0.1, 0.5])
    assert found["DNR"]["bound"] == pytest.approx(0.25)
    assert found["DNR"]["excess"] == pytest.approx(2)
    expected = {"network": 1 / 1.5, "kernels": 0.2 / 1.5, "head": 0.1 / 1.5, "rest": 0.2 / 1.5}
    assert found["share"] == pytest.approx(expected)


def test_products_are_those_of_scores_and_gradients():
    model, shape = forward.build_model(forward.Case("MNISTNet", size=28), 50)
    images = torch.rand(2, *shape)
    calls = forward.all_calls(model, {"DNR": (model.net, model)}, images)
    widths = (200, 200, 10, 30)
    flops = sum(2 * 2 * 50 * (d + 10) for d in widths)
    for mode, factor in (("forward", 1), ("gradient", 2)):
        with FlopCounterMode(display=False) as counted:
            calls["products"][mode]()
        assert counted.get_total_flops() == factor * flops
    (gradient,) = calls["DNR"]["gradient"]()
    leaf = images.clone().requires_grad_()
    model(leaf).sum().backward()
    torch.testing.assert_close(gradient, leaf.grad)


def test_a_missed_target_is_named():
    result = json.loads((RESULTS / "forward-cpu.json").read_text())
    found = result["cases"][0]["batches"]["1"]["forward"]["DNR"]
    for overhead, verdict in ((0.33, "missed by 18 points"), (0.1, "reached")):
        found |= {"overhead": overhead, "quartiles": [0.08, 0.4], "bound": 0.05}
        expected = (
            f"- 10 classes, batch of 1: {100 * overhead:.0f} % (quartiles 8 to 40), {verdict}; "
            "the products alone take 5 %"
        )
        assert expected in forward_page(result)
