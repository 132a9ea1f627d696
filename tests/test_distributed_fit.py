"""Fits by two processes: what one process finds, half the work each, and what a lost one leaves.

Two processes round otherwise than one, and the solver may stop elsewhere within its tolerance. So
what was fitted is the same up to rounding where the tolerance is fine. Where it is not, each of the
two solutions is as near to the optimum as its duality gap says, and dual coefficients say less
than scores: they may differ by more than the tolerance where the kernel is nearly singular.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small_train
import torch
from distributed_fits import COARSE, FITS, REFINED, coarse_points, make
from PIL import Image
from sklearn.datasets import load_digits

from torchdnr.cli.predict import load_classifier
from torchdnr.distributed import ALONE, Processes
from torchdnr.distributed.sharing import Partition, ShardedFeatures
from torchdnr.files import load_tensors

ROOT = Path(__file__).parents[1]
TORCHRUN = [
    *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
    *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--"),
]
WORK = "work kernel values", "work blocks", "work factorisations"


def environment(**more):
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **more}


def run_two(*arguments):
    command = [*TORCHRUN, *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(), timeout=300, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    """The folder of what two processes found together."""
    folder = tmp_path_factory.mktemp("two")
    run_two(ROOT / "tests" / "distributed_fits.py", folder)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process finds, by name."""
    return {name: make(name, tmp_path_factory.mktemp("one")) for name in FITS}


def found_by(folder, name, rank):
    return load_tensors(folder / f"{name}-{rank}", "fit")[0]


def assert_alike(one, two):
    assert one.keys() == two.keys() and len(one) > 5
    for key in one.keys() - set(WORK):
        torch.testing.assert_close(
            two[key], one[key], rtol=1e-5, atol=1e-5, equal_nan=True, msg=key
        )
    supports = [key for key in one if key.endswith("support")]
    assert all(torch.equal(one[key], two[key]) for key in supports)


@pytest.mark.slow
def test_two_processes_fit_one_dnr(tmp_path):
    name = "given_hyperparameters"
    both = start_two(ROOT / "tests" / "distributed_fits.py", [str(tmp_path), name])
    said = [process.communicate(timeout=200)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert_alike(FITS[name](tmp_path), found_by(tmp_path, name, 1))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FITS if name != COARSE])
def test_two_processes_find_what_one_finds(by_two, alone, name):
    assert_alike(alone[name], found_by(by_two, name, 0))


@pytest.mark.slow
def test_at_a_coarse_tolerance_the_duality_gaps_bound_how_far_two_are_from_one(by_two, alone):
    fits = alone[COARSE], found_by(by_two, COARSE, 0)
    coef, gaps, objectives = (
        [fit[f"solution {name}"] for fit in fits]
        for name in ("dual_coef", "duality_gap", "objective")
    )
    x, _ = coarse_points()
    kernel = torch.exp(-0.1 * torch.cdist(x, x).square())
    difference = coef[0] - coef[1]
    distance = (difference * (kernel @ difference)).sum(dim=0).sqrt()
    # The primal objective is strongly convex: half the squared distance of a solution's weights to
    # those of the optimum is at most its duality gap.
    assert (distance <= sum((2 * gap).sqrt() for gap in gaps)).all()
    rounding = 1e-6 * objectives[0].abs()
    assert ((objectives[0] - objectives[1]).abs() <= torch.maximum(*gaps) + rounding).all()
    assert all(fit["solution converged"].all() for fit in fits)


@pytest.mark.slow
@pytest.mark.parametrize("name", FITS)
def test_both_processes_have_the_same_to_the_last_bit(by_two, name):
    first, second = (found_by(by_two, name, rank) for rank in range(2))
    assert first.keys() == second.keys()
    for key in first.keys() - set(WORK):
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=0, equal_nan=True, msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FITS if name != REFINED])
def test_each_process_evaluates_half_of_the_kernel(by_two, alone, name):
    whole = alone[name][WORK[0]].item()
    shares = [found_by(by_two, name, rank)[WORK[0]].item() / whole for rank in range(2)]
    assert sum(shares) == pytest.approx(1, rel=0.05)
    # Five batches of a loader are three and two: 60 and 30 images.
    first = 2 / 3 if name == "two_classes_from_a_loader" else 1 / 2
    assert shares == pytest.approx([first, 1 - first], abs=0.03)


@pytest.mark.slow
def test_the_blocks_are_shared_too(by_two, alone):
    name = "searched"  # many problems, so many blocks
    both = [found_by(by_two, name, rank) for rank in range(2)]
    counts = [found[WORK[2]].item() / alone[name][WORK[2]].item() for found in both]
    assert sum(counts) == pytest.approx(1, rel=0.05)
    # The fewer are solved together, the less they are padded: two have no more to do than one.
    shares = [found[WORK[1]].item() / alone[name][WORK[1]].item() for found in both]
    assert sum(shares) < 1.05 and max(shares) < 0.7 * sum(shares)


