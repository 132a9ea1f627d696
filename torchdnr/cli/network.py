"""The network of a run folder and the layers that DNR reads: the paper's, or torchvision's."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

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
    """A network that fits a data set, with the layers that DNR reads and how it is trained.

    Attributes:
        name: Of its architecture.
        build: Makes it, with random weights.
        layers: Texts as for ``parse_layers``; None: to be chosen when the network is there.
        training: How it is trained.
    """

    name: str
    build: Callable[[], nn.Module]
    layers: tuple[str, ...] | None
    training: TrainingSettings


_PAPER = {
    (1, 28, 28): (MNISTNet, MNIST_LAYERS, MNIST_TRAINING),
    (3, 32, 32): (CIFAR10Net, CIFAR10_LAYERS, CIFAR10_TRAINING),
}


def choose_network(
    source: str, shape: tuple[int, ...], classes: int, chosen: Mapping[str, Any]
) -> Preset:
    """Choose the network for a data set.

    Args:
        source: Its name, for messages.
        shape: Of its images, (channels, height, width): decides which of the paper's networks.
        classes: How many it has.
        chosen: "backbone": a torchvision classifier instead, or None; "outputs" of it that are the
            data set's classes, and "weights", or None.

    Returns:
        How to build and train it.

    Raises:
        ValueError: If no network fits the images, or there is no such backbone.
    """
    backbone = chosen["backbone"]
    if backbone is not None:
        if shape[0] != 3:
            raise ValueError(
                f"--backbone takes images of 3 channels, got {shape} in {source}; repeat the "
                "grey channel in the data, or drop the option"
            )
        build = partial(build_backbone, backbone, classes, outputs=chosen["outputs"])
        build()  # raises for an unknown backbone or wrong outputs, before any costly work
        return Preset(backbone, build, None, CIFAR10_TRAINING)
    if orphans := [f"--{name}" for name in ("outputs", "weights") if chosen[name] is not None]:
        raise ValueError(f"{orphans[0]} must go with a --backbone: name one, or drop the option")
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
    """Choose layers of a network that no one has named layers of, as texts."""
    image, _ = dataset.select(torch.arange(1))
    prefix = f"{NETWORK}."
    return [
        name.removeprefix(prefix) + _text(reduction)
        for name, reduction in default_layers(net, image).items()
    ]


def parse_layers(texts: Sequence[str], net: nn.Module) -> dict[str, ReductionLike]:
    """Read layers as the command line has them: NAME, or NAME:REDUCTION.

    Args:
        texts: Such as ``features.12:avg``, ``layer3:grid2``, ``layer2:project512``.
        net: The network; names inside a backbone need not say so.

    Returns:
        Name in ``net`` -> reduction, what ``DNR`` takes.

    Raises:
        ValueError: If a text is no such thing, or a layer is named twice.
    """
    inside = {name for name, _ in net.named_modules()}
    found: dict[str, ReductionLike] = {}
    for text in texts:
        match = REDUCTION.fullmatch(text)
        if match is None:
            raise ValueError(
                f"--layers must be NAME or NAME:REDUCTION, the latter flatten, avg, gridN or "
                f"projectN, got {text!r}"
            )
        name, kind, number = match["layer"], match["kind"] or "flatten", match["number"]
        if name not in inside and f"{NETWORK}.{name}" in inside:
            name = f"{NETWORK}.{name}"
        if name in found:
            raise ValueError(f"--layers must name a layer once, got {name!r} twice; drop one")
        found[name] = (kind.removesuffix(number), int(number)) if number else kind
    return found


def _text(reduction: Any) -> str:  # noqa: ANN401 - what default_layers chooses
    kind = reduction if isinstance(reduction, str) else "".join(map(str, reduction))
    return "" if kind == "flatten" else f":{kind}"


def split_sizes(
    source: str, dataset: Dataset, sizes: Mapping[str, tuple[int, int, int]], trained: bool
) -> tuple[int, int, int]:
    """Choose how many images the network, the SVMs and theta get.

    Args:
        source: Name of the data set.
        dataset: The data set.
        sizes: Those of data sets that are known by name.
        trained: Whether the network comes with weights, and so needs no images.

    Returns:
        Images for the network, for the SVMs, for theta.
    """
    n, pool = len(dataset.labels_train), dataset.labels_test is None
    if trained:
        share = 6 * n // 10 if pool else n
        threshold = min(share // 5, 1_000)
        return 0, min(share - threshold, 10_000), threshold
    if source in sizes:
        return sizes[source]
    if pool:
        return 4 * n // 10, min(24 * n // 100, 10_000), min(n // 10, 1_000)
    return 6 * n // 10, min(3 * n // 10, 10_000), min(n // 10, 1_000)
