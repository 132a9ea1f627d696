"""The samples of each classifier dealt to processes in shares, each attacked on its own."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchdnr.arrays import as_features
from torchdnr.attacks.checks import check_pool
from torchdnr.attacks.objectives import decision_objective
from torchdnr.attacks.starts import assigned_classes
from torchdnr.attacks.target import Target
from torchdnr.distributed.processes import Processes
from torchdnr.evaluation.cascade import Cascade
from torchdnr.evaluation.checkpoint import (
    Checkpoint,
    Step,
    behaviour,
    fingerprint,
    identity,
    share_path,
)
from torchdnr.evaluation.judging import Judged, Task
from torchdnr.evaluation.line_up import Attack

# Fewest samples of a share, where there are two or more, and most: small batches are slow.
_FEW, _MANY = 10, 64


@dataclass(frozen=True, eq=False)
class Attacked:
    """A classifier, and the attacks on it."""

    name: str
    task: Task
    clean: Judged  # the inputs themselves
    line_up: Mapping[str, Attack]
    refines: set[str]  # attacks that only refine what others have found
    eps: list[float]
    settings: dict[str, Any]  # of the evaluation
    checkpoint: str | Path | None

    def assigned(self) -> dict[int, Tensor]:
        """Find the classes that the model assigns to each pool, by the ``id`` of the pool."""
        task, assigned = self.task, {}
        target = Target(task.model, decision_objective, task.reject, task.batch_size)
        for attack in self.line_up.values():
            if attack.pool is not None and id(attack.pool) not in assigned:
                pool = as_features("init_inputs", attack.pool, task.inputs)
                check_pool(pool, None, task.inputs, task.bounds)
                assigned[id(attack.pool)] = assigned_classes(target, pool)
        return assigned

    def cascades(self, shares: Mapping[int, Tensor], count: int) -> dict[int, Cascade]:
        """Prepare the attacks on shares, by number, of ``count`` in all."""
        known, assigned = identity(self.task.model), {}
        if shares and self.eps[-1] > 0:
            assigned = self.assigned()
        cascades = {}
        for number, rows in shares.items():
            task = self.task.part(rows)
            path = share_path(self.checkpoint, number, count)
            steps = Checkpoint(path, fingerprint(task, known), behaviour(task))
            given = self.line_up, self.eps, self.refines, assigned, steps
            cascades[number] = Cascade(task, *given)
        return cascades


def split_into_shares(n: int) -> list[Tensor]:
    """Divide n samples into shares, rows ``(k,)`` each: those of all classifiers are dealt in turn.

    Their sizes depend on n alone, and so do the results: not on how many processes there are.
    """
    count = max(1, min(2, n // _FEW), -(-n // _MANY))
    return list(torch.arange(n).tensor_split(count))


def deal(attacked: Sequence[Attacked], processes: Processes) -> list[dict[int, Cascade]]:
    """Prepare the shares of this process: for each classifier the attacks by number of share."""
    cascades = []
    for place, one in enumerate(attacked):
        inputs = one.task.inputs
        shares = [rows.to(inputs.device) for rows in split_into_shares(len(inputs))]
        first = place * len(shares)
        mine = {k: rows for k, rows in enumerate(shares) if processes.mine(first + k)}
        cascades.append(one.cascades(mine, len(shares)))
    return cascades


def gather(
    attacked: Sequence[Attacked], cascades: list[dict[int, Cascade]], processes: Processes
) -> Iterator[dict[str, Step]]:
    """Yield the steps of all shares, classifier by classifier, whichever process has run them."""
    processes.wait()
    for place, one in enumerate(attacked):
        parts = cascades.pop(0)  # their points are let go of one by one
        inputs = one.task.inputs
        shares = split_into_shares(len(inputs))
        first = place * len(shares)
        steps = [
            _from_owner(processes, first + k, parts.pop(k, None), inputs[rows].cpu())
            for k, rows in enumerate(shares)
        ]
        yield {label: _joined(part.pop(label) for part in steps) for label in [*steps[0]]}


def _from_owner(
    processes: Processes, unit: int, cascade: Cascade | None, like: Tensor
) -> dict[str, Step]:
    """Give all processes, which call this together, the steps of the share of one of them."""
    owner, steps = processes.owner(unit), {} if cascade is None else cascade.steps
    text = json.dumps({label: step.cost for label, step in steps.items()})
    shared = {}
    for label, cost in json.loads(processes.broadcast_text(text, owner)).items():
        points = steps[label].points if steps else torch.empty_like(like)
        shared[label] = Step(processes.broadcast(points, owner), cost)
    return shared


def _joined(parts: Iterable[Step]) -> Step:
    """Put the samples of all shares together, and add up what they cost."""
    points, costs = zip(*parts, strict=True)
    return Step(torch.cat(points), {key: sum(cost[key] for cost in costs) for key in costs[0]})
