"""Tests of python -m torchdnr.predict: image files to a table, with a tiny run folder."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import make_images, options
from torchvision.transforms.functional import to_pil_image

from torchdnr import DNR, NR
from torchdnr.cli import predict
from torchdnr.cli.console import Console
from torchdnr.cli.options import train_parser
from torchdnr.cli.run_folder import prepare
from torchdnr.models import MNISTNet, load_network, save_network

ROOT = Path(__file__).parents[1]
LAYERS = ["relu_fc2", "logits"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run folder as train.py makes it, of 120 images, whose data are gone; and its DNR."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    images = (make_images(120, 1, 28) * 255).round() / 255
    np.savez(folder / "data.npz", x_train=images.numpy(), y_train=np.arange(120) % 3)
    asked = ["--dataset", f"npz:{folder / 'data.npz'}", "--run", str(folder), "--device", "cpu"]
    asked += ["--layers", *LAYERS]
    job = prepare(train_parser().parse_args(asked), Console(quiet=True))
    net = job.build_network().eval()
    save_network(net, folder / "network.safetensors")
    dnr = DNR(net, LAYERS, **options(*LAYERS, "combiner")).fit(*job.images("svm"))
    nr = NR(net, "logits", **options("logits")).fit(*job.images("svm"))
    for model in (dnr, nr):
        model.calibrate(job.images("threshold")[0], 0.3)
        model.save(folder / f"{type(model).__name__.lower()}.safetensors")
    (folder / "data.npz").unlink()
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Twelve grey images 28 x 28 as files, in two folders, and a file that is no image."""
    folder = tmp_path_factory.mktemp("photographs")
    torch.manual_seed(1)
    images = (make_images(12, 1, 28) * 255).round() / 255
    for index, image in enumerate(images):
        path = folder / ("deep/er" if index >= 6 else ".") / f"{index:02}.PNG"
        path.parent.mkdir(parents=True, exist_ok=True)
        to_pil_image(image).save(path)
    (folder / "notes.txt").write_text("no image, and not called so")
    return folder, images


def table(path):
    with open(path, newline="") as opened:
        return list(csv.DictReader(opened))


def expected_model(folder, kind):
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["classes"] == ["0", "1", "2"] and settings["image_shape"] == [1, 28, 28]
    net = load_network(MNISTNet(num_classes=3), folder / "network.safetensors")
    return kind.load(folder / f"{kind.__name__.lower()}.safetensors", net)


@pytest.mark.parametrize("kind", [DNR, NR])
@pytest.mark.parametrize("batch_size", ["5", "256"])
def test_table_tells_what_the_classifier_says(finished, photographs, tmp_path, kind, batch_size):
    folder, images = photographs
    out = tmp_path / "out.csv"
    asked = ["--run", str(finished), str(folder), "--csv", str(out), "--device", "cpu", "--quiet"]
    asked += ["--classifier", kind.__name__, "--batch-size", batch_size, "--all-scores"]
    assert predict.main(asked) == 0
    rows = table(out)
    assert [Path(row["file"]).stem for row in rows] == [f"{index:02}" for index in range(12)]
    model = expected_model(finished, kind)
    with torch.no_grad():
        scores = model.scores(images)
    labels = model.predict(images).tolist()
    assert -1 in labels and set(labels) != {-1}
    assert [int(row["class"]) for row in rows] == labels
    assert [row["rejected"] for row in rows] == ["1" if label < 0 else "0" for label in labels]
    assert [row["label"] for row in rows] == ["" if k < 0 else str(k) for k in labels]
    assert [int(row["best_label"]) for row in rows] == scores.argmax(1).tolist()
    got = torch.tensor([[float(row[f"score {name}"]) for name in "012"] for row in rows])
    torch.testing.assert_close(got, scores, rtol=1e-4, atol=1e-4)
    assert [float(row["best_score"]) for row in rows] == got.amax(1).tolist()
    assert {float(row["threshold"]) for row in rows} == {model.threshold.item()}


def test_channels_last_changes_the_network_and_nothing_else(finished, photographs, tmp_path):
    asked = ["--run", str(finished), str(photographs[0]), "--device", "cpu", "--quiet"]
    for name, extra in (("plain", []), ("last", ["--channels-last"])):
        assert predict.main([*asked, "--csv", str(tmp_path / name), *extra]) == 0
        model = predict.load_classifier(
            finished, "DNR", torch.device("cpu"), channels_last=bool(extra)
        )
        weight = model.net.conv2.weight
        assert weight.is_contiguous(memory_format=torch.channels_last) == bool(extra)
        assert weight.is_contiguous() != bool(extra)
    for plain, last in zip(*(table(tmp_path / name) for name in ("plain", "last")), strict=True):
        score = float(plain.pop("best_score"))
        assert float(last.pop("best_score")) == pytest.approx(score, rel=1e-3, abs=1e-3)
        assert plain == last


def test_network_alone_rejects_nothing(finished, photographs, capsys):
    asked = ["--run", str(finished), str(photographs[0]), "--classifier", "DNN", "--device", "cpu"]
    assert predict.main(asked) == 0
    out, err = capsys.readouterr()
    rows = list(csv.DictReader(out.splitlines()))
    assert {(row["rejected"], row["threshold"]) for row in rows} == {("0", "")}
    assert all(row["label"] == row["best_label"] for row in rows) and "score 0" not in rows[0]
    assert "DNN: 12 images, 0 rejected, 0 unreadable" in err


