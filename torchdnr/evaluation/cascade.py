"""The attacks of a line-up on some samples: each goes on from what those before it have found."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchdnr.attacks.minimum_norm import Kept
from torchdnr.evaluation.checkpoint import Checkpoint, Step
from torchdnr.evaluation.judging import (
    TOLERANCE,
    CountedModel,
    Judged,
    Task,
    checked_points,
    judge,
    keep_inside,
)
from torchdnr.evaluation.line_up import Attack, Passes
from torchdnr.resources import synchronize

BELOW = 0.01
"""How far below the smallest norm of a sample an attack is tried first, as a share of it."""
_ATTACKED = 0.6  # share of the samples that an attack at every eps attacks, on average
ROUNDS = 16  # tries of one attack, at the most
_DOUBLINGS = 3  # 1, 2, 4, then 8 % below the last norm


def refining(attacks: Mapping[str, Attack], every_eps: bool) -> set[str]:
    """Name the attacks that only look for points nearer than those of the others."""
    if every_eps or not any(attack.minimum_norm for attack in attacks.values()):
        return set()  # there is no norm to go below
    return {
        name for name, attack in attacks.items() if not (attack.minimum_norm or attack.every_eps)
    }


def none_kept(task: Task) -> Kept:
    """Return the inputs, on the CPU, at an infinite norm: nothing evades yet."""
    norms = torch.full((len(task.inputs),), math.inf, dtype=torch.float64)
    return Kept(task.inputs.cpu(), norms)


def keep_nearer(task: Task, kept: Kept, judged: Judged) -> Kept:
    """Keep what evades, by more than rounding unless it is the input itself, and is nearer."""
    size = judged.size.cpu()
    evades = judged.safe.cpu() | (task.succeeds(judged.predictions).cpu() & (size == 0))
    return kept.update(judged.points, size, evades)


class Cascade:
    """The attacks of a line-up on one share of the samples, one after the other.

    Minimum-norm attacks run first, then those that run at every eps, each from its points at the
    smaller eps. The others, ``refines``, are tried just below the smallest norm that evades each
    sample so far, and lower while they succeed; where nothing evades, at the largest eps, and at
    the smaller ones while they succeed.

    Steps that the checkpoint holds are judged, not run again. ``classes`` are those that the model
    assigns to the pools of the attacks, by the ``id`` of the pool.
    """

    def __init__(
        self,
        task: Task,
        attacks: Mapping[str, Attack],
        eps: list[float],
        refines: set[str],
        classes: Mapping[int, Tensor],
        checkpoint: Checkpoint,
    ) -> None:
        self.task, self.attacks, self.refines = task, attacks, refines
        self.model = CountedModel(task.model)  # counts what the attacks do, not what is judged
        self.classes, self.checkpoint = classes, checkpoint
        self.sizes = [value for value in eps if value > 0]
        self.nearest = none_kept(task)
        self.steps: dict[str, Step] = {}
        self.keys: dict[str, dict[str, str]] = {}  # by attack and step: its name in the checkpoint
        order = sorted(attacks, key=lambda name: (name in refines, not attacks[name].minimum_norm))
        for name in order if self.sizes else ():
            attack, so_far = attacks[name], [*self.keys.values()]
            known: dict[str, Any] = {"attack": attack.settings, **attack.fingerprint}
            if attack.minimum_norm:
                depends = {name: known}
            elif name in refines:
                depends = {name: {**known, "below": so_far, "eps": self.sizes[-1]}}
            else:
                depends = {
                    step_at(name, value): {**known, "eps": self.sizes[: number + 1]}
                    for number, value in enumerate(self.sizes)
                }
            self.keys[name] = {step: f"{step} {_short(on)}" for step, on in depends.items()}

    def passes(self, name: str) -> Passes:
        """Estimate the input rows that an attack will send through the model, if not yet done."""
        left: float = sum(key not in self.checkpoint.steps for key in self.keys[name].values())
        if len(self.keys[name]) > 1:  # what evades is not attacked at larger eps
            left *= _ATTACKED
        forwards, backwards = self.attacks[name].passes
        rows = left * len(self.task.inputs)
        return Passes(rows * forwards, rows * backwards)

    def run(self, finished: Callable[[str], object]) -> dict[str, Step]:
        """Run every attack; ``finished`` is told the name of each once it is done."""
        clean = judge(self.task, self.task.inputs)
        self.nearest = keep_nearer(self.task, self.nearest, clean)
        for name, keys in self.keys.items():
            last, sizes = clean, self.sizes if len(keys) > 1 else [self.sizes[-1]]
            if self.attacks[name].minimum_norm:
                sizes = [math.inf]
            for (step, key), size in zip(keys.items(), sizes, strict=True):
                if key not in self.checkpoint.steps:
                    before = self._spent()
                    if name in self.refines:
                        new, counts = self._below(name)
                    else:
                        new, counts = self._at(name, size, last)
                    cost = {what: value - before[what] for what, value in self._spent().items()}
                    self.checkpoint.add(key, Step(new.cpu(), {**cost, **counts}))
                self.steps[step] = self.checkpoint.steps[key]
                last = judge(self.task, self.steps[step].points.to(self.task.inputs.device))
                self.nearest = keep_nearer(self.task, self.nearest, last)
            finished(name)
        return self.steps

    def _spent(self) -> dict[str, float]:
        """Return the time, and the input rows that the model has seen so far."""
        synchronize(self.task.inputs.device)  # kernels run on after their call
        rows = {"forwards": self.model.forwards, "backwards": self.model.backwards}
        return {"seconds": time.perf_counter(), **rows}

    def _at(self, name: str, size: float, last: Judged) -> tuple[Tensor, dict[str, int]]:
        """Attack at one eps, from the last points, what does not evade there.

        A point that evades stays inside every larger ball: neither accuracy nor rejection rate
        depends on attacking it again; the time does.
        """
        points = last.points.to(self.task.inputs.device)
        wanted = ~self.task.succeeds(last.predictions) | self.attacks[name].minimum_norm
        rows = wanted.nonzero()[:, 0]
        if len(rows) == 0:  # not all networks take an empty batch
            return points, {"violations": 0}
        task = self.task.part(rows)
        new = self._bound(name, task, size, points[rows])()
        new, violations = keep_inside(task, checked_points(new, task.inputs, name), size, name)
        return points.index_copy(0, rows, new), {"violations": violations}

    def _below(self, name: str) -> tuple[Tensor, dict[str, int]]:
        """Attack below the smallest norms, and again below what is reached, while it succeeds.

        Where nothing evades within the largest eps it comes down from there along the grid first:
        the norm may be far below, and a few steps of some per cent would not reach it.

        Where all samples have been evaded, and there is no mask, it starts at the inputs alone: the
        minimum-norm attacks have started at samples of other classes, and from the nearest points
        it was measured to evade no more. A mask leaves so little of such a sample that few
        minimum-norm attacks could start there. The points are its nearest that evade; of a sample
        where none does, that of its one try.
        """
        best, norms = self.task.inputs.cpu().clone(), self.nearest.norms.clone()
        sizes, largest = norms.new_tensor(self.sizes), self.sizes[-1]
        left, beyond, untried = norms > 0, norms > largest, norms > 0
        tries = torch.zeros(len(norms), dtype=torch.int64)
        counts = {"violations": 0, "tried": int(left.sum()), "nearer": 0}
        for _ in range(ROUNDS):
            rows = left.nonzero()[:, 0]
            if len(rows) == 0:
                break
            radius = norms[rows] * (1 - BELOW * 2 ** tries[rows].clamp_max(_DOUBLINGS))
            reached = torch.where(untried[rows], math.inf, norms[rows] * (1 - TOLERANCE))
            place = (torch.searchsorted(sizes, reached) - 1).clamp_min(0)
            radius = torch.where(beyond[rows], sizes[place], radius)
            task = self.task.part(rows.to(self.task.inputs.device))
            near = task.mask is None and bool(norms[rows].isfinite().all())
            eps = radius.to(task.inputs)
            new = self._bound(name, task, eps, task.inputs, from_pool=not near)()
            new, outside = keep_inside(task, checked_points(new, task.inputs, name), eps, name)
            judged = judge(task, new)
            evades = judged.safe.cpu()
            counts["violations"] += outside
            counts["nearer"] += int((evades & untried[rows]).sum())
            kept = evades | untried[rows]
            best[rows[kept]], norms[rows[evades]] = judged.points[kept], judged.size.cpu()[evades]
            # Off the grid, a few per cent below the norm, once nothing evades at the next eps.
            left[rows] = evades | (beyond[rows] & (norms[rows] <= largest * (1 + TOLERANCE)))
            tries[rows] = torch.where(evades, tries[rows] + 1, 0)
            beyond[rows] &= evades & (norms[rows] > sizes[0] * (1 + TOLERANCE))
            untried[rows] = False
        return best, counts

    def _bound(
        self,
        name: str,
        task: Task,
        eps: float | Tensor,
        start: Tensor,
        *,
        from_pool: bool = True,
    ) -> Callable[[], Tensor]:
        """Bind an attack to what it is called with, on some samples."""
        attack = self.attacks[name]
        given = task.given(torch.arange(len(start), device=start.device))
        if attack.pool is not None and not from_pool:
            given["init_inputs"] = None
        elif attack.pool is not None:
            given["init_labels"] = self.classes[id(attack.pool)]
        return partial(attack.run, self.model, task.inputs, task.labels, eps, start, **given)


def step_at(name: str, size: float) -> str:
    """Name the step that an attack takes at one eps."""
    return f"{name} eps {size}"


def _short(depends: Mapping[str, object]) -> str:
    """Compute a fingerprint of JSON values: sixteen hex digits."""
    text = json.dumps(depends, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
