"""Tests of export_onnx: onnxruntime scores, rejects and labels as PyTorch does."""

import re
import sys
from pathlib import Path

import pytest
import torch
from torchvision import models

sys.path.insert(0, str(Path(__file__).parents[1]))

from small_models import fading, fitted, make_images, options, small_dnr
from test_deployment import assert_decides_alike

from torchdnr import DNR, export_onnx
from torchdnr.models import MNISTNet

onnx = pytest.importorskip("onnx", reason="needs onnx: pip install -e '.[onnx]'")
pytest.importorskip("onnxscript", reason="needs onnxscript: pip install -e '.[onnx]'")
onnxruntime = pytest.importorskip(
    "onnxruntime", reason="needs onnxruntime: pip install -e '.[onnx]'"
)


def session(path):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def runner(path):
    """Run a file as ``program.module()`` runs: images in, the named outputs out."""
    opened = session(path)
    names = [output.name for output in opened.get_outputs()]

    def run(images):
        values = opened.run(names, {"images": images.numpy()})
        return dict(zip(names, map(torch.from_numpy, values), strict=True))

    return run


CASES = {
    "mnist": (lambda: MNISTNet(num_classes=3), ["relu_fc1", "relu_fc2", "logits"], 1, 28),
    "squeezenet": (
        lambda: models.squeezenet1_1(weights=None, num_classes=3),
        {"features.5": ("project", 256), "features.8": ("grid", 2), "classifier": "avg"},
        3,
        64,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_onnxruntime_decides_as_pytorch_does(name, tmp_path):
    build, layers, channels, size = CASES[name]
    images = make_images(30, channels, size)
    model = fitted(DNR(build(), layers, **options(*layers, "combiner")), images)
    export_onnx(model, tmp_path / "dnr.onnx", images[:1])
    assert [path.name for path in tmp_path.iterdir()] == ["dnr.onnx"]
    onnx.checker.check_model(tmp_path / "dnr.onnx", full_check=True)
    assert_decides_alike(runner(tmp_path / "dnr.onnx"), model, fading(images))


def test_names_shapes_and_metadata(tmp_path):
    images = make_images(30)
    model = small_dnr(images)
    path = tmp_path / "folder" / "dnr.onnx"
    export_onnx(model, path, images, opset=20)
    opened = session(path)
    (given,), outputs = opened.get_inputs(), opened.get_outputs()
    assert given.name == "images" and given.shape[1:] == [1, 8, 8]
    assert given.shape[0] == "n"  # any number
    assert [output.shape[0] for output in outputs] == ["n", "n", "n"]
    assert [output.name for output in outputs] == ["scores", "labels", "rejected"]
    assert [len(output.shape) for output in outputs] == [2, 1, 1]
    metadata = opened.get_modelmeta().custom_metadata_map
    assert float(metadata["threshold"]) == model.threshold.item()
    assert metadata["reject_label"] == "-1"
    assert {entry.domain: entry.version for entry in onnx.load(path).opset_import}[""] == 20
    bad = images[:2].clone()
    bad[0, 0, 0, 0], bad[1, 0, 0, 0] = float("nan"), 1.01
    assert runner(path)(bad)["rejected"].all()


def test_weights_in_a_file_of_their_own(tmp_path):
    images = make_images(30)
    model = small_dnr(images)
    path = tmp_path / "dnr.onnx"
    export_onnx(model, path, images)
    whole, expected = path.stat().st_size, runner(path)(images)["scores"]
    export_onnx(model, path, images, external_data=True)
    graph, data = sorted(tmp_path.iterdir())
    assert graph == path and re.fullmatch(r"dnr\.onnx\.[0-9a-f]{8}\.data", data.name)
    assert path.stat().st_size < whole
    assert torch.equal(runner(path)(images)["scores"], expected)
    export_onnx(model, path, images, external_data=True)
    assert len(list(tmp_path.iterdir())) == 2 and not data.exists()
    export_onnx(model, path, images)
    assert list(tmp_path.iterdir()) == [path]


def test_an_export_that_breaks_at_any_renaming_leaves_the_earlier_two_files(tmp_path):
    images = make_images(30)
    first, second = small_dnr(images), small_dnr(images.flip(0))
    path = tmp_path / "dnr.onnx"
    export_onnx(first, path, images, external_data=True)
    expected, files = runner(path)(images)["scores"], sorted(tmp_path.iterdir())
    left = [0]  # renamings until one fails; 0: none does

    def watch(event, arguments):
        if event == "os.rename" and left[0] and str(tmp_path) in str(arguments[0]):
            left[0] -= 1
            if not left[0]:
                raise OSError("the disk is gone")

    sys.addaudithook(watch)
    for number in range(1, 9):
        left[0] = number
        try:
            export_onnx(second, path, images, external_data=True)
        except OSError:
            assert sorted(tmp_path.iterdir()) == files
            assert torch.equal(runner(path)(images)["scores"], expected)
        else:
            break
    left[0] = 0
    assert number > 1 and not torch.equal(runner(path)(images)["scores"], expected)


def test_failure_leaves_the_earlier_file(tmp_path, monkeypatch):
    images = make_images(30)
    model = small_dnr(images)
    path = tmp_path / "dnr.onnx"
    path.write_bytes(b"earlier")

    def broken(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("onnx_ir.save", broken)
    with pytest.raises(OSError, match="disk full"):
        export_onnx(model, path, images)
    assert path.read_bytes() == b"earlier" and len(list(tmp_path.iterdir())) == 1


def test_old_opset_is_refused(tmp_path):
    with pytest.raises(ValueError, match="opset must be >= 18, got 11"):
        export_onnx(None, tmp_path / "dnr.onnx", make_images(3), opset=11)
