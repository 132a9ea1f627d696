"""How an output is read: the rule of acceptance, predicted labels, the success of an attack."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import RLock
from typing import Any, cast

import torch
from torch import Tensor, nn

REJECT = -1
"""Label of a rejected input."""
_BLOCKS: dict[int, int] = {}
"""How many blocks of ``evaluation_mode`` need a module, by its id."""
_BLOCKS_LOCK = RLock()


class NotFittedError(RuntimeError):
    """A module was used before it was fitted, or before its threshold was set."""


def accepted(best_score: Tensor, threshold: Tensor | float) -> Tensor:
    """Tell which inputs are accepted: those whose best score is above the threshold.

    Args:
        best_score: Largest class score of each input, ``(...)``.
        threshold: Rejection threshold theta, a number or like ``best_score``.

    Returns:
        Acceptance, bool ``(...)``. A tie with the threshold rejects, and so does a NaN.

    Source: Sotgiu et al., Sec. II: rejected if the maximum score "is not higher than" theta.
    """
    return best_score > threshold


def predict_with_rejection(scores: Tensor, threshold: Tensor | float) -> Tensor:
    """Predict labels, rejecting every input whose best score is not above the threshold.

    Args:
        scores: Class scores, ``(n, c)``.
        threshold: Rejection threshold theta, a scalar.

    Returns:
        Labels 0..c-1, or ``REJECT``, int64 ``(n,)``. A tie with the threshold rejects.
    """
    best, labels = scores.max(dim=1)
    return torch.where(accepted(best, threshold), labels, REJECT)


def split_scores(output: Tensor, reject: bool) -> tuple[Tensor, Tensor | None]:
    """Split a model output into class scores and rejection threshold.

    Args:
        output: ``(..., c)``, or ``(..., c + 1)`` with theta in the last column.
        reject: Whether the last column is theta.

    Returns:
        Scores ``(..., c)`` and the threshold of every row ``(...)``, ``None`` without a reject
        column.
    """
    return (output[..., :-1], output[..., -1]) if reject else (output, None)


def has_reject_column(model: Callable[[Tensor], Tensor], reject: bool | None) -> bool:
    """Decide whether the last column of the output is theta; ``None`` asks ``reject_index``."""
    return getattr(model, "reject_index", None) is not None if reject is None else reject


def class_scores(output: Any) -> Tensor:  # noqa: ANN401 - what networks return differs
    """Take the class scores ``(n, ...)`` from what a classifier returned, with theta if it has one.

    That is a tensor; a mapping or an object with ``logits`` as transformers has it, or with
    ``"out"`` as torchvision has it; or a tuple or list that starts with the scores. Anything else
    is a ``TypeError``.
    """
    scores = output
    if isinstance(output, Mapping):
        scores = output.get("logits", output.get("out"))
    elif not isinstance(output, Tensor):
        first = output[0] if isinstance(output, tuple | list) and output else None
        scores = getattr(output, "logits", first)
    if isinstance(scores, Tensor):
        return scores
    got = f"{type(output).__name__}"
    if isinstance(output, Mapping):
        got += f" with keys {list(output)}"
    elif isinstance(output, tuple | list):
        got += f" of {[type(part).__name__ for part in output]}"
    raise TypeError(
        'model must return its scores: a tensor, an object with logits, a mapping with "logits" or '
        f'"out", or a tuple that starts with them, got {got}; call it in the forward of a module '
        "that returns them"
    )


def method_of(model: object, name: str) -> Callable[..., Any] | None:
    """Return a method of a model; None without one, also where a layer has the name."""
    attribute = getattr(model, name, None)
    return None if isinstance(attribute, nn.Module) else attribute


def predict_labels(output: Tensor, reject: bool) -> Tensor:
    """Predict labels from what a model returns.

    Args:
        output: Scores ``(n, c)``, or with ``reject`` ``(n, c + 1)`` with theta in the last column.
        reject: Whether the last column is the rejection threshold.

    Returns:
        Labels 0..c-1, or ``REJECT`` where no score is above theta, int64 ``(n,)``.
    """
    scores, threshold = split_scores(output, reject)
    if threshold is None:
        return scores.argmax(dim=1)
    return predict_with_rejection(scores, threshold)


def is_evasion(predictions: Tensor, labels: Tensor) -> Tensor:
    """Tell which predictions, labels or ``REJECT`` ``(n,)``, are evasions, bool ``(n,)``."""
    return (predictions != REJECT) & (predictions != labels)


def is_success(predictions: Tensor, labels: Tensor, targets: int | Tensor | None) -> Tensor:
    """Tell which predictions ``(n,)`` an attack wanted: evasions, or its targets where it has any.

    A target that is the true class is none.
    """
    if targets is None:
        return is_evasion(predictions, labels)
    return (predictions == targets) & (labels != targets)


def true_and_best_other(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the score of the true class and the best score of another class, each ``(n,)``."""
    labels = labels[:, None]
    true = scores.gather(1, labels)[:, 0]
    return true, scores.scatter(1, labels, -torch.inf).max(dim=1).values


