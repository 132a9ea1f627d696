"""Features of a whole data set, batch by batch, in memory or in files: see `extract`.

`training_features` extracts what a classifier is fitted on, in as many processes as there are.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchdnr.arrays import ArrayLike, as_features, as_labels
from torchdnr.decisions import evaluation_mode
from torchdnr.distributed import current
from torchdnr.distributed.processes import warn_once
from torchdnr.distributed.sharing import (
    Batch,
    ShardedFeatures,
    check_same,
    checked_batches,
    local_batches,
    local_images,
)
from torchdnr.features.layers import LayerFeatures
from torchdnr.features.reductions import PAIRED, Project, Reduction, prepare_reduction
from torchdnr.features.storage import FeatureStore, LayerFiles, RowsInMemory, temporary_files
from torchdnr.files import digest
from torchdnr.resources import check_batch_size, default_batch_size, has_float64, progress_bar
from torchdnr.svm.checks import check_labels, checked_sample_weight
from torchdnr.svm.memory_plan import MEMORY_LIMIT

DISTORTION_LIMIT = 0.1
"""Root mean square of the relative errors of distances above which a projection is warned of: one
to 512 features makes 0.03, one to 50 features 0.1."""
_HALF = (torch.bfloat16, torch.float16)


class ProjectionWarning(UserWarning):
    """A random projection changed the distances between the features of images by much."""


@torch.no_grad()
def extract(
    features: LayerFeatures,
    data: Tensor | Iterable[Any],
    *,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    progress: bool = False,
    memory_limit: int | None = None,
    folder: str | Path | None = None,
    widen: bool = False,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Extract the features of a whole data set, batch by batch, without gradient.

    Features that would take too much memory go to files, and come back as tensors on the CPU that
    are mapped from them: their pages are read when they are used and dropped when memory gets
    short. The number of images need not be known: each layer has a safetensors file that grows.

    In a given folder they are kept. A call that was stopped goes on behind the last whole batch
    when it is repeated, and a repeated call computes none again. It still goes through the images,
    to see that they are the same in the same order: a loader that shuffles or augments is refused
    as soon as a batch differs, so pass one that does neither.

    Args:
        features: The layers to read.
        data: Images ``(n, ...)``, or an iterable such as a ``DataLoader`` that yields batches of
            images or ``(images, labels)``; not empty, and labels with every batch or with none.
        batch_size: Images per forward pass where ``data`` is a tensor, >= 1; None: as many as
            suits their size.
        device: Where the network runs and the results stay; default: the device of the network.
        progress: Whether to show a progress bar over the batches.
        memory_limit: Bytes that all features may take in memory; beyond that, they go to a
            temporary folder, with a warning. Default: no limit.
        folder: Where features are kept; a ``CheckpointError`` if it holds those of other images.
        widen: Whether features of half precision come back as float32, which SVMs need.

    Returns:
        Layer name -> features ``(n, d)``, and the labels ``(n,)`` if ``data`` yields them, or None.
    """
    check_batch_size(batch_size)
    if device is None:
        tensors = chain(features.net.parameters(), features.net.buffers())
        device = next((tensor.device for tensor in tensors), "cpu")
    device = torch.device(device)
    n = len(data) if isinstance(data, Tensor) else None
    if batch_size is None and isinstance(data, Tensor):
        batch_size = default_batch_size(data, device)
    labels: list[Tensor] = []
    count = images_seen = 0
    with ExitStack() as stack:
        # Once for all batches; inside, forward finds nothing left to switch.
        stack.enter_context(evaluation_mode(features.net))
        rows: RowsInMemory | LayerFiles | FeatureStore = RowsInMemory(n)
        if folder is not None:
            run = _describe(features, device, n, batch_size if n is not None else None)
            run["widened"] = widen
            rows = stack.enter_context(FeatureStore(folder, run, n))
        batches = data.split(batch_size) if batch_size and isinstance(data, Tensor) else data
        for batch in progress_bar(progress, batches, desc="features", unit="batch"):
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
                if (needed := rows.bytes_with(values)) > memory_limit:
                    files = stack.enter_context(temporary_files(n, needed, memory_limit))
                    rows = rows.moved_to(files)
            rows.append(values)
        if not images_seen:
            raise ValueError(
                "data holds no image; expected at least one; pass a non-empty tensor or loader"
            )
        joined = _joined(labels, count)
        return rows.finish(joined) if isinstance(rows, FeatureStore) else rows.finish(), joined


def _joined(labels: Sequence[Tensor | None], count: int) -> Tensor | None:
    """Join the labels of all batches, if they have any."""
    known = [part for part in labels if part is not None]
    if known and len(known) < count:
        raise ValueError(
            f"data must yield labels with every batch or with none, got {len(known)} of {count}"
        )
    return torch.cat(known) if known else None


def _describe(
    features: LayerFeatures, device: torch.device, n: int | None, batch_size: int | None
) -> dict[str, Any]:
    """Describe all that decides the features beside the images, as JSON values."""
    tensors = {**features.state_dict(), **dict(features.named_buffers())}
    options = {k: v for k, v in vars(features).items() if k[0] != "_" and k != "training"}
    return {
        "weights": digest(tensors),
        "modules": hashlib.sha256(repr(features).encode()).hexdigest(),
        "options": repr(sorted(options.items())),
        "device": device.type,  # rounding differs between kinds
        "number of images": n,
        "batch size": batch_size,
    }


