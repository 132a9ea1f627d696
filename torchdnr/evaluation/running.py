"""One attack of the line-up at every eps, step by step, with what it cost."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from torchdnr.attacks.projections import project
from torchdnr.decisions import is_evasion
from torchdnr.distributed.processes import Processes
from torchdnr.evaluation.checkpoint import Checkpoint
from torchdnr.evaluation.curve import AttackCurve
from torchdnr.evaluation.judging import Judged, Task, judge, keep_inside, outputs
from torchdnr.evaluation.line_up import Attack
from torchdnr.files import digest


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
            rows = (~is_evasion(before.predictions, task.labels)).nonzero()[:, 0]
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
    return judged.size.masked_fill(~is_evasion(judged.predictions, task.labels), math.inf)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # kernels run on after the call that started them
    return time.perf_counter()


@dataclass(frozen=True, eq=False)
class Unit:
    """One attack on one classifier.

    Attributes:
        number: Its place among all units, by which they are dealt to the processes.
        classifier: Name of the classifier.
        name: Name of the attack.
        attack: What is run.
        task: What is attacked.
        clean: The inputs themselves, judged.
        steps: What is done already.
    """

    number: int
    classifier: str
    name: str
    attack: Attack
    task: Task
    clean: Judged
    steps: Checkpoint

    def run(self, eps: list[float], bar: tqdm) -> AttackRun:
        """Run the attack at every eps, or judge what it has found already."""
        bar.set_description(self.classifier)
        return run_attack(self.task, self.name, self.attack, eps, self.clean, self.steps, bar)


def run_units(
    units: Sequence[Unit], eps: list[float], processes: Processes, progress: bool
) -> dict[str, dict[str, AttackRun]]:
    """Run the units of this process, and judge what the others have found.

    Args:
        units: All units, in the same order in every process.
        eps: Perturbation sizes.
        processes: Those that share the work.
        progress: Whether to show a progress bar.

    Returns:
        Runs by classifier and attack.
    """
    own = [unit for unit in units if processes.mine(unit.number)]
    found: dict[int, AttackRun] = {}
    with tqdm(total=len(eps) * len(own), unit="step", disable=not progress) as bar:
        for unit in own:
            found[unit.number] = unit.run(eps, bar)
    processes.wait()
    silent = tqdm(disable=True)
    for unit in units:
        names = step_names(unit.attack, eps)
        unit.steps.share(processes, processes.owner(unit.number), names, unit.task.inputs)
        if unit.number not in found:
            found[unit.number] = unit.run(eps, silent)
    runs: dict[str, dict[str, AttackRun]] = {}
    for unit in units:
        runs.setdefault(unit.classifier, {})[unit.name] = found[unit.number]
    return runs


def fingerprint(
    task: Task, model: Callable[[Tensor], Tensor], init_inputs: Tensor | None
) -> dict[str, Any]:
    """Collect what the points of every attack depend on, as JSON values."""
    tensors = {"inputs": task.inputs, "labels": task.labels}
    if init_inputs is not None:
        tensors["init_inputs"] = init_inputs
    return {
        "tensors": digest(tensors),
        "norm": task.norm,
        "bounds": task.bounds,
        "reject": task.reject,
        "torchdnr": version("torchdnr"),
        "model": [type(model).__qualname__, digest(model.state_dict())]
        if isinstance(model, nn.Module)
        else None,
    }


def behaviour(task: Task) -> Tensor:
    """Run the model on the inputs and on noise around them, to know it again.

    The noise tells apart models that agree on clean images only, such as one that quantises.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(task.inputs.shape, generator=generator).to(task.inputs)
    noisy = (task.inputs + 0.1 * (task.bounds[1] - task.bounds[0]) * noise).clamp(*task.bounds)
    return outputs(task.model, torch.cat([task.inputs, noisy]), task.batch_size)
