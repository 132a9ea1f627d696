"""Which problems are solved by `active_set`: those of which a large share of samples will be free.

The usual descent factors a matrix of the free samples of each problem, again and again: it takes
the cube of their number. Rounds of `active_set` take products with the whole kernel, which cost the
same whatever is free. They break even where about a quarter of all samples are: CIFAR-10 pixels at
gamma = "scale" (0.4) gain several times over, raw digits (0.1) lose.

The share is estimated from two small problems, on some of the samples: it falls with their number
by a power law, near enough. A first look ends most estimates before they cost anything.
"""

import math

import torch
from torch import Tensor

from torchdnr.svm.dual import Points
from torchdnr.svm.kernel_rows import KernelRows
from torchdnr.svm.memory_plan import SET_BYTES
from torchdnr.svm.newton import newton_blocks
from torchdnr.svm.nystroem import LowRank
from torchdnr.svm.working_set import common_sample

MANY_FREE = 0.27
"""Least share of free samples, on average over problems, at which `active_set` takes over."""
FIRST_LOOKS = ((128, 0.5), (256, 0.45))
"""Samples, and the least share of those that goes on to be looked at more closely. They are among
the samples of the first working set, so that their rows are evaluated anyway."""
SMALLEST = 1000
"""Samples from which the estimate is worth its time."""
PROBLEMS = 3
"""Problems that are looked at, evenly spaced among all."""
PART, LEAST, MOST = 8, 512, 1024
"""Samples of the last look: a share of all, at the least and at the most."""
DAMPING, ACCURACY, MAX_STEPS = 1e-2, 1e-2, 12
"""With which these are solved: the number of free samples needs no more."""


def many_are_free(rows: KernelRows, targets: Tensor, points: Points) -> bool:
    """Decide by kernel and group of problems; all processes that share a kernel decide alike.

    Targets and points are ``(P, n)``. The kernel has to be held whole, beside what the rounds take.
    """
    n, count = rows.n, len(targets)
    needed = LowRank.needed_bytes(n, count, rows.store.element_size())
    if n < SMALLEST or rows.capacity < n or needed > SET_BYTES * rows.largest_set**2:
        return False
    chosen = torch.arange(min(count, PROBLEMS), device=targets.device)
    chosen = chosen * count // len(chosen)
    targets, lower, upper = (t[chosen] for t in (targets, points.lower, points.upper))
    start = points.dual_coef[chosen]
    # From a warm start; where it holds no more samples off 0 than this, fewer still will be free.
    if start.any() and rows.replicate((start != 0).double().mean()) < MANY_FREE / 2:
        return False
    first = 0.0
    for size, least in FIRST_LOOKS:
        first = _free_share(rows, targets, lower, upper, size)
        if first < least:
            return False
    last = min(max(LEAST, n // PART), MOST)
    share = _free_share(rows, targets, lower, upper, last)
    # A share s of m samples and t of k m is t (t / s)^e of n, with k^e = n / (k m).
    exponent = math.log(n / last) / math.log(last / size)
    return share * min(1.0, share / first) ** exponent >= MANY_FREE


def _free_share(
    rows: KernelRows, targets: Tensor, lower: Tensor, upper: Tensor, size: int
) -> float:
    """Solve problems ``(p, n)`` on a common sample, and return the mean share of free samples."""
    sample = common_sample(rows.n, targets.device, size)
    kernels = rows.block(sample.unsqueeze(0)).double().expand(len(targets), -1, -1)
    targets, lower, upper = (t[:, sample] for t in (targets, lower, upper))
    points = Points(-targets, torch.zeros_like(targets), lower, upper)
    zero = torch.zeros_like(targets[:, 0])
    steps = torch.full_like(zero, MAX_STEPS, dtype=torch.int64)
    solution, *_ = newton_blocks(kernels, points, zero, zero + DAMPING, zero + ACCURACY, steps)
    free = (solution > lower) & (solution < upper)
    share = free.sum(dim=1) / (upper > lower).sum(dim=1).clamp_min(1)
    return rows.replicate(share.double().mean()).item()