def opposing_scores(scores: Tensor, classes: Tensor, targeted: bool) -> tuple[Tensor, Tensor]:
    """Return the score that an attack lowers and the one that it raises, each ``(n,)``."""
    chosen, other = true_and_best_other(scores, classes)
    return (other, chosen) if targeted else (chosen, other)


def succeeds(output: Tensor, classes: Tensor, reject: bool, targeted: bool = False) -> Tensor:
    """Tell which inputs are accepted as another class than the true one, or as the target.

    Args:
        output: Model output, ``(n, c)``, or ``(n, c + 1)`` with theta in the last column.
        classes: True classes, or targets, ``(n,)``.
        reject: Whether the last column is theta.
        targeted: Whether ``classes`` are targets.

    Returns:
        Successes, bool ``(n,)``. A tie or a NaN is none.
    """
    scores, threshold = split_scores(output, reject)
    against, toward = opposing_scores(scores, classes, targeted)
    better = toward > against
    return better if threshold is None else better & accepted(toward, threshold)


def evades(output: Tensor, labels: Tensor, reject: bool) -> Tensor:
    """Tell which inputs are accepted and assigned to a wrong class.

    Equal scores of the true and another class count as right, a tie with theta as rejected, a NaN
    as no evasion.

    Args:
        output: Model output, ``(n, c)``, or ``(n, c + 1)`` with theta in the last column.
        labels: True classes, ``(n,)``.
        reject: Whether the last column is theta.

    Returns:
        Evasions, bool ``(n,)``.
    """
    return succeeds(output, labels, reject)


@contextmanager
def evaluation_mode(model: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Put the modules of ``model`` that are training into evaluation mode, and exactly those back.

    Threads may share modules: one is put back when the last block that needs it ends. ``train()``
    of it in the meantime counts from then on; ``eval()`` of it changes nothing, and is undone.
    One that is in evaluation mode throughout is not touched, nor is a function.
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()
    blocks, lock = _BLOCKS, cast(AbstractContextManager[object], _BLOCKS_LOCK)
    if torch.compiler.is_dynamo_compiling():  # it only sees flags change: no other thread does
        blocks, lock = {}, nullcontext()
    with lock:
        training = [module for module in modules if module.training or id(module) in blocks]
        for module in training:
            blocks[id(module)] = blocks.get(id(module), 0) + 1
            module.training = False  # not .eval(): it would recurse, and networks override .train()
    try:
        yield
    finally:
        with lock:
            for module in training:
                blocks[id(module)] -= 1
                if not blocks[id(module)]:
                    del blocks[id(module)]
                    module.training = True


def check_images(name: str, images: Tensor, bounds: tuple[float, float] = (0.0, 1.0)) -> None:
    """Refuse images ``(n, ...)``: none, not floating point, NaN, or outside ``bounds``.

    The ``ValueError`` calls them by ``name``.
    """
    if images.ndim < 2 or len(images) == 0:
        raise ValueError(
            f"{name} must be a non-empty batch (n, ...), got shape {tuple(images.shape)}"
        )
    if not images.is_floating_point():
        raise ValueError(
            f"{name} must be floating point in {bounds}, got {images.dtype}; scale the images"
        )
    low, high = images.min(), images.max()
    if not (low >= bounds[0] and high <= bounds[1]):  # also true of NaN
        raise ValueError(
            f"{name} must lie in {bounds}, got values from {low:g} to {high:g}; "
            "scale or clamp the images, and keep normalisation inside the model"
        )
