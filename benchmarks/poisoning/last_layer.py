"""A network whose last layer is retrained, as a function of what it is trained on."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

TOLERANCE = 1e-9
"""Largest entry of the gradient at the optimum, per sample."""


class LastLayer(nn.Module):
    """Features of a network, in float64, and a linear layer on them and a constant."""

    def __init__(self, features: Callable[[Tensor], Tensor], weight: Tensor) -> None:
        super().__init__()
        self.features, self.weight = features, weight

    def forward(self, inputs: Tensor) -> Tensor:
        """Compute logits ``(n, c)``."""
        return (with_constant(self.features(inputs)) @ self.weight.T).to(inputs)


def retrain(
    features: Callable[[Tensor], Tensor],
    inputs: Tensor,
    labels: Tensor,
    sample_weight: Tensor | None = None,
    *,
    num_classes: int = 10,
    ridge: float = 1.0,
) -> LastLayer:
    """Train the last layer to its optimum, which keeps the graph of inputs and sample weights.

    Minimises the sum of the cross-entropies plus ``ridge / 2`` times the squared weights, of the
    constant too. At the optimum one more Newton step changes nothing but has its derivatives.

    Args:
        features: Maps inputs to features ``(n, d)``.
        inputs: ``(n, ...)``.
        labels: int64 ``(n,)``.
        sample_weight: Factor of each cross-entropy, ``(n,)``.
        num_classes: c.
        ridge: > 0.

    Returns:
        The network.
    """
    z = with_constant(features(inputs))
    each = torch.ones_like(z[:, 0]) if sample_weight is None else sample_weight.to(z)
    target = torch.eye(num_classes).to(z)[labels]
    weight = z.new_zeros(num_classes, z.shape[1])
    z0, each0 = z.detach(), each.detach()
    for _ in range(50):
        gradient = _gradient(weight, z0, each0, target, ridge)
        if gradient.abs().max() <= TOLERANCE * len(z):
            break
        weight = _newton_step(weight, gradient, z0, each0, target, ridge)
    factor = torch.linalg.cholesky(_hessian(weight, z0, each0, ridge))
    step = torch.cholesky_solve(
        _gradient(weight, z, each, target, ridge).flatten()[:, None], factor
    )
    return LastLayer(features, weight - step.view_as(weight))


def with_constant(features: Tensor) -> Tensor:
    """Append a one to each row of features ``(n, d)``, in float64."""
    return nn.functional.pad(features.double(), (0, 1), value=1.0)


def _gradient(weight: Tensor, z: Tensor, each: Tensor, target: Tensor, ridge: float) -> Tensor:
    error = each[:, None] * ((z @ weight.T).softmax(dim=1) - target)
    return error.T @ z + ridge * weight


def _hessian(weight: Tensor, z: Tensor, each: Tensor, ridge: float) -> Tensor:
    """Return that of the loss by the flat weights, ``(c (d + 1), c (d + 1))``."""
    p = (z @ weight.T).softmax(dim=1)
    c, d = weight.shape
    hessian = z.new_zeros(c, d, c, d)
    for i in range(c):
        for j in range(i, c):
            factor = each * p[:, i] * (float(i == j) - p[:, j])
            block = (z * factor[:, None]).T @ z
            hessian[i, :, j] = hessian[j, :, i] = block
    hessian = hessian.view(c * d, c * d)
    hessian.diagonal().add_(ridge)
    return hessian


def _newton_step(
    weight: Tensor, gradient: Tensor, z: Tensor, each: Tensor, target: Tensor, ridge: float
) -> Tensor:
    """Take a Newton step, halved until the loss falls."""
    factor = torch.linalg.cholesky(_hessian(weight, z, each, ridge))
    step = torch.cholesky_solve(gradient.flatten()[:, None], factor).view_as(weight)

    def loss(weight: Tensor) -> float:
        cross_entropy = (each[:, None] * target * (z @ weight.T).log_softmax(dim=1)).sum()
        return (ridge / 2 * weight.square().sum() - cross_entropy).item()

    before = loss(weight)
    while step.abs().max() > torch.finfo(step.dtype).eps and loss(weight - step) > before:
        step = step / 2
    return weight - step
