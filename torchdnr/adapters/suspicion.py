"""A rejecting classifier as a detector: one score per input, higher for a more suspicious one."""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchdnr.decisions import evaluation_mode, split_scores

if TYPE_CHECKING:
    import numpy as np


def suspicion(model: nn.Module, inputs: Tensor) -> Tensor:
    """Compute by how much the threshold exceeds the best score, ``theta - max_k s_k``.

    Args:
        model: Returns ``(n, c + 1)`` with the threshold in the last column.
        inputs: ``(n, ...)``.

    Returns:
        ``(n,)``, differentiable; rejected iff >= 0.
    """
    scores, threshold = split_scores(model(inputs), True)
    return threshold - scores.amax(dim=1)


@torch.no_grad()
def suspicion_of_array(model: nn.Module, x: "np.ndarray | Tensor", batch_size: int) -> Tensor:
    """Compute ``suspicion`` of an array, batch by batch, in evaluation mode.

    Args:
        model: Returns ``(n, c + 1)`` with the threshold in the last column.
        x: ``(n, ...)``; converted to the dtype and device of the model.
        batch_size: Rows in one forward.

    Returns:
        ``(n,)``, on the CPU.
    """
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    with evaluation_mode(model):
        parts = [suspicion(model, part.to(like)) for part in torch.as_tensor(x).split(batch_size)]
    return torch.cat(parts).cpu()


class SuspicionDetector:
    """The interface of alibi-detect's adversarial detectors; that package is not needed.

    Args:
        model: Returns ``(n, c + 1)`` with the threshold in the last column.
        batch_size: Rows in one forward.
        name: Put into what ``predict`` returns.
    """

    def __init__(self, model: nn.Module, *, batch_size: int = 256, name: str | None = None) -> None:
        self.model, self.batch_size = model, batch_size
        self.meta = {
            "name": name or type(model).__name__,
            "detector_type": "adversarial",
            "online": False,
            "data_type": "image",
            "version": version("torchdnr"),
        }

    def score(self, x: "np.ndarray") -> "np.ndarray":
        """Compute ``theta - max_k s_k``, ``(n,)``."""
        return suspicion_of_array(self.model, x, self.batch_size).numpy()

    def predict(self, x: "np.ndarray", return_instance_score: bool = True) -> dict[str, Any]:
        """Tell which inputs are rejected.

        Args:
            x: ``(n, ...)``.
            return_instance_score: Whether to return the scores too.

        Returns:
            ``{"meta": ..., "data": {"is_adversarial": (n,) of 0 and 1, "instance_score": (n,)}}``,
            the score None if it is not wanted. A score of 0, a tie with theta, is rejected.
        """
        score = self.score(x)
        data = {"is_adversarial": (score >= 0).astype(int)}
        data["instance_score"] = score if return_instance_score else None
        return {"data": data, "meta": dict(self.meta)}
