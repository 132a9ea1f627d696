"""The rejection threshold: how it is set on scores, kept, and decides."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from torchdnr.arrays import as_data, as_labels
from torchdnr.decisions import (
    NotFittedError,
    predict_labels,
)
from torchdnr.distributed import current
from torchdnr.distributed.processes import warn_once
from torchdnr.distributed.sharing import Batch, check_same, checked_batches
from torchdnr.rejection.risk import threshold_at_error
from torchdnr.resources import default_batch_size

REJECTION_RATE = 0.10
"""Share of clean inputs that ``calibrate`` rejects by default, that of the paper's experiments."""


class CalibrationWarning(UserWarning):
    """A threshold rejects more inputs than it was asked to, since their scores are equal."""


def rejection_threshold(scores: Tensor, rejection_rate: float) -> Tensor:
    """Compute the threshold that rejects a share of inputs with ``scores`` ``(n, c)``; a scalar.

    With distinct best scores exactly ``floor(rejection_rate * n)`` inputs are rejected. The
    threshold lies halfway between the last rejected and the first accepted best score, so that
    rounding in another batch size does not change the decision about either of them.
    """
    if scores.ndim != 2 or scores.shape[0] == 0:
        raise ValueError(f"scores must be (n, c) with n >= 1, got {tuple(scores.shape)}")
    if not 0.0 <= rejection_rate < 1.0:
        raise ValueError(f"rejection_rate must be in [0, 1), got {rejection_rate}")
    best = _finite(scores.max(dim=1).values).sort().values
    rejected = math.floor(rejection_rate * len(best) + 1e-9)  # 0.29 * 100 is 28.999...
    if rejected == 0:
        return torch.nextafter(best[0], torch.full_like(best[0], -math.inf))
    last_rejected, first_accepted = best[rejected - 1], best[rejected]
    middle = last_rejected + (first_accepted - last_rejected) / 2
    return torch.where(middle < first_accepted, middle, last_rejected)


Judge = Callable[[Tensor, Tensor | None], Tensor]
"""Makes of images and labels, or None, what ``best_and_wrong`` does."""


def calibrated_threshold(
    model: nn.Module,
    judge: Judge,
    inputs: Tensor | Iterable[Any],
    labels: Tensor | float | None,
    *,
    batch_size: int | None,
    rejection_rate: float | None,
    max_error: float | None,
    confidence: float,
) -> Tensor:
    """Compute theta for ``calibrate``, whose arguments these are; all processes work together.

    ``model`` has to be the same in all of them. Warns (``CalibrationWarning``) if a larger share is
    rejected than was asked for.
    """
    if isinstance(labels, float | int):
        labels, rejection_rate = None, labels
    if rejection_rate is not None and max_error is not None:
        raise ValueError("expected rejection_rate or max_error, got both: drop one")
    inputs = as_data(inputs, model)
    labels = None if labels is None else as_labels("labels", labels)
    if batch_size is None:  # a loader has its own
        device = next((p.device for p in model.parameters()), None)
        batch_size = default_batch_size(inputs, device) if isinstance(inputs, Tensor) else 1
    best, wrong = _outcomes(model, judge, inputs, labels, batch_size).unbind(dim=1)
    if max_error is None:
        rate = REJECTION_RATE if rejection_rate is None else rejection_rate
        threshold = rejection_threshold(best[:, None], rate)
        _warn_of_ties(best, threshold, rate)
        return threshold
    if wrong.isnan().any():
        raise ValueError(
            "max_error needs labels: calibrate(images, labels, max_error=...), or a loader that "
            "yields (images, labels)"
        )
    return threshold_at_error(_finite(best), wrong, max_error, confidence)


def _outcomes(
    model: nn.Module,
    judge: Judge,
    inputs: Tensor | Iterable[Any],
    labels: Tensor | None,
    batch_size: int,
) -> Tensor:
    """Judge all images, each process some batches of them, ``(n, 2)``."""
    processes = current()
    if isinstance(inputs, Tensor):  # a batch for each process at least
        batch_size = max(1, min(batch_size, math.ceil(len(inputs) / processes.count)))
    all_labels, parts, first = [], [], torch.empty(0)  # there is a batch at least
    for number, (images, of_batch) in enumerate(_labelled_batches(inputs, labels, batch_size)):
        first = images if number == 0 else first
        all_labels.append(of_batch)
        if processes.mine(number):
            parts.append(judge(images, of_batch))
    check_same(processes, model, all_labels, first)
    # One that got no batch still has to know what scores are like.
    outcomes = torch.cat(parts) if parts else judge(first[:1], None)[:0]
    return processes.gather(outcomes, processes.numbers(len(outcomes)))


