"""Training of a network and the SVMs on it together, against attacks on the whole."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchdnr.arrays import as_labels
from torchdnr.distributed.sharing import checked_batches
from torchdnr.kernels.any_kernel import rbf_gamma
from torchdnr.models.adversarial import Adversary
from torchdnr.models.training import (
    ADVERSARIAL_TRAINING,
    TrainingSettings,
    check_data,
    train_against,
)
from torchdnr.svm.rbf_svm import RBFSVM

END_TO_END_TRAINING = ADVERSARIAL_TRAINING
"""How ``DNR.fit_end_to_end`` trains."""
NETWORK_RATE = 0.25  # learning rate of the network relative to that of the SVMs
SCALE = 5.0  # what a score is worth in logits, at the beginning
TRAINED = "support_vectors", "dual_coef", "intercept"


class ScaledMargins(nn.Module):
    """How far the scores are above theta, times a scale that is learned: logits, 0 rejects."""

    def __init__(self, model: nn.Module, theta: float) -> None:
        super().__init__()
        self.model, self.theta = model, theta
        self.log_scale = nn.Parameter(torch.tensor(math.log(SCALE)))

    def forward(self, inputs: Tensor) -> Tensor:
        """Compute logits ``(n, c)``."""
        scored: Any = self.model
        return self.log_scale.exp() * (scored.scores(inputs) - self.theta)


@contextmanager
def trainable(svms: Iterable[RBFSVM]) -> Iterator[list[dict[str, Any]]]:
    """Make parameters of what is in SVMs while they train; yield groups for the optimizer.

    Support vectors, dual coefficients and intercepts are buffers before and after; the vectors are
    no training samples then. Of a kernel of gpytorch all that has a value is trained.
    """
    svms = list(svms)
    groups: list[dict[str, Any]] = []
    for svm in svms:
        for name in TRAINED:
            setattr(svm, name, nn.Parameter(getattr(svm, name).detach().clone()))
        groups.append({"params": [getattr(svm, name) for name in TRAINED]})
        if svm.kernel is not None:
            svm.kernel.requires_grad_(True)
            groups.append({"params": list(svm.kernel.parameters()), "lr": _kernel_rate(svm)})
    try:
        yield groups
    finally:
        for svm in svms:
            for name in TRAINED:
                value = getattr(svm, name).detach()
                delattr(svm, name)
                svm.register_buffer(name, value)
                setattr(svm, name, value)  # from which the SVM measures its vectors anew
            svm.support, svm.solution = torch.full_like(svm.support, -1), None
            if svm.kernel is not None:
                svm.kernel.requires_grad_(False)


def _kernel_rate(svm: RBFSVM) -> float:
    """Return the learning rate of a kernel at which log(gamma) moves as fast as others do.

    gamma is 1 / (2 lengthscale^2), and the lengthscale the softplus of what is trained.
    """
    if svm.kernel is None or rbf_gamma(svm.kernel) is None:
        return 1.0
    lengthscale = svm.kernel.lengthscale.item()
    return lengthscale / 2 / -math.expm1(-lengthscale)


def images_and_labels(
    inputs: Tensor | Iterable[Any], labels: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Check images and labels, and read those of a loader into memory.

    Raises:
        ValueError: If there are no labels, or they do not fit.
    """
    batches = list(checked_batches(inputs, 1 << 16))
    images = torch.cat([images for images, _ in batches])
    known = [of_batch for _, of_batch in batches if of_batch is not None]
    if labels is None and known:
        labels = torch.cat(known)
    if labels is None:
        raise ValueError("expected labels: pass them, or a loader that yields (images, labels)")
    labels = as_labels("labels", labels)
    check_data(images, labels)
    return images, labels


def train_end_to_end(
    model: nn.Module,
    net: nn.Module | None,
    images: Tensor,
    labels: Tensor,
    adversary: Adversary,
    settings: TrainingSettings,
    *,
    theta: float,
    seed: int,
    checkpoint: str | Path | None,
    progress: bool,
) -> None:
    """Train the SVMs of a model, and its network unless it is None; see ``DNR.fit_end_to_end``."""
    margins = ScaledMargins(model, theta).to(next(model.parameters()).device)
    modes = {module: module.training for module in margins.modules()}
    frozen = [p for p in model.parameters() if p.requires_grad] if net is None else []
    if net is not None and not any(p.requires_grad for p in net.parameters()):
        raise ValueError(
            "expected a network that can be trained, got one whose parameters all have "
            "requires_grad=False; call net.requires_grad_(True), or pass freeze_network=True"
        )
    with trainable(m for m in model.modules() if isinstance(m, RBFSVM)) as groups:
        groups = [*groups, {"params": [margins.log_scale]}]
        if net is not None:
            groups.append({"params": list(net.parameters()), "lr": NETWORK_RATE})
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            options: Any = {"seed": seed, "checkpoint": checkpoint, "progress": progress}
            options["against"] = {"freeze_network": net is None}
            train_against(margins, groups, adversary, images, labels, settings, **options)
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)
            for module, training in modes.items():
                module.training = training
