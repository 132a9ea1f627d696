"""Every defence has to fail when the perturbation is not bounded."""

import math
import warnings

import torch

from torchdnr.attacks.pgd import pgd
from torchdnr.attacks.projections import project_box
from torchdnr.decisions import is_evasion, predict_labels
from torchdnr.evaluation.checks.context import Context
from torchdnr.evaluation.checks.result import Finding
from torchdnr.evaluation.judging import outputs


def _unbounded(context: Context) -> tuple[int, int, int]:
    """Run the line-up, and PGD from the input alone, with no bound but the box.

    Returns samples, how many the line-up evades, and how many PGD from the input alone evades.
    """
    if "unbounded" not in context.cache:
        rows = context.first
        inputs, labels = context.inputs[rows], context.labels[rows]

        def evading(points: torch.Tensor) -> torch.Tensor:
            points = project_box(points.detach().to(inputs), context.bounds)
            output = outputs(context.model, points, context.batch_size)
            return is_evasion(predict_labels(output, context.reject), labels)

        evaded = evading(inputs)
        for attack in context.attacks.values():
            left = (~evaded).nonzero()[:, 0]
            if len(left) == 0:
                break
            start = inputs[left]
            with warnings.catch_warnings():  # samples without a start are counted below
                warnings.simplefilter("ignore")
                eps = math.inf if attack.minimum_norm else context.diameter
                points = attack.run(context.model, start, labels[left], eps, start)
            evaded = evaded | evading(inputs.index_copy(0, left, points.detach().to(inputs)))
        steps = context.options["steps"]
        alone = context.attack(pgd, rows, eps=context.diameter, steps=steps)
        context.cache["unbounded"] = len(rows), int(evaded.sum()), int(evading(alone).sum())
    return context.cache["unbounded"]


def check_unbounded(context: Context) -> Finding:
    """Attack with no bound but the box: every sample has to be evaded.

    The samples of the other classes are within reach, so that a correct attack cannot fail; to be
    rejected is no success. A sample left fails the check. It is also counted how many PGD evades
    from the input alone: few mean that gradients lead nowhere, and that all depends on starts.

    Source: Pintor et al., "Indicators of attack failure" (unconstrained attack failure); Carlini
    et al., "On evaluating adversarial robustness" (unbounded attacks reach 100 %).
    """
    total, count, alone = _unbounded(context)
    return Finding(
        "pass" if count == total else "fail",
        {"samples": total, "evaded": count, "evaded_from_the_input": alone},
        f"Without a bound the attacks evaded {count} of {total} samples, and PGD from the input "
        f"alone {alone}.",
        "The attacks are broken or blind: mend them before you believe any accuracy at a bounded "
        "eps.",
    )


def check_chance(context: Context) -> Finding:
    """Look whether the curve goes on until the accuracy is that of guessing, 1 / c.

    If it does not, and attacks without a bound do not get there either, it fails; if only the curve
    ends too early it warns.

    Source: Athalye et al., "Obfuscated gradients give a false sense of security"; the security
    curve of the Adversarial Robustness Toolbox flags the same.
    """
    with torch.no_grad():
        columns = context.model(context.inputs[:1]).shape[1]
    chance = 1 / (columns - context.reject)
    accuracy, largest = context.curve.accuracy[-1], context.curve.eps[-1]
    counts = {"largest_eps": largest, "accuracy": accuracy, "chance": chance}
    message = (
        f"At the largest eps, {largest:g}, the accuracy is {100 * accuracy:.1f} %, and "
        f"guessing has {100 * chance:.1f} %"
    )
    if accuracy <= chance:
        return Finding("pass", counts, message + ".")
    total, count, _ = _unbounded(context)
    counts["accuracy_without_bound"] = 1 - count / total
    message += f"; without a bound {100 * (1 - count / total):.1f} % are left."
    if 1 - count / total > chance or largest >= context.diameter:
        advice = "Gradients are masked: use attacks that start at accepted samples of other classes"
        return Finding("fail", counts, message, advice + ", or need no gradient.")
    return Finding("warn", counts, message, "Evaluate at larger eps too.")
