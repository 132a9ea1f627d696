"""train.py --max-error promises the error among accepted images; attack.py reports it."""

import json

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from torchdnr import DNR
from torchdnr.cli import attack, train
from torchdnr.cli.classifiers import make_classifiers
from torchdnr.cli.console import Console
from torchdnr.cli.options import train_parser
from torchdnr.cli.run_folder import prepare
from torchdnr.evaluation import risk_coverage
from torchdnr.models.paper import load_network

GOAL = ["--max-error", "0.1", "--confidence", "0.9"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Options of a run folder on 360 digits 0 and 1, and the folder."""
    x, y = load_digits(n_class=2, return_X_y=True)
    x = torch.tensor(x, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    x = torch.nn.functional.interpolate(x, size=28, mode="bilinear").clamp(0, 1)
    folder = tmp_path_factory.mktemp("risk")
    np.savez(folder / "digits.npz", x_train=x.numpy(), y_train=y)
    return [
        *("--dataset", f"npz:{folder / 'digits.npz'}", "--device", "cpu", "--epochs", "2"),
        *("--network-samples", "60", "--svm-samples", "40", "--threshold-samples", "100"),
        *("--train-batch-size", "16", "--layers", "relu_fc2", "logits", "--quiet"),
    ], folder


@pytest.mark.slow
def test_max_error_sets_theta_by_the_error_among_the_accepted(made, capsys):
    options, folder = made
    asked = [*options, "--run", str(folder / "run")]
    assert train.main([*asked, *GOAL]) == 0
    job = prepare(train_parser().parse_args(asked), Console(quiet=True))  # the folder remembers
    assert (job.settings.max_error, job.settings.confidence) == (0.1, 0.9)
    for name, model in make_classifiers(job, Console(quiet=True)).items():
        if name != "DNN":
            theta = model.threshold.clone()
            model.calibrate(*job.images("threshold"), max_error=0.1, confidence=0.9)
            assert theta == model.threshold
            model.calibrate(job.images("threshold")[0], 0.1)
            assert theta != model.threshold
    assert train.main([*asked, "--max-error", "0.2"]) == 2
    assert "was made with --max-error 0.1 (given: 0.2)" in capsys.readouterr().err


@pytest.mark.slow
def test_the_report_tells_the_error_among_the_accepted(made):
    options, folder = made
    asked = [*options, "--run", str(folder / "attacked"), *GOAL]
    attacks = ["--attack", "pgd", "--samples", "4", "--eps", "1", "--steps", "2", "--no-checks"]
    assert attack.main([*asked, *attacks, "--examples", "0"]) == 0
    content = json.loads((folder / "attacked" / "results.json").read_text())["settings"]
    job = prepare(train_parser().parse_args(asked), Console(quiet=True))
    images, labels = job.images("test")
    page = (folder / "attacked" / "report.html").read_text()
    for name, model in make_classifiers(job, Console(quiet=True)).items():
        with torch.no_grad():
            expected = risk_coverage(model(images), labels, name != "DNN")
        entry = content["classifiers"][name]
        assert entry["aurc"] == pytest.approx(expected.aurc)
        assert f"<td>{100 * expected.aurc:.2g}</td>" in page
        if name != "DNN":
            assert entry["test_error_if_accepted"] == pytest.approx(expected.error.value)
    assert "Risk and coverage" in page and (folder / "attacked" / "risk-coverage.png").exists()
    assert "--max-error 0.1 --confidence 0.9" in content["command"]


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        (["--max-error", "0"], "must be in (0, 1), got 0.0 and 0.95"),
        (["--max-error", "0.1", "--confidence", "1"], "must be in (0, 1), got 0.1 and 1.0"),
        (["--max-error", "0.01"], "takes --threshold-samples 300 at least"),
    ],
)
def test_what_cannot_be_promised_is_refused_before_any_work(made, goal, message, tmp_path, capsys):
    options, _ = made
    assert train.main([*options, "--run", str(tmp_path / "run"), *goal]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_after_a_promise_that_cannot_be_kept_another_one_goes_on_with_what_is_fitted(
    made, tmp_path, capsys
):
    options, folder = made
    with np.load(folder / "digits.npz") as content:
        x, y = content["x_train"], content["y_train"]
    y = np.where(np.arange(len(y)) % 4 == 0, 1 - y, y)  # a quarter of the labels are wrong
    np.savez(tmp_path / "wrong.npz", x_train=x, y_train=y)
    run = tmp_path / "run"
    asked = ["--run", str(run), *options, "--dataset", f"npz:{tmp_path / 'wrong.npz'}"]
    assert train.main([*asked, "--max-error", "0.05"]) == 2
    message = capsys.readouterr().err
    assert "can be promised" in message and "another --max-error or --confidence" in message
    made_before = (run / "network.safetensors").read_bytes()
    job = prepare(train_parser().parse_args(asked), Console(quiet=True))
    net = load_network(job.build_network(), run / "network.safetensors")
    fitted = DNR.load(run / "dnr.safetensors", net)
    assert fitted.threshold.isnan()
    assert train.main([*asked, "--max-error", "0.05"]) == 2  # again, without a new fit
    assert train.main([*asked, "--max-error", "0.8"]) == 0
    assert (run / "network.safetensors").read_bytes() == made_before
    job = prepare(train_parser().parse_args(asked), Console(quiet=True))
    for name, model in make_classifiers(job, Console(quiet=True)).items():
        if name != "DNN":
            theta = model.threshold.clone()
            model.calibrate(*job.images("threshold"), max_error=0.8)
            assert theta == model.threshold
        if name == "DNR":
            images = job.images("test")[0]
            assert torch.equal(model.scores(images), fitted.scores(images))
    assert train.main([*asked, "--max-error", "0.5"]) == 2  # now the folder is finished
    assert "was made with --max-error 0.8 (given: 0.5)" in capsys.readouterr().err
