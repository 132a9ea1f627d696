"""`LogitRejection`: a network that rejects by its own outputs."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from torchdnr.arrays import as_images
from torchdnr.decisions import class_scores, evaluation_mode
from torchdnr.features.network import has_digest, network_digest
from torchdnr.files import CheckpointError, load_tensors, save_tensors
from torchdnr.rejection.threshold import (
    Threshold,
    best_and_wrong,
    calibrated_threshold,
    predict_in_batches,
)
from torchdnr.resources import check_batch_size

KIND = "LogitRejection"


def _by_odds(logits: Tensor) -> Tensor:
    """Compute the log-odds of the softmax, ``log p_k - log(1 - p_k)``."""
    top = logits.argmax(dim=1, keepdim=True)
    # 1 - p loses its digits for the best class alone: there the others are summed by themselves.
    p = logits.softmax(dim=1).scatter(1, top, 0)
    others = logits.logsumexp(dim=1, keepdim=True) + torch.log1p(-p)
    of_top = logits.scatter(1, top, -torch.inf).logsumexp(dim=1, keepdim=True)
    return logits - others.scatter(1, top, of_top)


HEADS = {
    "logit": lambda logits: logits,
    "softmax": _by_odds,
    "class": lambda logits: logits[:, :-1] - logits[:, -1:],
}
"""Class scores of logits ``(n, k)``, see ``LogitRejection``."""


class LogitRejection(nn.Module):
    """A network that rejects an input whose best score, made of its logits, is not above theta.

    It is the head of a network that was trained to reject: that of the losses "reject" and "class"
    of an ``Adversary``. Of any other network it is the baseline that costs nothing.

    Args:
        net: Any classifier on images in [0, 1] that returns logits. It is not changed, and runs in
            the mode that it is in.
        head: What the scores are: "logit", the logits; "softmax", the log-odds of their softmax, by
            which inputs are ordered as by its probabilities, without their saturation; "class", how
            far each logit is above the last one, that of a class which rejects.
        batch_size: Images per forward pass in ``predict`` and ``calibrate``; None: as many
            as suits their size.

    Raises:
        ValueError: If there is no such head, or ``batch_size`` is below 1.
    """

    def __init__(
        self, net: nn.Module, *, head: str = "logit", batch_size: int | None = None
    ) -> None:
        super().__init__()
        if head not in HEADS:
            raise ValueError(f"no head {head!r}; choose from: {', '.join(HEADS)}")
        check_batch_size(batch_size)
        self.net, self.head, self.batch_size = net, head, batch_size
        self.rejection = Threshold()
        self.training = net.training  # whoever puts it back into its mode must not train the net

    @property
    def threshold(self) -> Tensor:
        """The rejection threshold theta, a scalar; NaN until it is set."""
        return self.rejection.theta

    @property
    def reject_index(self) -> int:
        """Column of the threshold in the output: the last one."""
        return -1

    @property
    def device(self) -> torch.device:
        """Where the scores are computed: the device of the network."""
        return next((p.device for p in self.parameters()), self.threshold.device)

    def scores(self, inputs: Tensor) -> Tensor:
        """Compute class scores ``(n, c)`` of images in [0, 1], ``(n, ...)``."""
        logits = class_scores(self.net(as_images("inputs", inputs, self.net)))
        return HEADS[self.head](logits)

    def forward(self, inputs: Tensor) -> Tensor:
        """Compute class scores and threshold, ``(n, c + 1)``, as ``DNR`` does.

        Raises:
            NotFittedError: If the threshold is not set.
        """
        return self.rejection.append(self.scores(inputs))

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
        """Set the threshold by a share of rejects or by an error: see ``DNR.calibrate``."""

        def judge(images: Tensor, of_batch: Tensor | None) -> Tensor:
            return best_and_wrong(self.scores(images.to(self.device)), of_batch)

        goal = {"rejection_rate": rejection_rate, "max_error": max_error, "confidence": confidence}
        options: dict[str, Any] = {"batch_size": self.batch_size, **goal}
        with evaluation_mode(self):
            self.rejection.set(calibrated_threshold(self, judge, inputs, labels, **options))
        return self

    def set_threshold(self, threshold: float | Tensor) -> None:
        """Set theta by hand; ValueError if it is not finite."""
        self.rejection.set(torch.as_tensor(threshold, device=self.device))

    def predict(
        self, inputs: Tensor | Iterable[Any], *, return_scores: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Predict labels or reject, batch by batch, in evaluation mode: see ``DNR.predict``."""
        with evaluation_mode(self):
            arguments = inputs, self.batch_size, self.device, return_scores
            return predict_in_batches(self, *arguments)

    def save(self, path: str | Path) -> None:
        """Save threshold and settings to one safetensors file; the network stays apart.

        Args:
            path: File to write, whole or not at all.

        Raises:
            OSError: If the file cannot be written; an earlier one stays as it was.
        """
        settings = {"head": self.head, "batch_size": self.batch_size}
        metadata = {"options": settings, "network_digest": network_digest(self.net)}
        save_tensors(path, {"theta": self.threshold}, metadata, kind=KIND)

    @classmethod
    def load(cls, path: str | Path, net: nn.Module, *, strict: bool = True) -> Self:
        """Load what ``save`` wrote, onto the network that it was saved with.

        Args:
            path: File to read.
            net: The network, with its weights.
            strict: Whether to refuse a network with other weights, to which theta says nothing.

        Returns:
            The classifier, on the device of the network.

        Raises:
            CheckpointError: If the file is damaged or foreign, or belongs to another network.
        """
        tensors, metadata = load_tensors(path, kind=KIND)
        if strict and not has_digest(net, metadata["network_digest"]):
            raise CheckpointError(
                f"{path}: expected the network it was saved with, got one with other weights; load "
                "those weights first, or pass strict=False"
            )
        model = cls(net, **metadata["options"])
        if torch.isfinite(tensors["theta"]):
            model.set_threshold(tensors["theta"])
        return model.to(model.device)
