"""Features of a whole data set, batch by batch, in memory or in files."""

import hashlib
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from torchdnr.feature_rows import RowsInMemory, temporary_files
from torchdnr.features.layers import LayerFeatures, evaluation_mode
from torchdnr.features.storage import FeatureStore
from torchdnr.files import digest

_HALF = (torch.bfloat16, torch.float16)


@torch.no_grad()
def extract(
    features: LayerFeatures,
    data: Tensor | Iterable[Any],
    *,
    batch_size: int = 256,
    device: str | torch.device | None = None,
    progress: bool = False,
    memory_limit: int | None = None,
    folder: str | Path | None = None,
    widen: bool = False,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Take the features of a whole data set, batch by batch, without gradient.

    Features that would take too much memory go to files, and come back as tensors on the CPU that
    are mapped from them: their pages are read when they are used and dropped when memory gets
    short. The number of images need not be known: each layer has a safetensors file that grows.

    In a folder of your own they are kept. A call that was stopped goes on behind the last whole
    batch when it is repeated, and a repeated call finds all of them. It still goes through the
    images, to see that they are the same in the same order: a loader that shuffles or augments is
    refused as soon as a batch differs, so pass one that does neither.

    Args:
        features: The layers to take.
        data: Images ``(n, ...)``, or an iterable such as a ``DataLoader`` that yields batches of
            images or ``(images, labels)``.
        batch_size: Images per forward pass where ``data`` is a tensor, >= 1.
        device: Where the network runs and the results stay; default: the device of the network.
        progress: Whether to show a progress bar over the batches.
        memory_limit: Bytes that the features of all layers together may take in memory; beyond
            that, they go to a temporary folder. Default: no limit.
        folder: Where features go in any case, and are kept.
        widen: Whether features of half precision come back as float32, which SVMs need.

    Returns:
        Layer name -> features ``(n, d)``, and the labels ``(n,)`` where ``data`` yields them,
        else None.

    Raises:
        ValueError: If ``data`` is empty, ``batch_size`` < 1, or only some batches have labels.
        CheckpointError: If the folder holds the features of other images or another network.
        OSError: If the disk is full, or the folder cannot be written to.

    Warns (``UserWarning``) if features go to a temporary folder, or were damaged on disk.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    device = _device_of(features.net) if device is None else torch.device(device)
    n = len(data) if isinstance(data, Tensor) else None
    labels: list[Tensor] = []
    count = images_seen = 0
    with ExitStack() as stack:
        # Once for all batches; inside, forward finds nothing left to switch.
        stack.enter_context(evaluation_mode(features.net))
        rows = RowsInMemory(n)
        if folder is not None:
            run = _describe(features, device, n, batch_size if n is not None else None)
            run["widened"] = widen
            rows = stack.enter_context(FeatureStore(folder, run, n))
        batches = data.split(batch_size) if isinstance(data, Tensor) else data
        for batch in tqdm(batches, desc="features", unit="batch", disable=not progress):
            images, *rest = batch if isinstance(batch, Sequence) else (batch,)
            count, images_seen = count + 1, images_seen + len(images)
            if rest:
                labels.append(torch.as_tensor(rest[0]).to(device, non_blocking=True))
            if isinstance(rows, FeatureStore) and rows.holds(images, labels[-1] if rest else None):
                continue
            values = features(images.to(device, non_blocking=True))
            if widen:
                values = {k: v.float() if v.dtype in _HALF else v for k, v in values.items()}
            if isinstance(rows, RowsInMemory) and memory_limit is not None:
                if (needed := rows.largest(values)) > memory_limit:
                    files = stack.enter_context(temporary_files(n, needed, memory_limit))
                    rows = rows.moved_to(files)
            rows.append(values)
        if not images_seen:
            raise ValueError(
                "data holds no image; expected at least one; pass a non-empty tensor or loader"
            )
        if labels and len(labels) != count:
            raise ValueError(
                f"data must yield labels with every batch or with none, got {len(labels)} of "
                f"{count}"
            )
        joined = torch.cat(labels) if labels else None
        if isinstance(rows, FeatureStore):
            return rows.finish(joined), joined
        return rows.finish(), joined


def _describe(
    features: LayerFeatures, device: torch.device, n: int | None, batch_size: int | None
) -> dict[str, Any]:
    """Describe all that decides the features beside the images, as JSON values."""
    tensors = {**features.state_dict(), **dict(features.named_buffers())}
    options = {k: v for k, v in vars(features).items() if k[0] != "_" and k != "training"}
    return {
        "weights": digest({k: v for k, v in tensors.items() if isinstance(v, Tensor)}),
        "modules": hashlib.sha256(repr(features).encode()).hexdigest(),
        "options": repr(sorted(options.items())),
        "device": device.type,  # rounding differs between kinds
        "number of images": n,
        "batch size": batch_size,
    }


def _device_of(net: nn.Module) -> torch.device:
    for tensor in (*net.parameters(), *net.buffers()):
        return tensor.device
    return torch.device("cpu")
