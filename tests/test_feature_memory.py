"""Fits on features that are larger than the memory limit: the same answer, and kept to it."""

import os
import subprocess
import sys

import pytest
import torch

from torchdnr.kernels.row_blocks import all_finite, column_means, entry_moments, row_blocks
from torchdnr.svm import RBFSVM, grid_search
from torchdnr.svm.gram import all_distances, rbf_rows
from torchdnr.svm.memory_plan import plan_features

MIB = 2**20


def wide(n=300, d=4000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, d, generator=generator) + torch.linspace(-3, 5, d)
    y = torch.arange(n) % 3
    x[torch.arange(n), y] += 8.0
    return x, y


def test_sums_in_blocks_are_those_of_the_whole():
    x, block = wide(60, 500)[0], {"block_bytes": 7 * 2000}
    assert len(row_blocks(x, **block)) == 9
    means, (variance, mean) = column_means(x, **block), entry_moments(x, **block).tolist()
    torch.testing.assert_close(means, x.double().mean(dim=0).float())
    torch.testing.assert_close(means, column_means(x))
    assert variance == pytest.approx(x.double().var(correction=0).item(), rel=1e-12)
    assert mean == pytest.approx(x.double().mean().item(), rel=1e-12)
    assert [variance, mean] == pytest.approx(entry_moments(x).tolist(), rel=1e-12)
    assert all_finite(x, **block)
    for bad in (torch.nan, -torch.inf):
        x[-1, -1] = bad
        assert not all_finite(x, **block)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distances_in_blocks(dtype):
    x = wide(60, 500)[0].to(dtype)
    found = all_distances(x, x.mean(dim=0), 4 * 7 * 500 * x.element_size())
    exact = x.double()
    expected = torch.cdist(exact, exact, compute_mode="donot_use_mm_for_euclid_dist").square()
    tolerance = {"rtol": 1e-5, "atol": 1e-3} if dtype == torch.float32 else {}
    torch.testing.assert_close(found.double(), expected, **tolerance)
    assert (found.diagonal() == 0).all() and torch.equal(found, found.T)


def test_kernel_rows_from_blocks_are_those_of_the_whole():
    x = wide()[0].double()
    center, index = x.mean(dim=0), torch.tensor([299, 0, 17])
    whole = rbf_rows(x, 1e-3, center)
    plan = plan_features(x, 3, 45 * MIB)
    assert plan.block_bytes < x.numel() * 8 / 2 and plan.rows < 300
    parts = rbf_rows(x, 1e-3, center, copies=plan)
    every = torch.arange(300)
    expected = (-1e-3 * (x[index].unsqueeze(1) - x).square().sum(dim=2)).exp()
    for rows in (whole, parts):
        torch.testing.assert_close(rows.store[rows.slots(index)], expected)
        rows.slots(every)
    torch.testing.assert_close(whole.block(every[None]), parts.block(every[None]))


def test_fits_and_searches_do_not_depend_on_the_limit():
    x, y = wide(120, 8000)
    x = x.double()
    little = 40 * MIB
    assert plan_features(x, 9, little).rows is not None
    plenty = RBFSVM(C=1.0, gamma=1e-3, tol=1e-5).fit(x, y)
    tight = RBFSVM(C=1.0, gamma=1e-3, tol=1e-5).fit(x, y, memory_limit=little)
    torch.testing.assert_close(tight(x), plenty(x), atol=1e-4, rtol=0)
    grid = {"C_grid": (1.0,), "gamma_grid": (1.0, 4.0), "folds": 3}
    searches = [grid_search(x, y, **grid, memory_limit=limit) for limit in (None, little)]
    torch.testing.assert_close(searches[0].accuracy, searches[1].accuracy, atol=0.01, rtol=0)
    assert searches[0].gamma == pytest.approx(searches[1].gamma)


# 1000 images whose layer takes 122 MiB, more than the limit. The classes are well apart, so that
# there are few support vectors. Libraries take their own memory in a small fit before.
MEASURED = """
import sys, threading, time, warnings, torch
from torch import nn
from torchdnr import DNR

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))

def watch():
    while True:
        seen.append(anonymous())
        time.sleep(0.003)

torch.set_num_threads(1)
torch.manual_seed(0)
warnings.simplefilter("ignore", UserWarning)
net = nn.Sequential(nn.Linear(4, 32_000), nn.ReLU())
y = torch.arange(1000) % 2
x = (0.05 * torch.rand(1000, 4) + 0.9 * y[:, None])
options = SEARCH
def model():
    return DNR(net, ["1"], batch_size=100, memory_limit=LIMIT, folds=2, stacking_folds=2, **options)
model().fit(x[:200], y[:200])
before, seen = anonymous(), []
threading.Thread(target=watch, daemon=True).start()
fitted = model().fit(x, y, features_folder=sys.argv[1] if len(sys.argv) > 1 else None)
vectors = fitted.base_svms[0].support_vectors
print((max(seen) - before) / 1024, vectors.numel() * 4 / 2**20, len(vectors), len(seen))
"""
GIVEN = "{'hyperparameters': {'1': (1.0, 1e-4), 'combiner': (1.0, 1.0)}}"
SEARCHED = "{'C_grid': [0.1, 1.0], 'gamma_grid': [1.0]}"


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("options", "keep"), [(GIVEN, True), (SEARCHED, False)])
def test_a_fit_on_mapped_features_keeps_to_its_limit(tmp_path, options, keep):
    limit = 80
    code = MEASURED.replace("LIMIT", str(limit * MIB)).replace("SEARCH", options)
    arguments = [str(tmp_path)] if keep else []
    # Freed memory goes back at once: glibc would keep up to 64 MiB of it.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144"}
    command = [sys.executable, "-c", code, *arguments]
    found = subprocess.run(
        command, capture_output=True, text=True, check=True, env=environment
    ).stdout
    peak, vectors, count, looks = map(float, found.split())
    assert looks > 10
    assert 2 <= count < 400
    assert peak <= limit + vectors
