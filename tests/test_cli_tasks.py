"""attack.py --mask and --targets, train.py --class-weight: other tasks than the usual ones."""

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from torchdnr import NR
from torchdnr.cli import attack, train
from torchdnr.cli.classifiers import make_classifiers
from torchdnr.cli.console import Console
from torchdnr.cli.options import attack_parser, train_parser
from torchdnr.cli.run_folder import prepare
from torchdnr.files import load_tensors

ATTACKING = [
    *("--attack", "pgd", "--steps", "4", "--samples", "8", "--eps", "0", "3", "--examples", "0"),
    *("--check-samples", "2", "--only-checks", "deterministic", "noise control"),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run folder on digits 0, 1 and 2, few of them of class 2, with balanced SVMs."""
    x, y = load_digits(n_class=3, return_X_y=True)
    kept = (y != 2) | (np.arange(len(y)) % 3 == 0)
    x, y = x[kept][:180], y[kept][:180]
    x = torch.tensor(x, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    x = torch.nn.functional.interpolate(x, size=28, mode="bilinear").clamp(0, 1)
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    np.savez(path, x_train=x.numpy(), y_train=y)
    folder = tmp_path_factory.mktemp("finished")
    making = [
        *("--quiet", "--dataset", f"npz:{path}", "--run", str(folder), "--device", "cpu"),
        *("--network-samples", "80", "--svm-samples", "50", "--threshold-samples", "20"),
        *("--epochs", "15", "--lr", "0.02", "--train-batch-size", "16"),
        *("--layers", "relu_fc2", "logits", "--C-grid", "1", "--gamma-grid", "1"),
        *("--class-weight", "balanced", "--no-channels-last"),
    ]
    assert train.main(making) == 0
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the run folder, for a test to write into."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def loaded(run):
    arguments = ["--quiet", "--run", str(run), "--device", "cpu"]
    job = prepare(train_parser().parse_args(arguments), Console(quiet=True))
    return job, make_classifiers(job, Console(quiet=True))


def attacked(run, *options):
    """Attack, and return results.json."""
    assert attack.main(["--quiet", "--run", str(run), *ATTACKING, *options]) == 0
    return json.loads((run / "results.json").read_text())


def points(run, name):
    """Load every adversarial point of a classifier, by step of the attacks."""
    found, _ = load_tensors(
        run / f"attack-{name}-1-of-1.safetensors", "torchdnr security evaluation"
    )
    return [value for key, value in found.items() if key != "clean output"]


def error(capsys, command, *options):
    """Run a command that must fail, and return its one line on stderr."""
    assert command.main(["--quiet", *options]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    return line


@pytest.mark.slow
def test_class_weight_balances_the_svms_of_both_classifiers(finished, capsys):
    job, made = loaded(finished)
    for name in ("NR", "DNR"):
        assert made[name].svm_options.class_weight == "balanced"
    images, labels = job.images("svm")
    assert labels.bincount().max() > 2 * labels.bincount().min()
    last = made["NR"].layers[0]
    chosen = made["NR"].selection[last]
    options = {"hyperparameters": {last: (chosen["C"], chosen["gamma"])}}
    balanced = NR(job.build_network(), last, class_weight="balanced", **options)
    balanced.net.load_state_dict(made["DNN"].state_dict())
    expected = balanced.fit(images, labels).scores(images)
    torch.testing.assert_close(made["NR"].scores(images), expected, atol=1e-4, rtol=0)
    plain = NR(balanced.net, last, **options).fit(images, labels).scores(images)
    assert (plain - expected).abs().max() > 0.1
    assert json.loads((finished / "settings.json").read_text())["class_weight"] == "balanced"
    with pytest.raises(SystemExit):
        train.main(["--run", str(finished), "--class-weight", "2"])
    assert "invalid choice: '2'" in capsys.readouterr().err


@pytest.mark.slow
def test_attacks_change_only_what_a_picture_shows(run, tmp_path, capsys):
    mask = torch.zeros(28, 28, dtype=torch.bool)
    mask[4:14, 6:14] = True
    picture, array = tmp_path / "mask.png", tmp_path / "mask.npy"
    Image.fromarray(mask.numpy().astype(np.uint8) * 200).convert("RGB").save(picture)
    free = attacked(run)
    held = attacked(run, "--mask", str(picture))
    images = loaded(run)[0].images("test")[0][:8]
    for name in ("dnn", "nr", "dnr"):
        for found in points(run, name):
            changed = found.reshape(-1, 1, 28, 28) != images.repeat(len(found) // 8, 1, 1, 1)
            assert changed.any() and not changed[..., ~mask].any()
    assert held["curves"]["DNN"]["evasion_rate"][1] < free["curves"]["DNN"]["evasion_rate"][1]
    assert "only what a mask lets them" in capsys.readouterr().out
    for report in held["checks"].values():
        assert [check["status"] for check in report["checks"]] == ["pass", "pass"]
    np.save(array, mask[None].float().numpy())
    torch.save(mask, tmp_path / "mask.pt")
    for file in (array, tmp_path / "mask.pt"):
        again = attacked(run, "--mask", str(file))
        digest = held["settings"]["attack"]["mask_digest"]
        assert again["settings"]["attack"]["mask_digest"] == digest
        for name, curve in held["curves"].items():
            assert again["curves"][name]["evasion_rate"] == curve["evasion_rate"]
    np.save(array, np.ones((28, 28)))  # another mask under the same name
    for name, curve in attacked(run, "--mask", str(array))["curves"].items():
        assert curve["evasion_rate"] == free["curves"][name]["evasion_rate"]


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [0, 2])
def test_with_a_target_only_what_is_accepted_as_it_counts(run, capsys, wanted):
    content = attacked(run, "--targets", str(wanted), "--eps", "0", "8", "--steps", "15")
    assert content["settings"]["attack"]["targets"] == wanted and not content["checks"]
    printed = capsys.readouterr().out
    assert "checks: none were made" in printed and "wanted one class each" in printed
    job, made = loaded(run)
    labels, seen = job.images("test")[1][:8], 0
    for name in ("NR", "DNR"):
        curve = content["curves"][name]
        found = [made[name].predict(some) for some in points(run, name.lower())]
        reached = torch.stack([row == wanted for row in found]).any(dim=0) & (labels != wanted)
        assert curve["evasion_rate"][-1] == reached.double().mean().item()
        seen += int(reached.sum())
    assert seen
    words = shlex.split(content["settings"]["command"])[2:]
    options = attack_parser().parse_args(words)
    assert options.targets == wanted and options.class_weight == "balanced"
    before = (run / "results.json").stat().st_mtime_ns
    attacked(run, "--targets", str(wanted), "--eps", "0", "8", "--steps", "15")
    assert (run / "results.json").stat().st_mtime_ns == before  # all is known


@pytest.mark.slow
def test_stratified_curve_and_sweep_keep_to_mask_and_target(run, tmp_path):
    picture = tmp_path / "mask.png"
    Image.fromarray(np.eye(28, dtype=np.uint8) * 255).save(picture)
    options = ["--mask", str(picture), "--targets", "1", "--stratified", "--sweep"]
    content = attacked(run, *options, "--classifiers", "NR", "--eps", "0", "0.5")
    for kind in ("stratified", "sweeps"):
        about = content[kind]["NR"]["settings"]
        assert about["masked"] and about["targeted"]
    curve = content["curves"]["NR"]
    evaded = sum(content["stratified"]["NR"]["evaded"]) / 8
    assert evaded == curve["evasion_rate"][-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--targets", "3"], "--targets must be below the 3 classes, got 3; from 0"),
        (["--mask", "absent.png"], "no file absent.png"),
        (
            ["--mask", "small.png"],
            "must be a picture of 28 x 28 pixels, or a tensor",
        ),
        (["--mask", "black.png"], "got zero everywhere; make those pixels white"),
        (["--mask", "text.npy"], "in a .pt or .npy file, got ValueError"),
        (["--mask", "objects.pt"], "in a .pt or .npy file, got"),
    ],
)
def test_what_is_no_mask_and_no_class_is_refused_before_any_work(
    run, tmp_path, monkeypatch, capsys, options, message
):
    monkeypatch.chdir(tmp_path)
    Image.new("L", (27, 28), 255).save("small.png")
    Image.new("L", (28, 28)).save("black.png")
    Path("text.npy").write_text("text")
    torch.save({"mask": [Path("a")]}, "objects.pt")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert message in error(capsys, attack, "--run", str(run), *options)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
