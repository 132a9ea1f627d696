"""Attack the parts of the defence alone: the SVM of each layer, and the network under them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from torchdnr.attacks.pgd import pgd
from torchdnr.attacks.target import Target, slope_at
from torchdnr.decisions import evades
from torchdnr.evaluation.checks.context import SMALL_DROP, Context, drop_status, evades_at
from torchdnr.evaluation.checks.gradients import SHARE_VANISHED, TINY
from torchdnr.evaluation.checks.result import CannotRun, Check
from torchdnr.evaluation.judging import outputs

COMPONENTS = "components"


def check_components(context: Context) -> Check:
    """Attack each layer's SVM and the network alone, and show the points to the whole.

    It fails, or warns, if points against a part evade the whole where the evaluation did not, as
    for the other weaker attacks; and it warns if the gradient of a part vanishes for more than a
    tenth of the samples: that part hides behind it.

    Raises:
        CannotRun: If the model is not made of ``base_svms`` on ``layers`` of a ``net``.

    Source: Carlini et al., "On evaluating adversarial robustness" (ablation study).
    """
    parts = _parts(context)
    rows = context.unevaded()
    inputs, labels = context.inputs[rows], context.labels[rows]
    whole = torch.zeros_like(rows, dtype=torch.bool)
    counts: dict[str, int | float] = {"samples": len(rows)}
    blind = []
    steps = context.options["steps"]
    for name, part in parts.items():
        target = Target(part, context.target("paper").objective, False, context.batch_size)
        vanished = int((slope_at(target, inputs, labels).length < TINY).sum())
        points = context.attack(pgd, rows, model=part, objective="paper", steps=steps)
        alone = evades(outputs(part, points, context.batch_size), labels, False)
        whole = whole | evades_at(context, points, rows)
        counts[f"{name}: evaded alone"] = int(alone.sum())
        counts[f"{name}: no gradient"] = vanished
        blind += [name] * (vanished > SHARE_VANISHED * len(rows))
    count = int(whole.sum())
    status, drop = drop_status(context, count, len(rows), SMALL_DROP)
    counts |= {"evaded": count, "accuracy_drop": drop}
    if blind and status == "pass":
        status = "warn"
    alone = ", ".join(f"{name} {counts[f'{name}: evaded alone']}" for name in parts)
    message = (
        f"Of {len(rows)} samples not evaded at eps = {context.eps:g} the parts alone are evaded "
        f"for: {alone}; these points evade the whole for {count}."
    )
    if blind:
        message += f" Gradients vanish in: {', '.join(blind)}."
    advice = "Start the attacks from points against the parts; give a blind part a smaller gamma."
    return Check(COMPONENTS, status, counts, message, advice if status != "pass" else "")


def _parts(context: Context) -> dict[str, Callable[[Tensor], Tensor]]:
    """Collect the SVM of each layer, and the network if it classifies."""
    model = context.original
    needed = "base_svms", "layers", "features"
    if not isinstance(model, nn.Module) or not all(hasattr(model, name) for name in needed):
        raise CannotRun("the model is not made of SVMs on the layers of a network")

    def on_layer(index: int, name: str) -> Callable[[Tensor], Tensor]:
        return lambda inputs: model.base_svms[index](model.features(inputs)[name])

    parts = {f"SVM on {name}": on_layer(i, name) for i, name in enumerate(model.layers)}
    if context.surrogate is not None:
        parts["network"] = context.surrogate
    return parts
