"""Foolbox's idea of success, corrected: accepted and wrong."""

from typing import Any

import torch
from torch import Tensor

from torchdnr.adapters.views import require
from torchdnr.decisions import evades

criteria: Any = require("foolbox.criteria", "foolbox")
eagerpy: Any = require("eagerpy", "foolbox")


class AcceptedMisclassification(criteria.Misclassification):
    """Criterion that an input is accepted and assigned to a wrong class.

    For a ``foolbox.PyTorchModel`` around a model with the threshold in its last column. It makes
    success exact in every attack that takes a ``Misclassification``, and is all that decision-based
    attacks need. Gradient attacks of foolbox follow a loss as well, in which rejection is one more
    class to run to: give them ``for_label(model, labels)`` instead, and the labels.

    Args:
        labels: True classes, a torch tensor ``(n,)``.
    """

    def __init__(self, labels: Tensor) -> None:
        if not isinstance(labels, Tensor):
            raise ValueError(f"labels must be a torch tensor (n,), got {type(labels).__name__}")
        super().__init__(labels)

    def __call__(self, perturbed: object, outputs: object) -> object:
        """Tell which inputs evade.

        Args:
            perturbed: Not looked at.
            outputs: Model outputs ``(n, c + 1)``, a torch or eagerpy tensor.

        Returns:
            Evasions, bool ``(n,)``, of the kind of ``outputs``.
        """
        scores, restore = eagerpy.astensor_(outputs)
        with torch.no_grad():
            evading = evades(scores.raw, self.labels.raw.to(scores.raw.device), reject=True)
        return restore(eagerpy.astensor(evading))
