"""All checks of an evaluation, one after the other."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from torchdnr.arrays import as_features
from torchdnr.attacks.checks import (
    check_count,
    check_levels,
    check_mask,
    check_pool,
    checked_inputs,
)
from torchdnr.attacks.objectives import decision_objective
from torchdnr.attacks.target import Target, check_classes
from torchdnr.decisions import class_scores, evaluation_mode, has_reject_column
from torchdnr.evaluation.checks import curve as curves
from torchdnr.evaluation.checks import model as models
from torchdnr.evaluation.checks import optimisation, weaker
from torchdnr.evaluation.checks.context import Context, Model, choose_eps
from torchdnr.evaluation.checks.result import CannotRun, Check, CheckReport, Finding
from torchdnr.evaluation.curve import SecurityCurve
from torchdnr.evaluation.judging import CountedModel
from torchdnr.evaluation.line_up import Attack, default_line_up
from torchdnr.resources import default_batch_size, progress_bar

CHECKS: dict[str, Callable[[Context], Finding]] = {
    "differentiable": models.check_differentiable,
    "zero gradient": models.check_zero_gradient,
    "true gradient": models.check_true_gradient,
    "unstable loss": models.check_unstable_loss,
    "deterministic": models.check_deterministic,
    "unbounded scores": models.check_unbounded_scores,
    "stored points": curves.check_stored_points,
    "monotone curve": curves.check_monotone,
    "silent success": optimisation.check_silent_success,
    "incomplete optimisation": optimisation.check_incomplete,
    "converged": optimisation.check_converged,
    "single step": weaker.check_single_step,
    "noise control": weaker.check_noise,
    "black-box attack": weaker.check_black_box,
    "transfer": weaker.check_transfer,
    "adaptive attack": weaker.check_unaware,
    "components": weaker.check_components,
    "unbounded attack": curves.check_unbounded,
    "chance at large eps": curves.check_chance,
    "plausible at eps / 2": curves.check_half_eps,
}
"""All checks by name, in the order in which they run."""


def run_checks(
    model: Model,
    inputs: Tensor,
    labels: Tensor,
    curve: SecurityCurve,
    *,
    norm: float | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    mask: Tensor | None = None,
    levels: int | None = None,
    reject: bool | None = None,
    eps: float | None = None,
    attacks: Mapping[str, Attack] | None = None,
    init_inputs: Tensor | None = None,
    surrogate: Model | None = None,
    reference: SecurityCurve | Mapping[float, float] | None = None,
    samples: int | None = None,
    recorded: int | None = None,
    steps: int = 25,
    draws: int = 10,
    noise_draws: int = 100,
    queries: int = 300,
    passes: int = 5,
    batch_size: int | None = None,
    seed: int = 0,
    only: Sequence[str] | None = None,
    progress: bool = False,
) -> CheckReport:
    """Check whether a security evaluation can be trusted.

    Most checks look at one eps and at the first ``samples`` that the evaluation did not evade
    there: what should be weaker than the evaluation must not evade them. A check that does not
    apply, or breaks off, is listed as "skipped" with its reason; one that breaks off also makes
    the report warn.

    The checks go on from the points of the evaluation, and by default look at a tenth of its
    samples, so that they cost about a tenth of it; the report has the cost of each. The literature
    asks for more, ``draws=100``, ``noise_draws=10_000`` and ``queries=1000``, where nothing else
    is at hand that could catch an evaluation that is too weak.

    Args:
        model: Maps inputs to scores ``(n, c)``, or ``(n, c + 1)`` with theta in the last column. A
            module is put into evaluation mode and back.
        inputs: Clean inputs of the evaluation, ``(n, ...)`` in ``bounds``.
        labels: Their true labels, int64 ``(n,)``.
        curve: What ``security_evaluation`` returned, with ``adversarial``. Without these points, as
            after loading, checks look at clean inputs instead or are skipped.
        norm: Norm of the perturbation; None: that of the curve.
        bounds: Smallest and largest value of an input.
        mask: What of each input may change, as in the evaluation; None: everything.
        levels: Levels of a pixel, as in the evaluation; None: any value.
        reject: Whether the last column of the output is theta; None: ask the model.
        eps: At which eps of the curve attacks are compared; None: where the accuracy is nearest
            to one half.
        attacks: Line-up of the evaluation; None: the default one.
        init_inputs: Samples of all classes to start from; None: the inputs.
        surrogate: Classifier without defence, to scores ``(n, c)``; None: ``model.net`` if it
            classifies.
        reference: The most robust classifier known, for ``eps / 2``: its curve, or its robust
            accuracy by eps.
        samples: Samples that the checks use; None: a tenth of the inputs, 4 to 32.
        recorded: Samples on which each attack is recorded; None: a third of these.
        steps: Steps of the attacks run here.
        draws: Points around each sample for the stability of the loss.
        noise_draws: Points of each ball for the noise control.
        queries: Queries per sample of the black-box attack.
        passes: Passes through the model that have to agree.
        batch_size: Rows in one forward; None: as many as suits the size of the inputs.
        seed: Of everything that is drawn.
        only: Names of the checks to run; None: all in ``CHECKS``.
        progress: Whether to show a progress bar.

    Returns:
        ``CheckReport``; print it to read it.

    Raises:
        ValueError: If an argument is not as described, or inputs and curve do not belong together.
    """
    if samples is None:  # a tenth of the evaluation, for its cost to remain a small share of it
        samples = min(32, max(4, len(inputs) // 10))
    counts = {
        "samples": samples,
        "recorded": max(1, samples // 3) if recorded is None else recorded,
        "steps": steps,
        "draws": draws,
        "noise_draws": noise_draws,
        "queries": queries,
        "passes": passes,
    }
    if torch.is_inference_mode_enabled():
        raise ValueError("the checks need gradients: call them outside torch.inference_mode")
    norm = curve.norm if norm is None else norm
    inputs, labels = checked_inputs(inputs, labels, norm, bounds, model)
    batch_size = default_batch_size(inputs) if batch_size is None else batch_size
    for name, value in {**counts, "batch_size": batch_size}.items():
        check_count(name, value, 2 if name == "passes" else 1)
    if init_inputs is not None:
        init_inputs = as_features("init_inputs", init_inputs, inputs)
        check_pool(init_inputs, None, inputs, bounds)
    _check_curve(curve, inputs, labels, norm)
    check_levels(levels, inputs, bounds)
    mask = check_mask(mask, inputs)
    chosen = _named(only)
    began = time.perf_counter()
    counted = CountedModel(model)
    reject = has_reject_column(model, reject)
    shared: dict[str, Any] = {"norm": norm, "bounds": bounds}
    shared |= {"batch_size": batch_size, "reject": reject}
    pool = inputs if init_inputs is None else init_inputs
    with evaluation_mode(counted), evaluation_mode(counted if surrogate is None else surrogate):
        target = Target(counted, decision_objective, reject, batch_size)
        classes = check_classes(target, inputs, labels)
        if attacks is None:
            attacks = default_line_up(pool, **shared)
        if surrogate is None:
            surrogate = _network(model, inputs, classes)
        others = [] if surrogate is None else [CountedModel(surrogate)]
        context = Context(
            model=counted,
            inputs=inputs,
            labels=labels,
            **shared,
            mask=mask,
            levels=levels,
            curve=curve,
            index=choose_eps(curve, eps),
            pool=pool,
            attacks={name: attack for name, attack in attacks.items() if attack.fits(model)},
            surrogate=others[0] if others else None,
            counters=[counted, *others],
            reference=reference,
            options=counts,
            seed=seed,
        )
        bar = progress_bar(progress, chosen.items(), desc="checks", unit="check")
        checks = [_run(name, check, context) for name, check in bar]
    settings = {**counts, "eps": context.eps, "norm": float(norm), "bounds": list(bounds)}
    settings |= {"unevaded": len(context.rows), "batch_size": batch_size, "seed": seed}
    spent = context.spent()
    seconds = spent["seconds"] - began
    return CheckReport(checks, spent["forwards"], spent["backwards"], seconds, settings)


def _check_curve(curve: SecurityCurve, inputs: Tensor, labels: Tensor, norm: float) -> None:
    if norm != curve.norm:
        raise ValueError(f"norm must be that of the curve, {curve.norm:g}, got {norm:g}")
    if curve.targets is not None:
        raise ValueError(
            "curve must be of an evaluation without targets, got one with: the checks ask whether "
            "stronger attacks would be accepted and wrong, as whatever class"
        )
    if curve.labels.shape != labels.shape or (curve.labels != labels.cpu()).any():
        raise ValueError(
            f"labels must be those of the curve, of {len(curve.labels)} samples in that order, "
            f"got {len(labels)} of others: pass the inputs and labels that were evaluated"
        )
    if curve.adversarial is not None and curve.adversarial.shape[1:] != inputs.shape:
        raise ValueError(
            f"inputs must be like the points of the curve, {tuple(curve.adversarial.shape[1:])}, "
            f"got {tuple(inputs.shape)}"
        )


def _named(only: Sequence[str] | None) -> dict[str, Callable[[Context], Finding]]:
    if only is None:
        return CHECKS
    unknown = [name for name in only if name not in CHECKS]
    if unknown or not only:
        raise ValueError(f"no check {unknown}; choose from: {', '.join(CHECKS)}")
    return {name: check for name, check in CHECKS.items() if name in only}


def _run(name: str, check: Callable[[Context], Finding], context: Context) -> Check:
    before = context.spent()
    status, counts, message, advice = _find(check, context)
    after = context.spent()
    cost = {key: after[key] - before[key] for key in before}
    return Check(name, status, counts, message, "" if status == "pass" else advice, **cost)


def _find(check: Callable[[Context], Finding], context: Context) -> Finding:
    try:
        return check(context)
    except CannotRun as reason:
        return Finding("skipped", {}, f"Did not run: {reason}.", reason.advice)
    except Exception as error:  # whatever a foreign model or attack raises; the others still run
        kind, counts = type(error).__name__, {"errors": 1}
        if context.cache.get("no gradient"):
            return Finding("skipped", counts, f"Did not run: see 'differentiable'; {kind}.")
        advice = "Mend what broke off and check again."
        return Finding("skipped", counts, f"Broke off with {kind}: {error}", advice)


def _network(model: Model, inputs: Tensor, classes: int) -> Model | None:
    """Return the network under the defence if it tells as many classes."""
    net = getattr(model, "net", None)
    if not isinstance(net, nn.Module):
        return None
    with torch.no_grad(), suppress(TypeError):
        return net if class_scores(net(inputs[:1])).shape == (1, classes) else None
    return None
