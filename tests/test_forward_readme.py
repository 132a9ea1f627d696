"""Tests that README.md tells the numbers of forward-cpu.json, and what they mean."""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("benchmarks.cost.forward_readme")


@pytest.fixture
def results(script):
    return json.loads(script.RESULTS.read_text())


def test_the_readme_has_the_committed_numbers(script, results):
    text = (ROOT / "README.md").read_text()
    if script.MARKERS[0] not in text:
        pytest.skip(f"README.md has no part {script.MARKERS[0]}")
    part = text.split(script.MARKERS[0])[1].split(script.MARKERS[1])[0]
    assert part.strip() == script.readme_section(results)


def test_the_committed_numbers_are_of_a_clean_commit_and_right(results):
    assert results["commit"] and not results["commit"].endswith("-dirty")
    assert results["settings"]["vectors"] == 5_000
    measured = {(case["network"], case["classes"]) for case in results["cases"]}
    assert {("squeezenet1_1", 10), ("squeezenet1_1", 1_000)} <= measured
    others = {"mobilenet_v3_small", "MNISTNet", "CIFAR10Net", "resnet18"}
    assert others <= {name for name, _ in measured}
    for case in results["cases"]:
        assert case["errors"]["scores"] < 1e-4 and case["errors"]["gradient"] < 1e-3
        assert set(case["batches"]) == {"1", "32"}
        for entry in case["batches"].values():
            assert entry["compiled_difference"]["scores"] < 1e-5
            # Of the whole network: one ReLU or max-pooling that rounding turns over shows in it.
            assert entry["compiled_difference"]["gradient"] < 0.1


def test_a_missed_target_is_told(script, results):
    found = results["cases"][0]["batches"]["1"]["forward"]["DNR"]
    for overhead, told in ((0.33, "missed by 18 points"), (0.1, "reached")):
        found |= {"overhead": overhead, "quartiles": [0.08, 0.4], "bound": 0.05}
        expected = (
            f"- 10 classes, batch of 1: {100 * overhead:.0f} % (quartiles 8 to 40), {told}; "
            "the products alone take 5 %"
        )
        assert expected in script.readme_section(results)
