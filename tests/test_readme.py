import importlib.util
import re
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

import torchdnr
from torchdnr.models import MNISTNet, save_network

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.fixture
def examples():
    """The Python of README.md: a whole run, layers of any size, training, the SVMs, a detector."""
    names = "run", "layers", "training", "svm", "detector"
    return dict(zip(names, re.findall(r"```python\n(.*?)```", README, re.S), strict=True))


def test_it_is_read_in_one_sitting():
    assert len(README.splitlines()) <= 250


@pytest.mark.slow
def test_the_example_of_a_run_runs(examples, tmp_path, monkeypatch):
    code = examples["run"]
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


def test_the_example_of_svms_runs(examples):
    features = torch.randn(40, 3)
    variables = {"features": features, "classes": (features[:, 0] > 0).long()}
    exec(examples["svm"], variables)
    assert variables["search"].svm(features).shape == (40, 2)


@pytest.mark.slow
def test_the_example_of_layers_runs(examples, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = examples["layers"]
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


@pytest.mark.slow
def test_the_example_of_training_runs(examples):
    labels = torch.arange(60) % 2
    images = torch.rand(60, 8) / 2 + labels[:, None] / 2
    net = nn.Sequential(OrderedDict(hidden=nn.Linear(8, 6), relu=nn.ReLU(), out=nn.Linear(6, 2)))
    model = torchdnr.DNR(net, ["relu", "out"]).fit(images, labels)
    variables = {"model": model, "net": net, "calibration_images": images.flip(1)}
    exec(examples["training"], variables | {"train_images": images, "train_labels": labels})
    assert model.predict(images).shape == (60,)


@pytest.mark.slow
def test_the_example_of_a_detector_runs(examples):
    images = torch.rand(12, 5)
    weight = torch.randn(5, 3)
    variables = {
        "classifier": lambda x: (x - 0.5) @ weight,
        "score_fn": lambda x: (x - 0.5).square().sum(dim=1),
        "pool": torch.rand(60, 5),
        "images": images,
        "labels": ((images - 0.5) @ weight).argmax(dim=1),
    }
    exec(examples["detector"], variables)
    assert set(variables["curve"].attacks) == {"line-search PGD", "boundary walk"}
    assert set(variables["curve"].refinements) == {"APGD", "Square"}
    assert variables["report"].status in {"pass", "warn", "fail"}


def test_versions_agree():
    assert f"## {torchdnr.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()
    assert f'version="{torchdnr.__version__}"' in (ROOT / "setup.py").read_text()
