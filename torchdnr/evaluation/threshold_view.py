"""A classifier seen with another rejection threshold, without a change to it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from torchdnr.attacks.objectives import split_scores
from torchdnr.attacks.target import has_reject_column


class WithThreshold(nn.Module):
    """A view of a classifier with another rejection threshold; the classifier is not changed.

    Args:
        model: Maps ``(n, ...)`` to scores ``(n, c)``, or ``(n, c + 1)`` with theta last.
        threshold: theta of the view, finite.
        reject: Whether the last column of ``model`` is theta; None: ask the model.
    """

    def __init__(
        self, model: Callable[[Tensor], Tensor], threshold: float, reject: bool | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.threshold = float(threshold)
        self.reject = has_reject_column(model, reject)
        self.reject_index = -1  # the last column; it tells attacks that there is one
        self.training = False

    def forward(self, inputs: Tensor) -> Tensor:
        """Compute scores and the threshold of the view, ``(n, c + 1)``."""
        scores, _ = split_scores(self.model(inputs), self.reject)
        return torch.cat([scores, scores.new_full((len(scores), 1), self.threshold)], dim=1)

    @property
    def smoothed(self) -> Callable[..., "WithThreshold"]:
        """Smoothed views of the model with this threshold; there are some iff the model has any."""
        smoothed = self.model.smoothed
        return lambda *args, **options: WithThreshold(
            smoothed(*args, **options), self.threshold, self.reject
        )
