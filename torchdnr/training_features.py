"""From images and labels to the features that the SVMs of DNR and NR are fitted on."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchdnr.features import LayerFeatures, extract
from torchdnr.preparation import peek
from torchdnr.rejection import checked_batches
from torchdnr.svm.checks import check_labels
from torchdnr.svm.gram import MEMORY_LIMIT


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
) -> tuple[LayerFeatures, dict[str, Tensor], Tensor]:
    """Extract the features of checked images, and the labels that go with them.

    Args:
        data: Images ``(n, ...)``, or a loader that yields ``(images, labels)``.
        labels: ``(n,)`` where ``data`` is a tensor.
        prepare: Makes the layers ready, given a few batches of the images on the device.
        device: Where the network runs.
        batch_size: Images per forward pass.
        memory_limit: Bytes that the features may take in memory; None: 4 GiB on a CPU, and no
            limit on a GPU.
        folder: Where features go in any case.
        progress: Whether to show a progress bar.

    Returns:
        The layers that were read; layer name -> features ``(n, d)``, float32 at least; labels
        ``(n,)``, int64.

    Raises:
        ValueError: If images or labels are not as said above.
    """
    if memory_limit is None and device.type == "cpu":
        memory_limit = MEMORY_LIMIT
    sample, batches = peek(checked_batches(data, batch_size))
    ready = prepare([images.to(device) for images in sample])
    pairs = (images if given is None else (images, given) for images, given in batches)
    features, found = extract(
        ready,
        data if isinstance(data, Tensor) else pairs,
        batch_size=batch_size,
        progress=progress,
        memory_limit=memory_limit,
        folder=folder,
        widen=True,
    )
    if (labels is None) == (found is None):
        raise ValueError(
            "labels must come once: fit(images, labels), or fit(loader) with a loader that "
            f"yields (images, labels); got {'none' if labels is None else 'both'}"
        )
    first = next(iter(features.values()))
    labels = torch.as_tensor(found if labels is None else labels, device=first.device)
    check_labels(labels, len(first))
    return ready, features, labels.long()
