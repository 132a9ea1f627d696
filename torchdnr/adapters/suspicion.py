"""The score of a rejecting classifier as a detector: higher for a more suspicious input."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from torchdnr.decisions import class_scores, evaluation_mode

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
    output = class_scores(model(inputs))
    return output[:, -1] - output[:, :-1].amax(dim=1)


@torch.no_grad()
def suspicion_of_array(model: nn.Module, x: "np.ndarray | Tensor", batch_size: int) -> Tensor:
    """Compute ``suspicion`` of an array in batches, in evaluation mode; returned on the CPU."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    with evaluation_mode(model):
        parts = [suspicion(model, part.to(like)) for part in torch.as_tensor(x).split(batch_size)]
    return torch.cat(parts).cpu()
