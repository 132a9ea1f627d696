"""One attack of the line-up at every eps, step by step, with what it cost."""

import math
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from torchdnr.attacks.projections import project
from torchdnr.evaluation.checkpoint import Checkpoint
from torchdnr.evaluation.curve import AttackCurve
from torchdnr.evaluation.judging import Judged, Task, judge, keep_inside
from torchdnr.evaluation.known_attacks import Attack
from torchdnr.evaluation.metrics import evaded


class AttackRun(NamedTuple):
    """One attack over all eps: its curve, its points, and the smallest norms that evaded."""

    curve: AttackCurve
    judged: list[Judged]
    evasion_norm: Tensor


def run_attack(
    task: Task,
    name: str,
    attack: Attack,
    eps: list[float],
    clean: Judged,
    steps: Checkpoint,
    bar: tqdm,
) -> AttackRun:
    """Run one attack at every eps, from the points of the previous eps.

    Steps that the checkpoint holds are judged, not run again.

    A point that evades stays inside every larger ball: at the next eps only samples that do not
    evade yet are attacked. Neither accuracy nor rejection rate depends on that; the time does.
    """
    judged, costs = [], []
    evasion_norm = _evasion_norm(task, clean)
    nearest = None  # points of a minimum-norm attack
    for value in eps:
        bar.set_postfix_str(f"{name}, eps {value:g}")
        cost = {"seconds": 0.0, "forwards": 0, "backwards": 0, "violations": 0}
        if value == 0:
            judged.append(clean)
        elif attack.minimum_norm:
            if nearest is None:
                points, spent = _run_step(task, name, attack, math.inf, steps)
                nearest, cost["violations"] = keep_inside(task, points, math.inf, name)
                cost |= spent
                evasion_norm = evasion_norm.minimum(_evasion_norm(task, judge(task, nearest)))
            points = project(nearest, task.inputs, value, task.norm, task.bounds)
            judged.append(judge(task, points))
        else:
            points, spent = _run_step(task, name, attack, value, steps, (judged or [clean])[-1])
            points, cost["violations"] = keep_inside(task, points, value, name)
            cost |= spent
            judged.append(judge(task, points))
        costs.append(cost)
        evasion_norm = evasion_norm.minimum(_evasion_norm(task, judged[-1]))
        bar.update()
    curve = AttackCurve(
        **what_happened(task, eps, judged),
        minimum_norm=attack.minimum_norm,
        **{key: [cost[key] for cost in costs] for key in costs[0]},
        settings=dict(attack.settings),
    )
    return AttackRun(curve, judged, evasion_norm)


def _run_step(
    task: Task,
    name: str,
    attack: Attack,
    eps: float,
    steps: Checkpoint,
    before: Judged | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Run an attack once, on the samples that do not evade before, or read the checkpoint."""
    step = _step_name(eps)
    if step not in steps.points:
        count = task.model.count
        forwards, backwards, began = count.forwards, count.backwards, _now(task.inputs.device)
        if attack.minimum_norm:
            points = _checked(attack.run(task.model, task.inputs, task.labels), task.inputs, name)
        else:
            points = before.points.to(task.inputs.device)
            rows = (~evaded(before.predictions, task.labels)).nonzero()[:, 0]
            inputs, labels, start = (t[rows] for t in (task.inputs, task.labels, points))
            if len(rows):
                found = attack.run(task.model, inputs, labels, eps, start)
                points = points.index_copy(0, rows, _checked(found, inputs, name))
        cost = {
            "seconds": _now(task.inputs.device) - began,
            "forwards": count.forwards - forwards,
            "backwards": count.backwards - backwards,
        }
        steps.add(step, points, cost)
    return steps.points[step].to(task.inputs.device), steps.costs[step]


def step_names(attack: Attack, eps: list[float]) -> list[str]:
    """Name the steps that an attack takes over all eps, as its checkpoint does."""
    positive = [value for value in eps if value > 0]
    if attack.minimum_norm:
        return [_step_name(math.inf)] if positive else []
    return [_step_name(value) for value in positive]


def _step_name(eps: float) -> str:
    return f"eps {eps}"


def _checked(points: Tensor, inputs: Tensor, name: str) -> Tensor:
    """Refuse what an attack returned if it is not finite or not like its inputs."""
    if points.shape != inputs.shape or not points.isfinite().all():
        raise ValueError(
            f"{name} must return finite points like inputs, {tuple(inputs.shape)}, "
            f"got {tuple(points.shape)} or NaN"
        )
    return points.detach().to(inputs.dtype)


def what_happened(task: Task, eps: list[float], judged: list[Judged]) -> dict[str, Any]:
    """Collect the fields that every curve has."""
    return {
        "eps": eps,
        "labels": task.labels.cpu(),
        "predictions": torch.stack([entry.predictions for entry in judged]).cpu(),
        "mean_norm": [entry.size.mean().item() for entry in judged],
    }


def _evasion_norm(task: Task, judged: Judged) -> Tensor:
    """Return the norm of each perturbation that evades, infinite elsewhere."""
    return judged.size.masked_fill(~evaded(judged.predictions, task.labels), math.inf)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # kernels run on after the call that started them
    return time.perf_counter()
