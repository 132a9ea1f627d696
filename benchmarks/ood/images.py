"""Images that a classifier of digits does not know: noise, other data sets, corrupted digits."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision import datasets
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from torchdnr.data import load_dataset

NOISE, OTHER, SHIFTED, CORRUPTED = "noise", "other data set", "digits of others", "corrupted"
Loader = tuple[str, Callable[[], tuple[Tensor, Tensor | None]]]

# Five strengths each; what they are measured in is in the names.
CORRUPTIONS: dict[str, tuple[float, ...]] = {
    "Gaussian noise, standard deviation": (0.1, 0.2, 0.3, 0.4, 0.5),
    "Gaussian blur, standard deviation in pixels": (0.5, 0.75, 1, 1.5, 2),
    "contrast, factor": (0.8, 0.6, 0.4, 0.2, 0.1),
    "pixelate, share of the side": (0.75, 0.5, 0.35, 0.25, 0.18),
    "rotation, degrees": (10, 20, 30, 45, 60),
    "shift to the right, share of the side": (0.07, 0.14, 0.21, 0.28, 0.35),
    "black square in the middle, share of the side": (0.15, 0.22, 0.3, 0.36, 0.5),
}


@dataclass(frozen=True)
class Unknown:
    """Images to tell from the clean ones of the run.

    Attributes:
        name: What they are.
        kind: NOISE, OTHER, SHIFTED (digits again, of another source) or CORRUPTED.
        images: In [0, 1], ``(n, C, H, W)``.
        labels: Digits, ``(n,)``, where they have one.
        strength: Of the corruption, in the unit that the name tells.
    """

    name: str
    kind: str
    images: Tensor
    labels: Tensor | None = None
    strength: float | None = None


def noise_images(like: Tensor, seed: int) -> Iterator[Unknown]:
    """Draw uniform noise, and Gaussian noise of mean and standard deviation 1/2, cut to [0, 1].

    Args:
        like: Images whose shape and number it takes, ``(n, C, H, W)``.
        seed: Of the noise.

    Yields:
        The two sets.
    """
    generator = torch.Generator().manual_seed(seed)
    yield Unknown("uniform noise", NOISE, torch.rand(like.shape, generator=generator))
    gaussian = 0.5 + 0.5 * torch.randn(like.shape, generator=generator)
    yield Unknown("Gaussian noise", NOISE, gaussian.clamp(0, 1))


def loaders(root: Path, cifar10: str) -> dict[str, Loader]:
    """Collect other data sets.

    Args:
        root: Folder of the data sets, into which those that lack are downloaded.
        cifar10: Source of CIFAR-10, for ``load_dataset``.

    Returns:
        Name to kind, and to what loads images and, where they are digits, labels.
    """
    return {
        "Fashion-MNIST": (OTHER, lambda: _fashion_mnist(root)),
        "CIFAR-10 in grey": (OTHER, lambda: (_test_images(cifar10, root)[0], None)),
        "scikit-learn's digits": (SHIFTED, _digits_8x8),
        "MNIST's test digits": (SHIFTED, lambda: _test_images("mnist", root)),
    }


def other_sets(
    like: Tensor, loaders: Mapping[str, Loader], seed: int
) -> tuple[list[Unknown], dict[str, str]]:
    """Load other data sets, as many images of each as there are digits, or all if it has fewer.

    Args:
        like: Images of the run, ``(n, C, H, W)``.
        loaders: What there is to load.
        seed: Decides which images are drawn.

    Returns:
        The sets; and by name why a set is not at hand.
    """
    sets, missing = [], {}
    for name, (kind, load) in loaders.items():
        try:
            images, labels = load()
        except (OSError, RuntimeError, ImportError) as error:
            missing[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"
            continue
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(len(images), generator=generator)[: len(like)]
        chosen = resized(images[drawn], like)
        sets.append(Unknown(name, kind, chosen, None if labels is None else labels[drawn]))
    return sets, missing


def corrupted_sets(images: Tensor, labels: Tensor, seed: int) -> Iterator[Unknown]:
    """Corrupt images in every way, at every strength.

    Args:
        images: In [0, 1], ``(n, C, H, W)``.
        labels: Digits, ``(n,)``.
        seed: Of the noise.

    Yields:
        A set per corruption and strength.
    """
    for name, strengths in CORRUPTIONS.items():
        for strength in strengths:
            changed = corrupt(images, name, strength, seed)
            yield Unknown(name, CORRUPTED, changed, labels, strength)


def corrupt(images: Tensor, name: str, strength: float, seed: int) -> Tensor:
    """Corrupt images by torchvision.

    Args:
        images: In [0, 1], ``(n, C, H, W)``.
        name: One of ``CORRUPTIONS``.
        strength: In the unit that the name tells.
        seed: Of the noise.

    Returns:
        Images in [0, 1], like ``images``.

    Raises:
        ValueError: If there is no such corruption.
    """
    side = round(strength * images.shape[-1])
    match name.partition(",")[0]:
        case "Gaussian noise":
            with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
                torch.default_generator.manual_seed(seed)
                changed = F.gaussian_noise(images, mean=0.0, sigma=strength)
        case "Gaussian blur":
            changed = F.gaussian_blur(images, [2 * round(4 * strength) + 1] * 2, [strength] * 2)
        case "contrast":
            changed = F.adjust_contrast(images, strength)
        case "pixelate":
            small = F.resize(images, [side, side], antialias=True)
            changed = F.resize(small, list(images.shape[-2:]), InterpolationMode.NEAREST)
        case "rotation":
            changed = F.rotate(images, strength, InterpolationMode.BILINEAR)
        case "shift to the right":
            changed = F.affine(images, 0.0, [side, 0], 1.0, [0.0, 0.0])
        case "black square in the middle":
            top, left = ((length - side) // 2 for length in images.shape[-2:])
            black = torch.zeros(images.shape[1], 1, 1)
            changed = F.erase(images, top, left, side, side, black)
        case _:
            raise ValueError(f"no corruption {name!r}; choose from: {', '.join(CORRUPTIONS)}")
    return changed.clamp(0, 1)


def resized(images: Tensor, like: Tensor) -> Tensor:
    """Bring images to the size and the channels, one or three, of others.

    Args:
        images: uint8, or float in [0, 1], ``(n, 1, h, w)`` or ``(n, 3, h, w)``.
        like: ``(k, C, H, W)``.

    Returns:
        float32 in [0, 1], ``(n, C, H, W)``.
    """
    images = F.to_dtype(images, torch.float32, scale=True)
    images = v2.Grayscale(like.shape[1])(images) if images.shape[1] != like.shape[1] else images
    return F.resize(images, list(like.shape[-2:]), antialias=True).clamp(0, 1)


def _test_images(source: str, root: Path) -> tuple[Tensor, Tensor]:
    data = load_dataset(source, root)
    if data.images_test is None or data.labels_test is None:
        raise OSError(f"{source} has no test images: give one that has, such as cifar10")
    return data.images_test, data.labels_test


def _fashion_mnist(root: Path) -> tuple[Tensor, None]:
    return datasets.FashionMNIST(root, train=False, download=True).data[:, None], None


def _digits_8x8() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(found.images).float()[:, None] / 16
    return images, torch.from_numpy(found.target).long()
