import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("benchmarks.cost.compress_readme")


def test_the_compression_numbers_are_those_of_the_committed_results(script):
    section = script.readme_section(json.loads(script.RESULTS.read_text()))
    text = "\n".join([script.MARKERS[0], section, script.MARKERS[1]])
    assert text in (ROOT / "README.md").read_text()


def test_every_recorded_size_tells_its_losses_beside_the_original(script):
    results = json.loads(script.RESULTS.read_text())
    models, samples = results["models"], results["settings"]["samples"]
    assert {entry["of"] for entry in models.values()} == {"DNR", "NR"}
    rows = script.readme_section(results).splitlines()
    for name, entry in models.items():
        attack = entry["attack"]
        assert len(attack["attacks"]) == 3  # never one alone
        assert all(len(row) == samples for row in attack["predictions"])
        (row,) = (row for row in rows if row.startswith(f"| {name} |"))
        assert all(f"| {100 * rate:.0f} |" in row for rate in attack["accuracy"][1:])
        if entry["factor"] > 1:
            original = models[entry["of"]]
            assert entry["losses"]["test"].keys() == original["vectors"].keys()
            assert entry["total_vectors"] < 1.1 * original["total_vectors"] / entry["factor"]
            changed = attack["newly_evaded"], attack["no_longer_evaded"]
            for index, (new, gone) in enumerate(zip(*changed, strict=True)):
                share = attack["evasion_rate"][index] - original["attack"]["evasion_rate"][index]
                assert new - gone == round(samples * share)
