import pytest
import torch

from benchmarks.attacks import peers as bench
from torchdnr.files import read_json, write_json

pytest.importorskip("torchattacks", reason="needs torchattacks: pip install -e '.[peers]'")


def problem(victim, ours):
    starts = victim.far_starts()
    return bench.Problem(victim.model, True, victim.inputs, victim.labels, starts, ours)


def test_counts_what_a_peer_evades_and_ours_does_not(peers, victim):
    ours = {
        1.0: torch.arange(16) == 0,
        2.0: torch.arange(16) < 2,
    }
    runs = {
        "1": {"rows": [0, 1, 5], "evading": [False, True, False], "norm": [1.0, 0.9, 1.0]},
        "2": {"rows": [0, 5], "evading": [True, True], "norm": [1.9, 2.0]},
    }
    made = problem(victim, ours)
    table = bench.compare(made, peers["torchattacks PGDL2"], runs)
    assert table == {
        "1": {"peer": 1, "ours": 1, "peer_only": [1]},
        "2": {"peer": 3, "ours": 2, "peer_only": [5]},
    }
    once = {"2": {"rows": [0, 3, 5], "evading": [True, True, False], "norm": [0.5, 1.5, 0.1]}}
    table = bench.compare(made, peers["foolbox FMN"], once)
    assert table["1"] == {"peer": 1, "ours": 1, "peer_only": []}
    assert table["2"] == {"peer": 2, "ours": 2, "peer_only": [3]}


def test_measures_the_missing_cases_only(peers, victim, tmp_path):
    ours = {size: torch.zeros(16, dtype=torch.bool) for size in (1.0, 2.0)}
    made = problem(victim, ours)
    chosen = {"torchattacks PGDL2": peers["torchattacks PGDL2"]}
    record, path = {"peers": {}}, tmp_path / "peers.json"
    bench.measure(made, chosen, record, lambda: write_json(path, record))
    entry = record["peers"]["torchattacks PGDL2"]
    first, second = entry["runs"]["1"], entry["runs"]["2"]
    assert first["rows"] == list(range(16))
    assert max(first["norm"]) <= 1.0001 and max(second["norm"]) <= 2.0002
    beaten = {row for row, hit in zip(first["rows"], first["evading"], strict=True) if hit}
    assert beaten and set(second["rows"]) == set(range(16)) - beaten
    assert entry["table"]["2"]["peer"] > entry["table"]["1"]["peer"] == len(beaten)
    assert f"{len(beaten):>5}" in bench.summary(record)

    def no_run(*_):
        raise AssertionError("measured again")

    again = read_json(path)
    bench.measure(made, chosen, again, lambda: None, run=no_run)
    assert again["peers"]["torchattacks PGDL2"]["runs"] == entry["runs"]
