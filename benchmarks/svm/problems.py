"""The problems: MNIST pixels, layers of a network, CIFAR10 pixels, tables, noisy labels."""

import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.svm.packaged import packaged
from torchdnr.data import Dataset, load_dataset, split
from torchdnr.features.extraction import extract
from torchdnr.features.layers import LayerFeatures
from torchdnr.models import MNIST_LAYERS, MNISTNet, load_network, save_network
from torchdnr.models.training import TrainingSettings, train_network

PACKAGED = ("diamonds", "cities")
DATASETS = ("raw", *MNIST_LAYERS, "cifar10", *PACKAGED, "noise")
NETWORK_SAMPLES = 20_000
TRAINING = TrainingSettings(epochs=5, lr=0.1, momentum=0.9, batch_size=128)


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        samples: Training samples, n; all other sizes follow from it.
        small_samples: Training samples of the problems that torchkm takes part in.
        repeats: Rounds.
        budget: Seconds per contender and case, beyond which it runs in part.
        device: ``cpu`` or ``cuda``; where ours runs, and whoever else can.
        threads: Of the CPU.
        data: Folder of the data sets.
        cache: Folder that keeps the trained network.
    """

    samples: int
    small_samples: int
    repeats: int
    budget: float
    device: str
    threads: int
    data: Path
    cache: Path


@dataclass(frozen=True)
class Problem:
    """Training and test samples of a classification problem.

    Attributes:
        x_train: ``(n, d)``, float32.
        y_train: ``(n,)`` in 0..c-1.
        x_test: ``(n // 5, d)``.
        y_test: ``(n // 5,)``.
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor

    def head(self, n: int) -> "Problem":
        """Return the problem of the first n training samples, a stratified share by `split`."""
        return Problem(self.x_train[:n], self.y_train[:n], self.x_test, self.y_test)

    def save(self, path: str | Path) -> None:
        """Write an npz file with one array per attribute."""
        np.savez(path, **{name: tensor.numpy() for name, tensor in vars(self).items()})


@lru_cache(maxsize=2)  # pixels of two data sets at the most stay in memory
def load_problem(name: str, settings: Settings) -> Problem:
    """Load or make a problem.

    Args:
        name: One of DATASETS.
        settings: Samples, folders (``cifar10.npz`` in the data folder is preferred to a download),
            and the device on which the network is trained and evaluated.

    Returns:
        The problem, on the CPU.

    Raises:
        ModuleNotFoundError: If the package that holds the data is not installed.
    """
    samples, data = settings.samples, settings.data
    if name == "noise":
        return noisy_clusters(samples)
    if name in PACKAGED:
        return Problem(*packaged(name, samples))
    if name == "cifar10":
        archive = data / "cifar10.npz"
        source = f"npz:{archive}" if archive.is_file() else "cifar10"
        return _pixels(load_dataset(source, data), samples, network=0)
    if name == "raw":
        return _pixels(_mnist(data), samples, _network_samples(samples))
    features = _layers(data, settings.cache, samples, settings.device)
    return Problem(*(part[name] if isinstance(part, dict) else part for part in features))


def noisy_clusters(samples: int, *, d: int = 20, c: int = 10, noise: float = 0.25) -> Problem:
    """Make Gaussian clusters of which a share of the training labels is wrong.

    Args:
        samples: Training samples, n.
        d: Features.
        c: Classes, one cluster each.
        noise: Share of training labels replaced by another class; test labels are right.

    Returns:
        The problem, always the same one.
    """
    generator = torch.Generator().manual_seed(0)
    total = samples + samples // 5
    centers = torch.randn(c, d, generator=generator)
    truth = torch.arange(total) % c
    features = centers[truth] + torch.randn(total, d, generator=generator)
    wrong = torch.rand(total, generator=generator) < noise
    other = (truth + torch.randint(1, c, (total,), generator=generator)) % c
    labels = torch.where(wrong, other, truth)[:samples]
    return Problem(features[:samples], labels, features[samples:], truth[samples:])


def gaussian(samples: int, queries: int, d: int) -> Problem:
    """Make points without structure, for timings that do not depend on values.

    Args:
        samples: Training samples.
        queries: Test samples.
        d: Features.

    Returns:
        The problem, always the same one, all labels 0.
    """
    generator = torch.Generator().manual_seed(0)
    train, test = (torch.randn(k, d, generator=generator) for k in (samples, queries))
    return Problem(train, torch.zeros(samples).long(), test, torch.zeros(queries).long())


def _network_samples(samples: int) -> int:
    """Choose the size of the network's training set: fewer for a smoke test of few samples."""
    return min(NETWORK_SAMPLES, 2 * samples)


def _mnist(data: Path) -> Dataset:
    return load_dataset("mnist", data)


def _images(
    dataset: Dataset, samples: int, network: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Draw disjoint samples: images and labels for the SVMs and for test, the network's indices."""
    parts = split(dataset, network=network, svm=samples, threshold=0, test=samples // 5, seed=0)
    train, test = dataset.select(parts.svm), dataset.select(parts.test, test=True)
    return *train, *test, parts.network


def _pixels(dataset: Dataset, samples: int, network: int) -> Problem:
    x_train, y_train, x_test, y_test, _ = _images(dataset, samples, network)
    return Problem(x_train.flatten(1), y_train, x_test.flatten(1), y_test)


@lru_cache(maxsize=1)
def _layers(
    data: Path, cache: Path, samples: int, device: str
) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor], Tensor]:
    """Train the network of Table I once, then take its layers."""
    dataset, count = _mnist(data), _network_samples(samples)
    x_train, y_train, x_test, y_test, chosen = _images(dataset, samples, count)
    path = cache / f"mnist-network-{count}.safetensors"
    torch.manual_seed(0)
    net = MNISTNet()
    if path.is_file():
        net = load_network(net, path).to(device).eval()
    else:
        net = train_network(
            net, *dataset.select(chosen), TRAINING, device=device, progress=sys.stderr.isatty()
        )
        save_network(net, path)
    layers = LayerFeatures(net, MNIST_LAYERS)
    train, test = (
        {name: values.cpu() for name, values in extract(layers, images)[0].items()}
        for images in (x_train, x_test)
    )
    return train, y_train, test, y_test
