"""The scripts on a folder of photographs with a torchvision classifier as the network."""

import csv
import html
import importlib.util
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from torchvision import models
from torchvision.io import write_jpeg

from torchdnr import DNR
from torchdnr.cli import predict
from torchdnr.cli.console import Console
from torchdnr.cli.options import attack_parser
from torchdnr.cli.run_folder import prepare
from torchdnr.data import load_dataset
from torchdnr.files import load_tensors
from torchdnr.models import load_network

ROOT = Path(__file__).parents[1]


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


train, attack = script("train"), script("attack")

ATTACKING = ("--samples", "2", "--eps", "0", "1", "--examples", "1", "--no-checks", "--device")
ATTACKING += ("cpu", "--attack", "line-search-pgd", "--steps", "2", "--seed", "0", "--quiet")
OUTPUTS = "7", "3"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Reddish and bluish noise, larger than the network gets it, with one file that is broken."""
    folder, generator = tmp_path_factory.mktemp("photographs"), torch.Generator().manual_seed(0)
    for part, count in (("train", 30), ("val", 6)):
        for channel, name in ((0, "red"), (2, "blue")):
            (folder / part / name).mkdir(parents=True)
            for index in range(count):
                image = torch.randint(0, 140, (3, 80, 96), generator=generator).byte()
                image[channel] += 110
                write_jpeg(image, str(folder / part / name / f"{index}.jpg"))
    (folder / "train/red/broken.jpg").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "squeezenet.pth"
    torch.save(models.squeezenet1_1(weights=None).state_dict(), path)
    return path


def making(photographs, weights, folder):
    options = ["--dataset", f"folder:{photographs}", "--run", str(folder), "--device", "cpu"]
    options += ["--backbone", "squeezenet1_1", "--weights", str(weights), "--outputs", *OUTPUTS]
    return [*options, "--image-size", "64", "--seed", "0", "--quiet"]


@pytest.fixture(scope="module")
def made(photographs, weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    layers = ["--layers", "features.7:grid2", "features.10:project64", "features.12:avg"]
    with pytest.warns(UserWarning, match="1 of 61 images .* unreadable"):
        assert train.main([*making(photographs, weights, folder), *layers]) == 0
    return folder


def settings_of(folder):
    return json.loads((folder / "settings.json").read_text())


@pytest.mark.slow
def test_weights_are_taken_and_not_trained(made, weights):
    settings, given = settings_of(made), torch.load(weights, weights_only=True)
    assert (settings["network"], settings["network_samples"]) == ("squeezenet1_1", 0)
    assert (settings["svm_samples"], settings["threshold_samples"]) == (48, 12)
    kept, _ = load_tensors(made / "network.safetensors", kind="network")
    assert {f"network.{name}" for name in given} == set(kept)
    assert all(torch.equal(kept[f"network.{name}"], value) for name, value in given.items())


@pytest.mark.slow
def test_layers_are_reduced_as_said(made):
    _, metadata = load_tensors(made / "dnr.safetensors", kind="DNR")
    sizes = {name: entry["features"] for name, entry in metadata["sizes"].items()}
    assert sizes == {
        "network.features.7": 4 * 256,
        "network.features.10": 64,
        "network.features.12": 512,
    }
    _, metadata = load_tensors(made / "nr.safetensors", kind="NR")
    assert metadata["sizes"]["network.features.12"]["features"] == 512


@pytest.mark.slow
def test_attack_needs_the_run_folder_alone(made, photographs, weights, tmp_path, capsys):
    """Not the file with the weights, which is in the folder."""
    folder = tmp_path / "run"
    shutil.copytree(made, folder)
    moved = weights.with_name("moved.pth")
    weights.rename(moved)
    try:
        assert attack.main(["--run", str(folder), *ATTACKING]) == 0
    finally:
        moved.rename(weights)
    assert "DNR" in capsys.readouterr().out
    results = json.loads((folder / "results.json").read_text())
    assert set(results["curves"]) == {"DNN", "NR", "DNR"}
    assert (folder / "curve.png").exists()
    command = re.search("<pre>(python attack.py .*?)</pre>", (folder / "report.html").read_text())
    asked = attack_parser().parse_args(shlex.split(html.unescape(command[1]))[2:])
    assert (asked.backbone, asked.image_size) == ("squeezenet1_1", 64)
    assert (asked.weights, asked.outputs) == (str(weights), [7, 3])


@pytest.mark.slow
def test_predict_labels_files_as_the_classifier_does(made, photographs, tmp_path):
    table = tmp_path / "labels.csv"
    asked = [str(photographs / "val"), "--run", str(made), "--csv", str(table), "--device", "cpu"]
    assert predict.main([*asked, "--quiet"]) == 0
    with table.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    job = prepare(
        attack_parser().parse_args(["--run", str(made), "--device", "cpu"]), Console(True)
    )
    data = load_dataset(f"folder:{photographs}", image_size=64)
    net = load_network(job.build_network(), made / "network.safetensors")
    model = DNR.load(made / "dnr.safetensors", net.eval())
    images, labels = data.select(torch.arange(12), test=True)
    assert [Path(row["file"]).parent.name for row in rows] == [data.classes[k] for k in labels]
    assert [int(row["class"]) for row in rows] == model.predict(images).tolist()
    best = torch.tensor([float(row["best_score"]) for row in rows])
    torch.testing.assert_close(best, model.scores(images).amax(dim=1).detach(), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_without_layers_three_are_chosen_and_remembered(photographs, weights, tmp_path):
    folder = tmp_path / "run"
    with pytest.warns(UserWarning, match="unreadable"):
        assert train.main(making(photographs, weights, folder)) == 0
    _, metadata = load_tensors(folder / "dnr.safetensors", kind="DNR")
    assert len(metadata["layers"]) == len(settings_of(folder)["layers"]) == 3


@pytest.mark.slow
def test_a_backbone_without_weights_is_trained(photographs, weights, tmp_path):
    options = making(photographs, weights, tmp_path / "run")
    start, end = options.index("--weights"), options.index("--image-size")
    options[start:end] = ["--epochs", "1", "--layers", "features.12:avg"]
    with pytest.warns(UserWarning, match="unreadable"):
        assert train.main(options) == 0
    settings = settings_of(tmp_path / "run")
    assert (settings["network_samples"], settings["svm_samples"]) == (36, 18)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backbone", "squeezenet9"], "no backbone 'squeezenet9'; choose from: squeezenet1_1"),
        (["--outputs", "1"], "outputs must be 2 different numbers in 0..999, one per class"),
        (["--layers", "features.12:max"], "the latter flatten, avg, gridN or projectN"),
        (["--layers", "features.99"], "no layer 'features.99'; did you mean: "),
        (["--layers", "features.12", "network.features.12"], "name a layer once"),
        (["--weights", "nowhere.pth"], "no file nowhere.pth; expected the weights"),
        (["--image-size", "8"], "fails on an image (3, 8, 8)"),
        (
            ["--image-size", "8", "--layers", "features.12"],
            "squeezenet1_1 fails on images (3, 8, 8)",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*unreadable")
def test_wrong_options_are_one_line(photographs, weights, tmp_path, capsys, options, message):
    given = making(photographs, weights, tmp_path / "run")
    assert train.main([*given, *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("error: ") and message in error[-1]


@pytest.mark.parametrize("option", [["--weights", "DEFAULT"], ["--outputs", "1", "2"]])
@pytest.mark.filterwarnings("ignore:.*unreadable")
def test_options_of_a_backbone_need_one(photographs, tmp_path, capsys, option):
    given = ["--dataset", f"folder:{photographs}", "--run", str(tmp_path), "--quiet", *option]
    assert train.main(given) == 2
    assert f"{option[0]} must go with a --backbone" in capsys.readouterr().err
