import importlib
import json
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_numbers_on_unknown_images_are_those_of_the_committed_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    script = importlib.import_module("benchmarks.ood.report")
    section = script.readme_section(json.loads(script.RESULTS.read_text()))
    readme = (ROOT / "README.md").read_text()
    assert "\n".join([script.MARKERS[0], section, script.MARKERS[1]]) in readme
