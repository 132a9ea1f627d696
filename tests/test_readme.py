import importlib
import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from torchvision.models import resnet18

import torchdnr
from torchdnr.evaluation import load_results
from torchdnr.evaluation.metrics import evaded
from torchdnr.models import MNISTNet, save_network

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.fixture
def recorded_run(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("benchmarks.record_run")


def test_the_numbers_are_those_of_the_committed_results(recorded_run):
    markers = recorded_run.MARKERS
    section = recorded_run.readme_section(*load_results(recorded_run.RESULTS / "mnist-5k.json"))
    assert "\n".join([markers[0], section, markers[1]]) in README


def test_the_svm_numbers_are_those_of_the_committed_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = importlib.import_module("benchmarks.svm.readme")
    section = script.readme_section(json.loads(script.RESULTS.read_text()))
    assert "\n".join([script.MARKERS[0], section, script.MARKERS[1]]) in README


def test_the_attack_numbers_are_those_of_the_committed_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = importlib.import_module("benchmarks.attacks.report")
    results = script.load()
    assert None not in results
    section = script.readme_section(*results)
    assert "\n".join([script.MARKERS[0], section, script.MARKERS[1]]) in README


def test_in_the_recorded_run_the_worst_case_holds_every_attack(recorded_run):
    curves, _ = load_results(recorded_run.RESULTS / "mnist-5k.json")
    assert len(curves) == 3
    for curve in curves.values():
        assert len(curve.attacks) == 3
        for attack in curve.attacks.values():
            for eps, worst, alone in zip(
                curve.eps, curve.predictions, attack.predictions, strict=True
            ):
                if eps > 0:
                    harmful = evaded(torch.as_tensor(alone), curve.labels)
                    assert evaded(torch.as_tensor(worst), curve.labels)[harmful].all()


def test_no_recorded_attack_of_another_library_evades_where_ours_does_not():
    peers = json.loads((ROOT / "benchmarks/results/peers-cpu.json").read_text())["peers"]
    assert len(peers) == 10
    for entry in peers.values():
        assert entry["table"].keys() == {"1.5", "2"}
        assert all(row["peer_only"] == [] for row in entry["table"].values())


def test_the_files_it_links_to_exist():
    links = re.findall(r"\]\((?!http)([^)]+)\)", README)
    assert len(links) == 31
    assert all((ROOT / link).exists() for link in links)


def test_the_python_example_runs(tmp_path, monkeypatch):
    code, svm_code, layers_code, detector_code = re.findall(r"```python\n(.*?)```", README, re.S)
    for given, small in [
        ("svm=1200", "svm=150"),
        ("threshold=500", "threshold=40"),
        ("[:20]", "[:2]"),
    ]:
        assert given in code
        code = code.replace(given, small)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_network(MNISTNet(), Path("runs/mnist-5k/network.safetensors"))
    variables = {}
    exec(code, variables)
    assert variables["model"].predict(variables["images"]).shape == (100,)
    assert len(variables["curve"].accuracy) == 3
    features = torch.randn(40, 3)
    variables = {"features": features, "classes": (features[:, 0] > 0).long()}
    exec(svm_code, variables)
    assert variables["search"].svm(features).shape == (40, 2)
    run_layers_example(layers_code)
    run_detector_example(detector_code)


def run_layers_example(code):
    labels = torch.arange(24) % 2
    images = torch.rand(24, 3, 32, 32) / 2 + labels[:, None, None, None] / 2
    net = resnet18(num_classes=2)
    variables = {"net": net, "images": images, "calibration_images": images}
    variables |= {"DNR": torchdnr.DNR, "loader": [(images[:12], labels[:12]), (images, labels)]}
    if importlib.util.find_spec("onnxscript") is None:
        code = code.replace("torchdnr.export_onnx(", "isinstance(")
        code = code.replace('model, "dnr.onnx", images)', "model, object)")
    code = code.replace("model = DNR(net, {", "lazy = model\nmodel = DNR(net, {")
    exec(f"import torch\n{code}", variables)
    assert variables["lazy"].layers == ()
    small, model = variables["small"], variables["model"]
    assert len(small.base_svms[0].support_vectors) < len(model.base_svms[0].support_vectors)
    found = variables["program"].module()(images)
    torch.testing.assert_close(found["scores"], model.scores(images), atol=1e-4, rtol=1e-4)


def run_detector_example(code):
    images = torch.rand(12, 5)
    weight = torch.randn(5, 3)
    variables = {
        "classifier": lambda x: (x - 0.5) @ weight,
        "score_fn": lambda x: (x - 0.5).square().sum(dim=1),
        "pool": torch.rand(60, 5),
        "images": images,
        "labels": ((images - 0.5) @ weight).argmax(dim=1),
    }
    exec(code, variables)
    assert set(variables["curve"].attacks) == {"line-search PGD", "boundary walk", "APGD", "Square"}
    assert variables["report"].status in {"pass", "warn", "fail"}


def test_versions_agree():
    assert f"## {torchdnr.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()
    assert f'__version__ = "{torchdnr.__version__}"' in (ROOT / "torchdnr/__init__.py").read_text()
