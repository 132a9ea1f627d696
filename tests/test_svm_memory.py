"""The memory limit of a fit: refused where too small, kept to, and without effect on the answer."""

import re
import subprocess
import sys

import pytest
import torch

from torchdnr.svm import RBFSVM, grid_search

MIB = 2**20
# Of a fit whose Gram matrix takes 256 MiB; libraries take their own memory in a small one before.
MEASURED = """
import torch
from torchdnr.costs import _process_memory, record_costs, stage
from torchdnr.svm import RBFSVM
torch.set_num_threads(1)
torch.manual_seed(0)
x = torch.rand(8192, 12)
y = (x[:, 0] + 0.6 * torch.randn(8192) > 0.5).long()
RBFSVM(C=1.0, gamma=2.0).fit(x[:1000], y[:1000])
before = _process_memory()[1]
with record_costs() as costs, stage("fit"):
    svm = RBFSVM(C=1.0, gamma=2.0).fit(x, y, memory_limit=LIMIT)
print(len(svm.support_vectors), costs["fit"].peak_memory_mib, before)
"""


def samples(n=900):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, 6, generator=generator)
    noise = 0.3 * torch.randn(n, generator=generator)
    return x, (3 * (x[:, 0] + noise)).long().clamp(0, 2)


def least(call):
    with pytest.raises(ValueError, match="memory_limit must be at least") as error:
        call(1000)
    return int(re.search(r"at least (\d+) bytes", str(error.value))[1])


def test_a_fit_in_the_least_memory_is_that_in_plenty():
    x, y = samples()
    plenty = RBFSVM(C=5.0, gamma=3.0, tol=1e-5).fit(x.double(), y)

    def fit(limit):
        return RBFSVM(C=5.0, gamma=3.0, tol=1e-5).fit(x.double(), y, memory_limit=limit)

    little = fit(least(fit))
    torch.testing.assert_close(little(x.double()), plenty(x.double()), atol=1e-4, rtol=0)


def test_a_search_in_the_least_memory_finds_the_same():
    x, y = samples(240)
    grid = {"C_grid": (0.5, 5.0), "gamma_grid": (1.0, 4.0), "folds": 3}

    def search(limit):
        return grid_search(x.double(), y, **grid, memory_limit=limit)

    plenty, little = search(None), search(least(search))
    torch.testing.assert_close(little.accuracy, plenty.accuracy, atol=0.01, rtol=0)
    assert (little.C, little.gamma) == (plenty.C, plenty.gamma)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("limit", [60 * MIB, 120 * MIB])
def test_a_fit_keeps_to_its_limit(limit):
    code = MEASURED.replace("LIMIT", str(limit))
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    if found[1] == "None":
        pytest.skip("this system does not forget the peak of a process")
    assert int(found[0]) > 2000  # much of the Gram matrix is needed
    assert float(found[1]) - float(found[2]) <= limit / MIB
