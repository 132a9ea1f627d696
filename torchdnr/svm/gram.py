"""Gram matrices of features that one process has, or more of them share; rows on demand."""

import itertools
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from torchdnr.distributed.sharing import Partition, ShardedFeatures
from torchdnr.kernels.rbf import full_precision, squared_distances
from torchdnr.kernels.row_blocks import row_blocks
from torchdnr.svm.kernel_rows import KernelRows
from torchdnr.svm.memory_plan import FeaturePlan, MemoryPlan, plan_features, plan_memory
from torchdnr.svm.sharded_rows import ShardedRows

FEW_FEATURES, MANY_SAMPLES = 256, 4096
"""Kernels of at most so many features are computed faster than read from rows far apart in memory,
as those of at least so many samples are."""


def rows_on_demand(
    evaluate: Callable[[Tensor], Tensor],
    partition: Partition,
    like: Tensor,
    plan: MemoryPlan | None = None,
    batch: int | None = None,
    between: Callable[[Tensor], Tensor] | None = None,
) -> KernelRows:
    """Build a Gram matrix, sharded if there is more than one process; as ``ShardedRows``."""
    if partition.processes.count > 1:
        return ShardedRows(evaluate, partition, like, plan, batch)
    return KernelRows(evaluate, partition.n, like, plan, batch, between=between)


def planned_rows(
    features: ShardedFeatures,
    gamma: float,
    center: Tensor,
    problems: int,
    memory_limit: int | None,
    distances: Tensor | None,
) -> KernelRows:
    """Build the Gram matrix of the RBF kernel in bounded memory, from distances if given."""
    partition, itemsize = features.partition, features.local.element_size()
    n, width = partition.n, partition.largest
    if distances is not None:
        plan = plan_memory(n, problems, itemsize, memory_limit, width=width)
        return distance_rows(distances, gamma, plan, partition)
    copies = plan_features(features, problems, memory_limit)
    plan = plan_memory(n, problems, itemsize, memory_limit, copies.total_bytes, width)
    return rbf_rows(features, gamma, center, plan, copies)


def rbf_rows(
    features: Tensor | ShardedFeatures,
    gamma: float,
    center: Tensor,
    plan: MemoryPlan | None = None,
    copies: FeaturePlan | None = None,
) -> KernelRows:
    """Build the Gram matrix of the RBF kernel from features ``(n, d)`` and their mean.

    The center serves the rounding. Without plans all rows may be held, and all features copied.
    Raises ``ValueError`` if squared distances overflow.
    """
    features = ShardedFeatures.of(features)
    local, partition = features.local, features.partition
    size = local.element_size() * local.numel()
    blocks = row_blocks(local, size if copies is None else copies.block_bytes)
    norms = torch.cat([(block - center).square_().sum(dim=1) * -gamma for block in blocks])
    all_norms = partition.gather(norms)
    if not torch.isfinite(all_norms).all():
        raise ValueError(
            "kernel must be finite, got squared distances that overflow: scale the features"
        )
    centred = ShardedFeatures(local - center, partition) if len(blocks) == 1 else None
    buffer = local.new_empty(0)

    def exponents(rows: Tensor) -> Tensor:
        """Compute ``2 gamma x_i x_j - gamma |x_j|^2``, given ``2 gamma x_i``."""
        if centred is not None:
            return torch.addmm(norms, rows, centred.local.T)
        result, first = rows.new_empty(len(rows), len(local)), 0
        for block in blocks:
            columns = slice(first, first + len(block))
            moved = torch.sub(block, center, out=buffer.resize_(block.shape))
            torch.addmm(norms[columns], rows, moved.T, out=result[:, columns])
            first += len(block)
        return result

    def evaluate(index: Tensor) -> Tensor:
        rows = features.rows(index).sub_(center) if centred is None else centred.rows(index)
        with full_precision(local.device):
            kernels = exponents(rows.mul_(2.0 * gamma))
        kernels = kernels.add_(all_norms[index].unsqueeze(1)).clamp_max_(0.0).exp_()
        # The kernel of each sample with itself is 1, where rounding made it a little less.
        positions, is_local = (t.unsqueeze(1) for t in partition.locate(index))
        diagonal = torch.where(is_local, 1.0, kernels.gather(1, positions))
        return kernels.scatter_(1, positions, diagonal)

    between = None
    n, d = features.shape
    few_held = plan is not None and plan.capacity < n
    if centred is not None and (few_held or (d <= FEW_FEATURES and n >= MANY_SAMPLES)):
        between = partial(_kernels_within, centred.local, all_norms, gamma)
    batch = None if copies is None else copies.rows
    return rows_on_demand(evaluate, partition, local, plan, batch, between)


