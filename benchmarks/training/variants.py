"""The networks that are trained and the classifiers on them, by name; made where a file lacks."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchdnr import DNR, NR, Adversary, LogitRejection
from torchdnr.files import read_json, write_json
from torchdnr.models import (
    ADVERSARIAL_TRAINING,
    MNIST_LAYERS,
    MNISTNet,
    TrainingSettings,
    load_network,
    save_network,
    train_network,
)
from torchdnr.rejection import consistent_prediction_rejection

PLAIN = "plain"
PLAIN_EPOCHS = {"mnist": 3, "cifar10": 12}
CONSISTENT = {2.0: (0.5, 10), math.inf: (0.1, 20)}  # eps and steps of CPR's perturbation, by norm
SVM_SAMPLES = 1_000
RAMP = 0.4  # of the training end to end


class SmallNet(nn.Sequential):
    """Two convolutions and two hidden layers: quick to train."""

    def __init__(self, num_classes: int = 10, channels: int = 1, side: int = 28) -> None:
        super().__init__()
        layers = {
            "conv1": nn.Conv2d(channels, 32, 4, 2, 1),
            "relu1": nn.ReLU(),
            "conv2": nn.Conv2d(32, 64, 4, 2, 1),
            "relu2": nn.ReLU(),
            "flatten": nn.Flatten(),
            "fc1": nn.Linear(64 * (side // 4) ** 2, 200),
            "relu_fc1": nn.ReLU(),
            "fc2": nn.Linear(200, 200),
            "relu_fc2": nn.ReLU(),
            "logits": nn.Linear(200, num_classes),
        }
        for name, layer in layers.items():
            self.add_module(name, layer)


SMALL_LAYERS = ["relu2", "relu_fc1", "relu_fc2"]
NETWORKS: dict[str, tuple[Callable[..., nn.Module], list[str]]] = {
    "small": (SmallNet, SMALL_LAYERS),
    "table1": (MNISTNet, list(MNIST_LAYERS)),
    "cifar": (partial(SmallNet, channels=3, side=32), SMALL_LAYERS),
}
"""Networks by name, with the layers that DNR reads; NR reads the last. "cifar" is for CIFAR-10."""

TRAININGS: dict[str, dict[str, Any]] = {
    "reject": {"loss": "reject"},
    "plain loss": {"loss": "plain"},
    "class": {"loss": "class"},
    "confidence": {"loss": "confidence"},
    "no far starts": {"loss": "reject", "far_starts": 0.0},
    "no mask": {"loss": "reject", "masked": False},
}
"""Adversaries by name, less eps and norm: a network is trained against each."""


@dataclass(frozen=True)
class Study:
    """One seed on one network: data, budget, and the folder that keeps what was made.

    Attributes:
        network: Name in ``NETWORKS``.
        norm: Of the attacks.
        eps: Of the adversary.
        seed: Of weights, splits and training.
        images: That are trained on, and ``labels``; ``svm`` and ``threshold`` are of others.
        epochs: Of training against the adversary.
        folder: Where files go.
    """

    network: str
    norm: float
    eps: float
    seed: int
    images: Tensor
    labels: Tensor
    svm: tuple[Tensor, Tensor]
    threshold: tuple[Tensor, Tensor]
    epochs: int
    folder: Path

    @property
    def dataset(self) -> str:
        """Name of the data set, which the network implies."""
        return "cifar10" if self.network == "cifar" else "mnist"

    def training(self, epochs: int) -> TrainingSettings:
        """Say how to train, with or without an adversary."""
        augment = self.dataset == "cifar10"
        return replace(ADVERSARIAL_TRAINING, epochs=epochs, augment=augment)

    def build(self, outputs: int = 10) -> nn.Module:
        """Build the network with the weights of the seed."""
        torch.manual_seed(self.seed)
        net = NETWORKS[self.network][0](num_classes=outputs)
        return net.to(memory_format=torch.channels_last)

    def trained(self, name: str) -> nn.Module:
        """Load a network, or train it: "plain", or against one of ``TRAININGS``."""
        path = self.folder / f"network {name}.safetensors"
        outputs = 11 if name.endswith("class") else 10
        if path.exists():
            return load_network(self.build(outputs), path).eval()
        net = self.build(outputs)
        if not name.startswith(PLAIN):
            start = self.trained("plain class" if outputs == 11 else PLAIN)
            net.load_state_dict(start.state_dict())
        began, checkpoint = time.process_time(), self.folder / f"training {name}.safetensors"
        in_one_piece = not checkpoint.exists()
        adversary, epochs = None, PLAIN_EPOCHS[self.dataset]
        if name in TRAININGS:
            adversary = Adversary(eps=self.eps, norm=self.norm, **TRAININGS[name])
            epochs = self.epochs
        train_network(
            net,
            self.images,
            self.labels,
            self.training(epochs),
            adversary=adversary,
            seed=self.seed,
            checkpoint=checkpoint,
        )
        save_network(net, path)
        if in_one_piece:
            self.note(name, time.process_time() - began)
        return net

    def note(self, name: str, seconds: float) -> None:
        """Keep the processor seconds that a training took."""
        write_json(self.folder / f"seconds {name}.json", {"seconds": seconds})

    def seconds(self, name: str) -> float | None:
        """Return the processor seconds that a training took, if it was in one piece."""
        path = self.folder / f"seconds {name}.json"
        return read_json(path)["seconds"] if path.exists() else None

    def fitted(self, kind: type[DNR], training: str) -> DNR:
        """Load an NR or DNR on a network, or fit it."""
        net, path = self.trained(training), self.folder / f"{kind.__name__} {training}.safetensors"
        if path.exists():
            return kind.load(path, net)
        layers = NETWORKS[self.network][1]
        given: Any = layers[-1] if kind is NR else layers
        model = kind(net, given, seed=self.seed).fit(*self.svm)
        model.save(path)
        return model

    def end_to_end(self, kind: type[DNR], freeze: bool = False) -> DNR:
        """Load an NR or DNR that was trained end to end from the one on the plain network."""
        name = f"{kind.__name__} end to end{' frozen' * freeze}"
        path = self.folder / f"{name}.safetensors"
        if path.exists():
            return kind.load(path, self.trained(PLAIN))
        model, checkpoint = self.fitted(kind, PLAIN), self.folder / f"training {name}.safetensors"
        began, in_one_piece = time.process_time(), not checkpoint.exists()
        model.fit_end_to_end(
            self.images,
            self.labels,
            Adversary(eps=self.eps, norm=self.norm, ramp=RAMP),
            self.training(self.epochs),
            freeze_network=freeze,
            seed=self.seed,
            checkpoint=checkpoint,
            progress=True,
        )
        model.save(path)
        if in_one_piece:
            self.note(name, time.process_time() - began)
        return model

    def consistent(self, training: str) -> nn.Module:
        """Build CPR on a network."""
        eps, steps = CONSISTENT[self.norm]
        net = self.trained(training)
        return consistent_prediction_rejection(net, eps, norm=self.norm, steps=steps)


class Variant(NamedTuple):
    """A classifier of the table."""

    make: Callable[[Study], nn.Module]
    training: str | None = None  # whose seconds it cost, beside what it starts from
    ablation: bool = False
    matched: str | None = None  # whose share of accepted and right clean images theta leaves


def _logit(training: str, head: str = "logit", ablation: bool = False) -> Variant:
    def make(study: Study) -> nn.Module:
        return LogitRejection(study.trained(training), head=head)

    return Variant(make, None if training == PLAIN else training, ablation)


def _on(kind: type[DNR], training: str) -> Variant:
    return Variant(partial(Study.fitted, kind=kind, training=training), training)


def _matched(kind: type[DNR], robust: str) -> Variant:
    return Variant(partial(Study.fitted, kind=kind, training=PLAIN), PLAIN, matched=robust)


VARIANTS: dict[str, Variant] = {
    "plain network, no rejection": Variant(lambda study: study.trained(PLAIN)),
    "NR": Variant(lambda study: study.fitted(NR, PLAIN)),
    "DNR": Variant(lambda study: study.fitted(DNR, PLAIN)),
    "trained to reject, logit": _logit("reject"),
    "DNR end to end": Variant(lambda study: study.end_to_end(DNR), "DNR end to end"),
    "adversarial training, no rejection": Variant(
        lambda study: study.trained("plain loss"), "plain loss"
    ),
    "adversarial training, logit": _logit("plain loss"),
    "NR end to end": Variant(lambda study: study.end_to_end(NR), "NR end to end"),
    "trained to reject, DNR refitted": _on(DNR, "reject"),
    "trained to reject, NR refitted": _on(NR, "reject"),
    "class that rejects": _logit("class", "class"),
    "confidence-calibrated, after CCAT": _logit("confidence", "softmax"),
    "adversarial training, CPR": Variant(
        lambda study: study.consistent("plain loss"), "plain loss"
    ),
    "plain network, logit": _logit(PLAIN),
    "NR, as often right as trained to reject": _matched(NR, "trained to reject, logit"),
    "DNR, as often right as trained to reject": _matched(DNR, "trained to reject, logit"),
    "trained to reject, softmax": _logit("reject", "softmax", ablation=True),
    "trained to reject without far starts": _logit("no far starts", ablation=True),
    "trained to reject without mask": _logit("no mask", ablation=True),
    "DNR end to end, network frozen": Variant(
        lambda study: study.end_to_end(DNR, freeze=True), "DNR end to end frozen", True
    ),
}
"""Classifiers by name, the most telling first."""
