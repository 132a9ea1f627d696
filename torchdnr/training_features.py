"""From images and labels to the features that the SVMs of DNR and NR are fitted on."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchdnr.distributed.processes import Processes
from torchdnr.distributed.sharing import SharedFeatures
from torchdnr.features.extraction import extract
from torchdnr.features.layers import LayerFeatures
from torchdnr.preparation import peek
from torchdnr.rejection import checked_batches
from torchdnr.shared_data import check_same, own_batches, own_images
from torchdnr.svm.checks import check_labels
from torchdnr.svm.memory_plan import MEMORY_LIMIT


def training_features(
    data: Tensor | Iterable[Any],
    labels: Tensor | None,
    prepare: Callable[[list[Tensor]], LayerFeatures],
    *,
    device: torch.device,
    batch_size: int,
    memory_limit: int | None,
    folder: str | Path | None,
    progress: bool,
    processes: Processes,
) -> tuple[LayerFeatures, dict[str, SharedFeatures], Tensor]:
    """Extract the features of checked images, and the labels that go with them.

    Each process extracts and keeps a contiguous share: of the images in a tensor, or of the batches
    of a loader, all of which it goes through for the labels.

    Args:
        data: Images ``(n, ...)``, or a loader that yields ``(images, labels)``.
        labels: ``(n,)`` where ``data`` is a tensor.
        prepare: Makes the layers ready, given a few batches of the images on the device.
        device: Where the network runs.
        batch_size: Images per forward pass.
        memory_limit: Bytes that the features may take in memory; None: 4 GiB on a CPU, and no
            limit on a GPU.
        folder: Where features go in any case; of several processes each has a folder in it.
        progress: Whether to show a progress bar.
        processes: Those that share the work; all call this together, with the same data.

    Returns:
        The layers that were read; layer name -> features ``(n, d)``, float32 at least; labels
        ``(n,)`` of all images, int64.

    Raises:
        ValueError: If images or labels are not as said above.
    """
    if memory_limit is None and device.type == "cpu":
        memory_limit = MEMORY_LIMIT
    sample, batches = peek(checked_batches(data, batch_size))
    ready = prepare([images.to(device) for images in sample])
    given: list[Tensor | None] = []
    if isinstance(data, Tensor):
        own = own_images(data, processes)
    else:
        pairs = own_batches(data, batches, given, processes)
        own = (images if of_batch is None else (images, of_batch) for images, of_batch in pairs)
    if folder is not None and processes.count > 1:
        folder = Path(folder) / f"process-{processes.rank + 1}-of-{processes.count}"
    features, _ = extract(
        ready,
        own,
        batch_size=batch_size,
        progress=progress,
        memory_limit=memory_limit,
        folder=folder,
        widen=True,
    )
    check_same(processes, ready.net, [labels, *given], torch.cat(sample))
    found = _joined(given)
    if (labels is None) == (found is None):
        raise ValueError(
            "labels must come once: fit(images, labels), or fit(loader) with a loader that "
            f"yields (images, labels); got {'none' if labels is None else 'both'}"
        )
    shared = _shared(features, processes)
    first = next(iter(shared.values()))
    labels = torch.as_tensor(found if labels is None else labels, device=first.own.device)
    check_labels(labels, len(first))
    return ready, shared, labels.long()


def _joined(given: list[Tensor | None]) -> Tensor | None:
    """Join the labels of all batches, if they have any."""
    known = [labels for labels in given if labels is not None]
    if known and len(known) < len(given):
        raise ValueError(
            f"data must yield labels with every batch or with none, got {len(known)} of "
            f"{len(given)}"
        )
    return torch.cat(known) if known else None


def _shared(features: dict[str, Tensor], processes: Processes) -> dict[str, SharedFeatures]:
    """Tell all processes who has how many rows; all work on the CPU if one's rows went to files."""
    on_gpu = all(rows.is_cuda for rows in features.values())
    if on_gpu and not processes.all_agree(on_gpu):
        features = {name: rows.cpu() for name, rows in features.items()}
    return {name: SharedFeatures.from_own(rows, processes) for name, rows in features.items()}