def first_images(batches: Iterator[Batch]) -> tuple[list[Tensor], Iterator[Batch]]:
    """Read the first images ahead; return them, and all the batches.

    They are up to 64 images of one shape, spread over as many of the first batches as it takes to
    have so many, in batches that are no larger than the first one.
    """
    read: list[Batch] = []
    for batch in batches:
        read.append(batch)
        if sum(len(images) for images, _ in read) >= PAIRED:
            break
    first = read[0][0]
    images = torch.cat([images for images, _ in read if images.shape[1:] == first.shape[1:]])
    spread = images[:: max(1, len(images) // PAIRED)][:PAIRED]
    return list(spread.split(len(first))), chain(read, batches)


@torch.no_grad()
def prepare_features(features: LayerFeatures, batches: Sequence[Tensor]) -> LayerFeatures:
    """Make the reductions of layers anew, for the outputs that images of this size give.

    Distances are compared for all pairs of the first 64 of a few images, ``(n, ...)`` each. Returns
    another module on the same network, ready to use, with ``sizes``. Warns (``ProjectionWarning``)
    if a projection changes distances by much. It is a ``ValueError`` if a layer does not give a row
    per image: they come in another number as well, which a dimension of other meaning cannot have.
    """
    fresh = LayerFeatures(features.net, features.given, seed=features.seed)
    parts, first = [], batches[0]
    few = first[torch.arange(3 if len(first) == 2 else 2) % len(first)]
    for images in (*batches, few):
        try:
            parts.append(fresh.outputs(images))
        except Exception as error:
            error.add_note(
                f"the network was given images {tuple(images.shape)}: does it take these?"
            )
            raise
    for name, reduction in zip(fresh.layers, fresh.reductions, strict=True):
        if isinstance(reduction, Reduction) and not reduction.ready:
            output = torch.cat([part[name] for part in parts[:-1]])
            prepare_reduction(reduction, name, output, first)
    for part, images in zip(parts, (*batches, few), strict=True):
        reduced = fresh.reduce(part, images)
    for name, values in reduced.items():
        shape = list(parts[0][name].shape[1:])
        fresh.sizes[name] = {"output": shape, "features": values.shape[1]}
    for name, distortion in distortions(fresh).items():
        if distortion["rms"] > DISTORTION_LIMIT:
            warn_once(
                f"the projection of layer {name!r} changes the distances of "
                f"{distortion['pairs']} pairs of images by {distortion['rms']:.0%} (root mean "
                f"square; at most {distortion['max']:.0%}), expected up to "
                f"{DISTORTION_LIMIT:.0%}; project to more features",
                ProjectionWarning,
                stacklevel=3,
            )
    return fresh


def distortions(features: LayerFeatures) -> dict[str, dict[str, float]]:
    """Collect what ``projection_distortion`` measured, by projected layer."""
    pairs = zip(features.layers, features.reductions, strict=True)
    return {name: r.distortion for name, r in pairs if isinstance(r, Project) and r.distortion}


def training_features(
    data: Tensor | Iterable[Any],
    labels: Tensor | None,
    prepare: Callable[[list[Tensor]], LayerFeatures],
    *,
    device: torch.device,
    batch_size: int | None,
    memory_limit: int | None,
    folder: str | Path | None,
    progress: bool,
    sample_weight: ArrayLike | None = None,
) -> tuple[LayerFeatures, dict[str, ShardedFeatures], Tensor, Tensor | None]:
    """Extract the features of checked images, and the labels that go with them.

    Each of the current processes extracts and keeps a contiguous part: of the images in a tensor,
    or of the batches of a loader, all of which it goes through for the labels. ``prepare`` makes
    the layers ready, given a few batches of images on the device. Without a memory limit it is 4
    GiB on a CPU; a GPU has none. With a folder each of more than one process has a folder in it.
    The sample weights have to be the same in all processes.

    Returns the layers that were read; layer name -> features ``(n, d)``, float32 at least; the
    labels of all images, int64; and their weights, float64, if they have any.
    """
    if sample_weight is not None:
        sample_weight = as_features("sample_weight", sample_weight)
    processes = current()
    if memory_limit is None and device.type == "cpu":
        memory_limit = MEMORY_LIMIT
    sample, batches = first_images(checked_batches(data, batch_size, device))
    ready = prepare([images.to(device) for images in sample])
    batch_labels: list[Tensor | None] = []
    local: Tensor | Iterable[Any]
    if isinstance(data, Tensor):
        local = local_images(data, processes)
    else:
        pairs = local_batches(data, batches, batch_labels, processes)
        local = (images if known is None else (images, known) for images, known in pairs)
    if folder is not None and processes.count > 1:
        folder = Path(folder) / f"process-{processes.rank + 1}-of-{processes.count}"
    features, _ = extract(
        ready,
        local,
        batch_size=batch_size,
        progress=progress,
        memory_limit=memory_limit,
        folder=folder,
        widen=True,
    )
    check_same(processes, ready.net, [labels, *batch_labels, sample_weight], torch.cat(sample))
    from_loader = _joined(batch_labels, len(batch_labels))
    if (labels is None) == (from_loader is None):
        raise ValueError(
            "labels must come once: fit(images, labels), or fit(loader) with a loader that "
            f"yields (images, labels); got {'none' if labels is None else 'both'}"
        )
    stay = all(rows.device.type != "cpu" for rows in features.values()) and has_float64(device)
    if not processes.all(stay):
        # Those of one process at least are on the CPU, perhaps mapped from files, or have to be.
        features = {name: rows.cpu() for name, rows in features.items()}
    sharded = {name: ShardedFeatures.from_local(rows, processes) for name, rows in features.items()}
    first = next(iter(sharded.values()))
    labels = from_loader if labels is None else labels
    labels = as_labels("labels", labels).to(first.local.device)
    c = check_labels(labels, len(first))
    return ready, sharded, labels.long(), checked_sample_weight(sample_weight, labels, c)
