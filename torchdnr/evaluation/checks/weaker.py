"""Attacks that ought to be weaker than the evaluation, on the samples that it did not evade.

One step, noise, queries, transfer, attacks that ignore rejection or know a part of the defence
only. If one evades a sample, the evaluation is not the worst case; most often gradients are masked.
"""

from functools import partial
from math import ceil
from typing import Any

import torch
from torch import Tensor

from torchdnr.attacks.directions import steepest
from torchdnr.attacks.noise import noise
from torchdnr.attacks.pgd import pgd
from torchdnr.attacks.projections import per_row
from torchdnr.attacks.square import square
from torchdnr.attacks.target import Target, slope_at
from torchdnr.attacks.transfer import transfer
from torchdnr.decisions import evades
from torchdnr.evaluation.checks.context import (
    SMALL_DROP,
    Context,
    Model,
    drop_status,
    evades_at,
    missed_evasions,
)
from torchdnr.evaluation.checks.model import SHARE_VANISHED, TINY
from torchdnr.evaluation.checks.result import CannotRun, Finding
from torchdnr.evaluation.judging import outputs

STEPS = (1.0, 0.5, 0.25, 0.125)  # lengths of the single step, relative to eps
_STRONGER = "Strengthen the attacks of the evaluation: more steps, restarts, other objectives"


def check_single_step(context: Context) -> Finding:
    """Take one step along the gradient, of four lengths, for two objectives.

    Source: Carlini et al., "On evaluating adversarial robustness" (iterative attacks are stronger).
    """
    rows = context.unevaded()
    inputs, labels = context.inputs[rows], context.labels[rows]
    evaded = torch.zeros_like(labels, dtype=torch.bool)
    for objective in ("decision", "paper"):
        region = context.region(context.eps, rows)
        direction = slope_at(context.target(objective), inputs, labels, region.bounds).direction
        direction = per_row(region.eps, inputs) * steepest(
            direction, inputs, region.norm, region.bounds
        )
        for length in STEPS:
            evaded = evaded | evades_at(context, inputs + length * direction, rows)
    advice = f"{_STRONGER}; an iterative attack must not lose against one step."
    return missed_evasions(context, "One step along the gradient", evaded, advice)


def check_noise(context: Context) -> Finding:
    """Draw many points of each ball at random.

    Source: Carlini et al., "On evaluating adversarial robustness" (brute-force random search),
    which asks for 10,000 draws and more.
    """
    rows, draws = context.unevaded(), context.options["noise_draws"]
    copies = min(draws, max(1, context.batch_size // len(rows)))  # to fill the batches
    repeated = rows.repeat_interleave(copies)
    points = context.attack(noise, repeated, draws=ceil(draws / copies))
    evaded = evades_at(context, points, repeated).view(-1, copies).any(dim=1)
    advice = f"{_STRONGER}; gradients are masked if chance does better."
    return missed_evasions(context, f"Noise, {draws} draws each,", evaded, advice)


def check_black_box(context: Context) -> Finding:
    """Search with the scores alone, from the input: the square attack.

    Source: Andriushchenko et al., "Square attack", ECCV 2020; AutoAttack takes a success of it
    where gradient attacks fail as a sign of masked gradients.
    """
    rows, queries = context.unevaded(), context.options["queries"]
    points = context.attack(square, rows, queries=queries)
    evaded = evades_at(context, points, rows)
    advice = f"{_STRONGER}; gradients are masked if queries do better."
    return missed_evasions(context, f"The square attack, {queries} queries,", evaded, advice)


def check_transfer(context: Context) -> Finding:
    """Attack an undefended classifier and show the points, and those on the line to them.

    Source: Carlini et al., "On evaluating adversarial robustness"; Pintor et al., "Indicators of
    attack failure" (transfer failure).
    """
    if context.surrogate is None:
        raise CannotRun(
            "there is no undefended classifier to attack in its place",
            "Pass surrogate, for instance the network under the defence.",
        )
    rows = context.unevaded()
    points = context.attack(
        partial(transfer, pgd, context.surrogate),
        rows,
        steps=context.options["steps"],
        surrogate_reject=False,
    )
    evaded = evades_at(context, points, rows)
    advice = f"{_STRONGER}; start them from points made on the surrogate."
    return missed_evasions(context, "Transfer from the surrogate", evaded, advice)


def check_unaware(context: Context) -> Finding:
    """Attack the class scores alone, as if there were no rejection.

    Source: Carlini and Wagner, "Adversarial examples are not easily detected", 2017; Sotgiu et al.,
    Sec. IV.
    """
    if not context.reject:
        raise CannotRun("the model does not reject")
    rows = context.unevaded()

    def class_scores(inputs: Tensor) -> Tensor:
        return context.model(inputs)[:, :-1]

    evaded = torch.zeros_like(rows, dtype=torch.bool)
    for objective in ("paper", "log-sum-exp"):
        steps = context.options["steps"]
        points = context.attack(pgd, rows, model=class_scores, objective=objective, steps=steps)
        evaded = evaded | evades_at(context, points, rows)
    advice = f"{_STRONGER}; an adaptive attack must not lose against one that ignores rejection."
    return missed_evasions(context, "An attack that ignores rejection", evaded, advice)


def check_components(context: Context) -> Finding:
    """Attack each layer's SVM and the network alone, and show the points to the whole.

    If the gradient of a part vanishes for many samples, the whole hides behind that part.

    Source: Carlini et al., "On evaluating adversarial robustness" (ablation study).
    """
    parts = _parts(context)
    rows = context.unevaded()
    inputs, labels = context.inputs[rows], context.labels[rows]
    evaded = torch.zeros_like(rows, dtype=torch.bool)
    counts: dict[str, int | float] = {"samples": len(rows)}
    blind = []
    steps = context.options["steps"]
    for name, part in parts.items():
        target = Target(part, context.target("paper").objective, False, context.batch_size)
        vanished = int((slope_at(target, inputs, labels).length < TINY).sum())
        points = context.attack(pgd, rows, model=part, objective="paper", steps=steps)
        alone = evades(outputs(part, points, context.batch_size), labels, False)
        evaded = evaded | evades_at(context, points, rows)
        counts[f"{name}: evaded alone"] = int(alone.sum())
        counts[f"{name}: no gradient"] = vanished
        blind += [name] * (vanished > SHARE_VANISHED * len(rows))
    count = int(evaded.sum())
    status, drop = drop_status(context, count, len(rows), SMALL_DROP)
    counts |= {"evaded": count, "accuracy_drop": drop}
    by_part = ", ".join(f"{name} {counts[f'{name}: evaded alone']}" for name in parts)
    message = (
        f"Of {len(rows)} samples not evaded at eps = {context.eps:g} the parts alone are evaded "
        f"for: {by_part}; these points evade the whole for {count}."
    )
    if blind:
        status = "warn" if status == "pass" else status
        message += f" Gradients vanish in: {', '.join(blind)}."
    advice = "Start the attacks from points against the parts; give a blind part a smaller gamma."
    return Finding(status, counts, message, advice)


def _parts(context: Context) -> dict[str, Model]:
    """Collect the SVM of each layer, and the network if it classifies."""
    model: Any = context.model
    if not all(hasattr(model, name) for name in ("base_svms", "layers", "features")):
        raise CannotRun("the model is not made of SVMs on the layers of a network")

    def on_layer(index: int, name: str) -> Model:
        return context.counted(lambda x: model.base_svms[index](model.features(x)[name]))

    parts = {f"SVM on {name}": on_layer(i, name) for i, name in enumerate(model.layers)}
    return parts if context.surrogate is None else {**parts, "network": context.surrogate}
