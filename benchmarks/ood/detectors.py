"""DNR, NR and detectors of pytorch-ood, on one network, fitted on the same images."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from pytorch_ood.detector import KNN, EnergyBased, Mahalanobis, MaxSoftmax
from torch import Tensor, nn

from torchdnr import DNR, NR
from torchdnr.adapters.pytorch_ood_detectors import RejectionDetector
from torchdnr.evaluation.judging import outputs
from torchdnr.features.extraction import extract

BATCH_SIZE = 256
ALL_LAYERS = "all layers"
NEIGHBOURS_PER_IMAGE = 0.001
"""Share of the fitted images that k is for kNN: 50 of 50,000, and 1,000 of a million, in Sun et
al., "Out-of-distribution detection with deep nearest neighbors", 2022."""


@dataclass(frozen=True)
class Detectors:
    """Scores by name, each higher for an image that is more likely unknown.

    Attributes:
        net: The network.
        dnr: DNR on it, fitted and calibrated.
        nr: NR on it, fitted and calibrated.
        on_features: Fitted detectors of pytorch-ood by name, with the layers that each reads.
    """

    net: nn.Module
    dnr: DNR
    nr: NR
    on_features: dict[str, tuple[Any, tuple[str, ...]]]

    @torch.no_grad()
    def scores(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Score images by all detectors.

        Args:
            images: In [0, 1], ``(n, ...)``.

        Returns:
            Scores by detector, float64 ``(n,)``, those of DNR and NR >= 0 where they reject; and
            the labels that the network alone gives, ``(n,)``; on the CPU.
        """
        logits = outputs(self.net, images, BATCH_SIZE).double()  # a softmax in float32 is often 1
        features, _ = extract(self.dnr.features, images, batch_size=BATCH_SIZE)
        scores = {}
        for name, model in (("DNR", self.dnr), ("NR", self.nr)):
            detector = RejectionDetector(model)
            scores[name] = torch.cat([detector(part) for part in images.split(BATCH_SIZE)])
        scores["maximum softmax"] = MaxSoftmax(None).predict_logits(logits)
        scores["energy"] = EnergyBased(None).predict_logits(logits)
        for name, (detector, layers) in self.on_features.items():
            scores[name] = detector.predict_features(joined(features, layers))
        return {k: s.double().cpu() for k, s in scores.items()}, logits.argmax(dim=1).cpu()


def fit_detectors(
    net: nn.Module, dnr: DNR, nr: NR, images: Tensor, labels: Tensor, neighbours: int
) -> Detectors:
    """Fit Mahalanobis and kNN on every layer that DNR reads, and on all of them together.

    Args:
        net: The network, in evaluation mode.
        dnr: DNR on it, fitted on these images and calibrated.
        nr: NR on it, likewise.
        images: In [0, 1], ``(n, ...)``.
        labels: Classes, ``(n,)``.
        neighbours: k of kNN.

    Returns:
        All detectors.
    """
    features, _ = extract(dnr.features, images, batch_size=BATCH_SIZE)
    labels = labels.cpu()
    views = {name: (name,) for name in dnr.layers} | {ALL_LAYERS: dnr.layers}
    fitted: dict[str, tuple[Any, tuple[str, ...]]] = {}
    for view, layers in views.items():
        # pytorch-ood makes a covariance of the default type. That of all layers is singular but
        # for its ridge, as logits are linear in the layer before: float32 cannot invert it.
        with double_by_default():
            mahalanobis = Mahalanobis(None).fit_features(joined(features, layers), labels)
        fitted[f"Mahalanobis, {view}"] = mahalanobis, layers
    for view, layers in views.items():
        knn = KNN(None, k=neighbours).fit_features(joined(features, layers), labels)
        fitted[f"kNN, {view}"] = knn, layers
    return Detectors(net, dnr, nr, fitted)


def joined(features: dict[str, Tensor], layers: tuple[str, ...]) -> Tensor:
    """Concatenate the features of layers, float64 ``(n, d)``, on the CPU, as scikit-learn wants."""
    return torch.cat([features[name] for name in layers], dim=1).double().cpu()


@contextmanager
def double_by_default() -> Iterator[None]:
    """Make new tensors float64 for a while."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
