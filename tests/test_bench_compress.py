import json
from types import SimpleNamespace

import pytest
import torch
from test_compression import digits, fitted  # noqa: F401 - a fixture

from benchmarks.cost import compress as bench
from benchmarks.cost.report import compress_page
from torchdnr.files import plain_json

FACTORS = {"DNR": (4,), "NR": (4,)}
EPS = (0.0, 2.0)


@pytest.fixture
def job():
    fit, calibration, test = digits()
    parts = {"svm": fit, "threshold": calibration, "test": test}
    settings = SimpleNamespace(seed=0, rejection_rate=0.1, dataset="digits")
    return SimpleNamespace(images=parts.__getitem__, settings=settings)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::torchdnr.svm.compression.CompressionWarning")
def test_the_benchmark_measures_what_the_models_do(job, fitted):  # noqa: F811
    models, found = bench.compressed_models(fitted, job, FACTORS)
    assert list(models) == ["DNR", "DNR, 4 times fewer", "NR", "NR, 4 times fewer"]
    images, labels = job.images("test")
    for name, times in bench.measure_speed(models, images[:8], 2).items():
        found[name]["speed"] = times
        predicted = models[name].predict(images)
        assert found[name]["test_accuracy"] == (predicted == labels).double().mean().item()
        assert found[name]["calibration_rejection_rate"] == pytest.approx(0.1)
        assert min(times["seconds"].values()) > 0
    curves = {}
    for name, model in models.items():
        original = curves.get(found[name]["of"])
        net = model.net
        curves[name], found[name]["attack"] = bench.attack(model, job, net, 4, original, EPS)
        points = curves[name].adversarial[1]
        wrong = (model.predict(points) != labels[:4]) & (model.predict(points) != -1)
        assert found[name]["attack"]["accuracy"][1] == 1 - wrong.double().mean().item()
    changed = found["DNR, 4 times fewer"]["attack"]
    before = curves["DNR"].evasion_rate[1]
    assert changed["newly_evaded"][1] - changed["no_longer_evaded"][1] == round(
        4 * (changed["evasion_rate"][1] - before)
    )
    record = {
        "environment": {"processor": "toy", "threads": 1, "torch": torch.__version__},
        "run": vars(job.settings),
        "settings": {"samples": 4},
        "models": found,
    }
    text = compress_page(json.loads(json.dumps(plain_json(record), allow_nan=False)))
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[1:]] == [f"| {name}" for name in models]
    assert len({row.count("|") for row in rows}) == 1
    assert "evaded by the original's points alone" in text