def best_and_wrong(scores: Tensor, labels: Tensor | None) -> Tensor:
    """Return the best of the scores ``(n, c)``, and 1 if its class is wrong, else 0, ``(n, 2)``.

    Without labels, NaN.
    """
    best, classes = scores.max(dim=1)
    wrong = torch.full_like(best, math.nan) if labels is None else classes != labels.to(best.device)
    return torch.stack([best, wrong.to(best)], dim=1)


def _labelled_batches(
    inputs: Tensor | Iterable[Any], labels: Tensor | None, batch_size: int
) -> Iterator[Batch]:
    """Yield checked batches with their labels or None, from tensors or a loader."""
    batches = checked_batches(inputs, batch_size)
    if labels is None:
        yield from batches
        return
    if not isinstance(inputs, Tensor) or labels.shape != inputs.shape[:1]:
        raise ValueError(
            "labels must be (n,), one for each image of a tensor; got "
            f"{tuple(labels.shape)} beside {getattr(inputs, 'shape', 'a loader')}"
        )
    for (images, _), part in zip(batches, labels.split(batch_size), strict=True):
        yield images, part


def _warn_of_ties(best: Tensor, threshold: Tensor, rate: float) -> None:
    """Warn if a larger share of the best scores ``(n,)`` is rejected than was asked for."""
    n, rejected = len(best), int((best <= threshold).sum())
    if rejected > math.floor(rate * n + 1e-9):
        equal = int((best == best[best <= threshold].max()).sum())
        warn_once(
            f"expected {rate:.1%} of {n} inputs to be rejected, got {rejected / n:.1%}: {equal} "
            "of them have the same best score, and equal scores are rejected together; drop "
            "repeated inputs, and see whether the features differ at all",
            CalibrationWarning,
            stacklevel=6,  # where calibrate was called, two decorators above it
        )


def _finite(scores: Tensor) -> Tensor:
    if not torch.isfinite(scores).all():
        raise ValueError("scores must be finite to set a threshold, got NaN or infinity")
    return scores


class Threshold(nn.Module):
    """The rejection threshold of a classifier: ``theta``, a scalar buffer, NaN until it is set."""

    theta: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("theta", torch.tensor(math.nan))
        self._is_set = False

    @torch.inference_mode(False)
    @torch.no_grad()
    def set(self, theta: float | Tensor) -> None:
        """Set theta to a finite number; a copy of floating point keeps its dtype and device."""
        theta = torch.as_tensor(theta).reshape(())
        if not torch.isfinite(theta):
            raise ValueError(f"threshold must be finite, got {theta.item()}")
        self.theta = (theta if theta.is_floating_point() else theta.float()).detach().clone()
        self._is_set = True

    @torch.inference_mode(False)
    def reset(self) -> None:
        """Forget theta, as after a new fit."""
        self.theta = torch.full_like(self.theta, math.nan)
        self._is_set = False

    def append(self, scores: Tensor) -> Tensor:
        """Append theta to scores ``(n, c)`` as the last column; a fresh tensor ``(n, c + 1)``."""
        # Looked at once: reading it stalls a GPU, and breaks the graph of torch.compile.
        if not self._is_set:
            if torch.isnan(self.theta):
                raise NotFittedError(
                    "the rejection threshold is not set: call calibrate(images) with images that "
                    "were not used in fit, or set_threshold(value); scores(x) works without it"
                )
            self._is_set = True
        return torch.cat([scores, self.theta.to(scores).expand(scores.shape[0], 1)], dim=1)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: object, **kwargs: object
    ) -> None:
        """Look at theta again; where none was set, take the stored dtype."""
        stored = state_dict.get(prefix + "theta")
        if stored is not None and torch.isnan(self.theta):
            self.theta = self.theta.to(stored.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._is_set = not torch.isnan(self.theta).item()


def predict_in_batches(
    model: nn.Module,
    inputs: Tensor | Iterable[Any],
    batch_size: int | None,
    device: torch.device | None,
    return_scores: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """Check images, and predict labels or ``REJECT`` ``(n,)``; on request scores ``(n, c)`` too."""
    inputs = as_data(inputs, model)
    with torch.no_grad():
        # Called as a user calls it: after compile() it runs the compiled program.
        batches = checked_batches(inputs, batch_size, device)
        output = torch.cat([model(images.to(device)) for images, _ in batches])
    labels = predict_labels(output, reject=True)
    return (labels, output[:, :-1]) if return_scores else labels
