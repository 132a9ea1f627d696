"""train.py and attack.py --adversarial --end-to-end: classifiers trained against attacks."""

import csv
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from interrupts import stopping_at
from PIL import Image
from sklearn.datasets import load_digits

from torchdnr import DNR
from torchdnr.cli import attack, predict, train
from torchdnr.cli.adversarial import warnings_kept
from torchdnr.cli.classifiers import make_classifiers
from torchdnr.cli.console import Console
from torchdnr.cli.options import attack_parser, train_parser
from torchdnr.cli.run_folder import prepare
from torchdnr.cli.settings import CLASSIFIERS
from torchdnr.decisions import REJECT
from torchdnr.models import WeakAttackWarning
from torchdnr.rejection import LogitRejection

pytestmark = pytest.mark.slow  # trainings, and attacks on what they make
BOTH = ["--adversarial", "1.5", "--adversarial-epochs", "2", "--end-to-end"]
ATTACKING = [
    *("--attack", "pgd", "--steps", "2", "--samples", "4", "--eps", "0", "1", "--examples", "1"),
    *("--check-samples", "2", "--only-checks", "deterministic"),
]
MADE = {
    *("robust-training.safetensors", "robust-network.safetensors", "robust.safetensors"),
    *("dnr-end-to-end-training.safetensors", "dnr-end-to-end.safetensors"),
}


