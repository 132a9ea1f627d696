"""`KernelRows`: rows of a Gram matrix, each evaluated when it is first needed, in bounded memory.

An SVM needs the kernel rows of the samples that some working set holds, and no others. Where few
samples become support vectors that is a small part of the Gram matrix; where most do, all of it.
A row costs the same either way, so rows on demand are never dearer than the whole matrix.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torchdnr.kernels.rbf import full_precision
from torchdnr.svm.memory_plan import EVALUATE_ELEMENTS, EXACT_ELEMENTS, LARGEST_SET, MemoryPlan


class Block(NamedTuple):
    """Working sets of p problems that are solved together.

    Attributes:
        problems: ``(p,)``.
        samples: Their working sets, ``(p, k)``.
        valid: Which entries count, bool ``(p, k)``; the rest pads.
    """

    problems: Tensor
    samples: Tensor
    valid: Tensor


class KernelRows:
    """A Gram matrix that is evaluated row by row on demand.

    Args:
        evaluate: Maps sample indices ``(m,)`` to their kernel rows ``(m, n)``, or to the
            ``columns`` of these.
        n: Samples.
        like: Tensor whose dtype and device the rows have.
        plan: How many rows are held at the most, at least 3; those used least recently give way.
            Default: all.
        batch: Rows evaluated at once, where each evaluation goes through large features. Default:
            as many as stay in a CPU's cache.
        columns: Part of each row that is evaluated and held. Default: all of it.
        width: Kernel values of a row by which the work is divided. Default: n.
        between: Maps sets of samples ``(p, k)`` to the kernels within each, ``(p, k, k)``, where
            that is cheaper than to evaluate all of their rows or to read them.

    Attributes:
        largest_set: Samples in a working set at the most.
        together: Problems solved together; None for all.
        parts: In how many blocks the problems of an outer step are solved at least.
        evaluated: Rows evaluated so far, repeats counted.
        exact_elements: Kernel values turned to float64 at a time.
        store: The rows held, ``(slots, columns)``; see ``slots``.
    """

    def __init__(
        self,
        evaluate: Callable[[Tensor], Tensor],
        n: int,
        like: Tensor,
        plan: MemoryPlan | None = None,
        batch: int | None = None,
        *,
        columns: slice | None = None,
        width: int | None = None,
        between: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        plan = MemoryPlan(n, LARGEST_SET) if plan is None else plan
        self._columns = slice(0, n) if columns is None else columns
        self._width = n if width is None else width
        self._passes_are_dear = batch is not None
        self._batch = max(1, EVALUATE_ELEMENTS // self._width) if batch is None else batch
        self._evaluate, self._between, self.n, self.parts = evaluate, between, n, 1
        self.capacity, self.largest_set = max(min(3, n), min(plan.capacity, n)), plan.largest_set
        self.together, self.exact_elements = plan.together, EXACT_ELEMENTS
        # A CPU gives memory only to the part that gets written.
        held = self._columns.stop - self._columns.start
        self.store = torch.empty(self.capacity, held, dtype=like.dtype, device=like.device)
        self._slot_of = torch.full((n,), -1, dtype=torch.int64, device=like.device)
        self._sample_in = torch.zeros(self.capacity, dtype=torch.int64, device=like.device)
        # One more than there are: where a sample has no slot, -1 is the last.
        self._last_use = torch.zeros(self.capacity + 1, dtype=torch.int64, device=like.device)
        self._filled, self._time, self.evaluated = 0, 0, 0

    @classmethod
    def dense(cls, kernel: Tensor) -> "KernelRows":
        """Wrap a symmetric Gram matrix ``(n, n)``, whose rows are all held then."""
        rows = cls(lambda index: kernel[index], len(kernel), kernel, MemoryPlan(1, LARGEST_SET))
        rows.capacity = rows._filled = rows.evaluated = rows.n
        rows.store = kernel
        rows._slot_of = rows._sample_in = torch.arange(rows.n, device=kernel.device)
        return rows

    @property
    def in_sets(self) -> int:
        """Samples, in all, of the working sets whose kernels can be made at once."""
        return self.capacity if self._between is None else self.n

    @property
    def is_dense(self) -> bool:
        """Whether the matrix was given whole."""
        return self._slot_of is self._sample_in

    def slots(self, index: Tensor) -> Tensor:
        """Hold rows of at most ``capacity`` different samples ``(m,)``, in any order.

        Returns the rows of ``store`` that hold them, ``(m,)``; valid until the next call.
        """
        if self.is_dense:
            return index
        self._time += 1
        wanted = index.unique()
        slots = self._slot_of[wanted]
        self._last_use[slots] = self._time
        missing = wanted[slots < 0]
        if len(missing):
            self._add(missing)
        return self._slot_of[index]

    def block(self, index: Tensor) -> Tensor:
        """Return the kernels ``(p, k, k)`` between the samples of working sets ``(p, k)``."""
        if self._between is not None:
            return self._between(index)
        return self.store[self._slots_of_sets(index).unsqueeze(2), index.unsqueeze(1)]

    def whole_rows(self, samples: Tensor) -> Tensor:
        """Return the rows of at most ``capacity`` different samples, ``(m, n)``."""
        return self.store[self.slots(samples)]

    def product_at(self, samples: Tensor, vectors: Tensor) -> Tensor:
        """Multiply vectors, float64 ``(P, n)``, by the rows of at most ``capacity`` samples.

        The sums are in the dtype of the kernel.
        """
        rows = self.store[self.slots(samples)]
        with full_precision(vectors.device):
            return (vectors[:, self._columns].to(rows.dtype) @ rows.T).to(vectors.dtype)

    def product(self, vectors: Tensor, *, exact: bool = True) -> Tensor:
        """Multiply vectors, float64 ``(P, n)``, by the Gram matrix: ``(P, n)``.

        Only rows with a nonzero coefficient are read. ``exact`` sums are in float64 whatever the
        dtype of the kernel.
        """
        used = vectors.ne(0).any(dim=0).nonzero().squeeze(1)  # a data-dependent size: syncs once
        if len(used) <= self.capacity:
            self.slots(used)
        # A few rows at a time stay in a CPU's cache; accelerators want all at once.
        in_parts = exact or self.store.device.type == "cpu"
        step = max(1, self.exact_elements // self._width) if in_parts else self.n
        dtype = vectors.dtype if exact else self.store.dtype
        result = torch.zeros_like(vectors[:, self._columns], dtype=dtype)
        widened = result.new_empty(step if exact else 0, result.shape[1])
        with full_precision(vectors.device):
            for samples, rows in self._parts(used, step):
                coefficients = vectors[:, samples].to(dtype)
                result.addmm_(coefficients, widened[: len(rows)].copy_(rows) if exact else rows)
        return result.to(vectors.dtype)

    def assigned(self, blocks: Sequence[Block]) -> Iterator[tuple[Block, Tensor]]:
        """Yield the blocks to be solved here, each with its kernels ``(p, k, k)``."""
        for block in blocks:
            yield block, self.block(block.samples)

    def collect(
        self, blocks: Sequence[Block], results: Sequence[Tensor], extra: int
    ) -> Sequence[Tensor]:
        """Return the results of all blocks, in their order, given those of the ``assigned`` ones.

        They have a row per problem, float64 ``(p, k + extra)``, with ``extra`` numbers beside those
        of its working set.
        """
        return results

    def replicate(self, tensor: Tensor) -> Tensor:
        """Return a value that decides how the work goes on; shards of one kernel agree on it."""
        return tensor

    def _slots_of_sets(self, index: Tensor) -> Tensor:
        union, position = index.unique(return_inverse=True)
        return self.slots(union)[position]

    def _parts(self, used: Tensor, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Pair samples with their rows, some at a time; all that are held if that saves a copy.

        The rows are valid until the next ones.
        """
        slots = self._slot_of[used]
        if 2 * len(used) > self._filled and bool((slots >= 0).all()):  # no copy of the rows
            for first in range(0, self._filled, step):
                rows = self.store[first : min(first + step, self._filled)]
                yield self._sample_in[first : first + len(rows)], rows
            return
        copies = self.store.new_empty(0, self.store.shape[1])
        for samples in used.split(self._batch if self._passes_are_dear else min(step, self._batch)):
            slots = self._slot_of[samples]
            held, missing = slots >= 0, samples[slots < 0]
            for part, at in zip(samples[held].split(step), slots[held].split(step), strict=True):
                if len(copies) < len(at):
                    copies = self.store.new_empty(len(at), self.store.shape[1])
                yield part, torch.index_select(self.store, 0, at, out=copies[: len(at)])
            if len(missing):  # they had to give way: evaluated again, and not kept
                self.evaluated += len(missing)
                rows = self._evaluate(missing)
                yield from zip(missing.split(step), rows.split(step), strict=True)
                del rows  # before the next are made

    def _add(self, missing: Tensor) -> None:
        """Evaluate rows into free slots, then into those used least recently."""
        new = min(self.capacity - self._filled, len(missing))
        slots = torch.arange(self._filled, self._filled + new, device=missing.device)
        if new < len(missing):
            freed = self._last_use[: self._filled].argsort(stable=True)[: len(missing) - new]
            self._slot_of[self._sample_in[freed]] = -1
            slots = torch.cat([slots, freed])
        for samples, at in zip(missing.split(self._batch), slots.split(self._batch), strict=True):
            kernels, free = self._evaluate(samples), self.capacity - self._filled
            if len(samples) <= free:  # one after the other: a plain copy
                self.store[self._filled : self._filled + len(samples)] = kernels
            else:
                self.store[at] = kernels
            self._filled += min(free, len(samples))
        self._slot_of[missing], self._sample_in[slots] = slots, missing
        self._last_use[slots] = self._time
        self.evaluated += len(missing)
