"""Security evaluation: the accuracy of a classifier against perturbations of growing size."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from torchdnr.arrays import as_features
from torchdnr.attacks.checks import (
    as_targets,
    check_count,
    check_levels,
    check_mask,
    check_pool,
    check_targets,
    checked_inputs,
)
from torchdnr.attacks.objectives import decision_objective
from torchdnr.attacks.target import Target, check_classes
from torchdnr.decisions import evaluation_mode, has_reject_column
from torchdnr.distributed.processes import ALONE, Processes
from torchdnr.evaluation.checkpoint import Checkpoint, attack_paths, behaviour, fingerprint
from torchdnr.evaluation.curve import PER_EPS, AttackCurve, Predictions, SecurityCurve
from torchdnr.evaluation.environment import describe_environment
from torchdnr.evaluation.judging import (
    CountedModel,
    Judged,
    Task,
    checked_points,
    increasing,
    judge,
    keep_inside,
    worse,
)
from torchdnr.evaluation.line_up import Attack, default_line_up
from torchdnr.resources import default_batch_size, progress_bar, synchronize


def security_evaluation(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    labels: Tensor,
    eps: Sequence[float],
    *,
    norm: float = 2,
    attacks: Mapping[str, Attack] | None = None,
    init_inputs: Tensor | None = None,
    mask: Tensor | None = None,
    targets: int | Tensor | None = None,
    levels: int | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    batch_size: int | None = None,
    reject: bool | None = None,
    name: str | None = None,
    settings: Mapping[str, Any] | None = None,
    checkpoint: str | Path | None = None,
    processes: Processes = ALONE,
    progress: bool = True,
) -> SecurityCurve:
    """Attack one classifier: ``security_evaluations`` for one model, with the same arguments.

    Returns:
        ``SecurityCurve``: worst case and each attack alone.
    """
    key = name or "classifier"
    curve = security_evaluations(
        {key: model},
        inputs,
        labels,
        eps,
        norm=norm,
        attacks=attacks,
        init_inputs=init_inputs,
        mask=mask,
        targets=targets,
        levels=levels,
        bounds=bounds,
        batch_size=batch_size,
        reject=reject,
        settings=settings,
        checkpoints=None if checkpoint is None else {key: checkpoint},
        processes=processes,
        progress=progress,
    )[key]
    curve.name = name
    return curve


def security_evaluations(
    models: Mapping[str, Callable[[Tensor], Tensor]],
    inputs: Tensor,
    labels: Tensor,
    eps: Sequence[float],
    *,
    norm: float = 2,
    attacks: Mapping[str, Attack] | None = None,
    init_inputs: Tensor | None = None,
    mask: Tensor | None = None,
    targets: int | Tensor | None = None,
    levels: int | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    batch_size: int | None = None,
    reject: bool | None = None,
    settings: Mapping[str, Any] | None = None,
    checkpoints: Mapping[str, str | Path] | None = None,
    processes: Processes = ALONE,
    progress: bool = True,
) -> dict[str, SecurityCurve]:
    """Attack classifiers at every ``eps`` with a line-up of attacks; keep the worst case.

    The worst case is taken per sample, over the attacks and over all smaller ``eps``: a point
    that evades stays inside every larger ball, so the accuracy never rises again for ``eps > 0``.
    A sample evades if it is accepted and wrong; one that is rejected is attacked further.
    At ``eps = 0`` the inputs are evaluated as they are.

    Processes share the work, one attack on one classifier each in turn. All return the same
    results, those that a single process has, as no attack depends on another.

    Args:
        models: Classifiers by name, each from ``(n, ...)`` to scores ``(n, c)``, or ``(n, c + 1)``
            with theta in the last column. A module is put into evaluation mode and back.
        inputs: Clean inputs within ``bounds``, ``(n, ...)``.
        labels: True labels 0..c-1, int64 ``(n,)``.
        eps: Perturbation sizes, >= 0 and increasing.
        norm: Norm of the perturbation; 1, 2 or infinity.
        attacks: Line-up by name; None: ``default_line_up``.
        init_inputs: Inputs from which the default attacks may start on the far side, best many of
            every class; None: the inputs themselves.
        mask: What of each input may change, bool or 0 and 1, like one input or all, or broadcast
            to them; None: everything.
        targets: Class wanted, one for all or ``(n,)``: an evasion is then to be accepted as it,
            and the rates count that. Inputs of that class are not attacked. None: any wrong class.
        levels: Levels of a pixel, 256 for images of 8 bits: the attacks look for points on them.
            In any case ``SecurityCurve.rounded`` tells what rounding to 8 bits leaves.
        bounds: Smallest and largest value of an input.
        batch_size: Inputs per batch; None: as many as suits their size.
        reject: Whether the last column of the outputs is theta; None: yes for a model that has a
            ``reject_index`` that is not None.
        settings: What else to store with the results: seed, data set, layers, ...
        checkpoints: Per classifier the beginning of the names of the files that keep the points of
            each finished step, one file per attack. A run that was stopped goes on there; a file
            of another evaluation is moved aside with a warning.
        processes: Those that share the work, from ``processes.joined``; all must call this with
            the same arguments.
        progress: Whether to show a progress bar.

    Returns:
        ``SecurityCurve`` by name: worst case and each attack alone.

    Raises:
        ValueError: If an argument is not as described, or a model or an attack returns NaN.
        OSError: If a checkpoint cannot be written.
        PeerError: If another of the processes has ended.

    Source: Sotgiu et al., Sec. IV-A, "Security Evaluation".
    """
    eps = increasing("eps", eps, "finite, >= 0", lambda value: 0 <= value < math.inf)
    inputs, labels = checked_inputs(inputs, labels, norm, bounds, next(iter(models.values()), None))
    if init_inputs is not None:
        init_inputs = as_features("init_inputs", init_inputs, inputs)
        check_pool(init_inputs, None, inputs, bounds)
    batch_size = default_batch_size(inputs) if batch_size is None else batch_size
    check_count("batch_size", batch_size, 1)
    targets = as_targets(targets, inputs.device)
    classes = check_targets(targets, labels)
    check_levels(levels, inputs, bounds)
    mask = check_mask(mask, inputs)
    jobs: list[_Job] = []
    settings_of: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        for name, model in models.items():
            stack.enter_context(evaluation_mode(model))
            rejects = has_reject_column(model, reject)
            counted = CountedModel(model)
            given = mask, targets, levels
            task = Task(counted, inputs, labels, norm, bounds, batch_size, rejects, *given)
            candidates = attacks
            if candidates is None:
                candidates = default_line_up(
                    inputs if init_inputs is None else init_inputs,
                    norm=norm,
                    bounds=bounds,
                    batch_size=batch_size,
                    reject=rejects,
                    progress=progress,
                )
            line_up = {key: attack for key, attack in candidates.items() if attack.fits(model)}
            if not line_up:
                raise ValueError(f"attacks is empty for {name}: give one, or None for the default")
            settings_of[name] = {
                "norm": norm,
                "bounds": list(bounds),
                "batch_size": batch_size,
                "reject": rejects,
                "levels": levels,
                "masked": mask is not None,
                "targeted": targets is not None,
                "samples": len(inputs),
                "init_inputs": None if init_inputs is None else len(init_inputs),
                "left_out": [key for key in candidates if key not in line_up],
                **(settings or {}),
            }
            target = Target(counted, decision_objective, rejects, batch_size)
            check_classes(target, inputs, labels)
            if classes is not None:
                check_classes(target, inputs, classes)
            clean, output = judge(task, inputs), behaviour(task)
            known = fingerprint(task, model, init_inputs)
            paths = attack_paths((checkpoints or {}).get(name), line_up)
            for key, attack in line_up.items():
                path = paths[key] if processes.mine(len(jobs)) else None
                depends = {**known, "attack": attack.settings, **attack.fingerprint}
                depends |= {} if attack.minimum_norm else {"eps": eps}  # each goes on from the last
                steps = Checkpoint(path, depends, output)
                jobs.append(_Job(name, key, attack, task, counted, clean, steps))
        results: dict[int, _Result] = {}
        mine = [number for number in range(len(jobs)) if processes.mine(number)]
        with progress_bar(progress, total=len(eps) * len(mine), unit="step") as bar:
            for number in mine:
                results[number] = _attack_at_every_eps(jobs[number], eps, bar)
        processes.wait()
        for number, job in enumerate(jobs):
            job.steps.share(processes, processes.owner(number), _steps(job.attack, eps), inputs)
            if number not in results:  # another process ran it: only judged here
                results[number] = _attack_at_every_eps(job, eps, progress_bar(False))
    return {
        name: _worst_case(
            eps,
            [(job, results[i]) for i, job in enumerate(jobs) if job.classifier == name],
            content,
        )
        for name, content in settings_of.items()
    }


@dataclass(frozen=True, eq=False)
class _Job:
    """One attack on one classifier."""

    classifier: str  # its name
    name: str  # of the attack
    attack: Attack
    task: Task
    model: CountedModel  # that of the task
    clean: Judged  # the inputs themselves
    steps: Checkpoint  # points and costs of the steps that are done


class _Result(NamedTuple):
    """One attack over all eps: its curve, its points, and the smallest norms that evade."""

    curve: AttackCurve
    judged: list[Judged]
    evasion_norm: Tensor


def _attack_at_every_eps(job: _Job, eps: list[float], bar: tqdm) -> _Result:
    """Run one attack at every eps, from the points of the previous eps.

    Steps that the checkpoint holds are judged, not run again. A minimum-norm attack runs once, and
    its points are projected on every ball.

    A point that evades stays inside every larger ball: at the next eps only samples that do not
    evade yet are attacked. Neither accuracy nor rejection rate depends on that; the time does.
    """
    task, attack, steps = job.task, job.attack, job.steps
    device = task.inputs.device
    bar.set_description(job.classifier)
    judged: list[Judged] = []
    costs: list[dict[str, Any]] = []
    norms = [_evasion_norm(task, job.clean)]
    last, nearest = job.clean, None  # nearest: points of a minimum-norm attack
    for value in eps:
        bar.set_postfix_str(f"{job.name}, eps {value:g}")
        costs.append({"seconds": 0.0, "forwards": 0, "backwards": 0, "violations": 0})
        if value > 0 and nearest is None:
            size = math.inf if attack.minimum_norm else value
            step, points = f"eps {size}", last.points.to(device)
            if step not in steps.points:
                before = _spent(job)
                wanted = ~task.succeeds(last.predictions) | attack.minimum_norm
                rows = wanted.nonzero()[:, 0]
                if len(rows):
                    inputs, labels = task.inputs[rows], task.labels[rows]
                    at = task.model, inputs, labels, size, points[rows]
                    new = attack.run(*at, **task.given(rows))
                    points = points.index_copy(0, rows, checked_points(new, inputs, job.name))
                after = _spent(job)
                steps.add(step, points, {key: after[key] - before[key] for key in before})
            points, violations = keep_inside(task, steps.points[step].to(device), size, job.name)
            costs[-1] |= {**steps.costs[step], "violations": violations}
            if attack.minimum_norm:
                nearest = points
                norms.append(_evasion_norm(task, judge(task, nearest)))
        if value > 0:
            if nearest is not None:
                points = task.inside(nearest, value)
            last = judge(task, points)
        judged.append(last)
        norms.append(_evasion_norm(task, last))
        bar.update()
    per_eps: dict[str, Any] = {key: [cost[key] for cost in costs] for key in PER_EPS}
    curve = AttackCurve(
        **_predictions(task, eps, judged),
        minimum_norm=attack.minimum_norm,
        **per_eps,
        settings=dict(attack.settings),
    )
    return _Result(curve, judged, torch.stack(norms).amin(dim=0))


def _steps(attack: Attack, eps: list[float]) -> list[str]:
    """Name the steps that an attack takes over all eps, as its checkpoint does."""
    sizes = [value for value in eps if value > 0]
    return [f"eps {size}" for size in ([math.inf] if attack.minimum_norm and sizes else sizes)]


def _spent(job: _Job) -> dict[str, float]:
    """Return the time, and the input rows that the model has seen so far."""
    synchronize(job.task.inputs.device)  # kernels run on after their call
    rows = {"forwards": job.model.forwards, "backwards": job.model.backwards}
    return {"seconds": time.perf_counter(), **rows}


def _evasion_norm(task: Task, judged: Judged) -> Tensor:
    """Return the norm of each perturbation that evades, infinite elsewhere."""
    evades = task.succeeds(judged.predictions).to(judged.size.device)
    return judged.size.masked_fill(~evades, math.inf)


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


def _worst_case(
    eps: list[float], attacks: list[tuple[_Job, _Result]], settings: dict[str, Any]
) -> SecurityCurve:
    """Take the worst case per sample over the attacks on a classifier, and over the smaller eps."""
    job, results = attacks[0][0], [result for _, result in attacks]
    worst, judged = job.clean, []
    for index, value in enumerate(eps):
        if value > 0:
            for result in results:
                worst = worse(job.task, worst, result.judged[index])
        judged.append(worst)
    rounded = [judge(job.task, _as_image(job.task, entry.points)) for entry in judged]
    return SecurityCurve(
        **_predictions(job.task, eps, judged),
        rounded=Predictions(**_predictions(job.task, eps, rounded)),
        name=job.classifier,
        norm=float(job.task.norm),
        rejects=job.task.reject,
        attacks={job.name: result.curve for job, result in attacks},
        evasion_norm=torch.stack([result.evasion_norm for result in results]).amin(dim=0).cpu(),
        settings=settings,
        environment=describe_environment(job.task.inputs.device),
        seconds=sum(sum(result.curve.seconds) for result in results),
        adversarial=torch.stack([entry.points for entry in judged]),
    )