@pytest.fixture(scope="module")
def making(tmp_path_factory):
    """Options of a run on 180 digits 0, 1 and 2, enlarged to 28 x 28 pixels, without the folder."""
    x, y = load_digits(n_class=3, return_X_y=True)
    x = torch.tensor(x[:180], dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    x = torch.nn.functional.interpolate(x, size=28, mode="bilinear").clamp(0, 1)
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    np.savez(path, x_train=x.numpy(), y_train=y[:180])
    return [
        *("--quiet", "--dataset", f"npz:{path}", "--device", "cpu", "--epochs", "15"),
        *("--network-samples", "29", "--svm-samples", "40", "--threshold-samples", "30"),
        *("--lr", "0.05", "--train-batch-size", "16", "--layers", "relu_fc2", "logits"),
        *("--C-grid", "1", "--gamma-grid", "1", "--no-channels-last"),
    ]


@pytest.fixture(scope="module")
def plain(making, tmp_path_factory):
    """A run folder with the three classifiers of a run without these options, attacked."""
    folder = tmp_path_factory.mktemp("plain")
    assert attack.main([*making, "--run", str(folder), *ATTACKING]) == 0
    return folder


@pytest.fixture(scope="module")
def finished(plain, tmp_path_factory):
    """A copy of it that was given the other two."""
    folder = Path(shutil.copytree(plain, tmp_path_factory.mktemp("finished") / "run"))
    assert attack.main(["--quiet", "--run", str(folder), *BOTH, *ATTACKING]) == 0
    return folder


@pytest.fixture
def run(plain, tmp_path):
    """A copy of the plain folder, for a test to spoil."""
    return Path(shutil.copytree(plain, tmp_path / "run"))


def results(folder):
    return json.loads((folder / "results.json").read_text())


def load(folder, *options):
    arguments = ["--quiet", "--run", str(folder), "--device", "cpu", *options]
    job = prepare(train_parser().parse_args(arguments), Console(quiet=True))
    return job, make_classifiers(job, Console(quiet=True))


def test_five_classifiers_are_attacked_and_reported(finished, capsys):
    content = results(finished)
    for part in (content["curves"], content["checks"], content["measures"]):
        assert list(part) == list(CLASSIFIERS)
    entries = content["settings"]["classifiers"]
    for name in CLASSIFIERS[1:]:
        assert entries[name]["calibration_rejection_rate"] == pytest.approx(0.1)
    with (finished / "results.csv").open(newline="") as file:
        assert {row["classifier"] for row in csv.DictReader(file)} == set(CLASSIFIERS)
    page = (finished / "report.html").read_text()
    assert all(f">{name}</" in page for name in CLASSIFIERS)
    assert attack.main(["--quiet", "--run", str(finished), *ATTACKING]) == 0  # the folder remembers
    table = capsys.readouterr().out.partition("worst case")[2]
    assert all(f" {name} " in table for name in CLASSIFIERS)
    options = attack_parser().parse_args(content["settings"]["command"].split()[2:])
    assert (options.adversarial, options.end_to_end, options.loss) == (1.5, True, "reject")


def test_an_earlier_folder_gains_them_and_what_it_held_stays(plain, finished):
    names = {path.name for path in plain.iterdir()}
    reported = {
        f"{file}.{kind}"
        for name in ("robust", "dnr-end-to-end")
        for file, kind in ((f"attack-{name}-1-of-1", "safetensors"), (f"checks-{name}", "json"))
    }
    assert {path.name for path in finished.iterdir()} == names | MADE | reported
    for pattern in ("*.safetensors", "checks-*.json"):
        for path in plain.glob(pattern):
            assert (finished / path.name).read_bytes() == path.read_bytes()
    before, after = results(plain)["curves"], results(finished)["curves"]
    for name, curve in before.items():
        assert curve["accuracy"] == after[name]["accuracy"]


def test_they_are_trained_further_and_come_back_as_they_were_saved(finished):
    job, classifiers = load(finished)
    images, labels = job.images("test")
    assert isinstance(classifiers["robust"], LogitRejection)
    assert isinstance(classifiers["DNR-end-to-end"], DNR)
    plain = classifiers["DNN"].state_dict()
    for name in ("robust", "DNR-end-to-end"):
        model = classifiers[name]
        trained = model.net.state_dict()
        distances = [(plain[key] - trained[key]).norm() / plain[key].norm() for key in plain]
        assert 0 < max(distances) < 0.5  # they go on from its weights
        predicted = model.predict(images)
        accepted = predicted != REJECT
        assert (predicted == labels)[accepted].double().mean() > 0.6
        entry = results(finished)["settings"]["classifiers"][name]
        assert entry["test_accuracy"] == pytest.approx((predicted == labels).double().mean())
    assert classifiers["DNR"].net is classifiers["DNN"]


def test_a_stopped_training_goes_on(run, finished):
    command = ["--quiet", "--run", str(run), *BOTH]
    for name in ("robust", "dnr-end-to-end"):
        with stopping_at(run / f"{name}-training.safetensors"):
            assert train.main(command) == 130
        assert not (run / f"{name}.safetensors").exists()
    assert train.main(["--quiet", "--run", str(run)]) == 0  # it remembers
    for name in MADE:
        assert (run / name).read_bytes() == (finished / name).read_bytes()


def test_only_the_classifiers_asked_for_are_attacked(finished, tmp_path, capsys):
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    asked = ["--quiet", "--run", str(folder), *ATTACKING, "--classifiers", "robust", "DNN"]
    assert attack.main(asked) == 0
    content = results(folder)
    assert list(content["curves"]) == list(content["checks"]) == ["DNN", "robust"]
    assert (
        content["curves"]["robust"]["accuracy"]
        == (results(finished)["curves"]["robust"]["accuracy"])
    )
    assert "DNR" not in capsys.readouterr().out
    command = content["settings"]["command"].split()
    assert attack_parser().parse_args(command[2:]).classifiers == ["DNN", "robust"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--adversarial", "2"], "made with --adversarial 1.5 (given: 2)"),
        (["--loss", "plain"], "made with --loss reject (given: plain)"),
        (["--adversarial-norm", "inf"], "made with --adversarial-norm 2 (given: inf)"),
        (["--adversarial-epochs", "3"], "made with --adversarial-epochs 2 (given: 3)"),
    ],
)
def test_options_that_disagree_with_the_folder_are_refused(finished, capsys, options, message):
    assert train.main(["--quiet", "--run", str(finished), *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--end-to-end"], "--end-to-end must go with --adversarial EPS"),
        (["--loss", "class"], "--loss must go with --adversarial EPS"),
        (["--adversarial", "0"], "expected eps > 0"),
        (["--adversarial", "28.5"], "must be at most 28, the distance of the farthest two images"),
        (
            ["--adversarial", "8", "--adversarial-norm", "inf"],
            "images in norm inf, got 8; pixels are in [0, 1]: 8 of 255 levels are 0.0314",
        ),
        (["--classifiers", "robust"], "must be among DNN, NR, DNR, got robust"),
    ],
)
def test_what_cannot_be_made_is_refused_before_any_work(run, capsys, options, message):
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert attack.main(["--quiet", "--run", str(run), *options]) == 2
    assert message in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_the_report_tells_that_the_attack_of_a_training_was_weak(run, finished, capsys):
    shutil.copytree(finished, run, dirs_exist_ok=True)
    for text in ("a walk finds <more>", "and more"):  # before a stop, and after it
        with pytest.warns(WeakAttackWarning, match=text), warnings_kept(run, "robust"):
            warnings.warn(text, WeakAttackWarning, stacklevel=1)
    asked = ["--quiet", "--run", str(run), *ATTACKING, "--classifiers", "robust", "DNN"]
    for _ in range(2):  # the second time from the results
        assert attack.main(asked) == 0
        above = capsys.readouterr().out.partition("worst case")[0]
        assert "WARNING robust: a walk finds <more>" in above and "robust: and more" in above
    entries = results(run)["settings"]["classifiers"]
    assert entries["robust"]["warnings"] == ["a walk finds <more>", "and more"]
    assert "warnings" not in entries["DNN"]
    assert "a walk finds &lt;more&gt;" in (run / "report.html").read_text()


