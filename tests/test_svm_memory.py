"""The memory limit of a fit: refused where too small, kept to, and without effect on the answer."""

import re
import sys

import pytest
import torch
from small_process import run_apart

from torchdnr.svm import RBFSVM, ConvergenceWarning, grid_search, solve_dual
from torchdnr.svm.kernel_rows import KernelRows
from torchdnr.svm.memory_plan import MemoryPlan, column_groups, plan_memory
from torchdnr.svm.multiclass import one_vs_rest

MIB = 2**20
# Of a fit whose Gram matrix takes 256 MiB; libraries take their own memory in a small one before.
MEASURED = """
import resource
import torch
from torchdnr.resources import process_peak_mib
from torchdnr.svm import RBFSVM
torch.set_num_threads(1)
torch.manual_seed(0)
x = torch.rand(8192, 12)
y = (x[:, 0] + 0.6 * torch.randn(8192) > 0.5).long()
RBFSVM(C=1.0, gamma=2.0).fit(x[:1000], y[:1000])
held = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20
svm = RBFSVM(C=1.0, gamma=2.0).fit(x, y, memory_limit=LIMIT)
print(len(svm.support_vectors), process_peak_mib(), held)
"""

MANY_CLASSES = """
import resource
import torch
from torchdnr.resources import process_peak_mib
from torchdnr.svm import RBFSVM
torch.set_num_threads(1)
torch.manual_seed(0)
y = torch.arange(2000) % 200
x = torch.randn(200, 16)[y] + torch.randn(2000, 16)
RBFSVM(C=1.0).fit(x[:400], y[:400])
held = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20
svm = RBFSVM(C=1.0).fit(x, y, memory_limit=LIMIT)
print(len(svm.support_vectors), process_peak_mib(), held)
"""


def samples(n):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, 6, generator=generator)
    noise = 0.3 * torch.randn(n, generator=generator)
    return x, (3 * (x[:, 0] + noise)).long().clamp(0, 2)


def least(call):
    with pytest.raises(ValueError, match="memory_limit must be at least") as error:
        call(1000)
    return int(re.search(r"at least (\d+) bytes", str(error.value))[1])


def test_a_fit_in_the_least_memory_is_that_in_plenty():
    x, y = samples(500)
    plenty = RBFSVM(C=5.0, gamma=3.0, tol=1e-5).fit(x.double(), y)

    def fit(limit):
        return RBFSVM(C=5.0, gamma=3.0, tol=1e-5).fit(x.double(), y, memory_limit=limit)

    little = fit(least(fit))
    torch.testing.assert_close(little(x.double()), plenty(x.double()), atol=1e-4, rtol=0)


def test_a_search_in_the_least_memory_finds_the_same():
    x, y = samples(150)
    grid = {"C_grid": (0.5, 5.0), "gamma_grid": (1.0, 4.0), "folds": 3}

    def search(limit):
        return grid_search(x.double(), y, **grid, memory_limit=limit)

    plenty, little = search(None), search(least(search))
    torch.testing.assert_close(little.accuracy, plenty.accuracy, atol=0.01, rtol=0)
    assert (little.C, little.gamma) == (plenty.C, plenty.gamma)


def test_many_classes_are_solved_in_groups_with_the_same_answer():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(480) % 48
    x = torch.randn(48, 8, generator=generator)[y] + torch.randn(480, 8, generator=generator)
    x = x.double()
    weight = torch.rand(480, generator=generator) + 0.5

    def fit(limit):
        svm = RBFSVM(C=5.0, tol=1e-6, class_weight="balanced")
        return svm.fit(x, y, sample_weight=weight, memory_limit=limit)

    few = least(fit)
    assert plan_memory(480, 48, 8, few).together == 16
    assert plan_memory(480, 48, 8, None).together == 48
    whole, parts = fit(None), fit(few)
    assert parts.solution.converged.all()
    torch.testing.assert_close(parts.dual_coef, whole.dual_coef, atol=1e-5, rtol=0)
    torch.testing.assert_close(parts(x), whole(x), atol=1e-5, rtol=0)
    assert parts.solution.steps.shape == (48,)


def test_problems_that_would_drive_out_the_rows_of_each_other_are_solved_in_turn():
    tight = plan_memory(8000, 10, 4, 170 * MIB)
    assert tight.capacity < 8000 and tight.together == tight.capacity // (2 * tight.largest_set)
    assert plan_memory(8000, 10, 4, None).together == 10
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(600) % 6
    x = torch.randn(6, 8, generator=generator)[y] + torch.randn(600, 8, generator=generator)
    kernel = torch.exp(-0.05 * torch.cdist(x.double(), x.double()).square())
    targets = one_vs_rest(y, 6)

    def solve(together):
        plan = MemoryPlan(capacity=260, largest_set=128, together=together)
        return solve_dual(KernelRows(lambda index: kernel[index], 600, kernel, plan), targets, 1.0)

    in_turn, at_once = solve(1), solve(6)
    assert in_turn.kernel_rows < at_once.kernel_rows
    torch.testing.assert_close(in_turn.scores, at_once.scores, atol=5e-3, rtol=0)


@pytest.mark.parametrize(("problems", "together"), [(7, 3), (6, 3), (2, None), (1, 16)])
def test_groups_hold_every_problem_once(problems, together):
    groups = column_groups(problems, together)
    assert [k for group in groups for k in range(problems)[group]] == list(range(problems))
    assert max(len(range(problems)[group]) for group in groups) <= (together or problems)


def test_groups_keep_the_names_of_their_problems():
    kernel = KernelRows(lambda index: torch.eye(6).double()[index], 6, torch.ones(1).double())
    kernel.together = 2
    targets = torch.ones(6, 5)
    targets[:3] = -1
    targets[:, 4] = 1
    with pytest.raises(ValueError, match=r"columns \[4\]"):
        solve_dual(kernel, targets, 1.0)
    targets[0, 4] = -1
    with pytest.warns(ConvergenceWarning, match=r"4 \(violation"):
        solve_dual(kernel, targets, 10.0, max_steps=0)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("script", "limit", "needed"),
    [
        (MEASURED, 60 * MIB, 2000),  # much of the Gram matrix
        (MEASURED, 120 * MIB, 2000),
        (MANY_CLASSES, 90 * MIB, 1900),  # of 2,000 samples
    ],
    ids=["60 MiB", "120 MiB", "200 classes"],
)
def test_a_fit_keeps_to_its_limit(script, limit, needed):
    code = script.replace("LIMIT", str(limit))
    found = run_apart(code).split()
    assert int(found[0]) > needed
    assert float(found[1]) - float(found[2]) <= limit / MIB
