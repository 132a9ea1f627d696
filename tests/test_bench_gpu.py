"""The measurements on an accelerator, tried without one."""

import json

import pytest
import torch
from accelerator import accelerator

from benchmarks.gpu.__main__ import main
from benchmarks.gpu.report import headline, page
from benchmarks.gpu.sections import SECTIONS


def run(path, *options):
    code = main(["--small", "--out", str(path), *options])
    return code, json.loads(path.read_text())


@pytest.mark.slow
def test_all_sections_run_and_are_told(tmp_path):
    code, record = run(tmp_path / "gpu.json", "--device", "cpu", "--minutes", "5")
    found = record["sections"]
    assert {name: one.get("error") or one.get("skipped") for name, one in found.items()} == (
        dict.fromkeys(SECTIONS)
    )
    assert code == 0 and found["tests"]["counts"]["passed"] > 0
    assert found["fits"]["dimensions"]["64"]["certificate"]["violation"] <= 1e-3
    assert all(one["eager"]["ratio"] > 0 for name, one in found["pgd"].items() if name in "NR DNR")
    assert found["line-up"]["DNR"]["samples"] == 6
    text = page(record)
    assert all(f"## {name}, " in text for name in SECTIONS)
    assert headline(record).startswith("6 of 6 sections on cpu: tests, fits")


@pytest.mark.slow
def test_what_runs_on_a_device_mixes_it_with_no_other(tmp_path):
    sections = ["fits", "training", "photographs"]
    with accelerator() as device:
        options = ["--device", str(device), "--sections", *sections]
        code, record = run(tmp_path / "gpu.json", *options)
    assert [one.get("error") for one in record["sections"].values()] == [None] * len(sections)
    assert code == 0 and list(record["sections"]) == sections


def test_a_section_that_fails_is_recorded_and_the_next_goes_on(tmp_path, monkeypatch):
    def failing(setup):
        raise RuntimeError("out of memory")

    monkeypatch.setitem(SECTIONS, "fits", failing)
    monkeypatch.setitem(SECTIONS, "training", lambda setup: {"images": torch.get_num_threads()})
    sections = ["--sections", "fits", "training"]
    code, record = run(tmp_path / "gpu.json", "--device", "cpu", *sections)
    assert code == 1
    assert record["sections"]["fits"]["error"] == "RuntimeError: out of memory"
    assert record["sections"]["training"]["images"] == 1


def test_no_section_begins_without_time(tmp_path):
    code, record = run(tmp_path / "gpu.json", "--device", "cpu", "--minutes", "0.01")
    assert code == 0
    assert {one["skipped"] for one in record["sections"].values()} == {"no time was left"}
