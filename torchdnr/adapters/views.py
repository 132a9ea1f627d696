"""A model that may reject, shown to attack libraries that know nothing of rejection.

They stop at, and count, whatever ``argmax`` says of the logits they are given. Shown all c + 1
columns, an untargeted attack counts rejections as successes; shown the class scores alone, it stops
at points that are rejected. Two views make ``argmax`` say just what evasion is, accepted and wrong:
``for_label`` for untargeted attacks on inputs of one class, ``for_target`` for targeted ones.

Each is a module with the model inside, so that it has its parameters, device and mode, and returns
a fresh tensor, into which a library may write. NaN is left to the code that evaluates the points.
"""

from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor, nn

from torchdnr.attacks.view import ModelView
from torchdnr.decisions import has_reject_column, split_scores
from torchdnr.rejection.detector import spacing


def require(module: str, package: str) -> ModuleType:
    """Import a module of an optional package; the ImportError says how to install it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f"this adapter needs {package}, which is not installed or cannot be imported "
            f"({error}): pip install 'torchdnr[peers]', or {package} alone"
        ) from error


def _checked(model: nn.Module, reject: bool | None) -> bool:
    """Refuse a model that is no module, and decide whether its last column is the threshold."""
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model must be a torch.nn.Module, got {type(model).__name__}: attack libraries look "
            "for its parameters and its mode; call it in the forward of a module"
        )
    return has_reject_column(model, reject)


def _each(classes: Tensor, scores: Tensor) -> Tensor:
    """Return the class of every row, ``(n, 1)``."""
    if classes.ndim and len(classes) != len(scores):
        raise ValueError(
            f"for_label was given {len(classes)} labels and then {len(scores)} inputs: what calls "
            "it splits batches; use attack_per_label, or one label per view"
        )
    return classes.to(scores.device).expand(len(scores))[:, None]


def _best_other(columns: Tensor, classes: Tensor) -> Tensor:
    """Compute the best of each row but that of its class, without gradient."""
    return columns.detach().scatter(1, classes, -torch.inf).amax(dim=1)


def as_classifier(model: nn.Module, *, reject: bool | None = None) -> nn.Module:
    """Show the class scores alone, as if the model never rejected.

    For attacks that are to ignore the rejection, such as those transferred to the model: they stop
    at points that it rejects, and overrate it.

    Args:
        model: Returns ``(n, c)``, or ``(n, c + 1)`` with the threshold in the last column.
        reject: Whether the last column is the threshold; ``None`` asks ``model.reject_index``.

    Returns:
        Module from inputs to ``(n, c)``.

    Raises:
        ValueError: If the model is no module.
    """
    reject = _checked(model, reject)
    return ModelView(model, lambda _, output: split_scores(output, reject)[0].clone(), False)


def with_reject(model: nn.Module, *, reject: bool | None = None) -> nn.Module:
    """Show rejection as one more class, the last: ``argmax`` is c iff the model rejects.

    It is the model's own output, but for ties with the threshold, which reject. Untargeted attacks
    on this view count rejected inputs as successes; use ``for_label`` for them.

    Args:
        model: Returns ``(n, c + 1)`` with the threshold in the last column.
        reject: Whether it does; ``None`` asks ``model.reject_index``.

    Returns:
        Module from inputs to ``(n, c + 1)``.

    Raises:
        ValueError: If the model is no module, or has no threshold.
    """
    if not _checked(model, reject):
        raise ValueError(
            "model must have the threshold as the last column of its output, got one without "
            "reject_index; pass reject=True if it has, or use as_classifier"
        )

    def change(_: Tensor, output: Tensor) -> Tensor:
        scores, threshold = output[:, :-1], output[:, -1]
        tie = scores.detach().amax(dim=1) == threshold.detach()
        threshold = torch.where(tie, threshold + spacing(threshold), threshold)
        return torch.cat([scores, threshold[:, None]], dim=1)

    return ModelView(model, change, True)


def for_label(model: nn.Module, labels: int | Tensor, *, reject: bool | None = None) -> nn.Module:
    """Show the model to an untargeted attack on inputs of a known class y.

    The class keeps the larger of its score and the threshold, ``z_y = max(s_y, theta)``, the others
    their scores: ``argmax z != y`` iff the model accepts and is wrong. A tie is moved by the least
    possible amount, so that this also holds where the first of equals wins.

    Args:
        model: Returns ``(n, c)``, or ``(n, c + 1)`` with the threshold in the last column.
        labels: True class of all inputs. Or ``(n,)``, one per input, for libraries that send the
            whole batch through the model each time, in order.
        reject: Whether the last column is the threshold; ``None`` asks ``model.reject_index``.

    Returns:
        Module from inputs to ``(n, c)``.

    Raises:
        ValueError: If the model is no module, or the labels are no classes.
    """
    reject = _checked(model, reject)
    classes = torch.as_tensor(labels)
    if classes.dtype != torch.int64 or classes.ndim > 1 or (classes < 0).any():
        raise ValueError(
            "labels must be a class >= 0, or int64 (n,), got "
            f"{classes.dtype} {tuple(classes.shape)}"
        )

    def change(_: Tensor, output: Tensor) -> Tensor:
        scores, threshold = split_scores(output, reject)
        each = _each(classes, scores)
        true = scores.gather(1, each)[:, 0]
        if threshold is not None:
            true = torch.maximum(true, threshold)
        tie = true.detach() == _best_other(scores, each)
        true = torch.where(tie, true + spacing(true), true)  # argmax would choose the first
        return scores.scatter(1, each, true[:, None])

    return ModelView(model, change, False)


def for_target(model: nn.Module, target: int, *, reject: bool | None = None) -> nn.Module:
    """Show the model to a targeted attack: ``argmax`` is the target iff it is accepted as that.

    The model's own output, but that a tie of the target with anything is moved against it. An input
    evades iff it reaches some target other than its class.

    Args:
        model: Returns ``(n, c)``, or ``(n, c + 1)`` with the threshold in the last column.
        target: Class that the attack wants.
        reject: Whether the last column is the threshold; ``None`` asks ``model.reject_index``.

    Returns:
        Module from inputs to ``(n, c + 1)``, or ``(n, c)`` if the model never rejects.

    Raises:
        ValueError: If the model is no module, or the target no class.
    """
    _checked(model, reject)
    if target < 0:
        raise ValueError(f"target must be a class >= 0, got {target}")

    def change(_: Tensor, output: Tensor) -> Tensor:
        targets = _each(torch.tensor(target), output)
        wanted = output.gather(1, targets)[:, 0]
        tie = wanted.detach() == _best_other(output, targets)
        wanted = torch.where(tie, wanted - spacing(wanted), wanted)
        return output.scatter(1, targets, wanted[:, None])

    return ModelView(model, change, reject)
