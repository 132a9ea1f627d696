"""The network of a run folder and the layers that DNR reads: the paper's, or torchvision's."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from torchdnr.cli.settings import SPLIT_SIZES
from torchdnr.data.sources import Dataset
from torchdnr.features.choice import default_layers
from torchdnr.features.reductions import ReductionLike
from torchdnr.models.backbones import NETWORK, build_backbone
from torchdnr.models.paper import CIFAR10_LAYERS, MNIST_LAYERS, CIFAR10Net, MNISTNet
from torchdnr.models.training import CIFAR10_TRAINING, MNIST_TRAINING, TrainingSettings

REDUCTION = re.compile(
    r"(?P<layer>[^:]+)(:(?P<kind>flatten|avg|(grid|project)(?P<number>[1-9]\d*)))?"
)


@dataclass(frozen=True)
class Preset:
    """A network that fits a data set, with the layers that DNR reads and how it is trained."""

    name: str  # its architecture
    build: Callable[..., nn.Module]  # num_classes=N gives it so many outputs
    layers: tuple[str, ...] | None  # for ``parse_layers``; None: chosen when the network is built
    training: TrainingSettings


_PAPER = {
    (1, 28, 28): (MNISTNet, MNIST_LAYERS, MNIST_TRAINING),
    (3, 32, 32): (CIFAR10Net, CIFAR10_LAYERS, CIFAR10_TRAINING),
}


def choose_network(
    source: str,
    shape: tuple[int, ...],
    classes: int,
    *,
    backbone: str | None = None,
    outputs: list[int] | None = None,
    weights: str | None = None,
) -> Preset:
    """Choose the network for a data set: by the shape of its images, or the named backbone.

    ``outputs`` are those of the backbone that are the data set's classes; None: it is built with
    one output per class. ``weights`` are here only refused where there is no backbone.
    """
    if backbone is not None:
        if shape[0] != 3:
            raise ValueError(
                f"--backbone takes images of 3 channels, got {shape} in {source}; repeat the "
                "grey channel in the data, or drop the option"
            )
        build = partial(build_backbone, backbone, num_classes=classes, outputs=outputs)
        build()  # raises for an unknown backbone or wrong outputs, before any costly work
        return Preset(backbone, build, None, CIFAR10_TRAINING)
    for flag, value in (("--outputs", outputs), ("--weights", weights)):
        if value is not None:
            raise ValueError(f"{flag} must go with a --backbone: name one, or drop the option")
    if shape not in _PAPER:
        raise ValueError(
            f"there is a built-in network for images {' and '.join(map(str, _PAPER))} "
            f"(channels, height, width), got {shape} in {source}; choose a torchvision "
            "network with --backbone, or resize the images"
        )
    network, layers, training = _PAPER[shape]
    build = partial(network, num_classes=classes, channels=shape[0])
    return Preset(network.__name__, build, layers, training)


def layers_for(net: nn.Module, dataset: Dataset) -> list[str]:
    """Choose layers of a network by default, as texts for ``parse_layers``."""
    image, _ = dataset.select(torch.arange(1))
    prefix = f"{NETWORK}."
    return [
        name.removeprefix(prefix) + _text(reduction)
        for name, reduction in default_layers(net, image).items()
    ]


def parse_layers(texts: Sequence[str], net: nn.Module) -> dict[str, ReductionLike]:
    """Read layers as the command line has them, such as ``layer3:grid2``: name to reduction.

    The names of a backbone's layers need no ``network.`` before them.
    """
    modules = {name for name, _ in net.named_modules()}
    layers: dict[str, ReductionLike] = {}
    for text in texts:
        match = REDUCTION.fullmatch(text)
        if match is None:
            raise ValueError(
                f"--layers must be NAME or NAME:REDUCTION, the latter flatten, avg, gridN or "
                f"projectN, got {text!r}"
            )
        name, kind, number = match["layer"], match["kind"] or "flatten", match["number"]
        if name not in modules and f"{NETWORK}.{name}" in modules:
            name = f"{NETWORK}.{name}"
        if name in layers:
            raise ValueError(f"--layers must name a layer once, got {name!r} twice; drop one")
        layers[name] = (kind.removesuffix(number), int(number)) if number else kind
    return layers


def _text(reduction: Any) -> str:  # noqa: ANN401 - what default_layers chooses
    kind = reduction if isinstance(reduction, str) else "".join(map(str, reduction))
    return "" if kind == "flatten" else f":{kind}"


def split_sizes(source: str, dataset: Dataset, *, trained: bool) -> dict[str, int]:
    """Choose how many images the network, the SVMs and theta get; by names of ``RunSettings``.

    A network that is trained already needs none.
    """
    n, pool = len(dataset.labels_train), dataset.labels_test is None
    if trained:
        share = 6 * n // 10 if pool else n
        theta = min(share // 5, 1_000)
        sizes = 0, min(share - theta, 10_000), theta
    elif source in SPLIT_SIZES:
        sizes = SPLIT_SIZES[source]
    elif pool:
        sizes = 4 * n // 10, min(24 * n // 100, 10_000), min(n // 10, 1_000)
    else:
        sizes = 6 * n // 10, min(3 * n // 10, 10_000), min(n // 10, 1_000)
    names = "network_samples", "svm_samples", "threshold_samples"
    return dict(zip(names, sizes, strict=True))
