"""Images of which each of several processes takes its share."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from torchdnr.distributed.processes import Processes
from torchdnr.distributed.sharing import Shares
from torchdnr.files import digest

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


def check_same(
    processes: Processes, net: nn.Module, labels: Iterable[Tensor | None], images: Tensor
) -> None:
    """Refuse a network or images that are not the same, in the same order, in all processes.

    Args:
        processes: Those that share the work.
        net: What the images are given to.
        labels: Of all images, None where there are none.
        images: The first ones.

    Raises:
        ValueError: In every process, if the weights, the labels or the first images differ.
    """
    if processes.count == 1:
        return
    tensors = {str(i): t for i, t in enumerate([*labels, images]) if t is not None}
    weights = {k: v for k, v in net.state_dict().items() if isinstance(v, Tensor)}
    for what, found in {
        "images and labels in the same order": digest(tensors),
        "network": digest(weights),
    }.items():
        if not processes.all_agree(processes.share_text(found, 0) == found):
            raise ValueError(
                f"all processes must be given the same {what}, got others: load the network from "
                "one file, take a loader that neither shuffles nor samples by process, or let one "
                "process work by itself with processes=ALONE"
            )


def _check_enough(smallest: int, what: str, count: int, processes: Processes) -> None:
    if smallest == 0:
        raise ValueError(
            f"{processes.count} processes need as many {what} at least, got {count}; start fewer "
            "of them"
        )
