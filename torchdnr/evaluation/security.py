"""Security evaluation: the accuracy of a classifier against perturbations of growing size."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, Unpack

from torch import Tensor

from torchdnr.arrays import as_features
from torchdnr.attacks.checks import (
    check_pool,
)
from torchdnr.decisions import evaluation_mode, has_reject_column
from torchdnr.distributed.processes import ALONE, Processes
from torchdnr.evaluation.cascade import refining
from torchdnr.evaluation.curve import SecurityCurve
from torchdnr.evaluation.estimate import Meter, in_words
from torchdnr.evaluation.judging import check_outputs, checked_task, increasing, judge
from torchdnr.evaluation.line_up import Attack, default_line_up
from torchdnr.evaluation.shares import Attacked, deal, gather
from torchdnr.evaluation.worst_case import worst_case


class EvaluationOptions(TypedDict, total=False):
    """Options of ``security_evaluations``, which documents them, that do not go by classifier."""

    norm: float
    attacks: Mapping[str, Attack] | None
    every_eps: bool
    init_inputs: Tensor | None
    mask: Tensor | None
    targets: int | Tensor | None
    levels: int | None
    bounds: tuple[float, float]
    batch_size: int | None
    reject: bool | None
    settings: Mapping[str, Any] | None
    processes: Processes
    progress: bool
    say: Callable[[str], object] | None


def security_evaluation(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    labels: Tensor,
    eps: Sequence[float],
    *,
    name: str | None = None,
    checkpoint: str | Path | None = None,
    **options: Unpack[EvaluationOptions],
) -> SecurityCurve:
    """Attack one classifier: ``security_evaluations`` for one model, with the same options.

    Returns:
        ``SecurityCurve``: the worst case, and each attack that serves every eps alone.
    """
    key = name or "classifier"
    checkpoints = None if checkpoint is None else {key: checkpoint}
    models = {key: model}
    curves = security_evaluations(models, inputs, labels, eps, checkpoints=checkpoints, **options)
    curves[key].name = name
    return curves[key]


def security_evaluations(
    models: Mapping[str, Callable[[Tensor], Tensor]],
    inputs: Tensor,
    labels: Tensor,
    eps: Sequence[float],
    *,
    norm: float = 2,
    attacks: Mapping[str, Attack] | None = None,
    every_eps: bool = False,
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
    say: Callable[[str], object] | None = None,
) -> dict[str, SecurityCurve]:
    """Attack classifiers with a line-up of attacks; keep the worst case at every ``eps``.

    The worst case is taken per sample, over the attacks and over all smaller ``eps``: a point
    that evades stays inside every larger ball, so the accuracy never rises again for ``eps > 0``.
    A sample evades if it is accepted and wrong; one that is rejected is attacked further.
    At ``eps = 0`` the inputs are evaluated as they are.

    The line-up is a cascade. Minimum-norm attacks run once, for all eps. Some, as the paper's, run
    at every eps. All others are then tried only where they add something: per sample just below
    the smallest norm that evades it so far, lower while they succeed, and where none evades, at the
    largest eps and, while they succeed, at the smaller ones.

    The samples are dealt to the processes in shares that depend on their number alone. All
    processes return the same results, those that a single one has.

    Args:
        models: Classifiers by name, each from ``(n, ...)`` to scores ``(n, c)``, or ``(n, c + 1)``
            with theta in the last column. A module is put into evaluation mode and back.
        inputs: Clean inputs within ``bounds``, ``(n, ...)``.
        labels: True labels 0..c-1, int64 ``(n,)``.
        eps: Perturbation sizes, >= 0 and increasing.
        norm: Norm of the perturbation; 1, 2 or infinity.
        attacks: Line-up by name; None: ``default_line_up``.
        every_eps: Whether every attack but the minimum-norm ones runs at every eps, so that each
            has a curve of its own; takes longer, and finds hardly more. Without a minimum-norm
            attack they do in any case.
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
            each finished step, one file per share of the samples. A run that was stopped goes on
            there; a file of another evaluation is moved aside with a warning.
        processes: Those that share the work, from ``processes.joined``; all must call this with
            the same arguments.
        progress: Whether to show a progress bar.
        say: Is told in a sentence, before the attacks start, about how long they will take.

    Returns:
        ``SecurityCurve`` by name: the worst case, and each attack that serves every eps alone.

    Raises:
        ValueError: If an argument is not as described, or a model or an attack returns NaN.
        OSError: If a checkpoint cannot be written.
        PeerError: If another of the processes has ended.

    Source: Sotgiu et al., Sec. IV-A, "Security Evaluation".
    """
    eps = increasing("eps", eps, "finite, >= 0", lambda value: 0 <= value < math.inf)
    if not models:
        return {}
    task = checked_task(
        next(iter(models.values())),
        inputs,
        labels,
        norm=norm,
        bounds=bounds,
        batch_size=batch_size,
        reject=reject,
        mask=mask,
        targets=targets,
        levels=levels,
    )
    inputs, labels, batch_size = task.inputs, task.labels, task.batch_size
    if init_inputs is not None:
        init_inputs = as_features("init_inputs", init_inputs, inputs)
        check_pool(init_inputs, None, inputs, bounds)
    attacked = []
    with ExitStack() as stack:
        for name, model in models.items():
            stack.enter_context(evaluation_mode(model))
            rejects = has_reject_column(model, reject)
            task = replace(task, model=model, reject=rejects)
            check_outputs(task)
            candidates = attacks
            if candidates is None:
                candidates = default_line_up(
                    inputs if init_inputs is None else init_inputs,
                    norm=norm,
                    bounds=bounds,
                    batch_size=batch_size,
                    reject=rejects,
                )
            line_up = {key: attack for key, attack in candidates.items() if attack.fits(model)}
            if not line_up:
                raise ValueError(f"attacks is empty for {name}: give one, or None for the default")
            about = {
                "norm": norm,
                "bounds": list(bounds),
                "batch_size": batch_size,
                "reject": rejects,
                **task.about,
                "samples": len(inputs),
                "init_inputs": None if init_inputs is None else len(init_inputs),
                "every_eps": every_eps,
                "left_out": [key for key in candidates if key not in line_up],
                **(settings or {}),
            }
            path, clean = (checkpoints or {}).get(name), judge(task, inputs)
            refines = refining(line_up, every_eps)
            attacked.append(Attacked(name, task, clean, line_up, refines, eps, about, path))
        cascades = deal(attacked, processes)
        with Meter(progress) as meter:
            if say is not None or meter.shown:
                for one, parts in zip(attacked, cascades, strict=True):
                    meter.announce(one.name, parts.values())
                # Each knows of its own shares: all take as long as the one that has most to do.
                seconds = max(processes.numbers(round(meter.seconds))) if say is not None else 0
                if say is not None and seconds:
                    say(f"the attacks take {in_words(seconds)}")
            for one, parts in zip(attacked, cascades, strict=True):
                for cascade in parts.values():
                    cascade.run(partial(meter.finish, one.name))
        steps = gather(attacked, cascades, processes)
        return {
            one.name: worst_case(one, its_steps)
            for one, its_steps in zip(attacked, steps, strict=True)
        }
