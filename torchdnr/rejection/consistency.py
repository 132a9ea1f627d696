"""CPR: reject where a small perturbation, made for it, changes the prediction."""

import math

import torch
from torch import Tensor, nn

from torchdnr.attacks.projections import per_row
from torchdnr.decisions import class_scores, true_and_best_other
from torchdnr.rejection.detector import WithReject

BOUNDS = 0.0, 1.0


class PredictionInconsistency(nn.Module):
    """Score how near a network's prediction is to changing within a small ball: > 0 if it does.

    From the input some steps of steepest descent on the margin of the predicted class are taken in
    the ball; the score is minus the margin at the point reached, ``(n,)``. The gradient leads
    through the steps, so that an attack on the whole is one on the perturbation too.

    Args:
        net: Any classifier on images in [0, 1] that returns logits.
        eps: Radius of the ball, > 0.
        norm: Its norm: 2 or infinity.
        steps: Steps, >= 1.
        step_size: Length of each; default 2.5 eps / steps.

    Source: Chen et al., "Stratified adversarial robustness with rejection", ICML 2023, Sec. 4.
    """

    def __init__(
        self,
        net: nn.Module,
        eps: float,
        *,
        norm: float = 2,
        steps: int = 3,
        step_size: float | None = None,
    ) -> None:
        super().__init__()
        if not eps > 0 or steps < 1 or norm not in (2, math.inf):
            raise ValueError(
                "expected eps > 0, norm 2 or infinity and steps >= 1, got "
                f"{eps}, {norm} and {steps}"
            )
        self.net, self.eps, self.norm, self.steps = net, eps, norm, steps
        self.step_size = 2.5 * eps / steps if step_size is None else step_size
        self.training = net.training

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the score of images ``(n, ...)``, ``(n,)``."""
        keep = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad():
            points = inputs if inputs.requires_grad else inputs.detach().clone().requires_grad_()
            center = points
            logits = class_scores(self.net(points))
            predicted = logits.detach().argmax(dim=1)
            for _ in range(self.steps):
                margin = _margin(logits, predicted)
                slope = torch.autograd.grad(margin.sum(), points, create_graph=keep)[0]
                points = self._moved(points, slope, center)
                logits = class_scores(self.net(points))
        score = -_margin(logits, predicted)
        return score if keep else score.detach()

    def _moved(self, points: Tensor, slope: Tensor, center: Tensor) -> Tensor:
        """Take a step down the margin, inside ball and box, in operations that have derivatives."""
        if self.norm == math.inf:
            shift = (points - self.step_size * slope.sign() - center).clamp(-self.eps, self.eps)
        else:
            length = _length(slope)
            step = torch.where(length > 0, self.step_size / length, 0)
            shift = points - per_row(step, points) * slope - center
            shrink = self.eps / _length(shift).clamp_min(self.eps)
            shift = per_row(shrink, points) * shift
        return (center + shift).clamp(*BOUNDS)


def _length(vectors: Tensor) -> Tensor:
    return torch.linalg.vector_norm(vectors.flatten(1), dim=1)


def _margin(logits: Tensor, classes: Tensor) -> Tensor:
    own, other = true_and_best_other(logits, classes)
    return own - other


def consistent_prediction_rejection(
    net: nn.Module, eps: float, *, norm: float = 2, steps: int = 3, threshold: float = 0.0
) -> WithReject:
    """Build CPR: a network that rejects what a small perturbation makes it predict otherwise.

    ``calibrate`` of what is returned sets the threshold by a share of rejects instead of at a
    change of the prediction. A gradient leads through the perturbation: attacks adapt to it.

    Args:
        net: Any classifier on images in [0, 1] that returns logits.
        eps: Radius of the perturbation, > 0.
        norm: Its norm: 2 or infinity.
        steps: Steps that make it, each one a forward and backward.
        threshold: By which margin the prediction has to change; 0 as in the source.

    Returns:
        The network with its rejection.

    Raises:
        ValueError: If an argument is out of range.

    Source: Chen et al., "Stratified adversarial robustness with rejection", ICML 2023, Sec. 4.
    """
    return WithReject(net, PredictionInconsistency(net, eps, norm=norm, steps=steps), threshold)
