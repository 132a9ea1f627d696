"""The Gram matrix of the RBF kernel, on demand: from features, or from squared distances.

Features may be too large for a copy, or may lie on disk: where memory has no room for them once
more, they are centred block by block each time that kernel rows are evaluated. Where several
processes share the features, each evaluates the kernels of the wanted samples with its own ones.
"""

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchdnr.distributed.sharing import SharedFeatures, Shares
from torchdnr.kernels.rbf import full_precision, squared_distances
from torchdnr.row_blocks import row_blocks
from torchdnr.svm.gram import KernelRows
from torchdnr.svm.memory_plan import MEMORY_LIMIT, USABLE, MemoryPlan, least_memory


@dataclass(frozen=True)
class FeaturePlan:
    """How much of the features is copied at a time.

    Attributes:
        block_bytes: Bytes of centred rows; the features are kept centred if all fit in there.
        taken: Bytes that the copies take together.
        rows: Kernel rows evaluated at once; None for as many as a CPU's cache holds.
    """

    block_bytes: int
    taken: int
    rows: int | None


def plan_features(
    features: Tensor | SharedFeatures, problems: int, memory_limit: int | None
) -> FeaturePlan:
    """Divide memory between copies of the features and all else that a fit needs.

    Args:
        features: ``(n, d)``.
        problems: Problems solved at once.
        memory_limit: Bytes beyond the features; None for ``MEMORY_LIMIT``.

    Returns:
        A plan that takes at most half of what the least memory of a fit leaves; more only if a
        single row is more.
    """
    features = SharedFeatures.of(features)
    (n, d), itemsize = features.shape, features.own.element_size()
    width = features.shares.largest  # the same plan in all processes
    size, limit = itemsize * width * d, MEMORY_LIMIT if memory_limit is None else int(memory_limit)
    room = int(USABLE * (limit - least_memory(n, problems, itemsize, width=width)))
    if 4 * size <= room:  # the centred features, and the rows of them whose kernels are evaluated
        return FeaturePlan(size, 2 * size, None)
    # A block of centred rows, those whose kernels are evaluated, and their kernels with all, of
    # which the last ones are still in use.
    row = itemsize * max(width, d)
    block = max(row, min(size, room // 8))
    return FeaturePlan(min(block, size), 4 * block, block // row)


def rbf_rows(
    features: Tensor | SharedFeatures,
    gamma: float,
    center: Tensor,
    plan: MemoryPlan | None = None,
    blocks: FeaturePlan | None = None,
) -> KernelRows:
    """Build the Gram matrix of the RBF kernel, to be evaluated on demand.

    Args:
        features: ``(n, d)``.
        gamma: Kernel width.
        center: Mean of the features, ``(d,)``; it serves the rounding.
        plan: How many rows are held at the most. Default: all.
        blocks: How much of the features is copied at a time. Default: all.

    Returns:
        Rows ``exp(-gamma |x_i - x_j|^2)``.

    Raises:
        ValueError: If squared distances overflow.
    """
    features = SharedFeatures.of(features)
    own, shares = features.own, features.shares
    size = own.element_size() * own.numel()
    parts = row_blocks(own, size if blocks is None else blocks.block_bytes)
    norms = torch.cat([(part - center).square_().sum(dim=1) * -gamma for part in parts])
    all_norms = shares.gather(norms)
    if not torch.isfinite(all_norms).all():
        raise ValueError(
            "kernel must be finite, got squared distances that overflow: scale the features"
        )
    kept = replace(features, own=own - center) if len(parts) == 1 else None
    room = own.new_empty(0)

    def products(chosen: Tensor) -> Tensor:
        if kept is not None:
            return torch.addmm(norms, chosen, kept.own.T)
        result, first = chosen.new_empty(len(chosen), len(own)), 0
        for part in parts:
            columns = slice(first, first + len(part))
            moved = torch.sub(part, center, out=room.resize_(part.shape))
            torch.addmm(norms[columns], chosen, moved.T, out=result[:, columns])
            first += len(part)
        return result

    def evaluate(index: Tensor) -> Tensor:
        chosen = features.take(index).sub_(center) if kept is None else kept.take(index)
        with full_precision(own.device):
            exponents = products(chosen.mul_(2.0 * gamma))
        rows = exponents.add_(all_norms[index].unsqueeze(1)).clamp_max_(0.0).exp_()
        return _with_diagonal(rows, index, shares)

    at_once = None if blocks is None else blocks.rows
    return KernelRows(evaluate, len(features), own, plan, at_once, shares)


def _with_diagonal(rows: Tensor, index: Tensor, shares: Shares) -> Tensor:
    """Set the kernel of each sample with itself to 1, where it is among the own columns."""
    places, here = (t.unsqueeze(1) for t in shares.places(index))
    return rows.scatter_(1, places, torch.where(here, 1.0, rows.gather(1, places)))


def distance_rows(
    distances: Tensor,
    gamma: float,
    plan: MemoryPlan | None = None,
    shares: Shares | None = None,
) -> KernelRows:
    """Build the Gram matrix of the RBF kernel from squared distances, on demand.

    Args:
        distances: Squared distances between all samples, ``(n, n)``, or the own columns of them.
        gamma: Kernel width.
        plan: How many rows are held at the most. Default: all.
        shares: Which columns belong to which process. Default: all to this one.

    Returns:
        Rows ``exp(-gamma D_i)``.
    """
    return KernelRows(
        lambda index: distances[index].mul_(-gamma).exp_(),
        len(distances),
        distances,
        plan,
        shares=shares,
    )


def all_distances(features: Tensor | SharedFeatures, center: Tensor, memory_limit: int) -> Tensor:
    """Compute the squared distances between all rows, in bounded memory beside them.

    Args:
        features: ``(n, d)``.
        center: Mean of the features, ``(d,)``.
        memory_limit: Bytes beside features and distances; a little more only if two rows are more.

    Returns:
        Squared distances, ``(n, n)``, at least 0, and 0 on the diagonal; where several processes
        share the features, ``(n, k)``: to those of this one.
    """
    shared = SharedFeatures.of(features)
    if shared.shares.processes.count > 1:
        return _own_distances(shared, center, memory_limit)
    features = shared.own
    parts = row_blocks(features, memory_limit // 4)
    if len(parts) == 1:
        return squared_distances(features, features, center)
    n = len(features)
    distances = features.new_empty(n, n)
    bounds = torch.tensor([0, *map(len, parts)]).cumsum(0).tolist()
    places = [slice(*pair) for pair in itertools.pairwise(bounds)]
    for (i, rows), (j, others) in itertools.combinations_with_replacement(
        zip(places, parts, strict=True), 2
    ):
        distances[i, j] = squared_distances(rows, others, center)
        distances[j, i] = distances[i, j].T
    return distances


def _own_distances(features: SharedFeatures, center: Tensor, memory_limit: int) -> Tensor:
    (n, d), own = features.shape, features.own
    distances = own.new_empty(n, len(own))
    step = max(1, memory_limit // 8 // (own.element_size() * d))  # as many in all processes
    columns = [slice(first, first + step) for first in range(0, len(own), step)]
    for first in range(0, n, step):
        rows = slice(first, min(first + step, n))
        chosen = features.take(rows)
        for part in columns:
            distances[rows, part] = squared_distances(chosen, own[part], center)
    distances[features.shares.own].fill_diagonal_(0.0)
    return distances
