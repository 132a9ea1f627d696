"""benchmarks/record_run.py: what it writes of a run, and what it refuses to record."""

import json

import pytest
from PIL import Image

from benchmarks import record_run
from benchmarks.common import RESULTS, commit
from torchdnr.evaluation import load_results

RUN = {
    "dataset": "folder:data/photographs",
    "weights": "data/weights.pth",
    "network": "squeezenet1_1",
    "backbone": "squeezenet1_1",
    "outputs": [1, 2],
    "image_shape": [3, 224, 200],
    "classes": ["cat", "dog"],
    "layers": ["features.9:avg", "network"],
    "svm_samples": 1200,
    "threshold_samples": 300,
    "test_samples": 500,
}


@pytest.fixture
def recorded():
    return json.loads((RESULTS / "mnist-5k.json").read_text())


def test_the_section_holds_the_numbers_of_the_run(recorded, tmp_path):
    recorded["settings"]["run"] |= RUN
    (tmp_path / "results.json").write_text(json.dumps(recorded))
    curves, settings = load_results(tmp_path / "results.json")
    text = record_run.page(recorded, "imagenette")
    assert "2 of its outputs; 224 x 200 pixels, 3 channels" in text
    dnr = settings["classifiers"]["DNR"]
    assert f"DNR {100 * dnr['test_accuracy']:.1f} % right" in text
    assert "DNN 97.5 % right;" in text  # it rejects nothing
    median = curves["DNR"].median_evasion_norm
    assert f"DNR {median:.2f}. Below" in text and 1 < median < 3
    norms = curves["NR"].evasion_norm
    left = ", ".join(f"{100 * (norms > eps).float().mean():.0f}" for eps in (0.1, 0.2, 0.3, 0.4))
    assert f"; NR {left}; DNR" in text and 90 < 100 * (norms > 0.4).float().mean() < 100
    assert "1 thread of an AMD EPYC" in text
    assert "attacks 146 s, checks 25 s, in all 238 s" in text
    assert "DNN 1.12, NR 1.46, DNR 1.49" in record_run.headline(recorded)
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[1:]] == [f"{eps:g}" for eps in curves["DNR"].eps]
    for index, row in enumerate(rows[1:]):
        rates = curves["DNR"].accuracy[index], curves["DNR"].rejection_rate[index]
        assert row[3] == "{:.0f} ({:.0f})".format(*(100 * rate for rate in rates))
        assert row[1] == f"{100 * curves['DNN'].accuracy[index]:.0f}"


@pytest.mark.parametrize(
    "absolute", [{"dataset": "folder:/home/me"}, {"weights": "/home/me/x.pth"}]
)
def test_paths_of_one_machine_are_not_recorded(recorded, tmp_path, capsys, absolute):
    recorded["settings"]["run"] |= RUN | absolute
    run = tmp_path / "run"
    run.mkdir()
    (run / "results.json").write_text(json.dumps(recorded))
    assert record_run.main(["imagenette", "--run", str(run)], tmp_path) == 2
    assert "/home/me" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(("name", "suffix"), [("mnist-5k", "png"), ("imagenette", "jpg")])
def test_results_and_figures_are_copied(recorded, tmp_path, name, suffix):
    recorded["settings"]["run"] |= RUN if name == "imagenette" else {}
    run, results = tmp_path / "run", tmp_path / "results"
    run.mkdir()
    results.mkdir()
    (run / "results.json").write_text(json.dumps(recorded))
    for figure in ("curve", "examples"):
        Image.new("RGBA", (30, 20), "red").save(run / f"{figure}.png")
    assert record_run.main([name, "--run", str(run)], results) == 0
    written = json.loads((results / f"{name}.json").read_text())
    assert written == recorded | {"commit": commit()}
    for figure, kind in (("curve", "png"), ("examples", suffix)):
        with Image.open(results / f"{name}-{figure}.{kind}") as image:
            assert image.size == (30, 20)
            assert image.format == {"png": "PNG", "jpg": "JPEG"}[kind]
    assert len(list(results.iterdir())) == 3


def test_runs_of_other_seeds_are_recorded_as_mean_least_and_most(recorded, tmp_path, capsys):
    runs = [tmp_path / str(seed) for seed in range(3)]
    for seed, run in enumerate(runs):
        run.mkdir()
        recorded["settings"]["run"]["seed"] = seed
        recorded["settings"]["classifiers"]["NR"]["test_accuracy"] = 0.9 + seed / 100
        (run / "results.json").write_text(json.dumps(recorded))
        for figure in ("curve", "examples"):
            Image.new("RGBA", (30, 20), "red").save(run / f"{figure}.png")
    command = ["mnist-5k", "--run", str(runs[0]), "--seeds"]
    assert record_run.main([*command, str(runs[1]), str(runs[1])], tmp_path) == 2
    assert "two of the same" in capsys.readouterr().err
    assert record_run.main([*command, str(runs[1]), str(runs[2])], tmp_path) == 0
    written = json.loads((tmp_path / "mnist-5k.json").read_text())
    assert list(written["seeds"]) == ["0", "1", "2"]
    text = record_run.page(written, "mnist-5k")
    assert "| NR | 91.0 (90.0 to 92.0) |" in text and "the seeds 0, 1, 2" in text
    assert "NR 91.0 %" in record_run.headline(written)
    assert "(100 images by each of 3 seeds)" in record_run.headline(written)


def test_of_a_large_run_rates_and_costs_are_recorded(recorded, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(recorded))
    assert record_run.main(["mnist-5k-1000", "--run", str(tmp_path)], tmp_path) == 0
    written = json.loads((tmp_path / "mnist-5k-1000.json").read_text())
    assert written["samples"] == 100 and written["commit"] == commit()
    text = record_run.large_page(written)
    curve = load_results(tmp_path / "results.json")[0]["NR"]
    row = next(line for line in text.splitlines() if line.startswith("| NR |"))
    assert row.split(" | ")[3] == f"{curve.median_evasion_norm:.2f}"
    assert row.split(" | ")[4:6] == [f"{100 * value:.1f}" for value in curve.accuracy[1:3]]
    seconds = recorded["settings"]["cost"]["stage_seconds"]["attacks"]
    assert f"The attacks on 10,000 images would take {seconds / 36:.1f} hours" in text
    assert "(100 images): " in record_run.large_headline(written)
