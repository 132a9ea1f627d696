"""Blocks of dual problems that are dealt to the processes that share a kernel."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from torchdnr.svm.gram import KernelRows

Block = tuple[Tensor, Tensor, Tensor]
"""Problems of a block, ``(p,)``; their working sets, ``(p, k)``; and which entries count."""


def dealt(
    rows: KernelRows, blocks: Sequence[Block], solve: Callable[..., Tensor], extra: int
) -> Iterator[tuple[Block, Tensor]]:
    """Let each process solve a block in turn, and tell all what came of it.

    Args:
        rows: The kernel, and the processes that share it.
        blocks: What is to be solved.
        solve: Makes an outcome, float64 ``(p, k + extra)``, of a block and its kernels.
        extra: Numbers per problem beside those of the working set.

    Yields:
        Blocks in their order, with outcomes.
    """
    processes = rows.processes
    for first in range(0, len(blocks), processes.count):
        turn = blocks[first : first + processes.count]  # a block each, solved at the same time
        outcomes = [
            torch.empty(*t.shape[:1], t.shape[1] + extra, dtype=torch.float64, device=t.device)
            for _, t, _ in turn
        ]
        held = []
        for owner, (_, taken, _) in enumerate(turn):
            kernels = rows.block(taken, owner)  # all take part in it
            if owner == processes.rank:
                held.append(kernels)
            del kernels
        if held:
            outcomes[processes.rank] = solve(*turn[processes.rank], held.pop())
        for owner, (block, outcome) in enumerate(zip(turn, outcomes, strict=True)):
            yield block, processes.share(outcome, owner)
