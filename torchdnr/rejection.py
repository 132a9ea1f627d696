"""The rejection threshold: how it is set, and a detector's decision as a column that rejects."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, Self, overload

import torch
from torch import Tensor, nn

from torchdnr.arrays import as_data, as_labels
from torchdnr.decisions import (
    NotFittedError,
    class_scores,
    evaluation_mode,
    predict_labels,
)
from torchdnr.distributed import current
from torchdnr.distributed.processes import warn_once
from torchdnr.distributed.sharing import Batch, check_same, checked_batches
from torchdnr.risk import threshold_at_error

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
    batch_size: int,
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
            stacklevel=5,
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
    batch_size: int,
    device: torch.device | None,
    return_scores: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """Check images, and predict labels or ``REJECT`` ``(n,)``; on request scores ``(n, c)`` too."""
    inputs = as_data(inputs, model)
    with torch.no_grad():
        # Called as a user calls it: after compile() it runs the compiled program.
        batches = checked_batches(inputs, batch_size)
        output = torch.cat([model(images.to(device)) for images, _ in batches])
    labels = predict_labels(output, reject=True)
    return (labels, output[:, :-1]) if return_scores else labels


def spacing(values: Tensor) -> Tensor:
    """Compute the least that, added or subtracted, makes another number of each value.

    Never below the smallest normal number: hardware may take smaller ones for zero.
    """
    values = values.detach()
    size = values.abs()
    step = torch.nextafter(size, torch.full_like(size, torch.inf)) - size
    return step.clamp_min(torch.finfo(values.dtype).tiny)


class WithReject(nn.Module):
    """Put a detector's decision beside the scores of a classifier, as a column that rejects.

    The last column is ``max_k s_k + scale * (score - threshold)``: above the best class score by as
    much as the detector's score is above its threshold. So every attack and evaluation for models
    that may reject works on the pair, and their "decision" objective is, on wrong inputs, the
    detector's own margin.

    An input is accepted if and only if its score does not exceed the threshold, which is what
    detectors mean by one; where rounding would decide otherwise, the column is moved to the next
    number that decides rightly.

    Args:
        classifier: Maps inputs ``(n, ...)`` to class scores ``(n, c)``, or to what ``class_scores``
            takes them from; best logits: probabilities saturate, and flatten the gradient.
        score_fn: Maps inputs to ``(n,)``, higher for a more suspicious input, such as a detector of
            pytorch-ood. A gradient must lead through it, or gradient attacks are blind to the
            detector; a warning says where none does.
        threshold: An input is rejected iff its score is above; finite.
        scale: What a unit of the detector's score is worth in units of the class scores; > 0. It
            changes no decision, only how an attack weighs the two sides.
        batch_size: Inputs per forward pass in ``predict``.

    Raises:
        ValueError: If a part is not callable, or a number is out of range.

    Modules among the two are registered: their parameters and buffers are those of the pair.
    """

    def __init__(
        self,
        classifier: Callable[[Tensor], Tensor],
        score_fn: Callable[[Tensor], Tensor],
        threshold: float,
        *,
        scale: float = 1.0,
        batch_size: int = 256,
    ) -> None:
        super().__init__()
        for name, part in (("classifier", classifier), ("score_fn", score_fn)):
            if not callable(part):
                raise ValueError(f"{name} must be callable, got {type(part).__name__}")
        self.threshold, self.scale, self.batch_size = float(threshold), float(scale), batch_size
        if not math.isfinite(self.threshold):
            raise ValueError(f"threshold must be finite, got {threshold}")
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale must be finite and > 0, got {scale}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}")
        self.classifier = classifier
        self.score_fn = score_fn
        # Whoever puts the pair back into the mode it was in must not train the classifier.
        self.training = getattr(classifier, "training", False)
        self._num_classes: int | None = None

    @property
    def reject_index(self) -> int:
        """Column of the rejection: c, or -1, the last one, before any input was seen."""
        return -1 if self._num_classes is None else self._num_classes

    def forward(self, inputs: Tensor) -> Tensor:
        """Compute class scores and the column that rejects.

        Args:
            inputs: ``(n, ...)``.

        Returns:
            ``(n, c + 1)``, a fresh tensor.

        Raises:
            ValueError: If the class scores are not ``(n, c)``, or the detector's not ``(n,)``.
            TypeError: If no scores are found in what the classifier returns.

        Warns (``UserWarning``) if a gradient leads to the class scores but not to the detector's.
        """
        scores, suspicion = self._both(inputs)
        self._num_classes = scores.shape[1]
        return torch.cat([scores, self._column(scores, suspicion)[:, None]], dim=1)

    def _both(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Compute class scores ``(n, c)`` and the detector's score ``(n,)``."""
        scores = class_scores(self.classifier(inputs))
        suspicion = self.score_fn(inputs)
        n = inputs.shape[0]  # not len: torch.export would fix it
        if scores.ndim != 2 or scores.shape[0] != n:
            raise ValueError(
                f"classifier must return (n, c) with n = {n} inputs, got {tuple(scores.shape)}"
            )
        if suspicion.shape != (n,):
            raise ValueError(
                f"score_fn must return (n,) with n = {n} inputs, got {tuple(suspicion.shape)}; "
                "flatten its result to one score per input"
            )
        if torch.is_grad_enabled() and scores.requires_grad and not suspicion.requires_grad:
            warnings.warn(
                "no gradient leads through score_fn, so gradient attacks cannot see the detector "
                "and will overrate it; use its differentiable score, or attacks without gradients",
                stacklevel=3,
            )
        return scores, suspicion

    def _column(self, scores: Tensor, suspicion: Tensor) -> Tensor:
        """Compute the column that is above the best score iff the detector rejects."""
        best = scores.amax(dim=1)
        # Compared in the detector's own precision: a cast could move a score onto the threshold.
        rejected = suspicion.detach() > self.threshold
        column = best + (self.scale * (suspicion - self.threshold)).to(scores)
        # A score just below the threshold may leave no trace in the sum: it must stay below.
        lost = ~rejected & (column.detach() == best.detach())
        return torch.where(lost, column - spacing(best), column)

    @torch.no_grad()
    def calibrate(
        self,
        inputs: Tensor | Iterable[Any],
        labels: Tensor | float | None = None,
        *,
        rejection_rate: float | None = None,
        max_error: float | None = None,
        confidence: float = 0.95,
    ) -> Self:
        """Set the threshold on the detector's scores, by a share of rejects or by an error.

        Args:
            inputs: Images ``(n, ...)`` in [0, 1], or a loader of batches, as in ``DNR.calibrate``.
            labels: ``(n,)``, for ``max_error``, unless the loader yields them. A number is taken
                for ``rejection_rate``.
            rejection_rate: Share to reject, in [0, 1); default 0.1.
            max_error: Instead, the bound of the error among the accepted, as in ``DNR.calibrate``.
            confidence: Probability that this bound holds, in (0, 1).

        Returns:
            The model itself.

        Raises:
            ValueError: If an argument is not as said above, or no threshold promises ``max_error``.

        Warns:
            CalibrationWarning: If equal scores make it reject more than ``rejection_rate``.
        """

        def judge(images: Tensor, of_batch: Tensor | None) -> Tensor:
            scores, suspicion = self._both(images.to(self._device()))
            wrong = best_and_wrong(scores, of_batch)[:, 1]
            return torch.stack([-suspicion, wrong.to(suspicion)], dim=1)

        goal = {"rejection_rate": rejection_rate, "max_error": max_error, "confidence": confidence}
        options: dict[str, Any] = {"batch_size": self.batch_size, **goal}
        with evaluation_mode(self):
            theta = calibrated_threshold(self, judge, inputs, labels, **options)
        # A score equal to theta is rejected, but one equal to a detector's threshold is accepted.
        self.threshold = -torch.nextafter(theta, theta.new_tensor(math.inf)).item()
        return self

    def _device(self) -> torch.device | None:
        """Return the device of the parameters, if there are any."""
        return next((p.device for p in self.parameters()), None)

    @overload
    def predict(
        self, inputs: Tensor | Iterable[Any], *, return_scores: Literal[False] = False
    ) -> Tensor: ...

    @overload
    def predict(
        self, inputs: Tensor | Iterable[Any], *, return_scores: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...

    def predict(
        self, inputs: Tensor | Iterable[Any], *, return_scores: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Predict labels or reject, batch by batch, in evaluation mode.

        Args:
            inputs: Images in [0, 1], ``(n, ...)``, or a loader of batches (labels are ignored).
            return_scores: Whether to return class scores ``(n, c)`` too.

        Returns:
            0..c-1, or ``REJECT`` = -1, int64 ``(n,)``; with ``return_scores`` also the scores.

        Raises:
            ValueError: If the images are empty, not floating point, outside [0, 1] or NaN.
        """
        with evaluation_mode(self):
            arguments = inputs, self.batch_size, self._device(), return_scores
            return predict_in_batches(self, *arguments)