def test_broken_files_are_told_counted_and_left_out(finished, photographs, tmp_path, capsys):
    folder, out = tmp_path / "images", tmp_path / "out.csv"
    shutil.copytree(photographs[0], folder)
    (folder / "00.PNG").write_bytes(b"no image")
    (folder / "07.png").write_bytes((folder / "deep/er/07.PNG").read_bytes()[:-200])
    asked = ["--run", str(finished), str(folder), "--csv", str(out), "--device", "cpu"]
    assert predict.main(asked) == 1
    err = capsys.readouterr().err
    assert f"cannot read {folder / '00.PNG'}: " in err
    assert f"cannot read {folder / '07.png'}: " in err
    assert "11 images" in err and "2 unreadable" in err
    assert len(table(out)) == 11 and not any("00.PNG" in row["file"] for row in table(out))
    shutil.rmtree(folder)
    assert predict.main([*asked[:2], str(photographs[0] / "notes.txt"), *asked[3:], "--quiet"]) == 1
    assert table(out) == []


def test_images_of_any_size_and_colour_are_cropped_like_a_folder(finished, tmp_path):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (60, 100, 3), generator=generator).byte()
    image = Image.fromarray(pixels.numpy())
    image.save(tmp_path / "wide.png")
    image.crop((20, 0, 80, 60)).convert("L").resize((28, 28), Image.Resampling.BILINEAR).save(
        tmp_path / "square.png"
    )
    out = tmp_path / "out.csv"
    files = [str(tmp_path / name) for name in ("wide.png", "square.png")]
    asked = ["--run", str(finished), *files, "--csv", str(out), "--device", "cpu", "--all-scores"]
    assert predict.main(asked) == 0
    wide, square = table(out)
    assert float(wide["score 1"]) == pytest.approx(float(square["score 1"]), abs=0.05)


def error(capsys, *asked):
    assert predict.main(["--quiet", "--device", "cpu", *map(str, asked)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


def test_errors_in_one_line_and_an_earlier_table_stays(run, photographs, tmp_path, capsys):
    out = tmp_path / "out.csv"
    out.write_text("earlier")
    images, asked = photographs[0], ["--run", run, "--csv", out]
    assert "no file or folder" in error(capsys, *asked, tmp_path / "nowhere.png")
    (tmp_path / "empty").mkdir()
    assert "no image in" in error(capsys, *asked, tmp_path / "empty")
    assert "expected a run folder" in error(capsys, images, "--run", tmp_path / "empty")
    settings = json.loads((run / "settings.json").read_text())
    older = {name: value for name, value in settings.items() if name != "classes"}
    (run / "settings.json").write_text(json.dumps(older))
    assert "older version" in error(capsys, *asked, images)
    (run / "settings.json").write_text(json.dumps(settings))
    (run / "nr.safetensors").unlink()
    assert "no NR file here" in error(capsys, *asked, images, "--classifier", "NR")
    (run / "dnr.safetensors").write_bytes(b"damaged")
    assert "dnr.safetensors" in error(capsys, *asked, images)
    assert out.read_text() == "earlier"


@pytest.mark.slow
def test_module_on_the_command_line(finished, photographs):
    command = [sys.executable, "-m", "torchdnr.predict", "--run", finished, photographs[0]]
    done = subprocess.run(
        [*command, "--device", "cpu", "--quiet"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr == ""
    assert len(done.stdout.splitlines()) == 13


def test_a_stopped_call_says_that_it_starts_again(run, photographs, capsys):
    images, pipe, path = photographs[0], run / "endless.png", run / "labels.csv"
    os.mkfifo(pipe)

    ended = threading.Event()

    def stop_while_it_is_read():
        with pipe.open("wb"):  # waits until the command reads it; nothing comes, nor an end
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGINT)
            ended.wait(30)

    threading.Thread(target=stop_while_it_is_read, daemon=True).start()
    asked = [str(images / "00.PNG"), str(pipe), "--batch-size", "1", "--csv", str(path)]
    assert predict.main([*asked, "--run", str(run), "--device", "cpu"]) == 130
    ended.set()
    assert capsys.readouterr().err.endswith("stopped; the same command starts again\n")
    assert not path.exists() and not list(run.glob("*.tmp"))


@pytest.mark.slow
def test_a_picture_explains_decisions_by_training_images(finished, photographs, tmp_path):
    """The data set has to be there, and to be the one that the folder was made with."""
    run, picture = tmp_path / "run", tmp_path / "why.png"
    shutil.copytree(finished, run)
    data = tmp_path / "data.npz"
    torch.manual_seed(0)
    images = (make_images(120, 1, 28) * 255).round() / 255
    np.savez(data, x_train=images.numpy(), y_train=np.arange(120) % 3)
    settings = json.loads((run / "settings.json").read_text()) | {"dataset": f"npz:{data}"}
    (run / "settings.json").write_text(json.dumps(settings))
    asked = ["--run", str(run), str(photographs[0]), "--csv", str(tmp_path / "out.csv")]
    asked += ["--device", "cpu", "--quiet", "--explain", str(picture)]
    assert predict.main(asked) == 0
    with Image.open(picture) as drawn:
        width, height = drawn.size
    assert width > height > 1_000  # eight rows
    assert predict.main([*asked, "--classifier", "DNN"]) == 2
    np.savez(data, x_train=1 - images.numpy(), y_train=np.arange(120) % 3)
    assert predict.main(asked) == 2
