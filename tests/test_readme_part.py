"""benchmarks/readme_part.py: a part of README.md is replaced, and nothing else."""

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MARKERS = "<!-- x: written by x.py -->", "<!-- end of x -->"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("benchmarks.readme_part")


def test_the_part_is_replaced_and_nothing_else(script, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{'old'.join(MARKERS)}\nafter\n")
    for section in ("new", r"with \1 and | pipes", "last"):
        assert script.rewrite(MARKERS, section, readme) == 0
        expected = f"before\n{MARKERS[0]}\n{section}\n{MARKERS[1]}\nafter\n"
        assert readme.read_text() == expected


def test_without_markers_nothing_is_written(script, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("nothing\n")
    assert script.rewrite(MARKERS, "new", readme) == 2
    assert MARKERS[0] in capsys.readouterr().err
    assert readme.read_text() == "nothing\n"
