"""Several processes: the same results as one, and an error in one that ends all."""

import os
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from torchdnr.distributed import ALONE, Processes, local_device
from torchdnr.evaluation import SecurityCurve
from torchdnr.files import load_tensors

# A toy evaluation that the processes share; it may be told to break the second one, or slow it.
JOB = """
import os, sys, time, warnings
warnings.filterwarnings("ignore")
import torch
from torchdnr.distributed import PeerError, joined
from torchdnr.evaluation.line_up import build_line_up
from torchdnr.evaluation.security import security_evaluations
from torchdnr.files import save_tensors

torch.set_num_threads(1)
fail, folder = sys.argv[1], sys.argv[2]


def make_model(seed):
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    def model(x):
        if fail == "slow" and os.environ["RANK"] == "1":
            time.sleep(0.02)
        scores = net(x)
        return torch.cat([scores, scores.new_full((len(x), 1), -0.2)], dim=1)
    return model


torch.manual_seed(0)
pool, inputs = torch.rand(40, 6), torch.rand(31, 6)
labels = make_model(1)(inputs)[:, :3].argmax(dim=1)
models = {"first": make_model(1), "second": make_model(2)}
with joined(torch.device("cpu")) as processes:
    made = []
    with processes.first_alone():
        made.append(processes.rank)
    if fail == "error" and processes.rank == 1:
        raise ValueError("this one broke")
    attacks = build_line_up(
        ["default", "fmn", "noise"], pool, reject=True,
        own_options={"boundary-walk": {"steps": 8}, "apgd": {"steps": 5}, "fmn": {"steps": 9},
                     "line-search-pgd": {"steps": 3, "restarts": 1}},
    )
    names = {name: f"{folder}/{name}.safetensors" for name in models}
    said = []
    try:
        curves = security_evaluations(
            models, inputs, labels, [0, 0.2, 0.5], attacks=attacks, init_inputs=pool, reject=True,
            checkpoints=names, processes=processes, progress=False, say=said.append,
        )
    except PeerError as error:
        print("PEER", error, flush=True)
        sys.exit(2)
    text = processes.broadcast_text("from the last \\u20ac" * processes.rank, processes.count - 1)
    assert text == "from the last \\u20ac" * (processes.count - 1), text
    with open(f"{folder}/said-{processes.rank}.txt", "w") as file:
        file.write(str(said))
    for name, curve in curves.items():
        curve.save(f"{folder}/{name}-{processes.rank}-of-{processes.count}.json")
        path = f"{folder}/{name}-{processes.rank}-of-{processes.count}.points"
        save_tensors(path, {"points": curve.adversarial}, {}, "points")
"""


def run(folder, count, fail="no", timeout=120):
    script = folder / "job.py"
    script.write_text(textwrap.dedent(JOB))
    # a port that the system chooses, so that tests can run side by side
    command = [sys.executable]
    if count > 1:
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(count)]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command += [str(script), fail, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The folders of a run by one process and by two."""
    folders = []
    for count in (1, 2):
        folder = tmp_path_factory.mktemp(f"processes{count}")
        done = run(folder, count)
        assert done.returncode == 0, done.stderr
        folders.append(folder)
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("name", ["first", "second"])
@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes_find_what_one_finds(both, name, rank):
    one = SecurityCurve.load(both[0] / f"{name}-0-of-1.json")
    two = SecurityCurve.load(both[1] / f"{name}-{rank}-of-2.json")
    assert list(one.attacks) == ["line-search PGD", "boundary walk", "FMN"] == list(two.attacks)
    assert list(one.refinements) == ["APGD", "noise"]
    for added in (*one.refinements.values(), *two.refinements.values()):
        assert added.seconds > 0
        added.seconds = 0
    assert one.refinements == two.refinements
    assert torch.equal(one.predictions, two.predictions)
    assert torch.equal(one.evasion_norm, two.evasion_norm)
    assert one.mean_norm == two.mean_norm
    for attack, alone in one.attacks.items():
        other = two.attacks[attack]
        assert torch.equal(alone.predictions, other.predictions)
        for field in ("mean_norm", "forwards", "backwards", "violations", "settings"):
            assert getattr(alone, field) == getattr(other, field)
        assert sum(other.seconds) > 0
    points = [
        load_tensors(both[0] / f"{name}-0-of-1.points", "points")[0]["points"],
        load_tensors(both[1] / f"{name}-{rank}-of-2.points", "points")[0]["points"],
    ]
    assert torch.equal(*points)


@pytest.mark.slow
def test_no_process_writes_the_file_of_another(both):
    names = [sorted(path.name for path in folder.glob("*.safetensors")) for folder in both]
    assert names[0] == names[1] and len(names[0]) == 4  # a file per classifier and share


@pytest.mark.slow
def test_what_two_processes_have_finished_one_goes_on_with(both, tmp_path):
    before = {path.name: path.read_bytes() for path in both[1].glob("*.safetensors")}
    for name, content in before.items():
        (tmp_path / name).write_bytes(content)
    assert run(tmp_path, 1).returncode == 0
    one = SecurityCurve.load(tmp_path / "first-0-of-1.json")
    two = SecurityCurve.load(both[1] / "first-0-of-2.json")
    assert one.seconds == two.seconds  # not run again: the times are those of the file


@pytest.mark.slow
def test_all_take_as_long_as_the_slowest(tmp_path):
    done = run(tmp_path, 2, fail="slow")
    assert done.returncode == 0, done.stderr
    one, two = ((tmp_path / f"said-{rank}.txt").read_text() for rank in (0, 1))
    assert one == two and "the attacks take about" in one
    assert "about a second" not in one  # what the first has to do takes no longer


@pytest.mark.slow
def test_an_error_in_one_process_ends_all(tmp_path):
    began = time.monotonic()
    failed = run(tmp_path, 2, fail="error")
    assert failed.returncode != 0
    assert "this one broke" in failed.stderr
    assert time.monotonic() - began < 100
    assert not list(tmp_path.glob("*.json"))


def test_one_process_shares_with_itself(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    tensor = torch.rand(3)
    assert ALONE.broadcast(tensor) is tensor and ALONE.broadcast_text("text") == "text"
    assert ALONE.first and ALONE.mine(7)
    ALONE.wait()
    with ALONE.first_alone():
        pass
    assert local_device(torch.device("cuda")) == torch.device("cuda")


def test_units_are_assigned_in_turn():
    several = [Processes(rank, 3) for rank in range(3)]
    assert [[one.mine(unit) for one in several].index(True) for unit in range(5)] == [0, 1, 2, 0, 1]
    assert all(sum(one.mine(unit) for one in several) == 1 for unit in range(5))
    assert [one.first for one in several] == [True, False, False]


def test_each_process_needs_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert local_device(torch.device("cuda")) == torch.device("cuda", 1)
    assert local_device(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(ValueError, match="got the one device cuda:0; ask for cuda"):
        local_device(torch.device("cuda", 0))
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="got 2 for process 2; lower --nproc-per-node"):
        local_device(torch.device("cuda"))