@pytest.mark.slow
def test_images_that_differ_between_processes_are_refused_by_all(by_two):
    for rank in range(2):
        said = load_tensors(by_two / f"refused-{rank}", "refused")[1]
        for case in ("shuffled", "sampled by process"):
            assert "the same images and labels in the same order" in said[case]
        assert "the same network, got others" in said["another network"]
        assert said["alone"] == "1 process instead of 2"
        assert "must tell its number of batches" in said["no length"]
        assert "2 processes need as many batches at least, got 1" in said["one batch"]


def test_parts_follow_each_other_and_differ_by_one_at_most():
    parts = [Partition.even(11, Processes(rank, 3)) for rank in range(3)]
    assert [list(range(11))[part.local] for part in parts] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10],
    ]
    assert parts[1].n == 11 and parts[1].largest == 4
    positions, is_local = parts[1].locate(torch.tensor([9, 5, 4, 0]))
    assert is_local.tolist() == [False, True, True, False]
    assert positions[is_local].tolist() == [1, 0]


def test_one_process_shares_with_itself():
    x = torch.rand(7, 3, dtype=torch.float64)
    features = ShardedFeatures.from_local(x, ALONE)
    assert features.shape == (7, 3) and torch.equal(features.rows(torch.tensor([4, 0])), x[[4, 0]])
    assert torch.equal(features.select(torch.tensor([1, 6])).local, x[[1, 6]])
    assert features.variance() == pytest.approx(x.var(correction=0).item(), rel=1e-12)
    torch.testing.assert_close(features.means(), x.mean(dim=0))


