"""`WithReject`: a detector's decision as a column that rejects, beside a classifier's scores."""

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal, Self, overload

import torch
from torch import Tensor, nn

from torchdnr.decisions import class_scores, evaluation_mode
from torchdnr.rejection.threshold import best_and_wrong, calibrated_threshold, predict_in_batches
from torchdnr.resources import check_batch_size


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
        batch_size: Inputs per forward pass in ``predict``; None: as many as suits their size.

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
        batch_size: int | None = None,
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
        check_batch_size(batch_size)
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

    @torch.inference_mode(False)
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
        self.threshold = -torch.nextafter(theta, torch.full_like(theta, math.inf)).item()
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
