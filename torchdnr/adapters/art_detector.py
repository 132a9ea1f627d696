"""A rejecting classifier as an evasion detector of the Adversarial Robustness Toolbox."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from torchdnr.adapters.suspicion import suspicion_of_array
from torchdnr.adapters.views import require

if TYPE_CHECKING:
    import numpy as np

detectors: Any = require("art.defences.detector.evasion", "adversarial-robustness-toolbox")


class ARTDetector(detectors.EvasionDetector):
    """The rejection of a model as ART's ``EvasionDetector``.

    Args:
        model: Returns ``(n, c + 1)`` with the threshold in the last column, such as ``DNR``.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model  # with a method ``fit``

    def fit(
        self,
        x: "np.ndarray",
        y: "np.ndarray",
        batch_size: int = 128,
        nb_epochs: int = 20,
        **kwargs: Any,  # noqa: ANN401 - ART's signature
    ) -> None:
        """Fit the model anew; its threshold is dropped, so call ``model.calibrate`` next.

        Args:
            x: Images in [0, 1], ``(n, ...)``.
            y: Labels ``(n,)``, or one-hot ``(n, c)``.
            batch_size: Not used; the model has its own.
            nb_epochs: Not used; the fit is exact.
            **kwargs: For ``model.fit``.
        """
        labels = torch.as_tensor(y)
        labels = labels.argmax(dim=1) if labels.ndim == 2 else labels
        self.model.fit(torch.as_tensor(x), labels.long(), **kwargs)

    def detect(
        self,
        x: "np.ndarray",
        batch_size: int = 128,
        **kwargs: Any,  # noqa: ANN401 - ART's signature
    ) -> "tuple[dict[str, Any], np.ndarray]":
        """Tell which inputs are rejected.

        Args:
            x: Images in [0, 1], ``(n, ...)``.
            batch_size: Rows in one forward.
            **kwargs: Not used.

        Returns:
            ``{"scores": theta - max_k s_k, (n,)}``, and whether each is rejected, bool ``(n,)``.
        """
        score = suspicion_of_array(self.model, x, batch_size)
        return {"scores": score.numpy()}, (score >= 0).numpy()
