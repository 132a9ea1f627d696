"""Images of which each of several processes takes its share."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from torchdnr.files import digest
from torchdnr.processes import Processes
from torchdnr.shared_features import Shares

Batch = tuple[Tensor, Tensor | None]


def own_images(images: Tensor, processes: Processes) -> Tensor:
    """Take this process's contiguous share of the images.

    Args:
        images: All of them, ``(n, ...)``, the same in every process.
        processes: Those that share them.

    Returns:
        Some images, ``(k, ...)``, a view.

    Raises:
        ValueError: If there are fewer images than processes.
    """
    shares = Shares.even(len(images), processes)
    _check_enough(min(shares.sizes), "images", len(images), processes)
    return images[shares.own]


def own_batches(
    data: Iterable[Any], batches: Iterator[Batch], labels: list[Tensor | None], processes: Processes
) -> Iterator[Batch]:
    """Go through all batches of a loader, and yield this process's contiguous share of them.

    Args:
        data: The loader: its length is asked for where there are several processes.
        batches: What it yields, images and labels or None.
        labels: Gets the labels of all batches, in their order.
        processes: Those that share them.

    Yields:
        Images, and labels or None.

    Raises:
        ValueError: If the loader does not tell its length, or has fewer batches than there are
            processes.
    """
    own = range(0)
    if processes.count > 1:
        try:
            count = len(data)
        except TypeError as error:
            raise ValueError(
                f"a loader for {processes.count} processes must tell its number of batches, got a "
                f"{type(data).__name__} without len(); pass a DataLoader, or images and labels"
            ) from error
        shares = Shares.even(count, processes)
        _check_enough(min(shares.sizes), "batches", count, processes)
        own = range(shares.own.start, shares.own.stop)
    for number, (images, given) in enumerate(batches):
        labels.append(given)
        if processes.count == 1 or number in own:
            yield images, given


def check_same(processes: Processes, labels: Iterable[Tensor | None], images: Tensor) -> None:
    """Refuse images that are not the same, in the same order, in all processes.

    Args:
        processes: Those that share them.
        labels: Of all images, None where there are none.
        images: The first ones.

    Raises:
        ValueError: In every process, if the labels or the first images differ.
    """
    if processes.count == 1:
        return
    tensors = {str(i): t for i, t in enumerate([*labels, images]) if t is not None}
    own = digest({name: tensor.cpu() for name, tensor in tensors.items()})
    if not processes.all_agree(processes.share_text(own, 0) == own):
        raise ValueError(
            "all processes must be given the same images and labels in the same order, got others: "
            "a loader must neither shuffle nor sample by process; or let this one work by itself "
            "with processes=ALONE"
        )


def _check_enough(smallest: int, what: str, count: int, processes: Processes) -> None:
    if smallest == 0:
        raise ValueError(
            f"{processes.count} processes need as many {what} at least, got {count}; start fewer "
            "of them"
        )
