"""Security evaluation: the accuracy of a classifier against perturbations of growing size."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchdnr.attacks.checks import check_inputs, check_like
from torchdnr.attacks.objectives import decision_objective
from torchdnr.attacks.target import Target, check_classes
from torchdnr.decisions import check_images, evaluation_mode, has_reject_column
from torchdnr.distributed.processes import ALONE, Processes
from torchdnr.evaluation.checkpoint import Checkpoint, attack_paths
from torchdnr.evaluation.curve import SecurityCurve
from torchdnr.evaluation.environment import describe_environment
from torchdnr.evaluation.judging import CountedModel, Judged, Task, judge, worse
from torchdnr.evaluation.line_up import Attack, default_line_up
from torchdnr.evaluation.running import (
    AttackRun,
    Unit,
    behaviour,
    fingerprint,
    run_units,
    what_happened,
)


def security_evaluation(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    labels: Tensor,
    eps: Sequence[float],
    *,
    norm: float = 2,
    attacks: Mapping[str, Attack] | None = None,
    init_inputs: Tensor | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    batch_size: int = 256,
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
    bounds: tuple[float, float] = (0.0, 1.0),
    batch_size: int = 256,
    reject: bool | None = None,
    settings: Mapping[str, Any] | None = None,
    checkpoints: Mapping[str, str | Path] | None = None,
    processes: Processes = ALONE,
    progress: bool = True,
) -> dict[str, SecurityCurve]:
    """Attack several classifiers at every ``eps`` with a line-up of attacks; keep the worst case.

    The worst case is taken per sample, over the attacks and over all smaller ``eps``: a point
    that evades stays inside every larger ball, so the accuracy never rises again for ``eps > 0``.
    A sample evades if it is accepted and wrong; one that is rejected is attacked further.
    At ``eps = 0`` the inputs are evaluated as they are.

    Each attack on each classifier is a unit of work. Several processes take them in turn, and all
    return the same results: those that one process finds, as no unit depends on another.

    Args:
        models: Classifiers by name, each from ``(n, ...)`` to scores ``(n, c)``, or ``(n, c + 1)``
            with theta in the last column. A module is put into evaluation mode and left as found.
        inputs: Clean inputs within ``bounds``, ``(n, ...)``.
        labels: True labels 0..c-1, int64 ``(n,)``.
        eps: Perturbation sizes, >= 0 and increasing.
        norm: Norm of the perturbation; 1, 2 or infinity.
        attacks: Line-up by name; None: ``default_line_up``.
        init_inputs: Inputs from which the default attacks may start on the far side, best many of
            every class; None: the inputs themselves.
        bounds: Smallest and largest value of an input.
        batch_size: Inputs per batch.
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
    eps = _checked_eps(eps)
    check_inputs(inputs, labels, norm, bounds)
    if init_inputs is not None:
        check_images("init_inputs", init_inputs, bounds)
        check_like("init_inputs", init_inputs, inputs)
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    shared = {"norm": norm, "bounds": bounds, "batch_size": batch_size}
    pool = inputs if init_inputs is None else init_inputs
    units: list[Unit] = []
    left_out: dict[str, list[str]] = {}
    clean: dict[str, tuple[Task, Judged]] = {}
    with ExitStack() as stack:
        for name, model in models.items():
            options = {**shared, "reject": has_reject_column(model, reject)}
            line_up = attacks
            if line_up is None:
                line_up = default_line_up(pool, progress=progress, **options)
            left_out[name] = [key for key, attack in line_up.items() if not attack.fits(model)]
            line_up = {key: attack for key, attack in line_up.items() if attack.fits(model)}
            if not line_up:
                raise ValueError(f"attacks is empty for {name}: give one, or None for the default")
            task = Task(CountedModel(model), inputs, labels, **options)
            stack.enter_context(evaluation_mode(model))
            target = Target(task.model, decision_objective, task.reject, batch_size)
            check_classes(target, inputs, labels)
            clean[name] = task, judge(task, inputs)
            known = fingerprint(task, model, init_inputs)
            paths = attack_paths((checkpoints or {}).get(name), line_up)
            for key, attack in line_up.items():
                number = len(units)
                path = paths[key] if processes.mine(number) else None
                own = {"attack": attack.settings, **attack.fingerprint}
                own |= {} if attack.minimum_norm else {"eps": eps}  # each goes on from the last
                steps = Checkpoint(path, known | own, behaviour(task))
                units.append(Unit(number, name, key, attack, task, clean[name][1], steps))
        runs = run_units(units, eps, processes, progress)
    return {
        name: SecurityCurve(
            name=name,
            norm=float(norm),
            rejects=task.reject,
            settings={
                **shared,
                "bounds": list(bounds),
                "reject": task.reject,
                "samples": len(inputs),
                "init_inputs": None if init_inputs is None else len(init_inputs),
                "left_out": left_out[name],
                **(settings or {}),
            },
            environment=describe_environment(inputs.device),
            **_combine(task, eps, judged, runs[name]),
        )
        for name, (task, judged) in clean.items()
    }


def _checked_eps(eps: Sequence[float]) -> list[float]:
    eps = [float(value) for value in eps]
    increasing = all(one < two for one, two in pairwise(eps))
    if not eps or not increasing or not all(0 <= value < math.inf for value in eps):
        raise ValueError(f"eps must be finite, >= 0 and increasing, got {eps}: sort it")
    return eps


def _combine(
    task: Task, eps: list[float], clean: Judged, runs: Mapping[str, AttackRun]
) -> dict[str, Any]:
    """Take the worst case per sample over the attacks, and over the smaller eps."""
    worst, judged = clean, []
    for index, value in enumerate(eps):
        if value > 0:
            for run in runs.values():
                worst = worse(task, worst, run.judged[index])
        judged.append(worst)
    norms = [run.evasion_norm for run in runs.values()]
    return {
        **what_happened(task, eps, judged),
        "evasion_norm": torch.stack(norms).amin(dim=0).cpu(),
        "attacks": {name: run.curve for name, run in runs.items()},
        "seconds": sum(sum(run.curve.seconds) for run in runs.values()),
        "adversarial": torch.stack([entry.points for entry in judged]),
    }