@pytest.mark.parametrize("typed", ["-1", "8/255", "nan", "inf"])
def test_a_mistyped_size_says_what_was_expected(capsys, typed):
    with pytest.raises(SystemExit):
        train.main(["--adversarial", typed])
    assert f"--adversarial: expected a number >= 0, got {typed}" in capsys.readouterr().err


def test_a_process_that_finds_them_trains_none(run, finished):
    """As all but the first do, which trains while the others wait."""
    shutil.copytree(finished, run, dirs_exist_ok=True)
    for name in ("robust", "dnr-end-to-end"):
        (run / f"{name}-training.safetensors").unlink()
    made = load(run)[1]
    assert list(made) == list(CLASSIFIERS) and not list(run.glob("*-end-*-training*"))
    assert not (run / "robust-training.safetensors").exists()


@pytest.mark.parametrize(
    "loss", [pytest.param("plain", marks=pytest.mark.slow), "class", "confidence"]
)
def test_each_loss_makes_a_classifier_that_rejects(run, loss):
    head = {"plain": "logit", "class": "class", "confidence": "softmax"}[loss]
    options = ["--adversarial", "1", "--loss", loss, "--adversarial-epochs", "1"]
    job, made = load(run, *options)
    model = made["robust"]
    images, _ = job.images("threshold")
    assert model.head == head and (model.predict(images) == REJECT).sum() == 3
    outputs = model.net(images).shape[1]
    assert outputs == (4 if loss == "class" else 3) and model.scores(images).shape[1] == 3
    _, loaded = load(run)
    torch.testing.assert_close(loaded["robust"](images), model(images))


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_each_of_them_labels_image_files(finished, tmp_path, name):
    job, classifiers = load(finished)
    pixels = (job.images("test")[0] * 255).round().byte()
    for number, image in enumerate(pixels[:, 0].numpy()):
        Image.fromarray(image).save(tmp_path / f"{number:03}.png")
    table = tmp_path / "labels.csv"
    asked = ["--run", str(finished), "--csv", str(table), "--classifier", name, "--quiet"]
    assert predict.main([str(tmp_path), *asked, "--device", "cpu"]) == 0
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    images = pixels / 255
    with torch.no_grad():
        output = classifiers[name](images)
    best = output[:, :3].max(dim=1)
    assert [int(row["best_label"]) for row in rows] == best.indices.tolist()
    rejected = best.values <= output[:, -1] if name != "DNN" else torch.zeros(len(rows))
    assert [int(row["rejected"]) for row in rows] == rejected.int().tolist()
