"""`ShardedRows`: kernel rows of which each of several processes evaluates and holds a part."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from torchdnr.distributed.sharing import Partition
from torchdnr.svm.kernel_rows import Block, KernelRows
from torchdnr.svm.memory_plan import MemoryPlan


class ShardedRows(KernelRows):
    """A Gram matrix whose columns are divided among processes, as ``partition`` says.

    All call the same methods with the same arguments, and get the same results. ``evaluate`` maps
    sample indices ``(m,)`` to their kernels with this process's samples, ``(m, k)``.
    """

    def __init__(
        self,
        evaluate: Callable[[Tensor], Tensor],
        partition: Partition,
        like: Tensor,
        plan: MemoryPlan | None = None,
        batch: int | None = None,
    ) -> None:
        columns, width = partition.local, partition.largest
        super().__init__(evaluate, partition.n, like, plan, batch, columns=columns, width=width)
        self._partition, self._processes = partition, partition.processes
        self.parts = 4 * self._processes.count  # dealt out in turn, as the first are the largest

    def block(self, index: Tensor) -> Tensor:
        """Return the kernels between the samples of working sets, ``(p, k, k)``."""
        return self._processes.all_reduce(self._local_block(index))

    def whole_rows(self, samples: Tensor) -> Tensor:
        """Return the rows of some samples, ``(m, n)``."""
        return self._partition.gather(super().whole_rows(samples), dim=1)

    def product_at(self, samples: Tensor, vectors: Tensor) -> Tensor:
        """Multiply vectors by the rows of some samples; ``(P, m)``."""
        return self._processes.all_reduce(super().product_at(samples, vectors))

    def product(self, vectors: Tensor, *, exact: bool = True) -> Tensor:
        """Multiply vectors by the Gram matrix; ``(P, n)``."""
        return self._partition.gather(super().product(vectors, exact=exact), dim=1)

    def assigned(self, blocks: Sequence[Block]) -> Iterator[tuple[Block, Tensor]]:
        """Yield every ``count``-th block, which this process is to solve, with its kernels."""
        rank, count = self._processes.rank, self._processes.count
        for first in range(0, len(blocks), count):
            turn, kernels = blocks[first : first + count], None  # a block each, solved side by side
            for target, block in enumerate(turn):
                values = self._processes.reduce(self._local_block(block.samples), target)
                kernels = values if target == rank else kernels
                del values
            if kernels is not None:
                yield turn[rank], kernels

    def collect(
        self, blocks: Sequence[Block], results: Sequence[Tensor], extra: int
    ) -> list[Tensor]:
        """Give every process the results of all blocks, in their order."""
        local, collected = iter(results), []
        for number, (problems, samples, _) in enumerate(blocks):
            if self._processes.mine(number):
                result = next(local)
            else:
                shape = len(problems), samples.shape[1] + extra
                result = torch.empty(shape, dtype=torch.float64, device=samples.device)
            collected.append(self._processes.broadcast(result, self._processes.owner(number)))
        return collected

    def replicate(self, tensor: Tensor) -> Tensor:
        """Return the first process's tensor: rounding and ties may differ between machines."""
        return self._processes.broadcast(tensor)

    def _local_block(self, index: Tensor) -> Tensor:
        """Return the kernels with this process's samples, and 0 for the others."""
        slots, (positions, is_local) = self._slots_of_sets(index), self._partition.locate(index)
        values = self.store[slots.unsqueeze(2), positions.unsqueeze(1)]
        return values.masked_fill_(~is_local.unsqueeze(1), 0.0)