@pytest.fixture(scope="module")
def making(tmp_path_factory):
    """The options of a small job, but for its folder."""
    x, y = load_digits(n_class=3, return_X_y=True)
    x = torch.tensor(x[:150], dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    x = torch.nn.functional.interpolate(x, size=28, mode="bilinear").clamp(0, 1)
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    np.savez(path, x_train=x.numpy(), y_train=y[:150])
    return [
        *("--dataset", f"npz:{path}", "--device", "cpu", "--epochs", "1", "--layers", "logits"),
        *("--C-grid", "1", "--gamma-grid", "1"),  # nothing to choose from
        *("--network-samples", "60", "--svm-samples", "30", "--threshold-samples", "30"),
        *("--lr", "0.05", "--train-batch-size", "16"),
    ]


def start_two(script, arguments):
    """Start two processes without torchrun, which would end the one when the other is lost."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank in ("0", "1"):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
        env = environment(**names, MASTER_ADDR="localhost", MASTER_PORT=port)
        command = [sys.executable, str(script), *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(command, text=True, env=env, cwd=ROOT, **pipes))
    return started


@pytest.fixture(scope="module")
def made_by_one(making, tmp_path_factory):
    """The run folder that one process makes."""
    folder = tmp_path_factory.mktemp("run")
    assert small_train.train.main(["--quiet", *making, "--run", str(folder)]) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "stage"), [(0, "DNR"), (1, "NR")])
def test_a_lost_process_ends_the_other_and_the_same_command_goes_on(
    making, made_by_one, tmp_path, victim, stage
):
    run = tmp_path / "run"
    shutil.copytree(made_by_one, run)
    for name in ("dnr", "nr"):
        (run / f"{name}.safetensors").unlink()
    script, arguments = ROOT / "tests" / "small_train.py", [*making, "--run", str(run)]
    both = start_two(script, [stage, str(victim), *arguments])
    said = [process.communicate(timeout=200)[1] for process in both]
    assert both[victim].returncode == -signal.SIGKILL
    assert both[1 - victim].returncode == 2, said
    assert "another process of this job ended before its work was done" in said[1 - victim]
    assert "the same command goes on from what is finished" in said[1 - victim]
    made = {path.name: path.read_bytes() for path in run.glob("*r.safetensors")}
    assert list(made) == ["dnr.safetensors"] * victim  # finished, so it is kept

    done = run_two(script, stage, "nobody", *arguments)
    assert done.stderr.count("clean accuracy") == 1  # the first process talks
    assert all((run / name).read_bytes() == content for name, content in made.items())
    assert {path.name for path in run.iterdir()} == {path.name for path in made_by_one.iterdir()}
    images = torch.from_numpy(np.load(making[1].removeprefix("npz:"))["x_train"])
    # The tolerance of each problem is 1e-3, and DNR stacks two: its combiner learns from scores
    # that differ. Any one of the 30 samples left out moves the scores by 0.05 and more.
    for kind, tolerance in {"DNR": 5e-3, "NR": 2e-3}.items():
        one, two = (
            load_classifier(folder, kind, torch.device("cpu"))(images).detach()
            for folder in (made_by_one, run)
        )
        torch.testing.assert_close(two, one, rtol=0, atol=tolerance, msg=kind)


@pytest.mark.slow
def test_train_py_finds_what_is_finished(making, made_by_one):
    before = {path.name: path.read_bytes() for path in made_by_one.glob("*.safetensors")}
    done = run_two(ROOT / "train.py", *making, "--run", made_by_one)
    assert done.stderr.count("clean accuracy") == 1 and done.stderr.count("DNR: from") == 1
    after = {path.name: path.read_bytes() for path in made_by_one.glob("*.safetensors")}
    assert before == after


# What every process sees alike, and what only the second one sees.
WARNING = """
import sys
import torch
from PIL import Image
from torchdnr import WithReject
from torchdnr.data import load_dataset
from torchdnr.distributed import alone, joined
from torchdnr.svm import RBFSVM
from distributed_fits import points
with joined(torch.device("cpu")) as processes:
    load_dataset(f"folder:{sys.argv[1]}", image_size=8)
    RBFSVM(C=10.0, gamma=0.1, max_steps=1).fit(*points(60, 3))
    model = WithReject(lambda x: x, lambda x: x.amax(dim=1), 0.0)
    model.calibrate(torch.zeros(20, 2), 0.1)
    images = torch.rand(301, 2, generator=torch.Generator().manual_seed(0))
    labels = torch.where(images.amax(dim=1) < 0.9, images.argmax(dim=1), 0)
    print("THETA", model.calibrate(images, labels, max_error=0.1).threshold, flush=True)
    with alone():
        print("ALONE", model.calibrate(images, labels, max_error=0.1).threshold, flush=True)
    if processes.rank == 1:
        scores = torch.zeros(2, 2, requires_grad=True)
        WithReject(lambda x: scores, lambda x: x.amax(dim=1), 0.0)(torch.zeros(2, 2))
"""


@pytest.mark.slow
def test_of_several_processes_the_first_warns_and_another_only_of_its_own(tmp_path):
    script, folder = tmp_path / "warning.py", tmp_path / "folder"
    script.write_text(WARNING)
    for place in ("train/a", "train/b", "val/a", "val/b"):
        (folder / place).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / place / "1.png")
    (folder / "train/a/broken.png").write_bytes(b"no image")
    both = start_two(script, [str(folder)])
    printed, (first, second) = zip(*(p.communicate(timeout=200) for p in both), strict=True)
    assert [process.returncode for process in both] == [0, 0], (first, second)
    thetas = {text.split()[1::2][i] for text in printed for i in (0, 1)}  # together and alone
    assert len(thetas) == 1 and 0.5 < float(thetas.pop()) < 0.999
    for warning in ("unreadable and left out", "did not reach a KKT violation", "to be rejected"):
        assert (first.count(warning), second.count(warning)) == (1, 0), (warning, first, second)
    assert "no gradient leads through score_fn" in second


# A fit with features in a folder, of which process 1 is killed at its second batch; or it lives.
EXTRACTION = """
import os, signal, sys, warnings
warnings.simplefilter("ignore")
import torch
from distributed_fits import images, small_net
from torchdnr import NR
from torchdnr.distributed import PeerError, joined
folder, victim = sys.argv[1:]
PREPARING = 6  # batches in which all look at the first 64 images
net, batches = small_net(), []
def count(_module, inputs):
    batches.append(len(inputs[0]))
    if os.environ["RANK"] == victim and batches.count(10) == PREPARING + 2:
        os.kill(os.getpid(), signal.SIGKILL)
net.register_forward_pre_hook(count)
model = NR(net, "logits", hyperparameters={"logits": (1.0, 0.1)}, batch_size=10)
with joined(torch.device("cpu")) as processes:
    try:
        model.fit(*images(80, 2), features_folder=folder)
    except PeerError as error:
        sys.exit(f"PEER {error}")
print("BATCHES", batches.count(10) - PREPARING, flush=True)
"""


@pytest.mark.slow
def test_features_of_the_process_that_lived_are_found_again(tmp_path):
    script, folder = tmp_path / "extraction.py", tmp_path / "features"
    script.write_text(EXTRACTION)
    both = start_two(script, [str(folder), "1"])
    said = [process.communicate(timeout=200)[1] for process in both]
    assert both[1].returncode == -signal.SIGKILL and both[0].returncode == 1
    assert "PEER another process of this job ended" in said[0]
    again = start_two(script, [str(folder), "nobody"])
    told = [process.communicate(timeout=200)[0] for process in again]
    assert [process.returncode for process in again] == [0, 0]
    assert "BATCHES 0" in told[0]  # its four are in the folder
    assert told[1].split()[-1] in {"3", "4"}  # the record of the first may not have been written
