"""The result of attacks on a classifier: all points are judged, and the worst of them counts."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchdnr.evaluation.cascade import keep_nearer, none_kept, step_at
from torchdnr.evaluation.checkpoint import Step
from torchdnr.evaluation.curve import (
    PER_EPS,
    AttackCurve,
    Predictions,
    Refinement,
    SecurityCurve,
)
from torchdnr.evaluation.environment import describe_environment
from torchdnr.evaluation.judging import Judged, Task, judge, worse
from torchdnr.evaluation.shares import Attacked


def worst_case(attacked: Attacked, steps: Mapping[str, Step]) -> SecurityCurve:
    """Take the worst case per sample over the attacks, and over the smaller eps."""
    task, eps, clean = attacked.task, attacked.eps, attacked.clean
    nearest, worst = keep_nearer(task, none_kept(task), clean), [clean] * len(eps)
    attacks: dict[str, AttackCurve] = {}
    refinements: dict[str, Refinement] = {}
    for name, attack in attacked.line_up.items():
        judged: list[Judged] = []
        for value in eps:
            judged.append(judge(task, _points(task, name, value, steps)) if value > 0 else clean)
        once = [judge(task, steps[name].points.to(task.inputs))] if name in steps else []
        for entry in (*once, *judged):
            nearest = keep_nearer(task, nearest, entry)
        worst = [worse(task, old, new) for old, new in zip(worst, judged, strict=True)]
        costs: dict[str, Any] = _costs(name, eps, steps)
        settings = dict(attack.settings)
        if name in attacked.refines:
            refinements[name] = Refinement(
                **{key: sum(values) for key, values in costs.items()}, settings=settings
            )
        else:
            attacks[name] = AttackCurve(
                **_predictions(task, eps, judged),
                minimum_norm=attack.minimum_norm,
                **{key: costs[key] for key in PER_EPS},
                settings=settings,
            )
    for index, value in enumerate(eps):
        if index and value > 0:
            worst[index] = worse(task, worst[index - 1], worst[index])
    rounded = [judge(task, _as_image(task, entry.points)) for entry in worst]
    return SecurityCurve(
        **_predictions(task, eps, worst),
        name=attacked.name,
        norm=float(task.norm),
        rejects=task.reject,
        attacks=attacks,
        evasion_norm=nearest.norms,
        settings=attacked.settings,
        environment=describe_environment(task.inputs.device),
        seconds=sum(step.cost["seconds"] for step in steps.values()),
        adversarial=torch.stack([entry.points for entry in worst]),
        nearest=nearest.points,
        rounded=Predictions(**_predictions(task, eps, rounded)),
        refinements=refinements,
    )


def _points(task: Task, name: str, eps: float, steps: Mapping[str, Step]) -> Tensor:
    """Return the points of an attack at one eps: projected, if it has run once for all."""
    if name in steps:
        return task.inside(steps[name].points.to(task.inputs), eps)
    return steps[step_at(name, eps)].points.to(task.inputs)


def _costs(name: str, eps: list[float], steps: Mapping[str, Step]) -> dict[str, list[Any]]:
    """Collect the costs of an attack, one per eps; those of a single run at the first > 0."""
    costs: dict[str, list[Any]] = {key: [] for key in (*PER_EPS, "tried", "nearer")}
    first = next((value for value in eps if value > 0), None)
    for value in eps:
        step = steps.get(step_at(name, value), steps.get(name) if value == first else None)
        for key, values in costs.items():
            nothing = 0.0 if key == "seconds" else 0
            values.append(nothing if step is None else step.cost.get(key, nothing))
    return costs


def _as_image(task: Task, points: Tensor) -> Tensor:
    """Round points to the 256 levels of an image file."""
    low, high = task.bounds
    level = ((points.to(task.inputs) - low) / (high - low) * 255).round()
    return low + (high - low) * (level / 255)


def _predictions(task: Task, eps: list[float], judged: list[Judged]) -> dict[str, Any]:
    """Collect the fields of ``Predictions``."""
    return {
        "eps": eps,
        "labels": task.labels.to("cpu", copy=True),
        "predictions": torch.stack([entry.predictions for entry in judged]).cpu(),
        "mean_norm": [entry.size.mean().item() for entry in judged],
        "targets": None
        if task.targets is None
        else torch.as_tensor(task.targets).expand(len(task.labels)).cpu(),
    }
