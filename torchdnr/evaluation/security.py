"""Security evaluation: the accuracy of a classifier against perturbations of growing size."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from torchdnr import __version__
from torchdnr.attacks.checks import check_inputs, check_like
from torchdnr.attacks.objectives import decision_objective
from torchdnr.attacks.target import Target, check_classes, has_reject_column, left_as_found
from torchdnr.evaluation.checkpoint import Checkpoint
from torchdnr.evaluation.curve import SecurityCurve
from torchdnr.evaluation.environment import describe_environment
from torchdnr.evaluation.judging import CountedModel, Judged, Task, judge, outputs, worse
from torchdnr.evaluation.line_up import Attack, default_line_up
from torchdnr.evaluation.running import AttackRun, run_attack, what_happened
from torchdnr.files import digest
from torchdnr.inputs import check_images


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
    progress: bool = True,
) -> SecurityCurve:
    """Attack a classifier at every ``eps`` with a line-up of attacks, and keep the worst case.

    The worst case is taken per sample, over the attacks and over all smaller ``eps``: a point
    that evades stays inside every larger ball, so the accuracy never rises again for ``eps > 0``.
    A sample evades if it is accepted and wrong; one that is rejected is attacked further.
    At ``eps = 0`` the inputs are evaluated as they are.

    Args:
        model: Maps ``(n, ...)`` to scores ``(n, c)``, or ``(n, c + 1)`` with theta in the last
            column. A module is put into evaluation mode and left as it was found.
        inputs: Clean inputs within ``bounds``, ``(n, ...)``.
        labels: True labels 0..c-1, int64 ``(n,)``.
        eps: Perturbation sizes, >= 0 and increasing.
        norm: Norm of the perturbation; 2.
        attacks: Line-up by name; None: ``default_line_up``.
        init_inputs: Inputs from which the default attacks may start on the far side, best many of
            every class; None: the inputs themselves.
        bounds: Smallest and largest value of an input.
        batch_size: Inputs per batch.
        reject: Whether the last column of the output is theta; None: yes if the model has a
            ``reject_index`` that is not None.
        name: Name of the classifier.
        settings: What else to store with the result: seed, data set, layers, ...
        checkpoint: File that keeps the points of each finished step. A run that was stopped goes
            on there; a file of another evaluation is moved aside with a warning.
        progress: Whether to show progress bars.

    Returns:
        ``SecurityCurve``: worst case and each attack alone.

    Raises:
        ValueError: If an argument is not as described, or the model or an attack returns NaN.
        OSError: If the checkpoint cannot be written.

    Source: Sotgiu et al., Sec. IV-A, "Security Evaluation".
    """
    eps = _checked_eps(eps)
    check_inputs(inputs, labels, norm, bounds)
    if init_inputs is not None:
        check_images("init_inputs", init_inputs, bounds)
        check_like("init_inputs", init_inputs, inputs)
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    reject = has_reject_column(model, reject)
    options = {"norm": norm, "bounds": bounds, "batch_size": batch_size, "reject": reject}
    if attacks is None:
        pool = inputs if init_inputs is None else init_inputs
        attacks = default_line_up(pool, progress=progress, **options)
    if not attacks:
        raise ValueError("attacks is empty: give at least one attack, or None for the default")
    task = Task(CountedModel(model), inputs, labels, **options)
    tensors = {"inputs": inputs, "labels": labels}
    if init_inputs is not None:
        tensors["init_inputs"] = init_inputs
    fingerprint = {
        "tensors": digest(tensors),
        "eps": eps,
        "norm": norm,
        "bounds": bounds,
        "reject": reject,
        "torchdnr": __version__,
        "model": [type(model).__qualname__, digest(model.state_dict())]
        if isinstance(model, nn.Module)
        else None,
        "attacks": {key: attack.settings for key, attack in attacks.items()},
    }
    with left_as_found(model):
        check_classes(Target(task.model, decision_objective, reject, batch_size), inputs, labels)
        clean = judge(task, inputs)
        steps = Checkpoint(checkpoint, fingerprint, _behaviour(task))
        bar = tqdm(total=len(eps) * len(attacks), desc=name, unit="step", disable=not progress)
        with bar:
            runs = {
                key: run_attack(task, key, attack, eps, clean, steps, bar)
                for key, attack in attacks.items()
            }
    return SecurityCurve(
        name=name,
        norm=float(norm),
        rejects=reject,
        settings={
            **options,
            "bounds": list(bounds),
            "samples": len(inputs),
            "init_inputs": None if init_inputs is None else len(init_inputs),
            **(settings or {}),
        },
        environment=describe_environment(inputs.device),
        **_combine(task, eps, clean, runs),
    )


def _behaviour(task: Task) -> Tensor:
    """Run the model on the inputs and on noise around them, to know it again.

    The noise tells apart models that agree on clean images only, such as one that quantises.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(task.inputs.shape, generator=generator).to(task.inputs)
    noisy = (task.inputs + 0.1 * (task.bounds[1] - task.bounds[0]) * noise).clamp(*task.bounds)
    return outputs(task.model, torch.cat([task.inputs, noisy]), task.batch_size)


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
