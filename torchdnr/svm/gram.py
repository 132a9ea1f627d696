"""`KernelRows`: rows of a Gram matrix, each evaluated when it is first needed, in bounded memory.

An SVM needs the kernel rows of the samples that some working set holds, and no others. Where few
samples become support vectors that is a small part of the Gram matrix; where most do, all of it.
A row costs the same either way, so rows on demand are never dearer than the whole matrix.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from torchdnr.distributed.processes import Processes
from torchdnr.distributed.sharing import SharedFeatures, Shares, row_blocks
from torchdnr.kernels.rbf import full_precision, squared_distances
from torchdnr.svm.memory_plan import (
    EVALUATE_ELEMENTS,
    EXACT_ELEMENTS,
    LARGEST_SET,
    FeaturePlan,
    MemoryPlan,
)


class KernelRows:
    """A Gram matrix that is evaluated row by row on demand.

    Several processes may share each row: everyone evaluates and holds the values with its own
    samples, the columns ``own``. All call the same methods with the same arguments, and get the
    same results.

    Args:
        evaluate: Maps sample indices ``(m,)`` to their kernel rows ``(m, n)``, or to the own
            columns of these.
        n: Samples.
        like: Tensor whose dtype and device the rows have.
        plan: How many rows are held at the most, at least 3; those used least recently give way.
            Default: all.
        at_once: Rows evaluated at once, where each evaluation goes through large features. Default:
            as many as stay in a CPU's cache.
        shares: Which columns belong to which process. Default: all to this one, which is alone.

    Attributes:
        largest_set: Samples in a working set at the most.
        together: Problems solved together; None for all.
        evaluated: Rows evaluated so far, repeats counted.
        shares: Which columns belong to which process.
        store: The rows held, ``(slots, own columns)``; see ``slots``.
    """

    def __init__(
        self,
        evaluate: Callable[[Tensor], Tensor],
        n: int,
        like: Tensor,
        plan: MemoryPlan | None = None,
        at_once: int | None = None,
        shares: Shares | None = None,
    ) -> None:
        self.shares = Shares((n,)) if shares is None else shares
        self._own, width = self.shares.own, self.shares.largest
        plan = MemoryPlan(n, LARGEST_SET) if plan is None else plan
        self._at_once, self._passes_are_dear = at_once, at_once is not None
        if at_once is None:
            self._at_once = max(1, EVALUATE_ELEMENTS // width)
        self._evaluate, self.n = evaluate, n
        self.capacity, self.largest_set = max(min(3, n), min(plan.capacity, n)), plan.largest_set
        self.together = plan.together
        # A CPU gives memory only to the part that gets written.
        columns = self._own.stop - self._own.start
        self.store = torch.empty(self.capacity, columns, dtype=like.dtype, device=like.device)
        self._slot_of = torch.full((n,), -1, dtype=torch.int64, device=like.device)
        self._sample_in = torch.zeros(self.capacity, dtype=torch.int64, device=like.device)
        self._last_use = torch.zeros(self.capacity, dtype=torch.int64, device=like.device)
        self._used, self._time, self.evaluated = 0, 0, 0

    @classmethod
    def dense(cls, kernel: Tensor) -> "KernelRows":
        """Wrap a Gram matrix that is at hand.

        Args:
            kernel: Symmetric Gram matrix, ``(n, n)``.

        Returns:
            Rows that are all held already.
        """
        rows = cls(lambda index: kernel[index], len(kernel), kernel, MemoryPlan(1, LARGEST_SET))
        rows.capacity = rows.n
        rows.store, rows._used = kernel, rows.n
        rows.evaluated = rows.n
        rows._slot_of = rows._sample_in = torch.arange(rows.n, device=kernel.device)
        return rows

    @property
    def processes(self) -> Processes:
        """Those that share the rows."""
        return self.shares.processes

    @property
    def is_dense(self) -> bool:
        """Whether the matrix was given whole."""
        return self._slot_of is self._sample_in

    def slots(self, index: Tensor) -> Tensor:
        """Make sure that rows are held.

        Args:
            index: Samples, ``(m,)``, any order, repeats allowed; at most ``capacity`` different.

        Returns:
            Rows of ``store`` that hold them, ``(m,)``; valid until the next call.
        """
        if self.is_dense:
            return index
        self._time += 1
        wanted = index.unique()
        found = self._slot_of[wanted]
        self._last_use[found[found >= 0]] = self._time
        missing = wanted[found < 0]
        if len(missing):
            self._add(missing)
        return self._slot_of[index]

    def block(self, index: Tensor, owner: int | None = None) -> Tensor:
        """Return the kernels between the samples of several working sets.

        Args:
            index: Samples of each set, ``(p, k)``.
            owner: Rank of the only process that wants them; elsewhere what is returned is of no
                use then. Default: all want them.

        Returns:
            Kernel values, ``(p, k, k)``.
        """
        union, position = index.unique(return_inverse=True)
        slots = self.slots(union)[position]
        if self.processes.count == 1:
            return self.store[slots.unsqueeze(2), index.unsqueeze(1)]
        places, here = self.shares.places(index)
        values = self.store[slots.unsqueeze(2), places.unsqueeze(1)]
        values.masked_fill_(~here.unsqueeze(1), 0.0)  # each value comes from one process
        if owner is None:
            return self.processes.total(values)
        return self.processes.total_for(owner, values)

    def product_at(self, samples: Tensor, vectors: Tensor) -> Tensor:
        """Multiply vectors by the rows of some samples.

        Args:
            samples: At most ``capacity`` of them, ``(m,)``.
            vectors: One vector per row, float64 ``(P, n)``.

        Returns:
            Products, float64 ``(P, m)``.
        """
        rows = self.store[self.slots(samples)].double()
        return self.processes.total(vectors[:, self._own] @ rows.T)

    def product(self, vectors: Tensor, *, exact: bool = True) -> Tensor:
        """Multiply vectors by the Gram matrix; only rows with a nonzero coefficient are read.

        Args:
            vectors: One vector per row, float64 ``(P, n)``.
            exact: Whether to accumulate in float64 whatever the dtype of the kernel.

        Returns:
            Products, float64 ``(P, n)``.
        """
        used = vectors.ne(0).any(dim=0).nonzero().squeeze(1)  # a data-dependent size: syncs once
        result = torch.zeros_like(vectors[:, self._own])
        step = max(1, EXACT_ELEMENTS // self.shares.largest) if exact else self.n
        room = result.new_empty(step, result.shape[1]) if exact else None
        with full_precision(vectors.device):
            for samples, rows in self._parts(used, step, spread=2 if exact else 10):
                coefficients = vectors[:, samples]
                if exact:
                    result.addmm_(coefficients, room[: len(rows)].copy_(rows))
                else:
                    result += coefficients.to(rows.dtype) @ rows
        return self.shares.gather(result, dim=1)

    def _parts(self, used: Tensor, step: int, spread: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Pair samples with their rows, some at a time; all that are held if that saves a copy."""
        held = self._slot_of[used]
        if spread * len(used) > self._used and bool((held >= 0).all()):  # no copy of the rows
            for slot in range(0, self._used, step):
                rows = self.store[slot : min(slot + step, self._used)]
                yield self._sample_in[slot : slot + len(rows)], rows
            return
        together = self._at_once if self._passes_are_dear else min(step, self._at_once)
        for some in used.split(together):
            held = self._slot_of[some]
            there, missing = held >= 0, some[held < 0]
            for part, slots in zip(some[there].split(step), held[there].split(step), strict=True):
                yield part, self.store[slots]
            if len(missing):  # they had to give way: evaluated again, and not kept
                self.evaluated += len(missing)
                rows = self._evaluate(missing)
                yield from zip(missing.split(step), rows.split(step), strict=True)
                del rows  # before the next are made

    def _add(self, missing: Tensor) -> None:
        """Evaluate rows into free slots, then into those used least recently."""
        new = min(self.capacity - self._used, len(missing))
        slots = torch.arange(self._used, self._used + new, device=missing.device)
        if new < len(missing):
            freed = self._last_use[: self._used].argsort(stable=True)[: len(missing) - new]
            self._slot_of[self._sample_in[freed]] = -1
            slots = torch.cat([slots, freed])
        at_once = self._at_once
        for samples, places in zip(missing.split(at_once), slots.split(at_once), strict=True):
            self.store[places] = self._evaluate(samples)
        self._used += new
        self._slot_of[missing], self._sample_in[slots] = slots, missing
        self._last_use[slots] = self._time
        self.evaluated += len(missing)


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
