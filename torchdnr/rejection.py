"""The rejection threshold: how it is set, and a detector's decision as a column that rejects."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchdnr.arrays import as_images
from torchdnr.decisions import (
    NotFittedError,
    check_images,
    class_scores,
    evaluation_mode,
    predict_labels,
)


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
    best = scores.max(dim=1).values.sort().values
    if not torch.isfinite(best).all():
        raise ValueError("scores must be finite to set a threshold, got NaN or infinity")
    rejected = math.floor(rejection_rate * len(best) + 1e-9)  # 0.29 * 100 is 28.999...
    if rejected == 0:
        return torch.nextafter(best[0], torch.full_like(best[0], -math.inf))
    last_rejected, first_accepted = best[rejected - 1], best[rejected]
    middle = last_rejected + (first_accepted - last_rejected) / 2
    return torch.where(middle < first_accepted, middle, last_rejected)


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
    model: nn.Module, inputs: Tensor, batch_size: int, device: torch.device | None = None
) -> Tensor:
    """Check images, and predict labels or ``REJECT`` batch by batch, ``(n,)``."""
    inputs = as_images("inputs", inputs, model)
    check_images("inputs", inputs)
    with torch.no_grad():
        # Called as a user calls it: after compile() it runs the compiled program.
        output = torch.cat([model(batch.to(device)) for batch in inputs.split(batch_size)])
    return predict_labels(output, reject=True)


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
                stacklevel=2,
            )
        self._num_classes = scores.shape[1]
        return torch.cat([scores, self._column(scores, suspicion)[:, None]], dim=1)

    def _column(self, scores: Tensor, suspicion: Tensor) -> Tensor:
        """Compute the column that is above the best score iff the detector rejects."""
        best = scores.amax(dim=1)
        # Compared in the detector's own precision: a cast could move a score onto the threshold.
        rejected = suspicion.detach() > self.threshold
        column = best + (self.scale * (suspicion - self.threshold)).to(scores)
        # A score just below the threshold may leave no trace in the sum: it must stay below.
        lost = ~rejected & (column.detach() == best.detach())
        return torch.where(lost, column - spacing(best), column)

    def predict(self, inputs: Tensor) -> Tensor:
        """Predict labels or reject, batch by batch, in evaluation mode.

        Args:
            inputs: Images in [0, 1], ``(n, ...)``.

        Returns:
            0..c-1, or ``REJECT`` = -1, int64 ``(n,)``.

        Raises:
            ValueError: If the images are empty, not floating point, outside [0, 1] or NaN.
        """
        with evaluation_mode(self):
            return predict_in_batches(self, inputs, self.batch_size)
