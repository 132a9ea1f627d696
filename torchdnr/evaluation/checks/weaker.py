"""Attacks that ought to be weaker than those of the evaluation: one step, noise, queries, transfer.

Each of them is run on the samples that the evaluation did not evade. If it evades one, the
evaluation is not the worst case, and most often its gradients are masked.
"""

from functools import partial
from math import ceil

import torch

from torchdnr.attacks.noise import noise
from torchdnr.attacks.pgd import pgd
from torchdnr.attacks.projections import steepest
from torchdnr.attacks.square import square
from torchdnr.attacks.target import slope_at
from torchdnr.attacks.transfer import transfer
from torchdnr.evaluation.checks.context import Context, evades_at, weaker_attack
from torchdnr.evaluation.checks.result import CannotRun, Check

SINGLE_STEP = "single step"
NOISE = "noise control"
BLACK_BOX = "black-box attack"
TRANSFER = "transfer"
UNAWARE = "adaptive attack"

STEPS = (1.0, 0.5, 0.25, 0.125)
"""Lengths of the single step, relative to eps."""
_STRONGER = "Strengthen the attacks of the evaluation: more steps, restarts, other objectives"


def check_single_step(context: Context) -> Check:
    """Take one step along the gradient, of several lengths, for two objectives.

    Source: Carlini et al., "On evaluating adversarial robustness" (iterative attacks are stronger).
    """
    rows = context.unevaded()
    inputs, labels = context.inputs[rows], context.labels[rows]
    found = torch.zeros_like(labels, dtype=torch.bool)
    for objective in ("decision", "paper"):
        direction = slope_at(context.target(objective), inputs, labels).direction
        direction = steepest(direction, inputs, context.norm, context.bounds)
        for length in STEPS:
            found = found | evades_at(context, inputs + length * context.eps * direction, rows)
    advice = f"{_STRONGER}; an iterative attack must not lose against one step."
    return weaker_attack(context, SINGLE_STEP, "One step along the gradient", found, advice)


def check_noise(context: Context) -> Check:
    """Draw many points of each ball at random.

    Source: Carlini et al., "On evaluating adversarial robustness" (brute-force random search),
    which asks for 10,000 draws and more.
    """
    rows, draws = context.unevaded(), context.options["noise_draws"]
    copies = min(draws, max(1, context.batch_size // len(rows)))  # to fill the batches
    repeated = rows.repeat_interleave(copies)
    points = context.attack(noise, repeated, draws=ceil(draws / copies))
    found = evades_at(context, points, repeated).view(-1, copies).any(dim=1)
    advice = f"{_STRONGER}; gradients are masked if chance does better."
    return weaker_attack(context, NOISE, f"Noise, {draws} draws each,", found, advice)


def check_black_box(context: Context) -> Check:
    """Search with the scores alone, from the input: the square attack.

    Source: Andriushchenko et al., "Square attack", ECCV 2020; AutoAttack takes a success of it
    where gradient attacks fail as a sign of masked gradients.
    """
    rows, queries = context.unevaded(), context.options["queries"]
    points = context.attack(square, rows, queries=queries)
    found = evades_at(context, points, rows)
    advice = f"{_STRONGER}; gradients are masked if queries do better."
    return weaker_attack(
        context, BLACK_BOX, f"The square attack, {queries} queries,", found, advice
    )


def check_transfer(context: Context) -> Check:
    """Attack an undefended classifier and show the points to the model.

    Points found on the surrogate and points on the line to them.

    Raises:
        CannotRun: If there is no surrogate.

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
    found = evades_at(context, points, rows)
    advice = f"{_STRONGER}; start them from points found on the surrogate."
    return weaker_attack(context, TRANSFER, "Transfer from the surrogate", found, advice)


def check_unaware(context: Context) -> Check:
    """Attack the class scores alone, as if there were no rejection.

    Raises:
        CannotRun: If the model does not reject.

    Source: Carlini and Wagner, "Adversarial examples are not easily detected", 2017; Sotgiu et al.,
    Sec. IV.
    """
    if not context.reject:
        raise CannotRun("the model does not reject")
    rows = context.unevaded()

    def class_scores(inputs: torch.Tensor) -> torch.Tensor:
        return context.model(inputs)[:, :-1]

    found = torch.zeros_like(rows, dtype=torch.bool)
    for objective in ("paper", "log-sum-exp"):
        steps = context.options["steps"]
        points = context.attack(pgd, rows, model=class_scores, objective=objective, steps=steps)
        found = found | evades_at(context, points, rows)
    advice = f"{_STRONGER}; an adaptive attack must not lose against one that ignores rejection."
    return weaker_attack(context, UNAWARE, "An attack that ignores rejection", found, advice)