def _kernels_within(vectors: Tensor, norms: Tensor, gamma: float, sets: Tensor) -> Tensor:
    """Compute the kernels ``(p, k, k)`` within sets of samples ``(p, k)``.

    The vectors are centred, and the norms are ``-gamma |x_i|^2``.
    """
    kernels = vectors.new_empty(*sets.shape, sets.shape[1])
    step = max(1, len(vectors) // sets.shape[1])  # copies no larger than all vectors
    for index, result in zip(sets.split(step), kernels.split(step), strict=True):
        chosen, offsets = vectors[index], norms[index]
        with full_precision(vectors.device):
            factor = 2.0 * gamma
            torch.baddbmm(offsets.unsqueeze(1), chosen, chosen.mT, alpha=factor, out=result)
        result.add_(offsets.unsqueeze(2)).clamp_max_(0.0).exp_()
    kernels.diagonal(dim1=1, dim2=2).fill_(1.0)
    return kernels


def distance_rows(
    distances: Tensor,
    gamma: float,
    plan: MemoryPlan | None = None,
    partition: Partition | None = None,
) -> KernelRows:
    """Build the Gram matrix of the RBF kernel from squared distances, to local samples."""
    partition = Partition((len(distances),)) if partition is None else partition
    return rows_on_demand(
        lambda index: distances[index].mul_(-gamma).exp_(), partition, distances, plan
    )


def all_distances(features: Tensor | ShardedFeatures, center: Tensor, memory_limit: int) -> Tensor:
    """Compute the squared distances between all rows, ``(n, n)``, in bounded memory beside them.

    They are at least 0, and 0 on the diagonal. Where the features are sharded, they are those to
    the rows of this process, ``(n, k)``. The limit is exceeded only if two rows are more.
    """
    features = ShardedFeatures.of(features)
    local = features.local
    if features.partition.processes.count > 1:
        return _distances_to_local(features, center, memory_limit)
    blocks = row_blocks(local, memory_limit // 4)
    if len(blocks) == 1:
        return squared_distances(local, local, center)
    distances = local.new_empty(len(local), len(local))
    bounds = torch.tensor([0, *map(len, blocks)]).cumsum(0).tolist()
    ranges = [slice(*pair) for pair in itertools.pairwise(bounds)]
    for (i, rows), (j, others) in itertools.combinations_with_replacement(
        zip(ranges, blocks, strict=True), 2
    ):
        distances[i, j] = squared_distances(rows, others, center)
        distances[j, i] = distances[i, j].T
    return distances


def _distances_to_local(features: ShardedFeatures, center: Tensor, memory_limit: int) -> Tensor:
    (n, d), local = features.shape, features.local
    distances = local.new_empty(n, len(local))
    step = max(1, memory_limit // 8 // (local.element_size() * d))  # as many in all processes
    columns = [slice(first, first + step) for first in range(0, len(local), step)]
    for first in range(0, n, step):
        rows = slice(first, min(first + step, n))
        chosen = features.rows(rows)
        for part in columns:
            distances[rows, part] = squared_distances(chosen, local[part], center)
    distances[features.partition.local].fill_diagonal_(0.0)
    return distances
