"""benchmarks/photographs.py: what it writes of a run, and what it refuses to record."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from torchdnr.evaluation import load_results

ROOT = Path(__file__).parents[1]
RUN = {
    "dataset": "folder:data/photographs",
    "weights": "data/weights.pth",
    "network": "squeezenet1_1",
    "image_shape": [3, 224, 200],
    "classes": ["cat", "dog"],
    "layers": ["features.9:avg", "network"],
    "svm_samples": 1200,
    "threshold_samples": 300,
    "test_samples": 500,
}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("benchmarks.photographs")


@pytest.fixture
def recorded():
    return json.loads((ROOT / "benchmarks/results/mnist-5k.json").read_text())


def test_the_section_holds_the_numbers_of_the_run(script, recorded, tmp_path):
    recorded["settings"]["run"] |= RUN
    (tmp_path / "results.json").write_text(json.dumps(recorded))
    curves, settings = load_results(tmp_path / "results.json")
    text = script.readme_section(curves, settings)
    assert "2 of its outputs; 224 x 200 pixels, 3 channels" in text
    dnr = settings["classifiers"]["DNR"]
    assert f"DNR {100 * dnr['test_accuracy']:.1f} % right" in text
    assert "DNN 96.7 % right;" in text  # it rejects nothing
    median = curves["DNR"].median_evasion_norm
    assert f"DNR {median:.2f}. Between" in text and 1 < median < 3
    norms = curves["NR"].evasion_norm
    left = ", ".join(f"{100 * (norms > eps).float().mean():.0f}" for eps in script.FINER)
    assert f"; NR {left}; DNR" in text and 90 < 100 * (norms > 0.4).float().mean() < 100
    assert "line-up; 6 minutes on 2 thread" in text
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[1:]] == [f"{eps:g}" for eps in curves["DNR"].eps]
    for index, row in enumerate(rows[1:]):
        rates = curves["DNR"].accuracy[index], curves["DNR"].rejection_rate[index]
        assert row[3] == "{:.0f} ({:.0f})".format(*(100 * rate for rate in rates))
        assert row[1] == f"{100 * curves['DNN'].accuracy[index]:.0f}"


@pytest.mark.parametrize(
    "absolute", [{"dataset": "folder:/home/me"}, {"weights": "/home/me/x.pth"}]
)
def test_paths_of_one_machine_are_not_recorded(
    script, recorded, tmp_path, monkeypatch, capsys, absolute
):
    recorded["settings"]["run"] |= RUN | absolute
    (tmp_path / "results.json").write_text(json.dumps(recorded))
    monkeypatch.setattr(sys, "argv", ["photographs.py", "--run", str(tmp_path)])
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    assert script.main() == 2
    assert "/home/me" in capsys.readouterr().err
    assert not (tmp_path / "imagenette.json").exists()


def test_the_readme_has_the_committed_numbers(script):
    curves, settings = load_results(ROOT / "benchmarks/results/imagenette.json")
    assert settings["run"]["image_shape"] == [3, 224, 224]
    assert set(curves) == {"DNN", "NR", "DNR"}
    text = (ROOT / "README.md").read_text()
    part = text.split(script.MARKERS[0])[1].split(script.MARKERS[1])[0]
    assert part.strip() == script.readme_section(curves, settings)
    for name in ("curve.png", "examples.jpg"):
        path = f"benchmarks/results/imagenette-{name}"
        assert f"({path})" in text
        assert (ROOT / path).stat().st_size < 2_000_000
