"""How a fit divides its memory limit among its state, working sets, kernel rows and copies."""

import itertools
import math
from dataclasses import dataclass

from torch import Tensor

from torchdnr.distributed.sharing import ShardedFeatures

EVALUATE_ELEMENTS = 2**22
"""Kernel values evaluated at once: few enough to stay in a CPU's cache between two steps."""
EXACT_ELEMENTS = 2**19
"""Kernel values turned to float64 at a time: 4 MiB, which stay in a CPU's cache."""

MEMORY_LIMIT = 4 * 2**30
"""Bytes that a fit may take where the caller sets no limit."""
STATE_ARRAYS = 24
"""Float64 arrays of one entry per sample and problem that are alive at once, at the most."""
WHOLE_ARRAYS = 8
"""Those of all problems, where they are solved some at a time: what is given and returned."""
LEAST_TOGETHER = 16
"""Problems solved together at the least, if there are as many."""
LARGEST_SET = 8192
"""Samples in a working set at the most."""
SET_BYTES = 40
"""Bytes per entry of the matrices that a working set needs at once."""
USABLE = 0.95
"""Share of a memory limit that is planned; allocators lose the rest between their pieces."""


@dataclass(frozen=True)
class FeaturePlan:
    """How much of the features is copied at a time, and how many kernel rows are evaluated."""

    block_bytes: int  # of centred rows; the features are kept centred if all fit in there
    total_bytes: int  # of all copies together
    rows: int | None  # None for as many as a CPU's cache holds


def plan_features(
    features: Tensor | ShardedFeatures, problems: int, memory_limit: int | None
) -> FeaturePlan:
    """Divide memory between copies of the features and all else that a fit needs.

    The copies get at most half of what the least memory of a fit leaves; more only if a single row
    is more.
    """
    features = ShardedFeatures.of(features)
    (n, d), itemsize = features.shape, features.local.element_size()
    width = features.partition.largest  # the same plan in all processes
    size, limit = itemsize * width * d, MEMORY_LIMIT if memory_limit is None else int(memory_limit)
    spare = int(USABLE * (limit - least_memory(n, problems, itemsize, width=width)))
    if 4 * size <= spare:  # the centred features, and the rows of them whose kernels are evaluated
        return FeaturePlan(size, 2 * size, None)
    # A block of centred rows, those whose kernels are evaluated, and their kernels with all, of
    # which the last ones are still in use.
    row = itemsize * max(width, d)
    block = max(row, min(size, spare // 8))
    return FeaturePlan(min(block, size), 4 * block, block // row)


@dataclass(frozen=True)
class MemoryPlan:
    """How many kernel rows are held, and samples in a working set, at the most."""

    capacity: int
    largest_set: int
    together: int | None = None  # problems solved together; None for all


def plan_memory(
    n: int,
    problems: int,
    itemsize: int,
    memory_limit: int | None,
    reserved: int = 0,
    width: int | None = None,
) -> MemoryPlan:
    """Divide memory between the state of the problems, working sets and kernel rows.

    A quarter of what is beyond the least goes to solving more problems together; of what their
    state leaves, a fifth goes to working sets, the rest to kernel rows. Where not all rows fit,
    only as many problems are solved together as have all of theirs held. ``reserved`` bytes are for
    copies of the features, ``width`` is how much of each row is held where rows are sharded. Raises
    ``ValueError`` if the limit is less than a small working set needs.
    """
    limit = MEMORY_LIMIT if memory_limit is None else int(memory_limit)
    width = n if width is None else width
    least = least_memory(n, problems, itemsize, reserved, width)
    if limit < least:
        raise ValueError(
            f"memory_limit must be at least {least} bytes for {n} samples and {problems} problems "
            f"at once, got {limit}: raise it, or use fewer samples"
        )
    spare = int(USABLE * (limit - least))
    together = min(problems, LEAST_TOGETHER + spare // 4 // (STATE_ARRAYS * 8 * n))
    state = _state_bytes(n, problems, together, itemsize) + reserved
    rest = int(limit * USABLE) - state
    sets = rest // 5
    capacity = (rest - sets) // (width * itemsize)
    largest = min(LARGEST_SET, int((sets / SET_BYTES) ** 0.5), max(2, capacity))
    if capacity < n:  # else the rows of each problem drive out those of the others, step by step
        together = max(1, min(together, capacity // (2 * largest)))
    return MemoryPlan(min(n, capacity), largest, together)


def least_memory(
    n: int, problems: int, itemsize: int, reserved: int = 0, width: int | None = None
) -> int:
    """Compute the smallest memory limit, in bytes, that ``plan_memory`` takes."""
    width = n if width is None else width
    state = _state_bytes(n, problems, min(problems, LEAST_TOGETHER), itemsize) + reserved
    sets_and_rows = 5 * SET_BYTES * 256**2 + 2 * width * itemsize * min(n, 256)
    return math.ceil((state + sets_and_rows) / USABLE)


def _state_bytes(n: int, problems: int, together: int, itemsize: int) -> int:
    """Bytes of the state of the problems, and of the rows that are being evaluated or added up."""
    arrays = STATE_ARRAYS * together + (WHOLE_ARRAYS * problems if together < problems else 0)
    rows = min(EVALUATE_ELEMENTS, n * n) * itemsize + 8 * min(EXACT_ELEMENTS, n * n)
    return 8 * n * arrays + rows


def column_groups(problems: int, together: int | None) -> list[slice]:
    """Divide problems into groups of nearly one size, ``together`` at the most; None for all."""
    groups = math.ceil(problems / (together or problems))
    bounds = [problems * part // groups for part in range(groups + 1)]
    return [slice(*pair) for pair in itertools.pairwise(bounds)]
