"""What is settled on the first images of a fit: reductions, and how projections keep distances."""

import warnings
from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from torchdnr.features.layers import LayerFeatures
from torchdnr.features.reductions import PAIRED, Project

# Root mean square of the relative errors of distances above which a projection is warned of: one
# to 512 features makes 0.03, one to 50 features 0.1.
DISTORTION_LIMIT = 0.1

Batch = tuple[Tensor, Tensor | None]


class ProjectionWarning(UserWarning):
    """A random projection changed the distances between the features of images by much."""


def peek(batches: Iterator[Batch]) -> tuple[list[Tensor], Iterator[Batch]]:
    """Look at the first images without losing them.

    Args:
        batches: Images ``(n, ...)`` and labels or None; not empty.

    Returns:
        Up to 64 images of one shape, spread over as many of the first batches as it takes to have
        so many, in batches that are no larger than the first one; and all the batches.
    """
    seen: list[Batch] = []
    for batch in batches:
        seen.append(batch)
        if sum(len(images) for images, _ in seen) >= PAIRED:
            break
    first = seen[0][0]
    images = torch.cat([images for images, _ in seen if images.shape[1:] == first.shape[1:]])
    spread = images[:: max(1, len(images) // PAIRED)][:PAIRED]
    return list(spread.split(len(first))), chain(seen, batches)


@torch.no_grad()
def prepare_features(features: LayerFeatures, batches: Sequence[Tensor]) -> LayerFeatures:
    """Make the reductions of layers anew, for the outputs that images of this size give.

    Args:
        features: The layers and the reductions wanted; left as they are.
        batches: A few images of those to come, ``(n, ...)`` each, on the device of the network.
            Distances are compared for all pairs of the first 64.

    Returns:
        Another module on the same network, ready to use, with ``sizes``.

    Raises:
        Exception: Whatever the network raises, with a note of the size of the images.
        ValueError: If a reduction does not fit the output of its layer.

    Warns:
        ProjectionWarning: If a projection changes distances by much.
    """
    fresh = LayerFeatures(features.net, features.given, seed=features.seed)
    parts = [_outputs(fresh, images) for images in batches]
    outputs = {name: torch.cat([part[name] for part in parts]) for name in fresh.layers}
    for name, values in fresh.reduce(outputs, torch.cat(list(batches))).items():
        shape = list(outputs[name].shape[1:])
        fresh.sizes[name] = {"output": shape, "features": values.shape[1]}
    for name, distortion in distortions(fresh).items():
        if distortion["rms"] > DISTORTION_LIMIT:
            warnings.warn(
                f"the projection of layer {name!r} changes the distances of "
                f"{distortion['pairs']} pairs of images by {distortion['rms']:.0%} (root mean "
                f"square; at most {distortion['max']:.0%}), expected up to "
                f"{DISTORTION_LIMIT:.0%}; project to more features",
                ProjectionWarning,
                stacklevel=3,
            )
    return fresh


def distortions(features: LayerFeatures) -> dict[str, dict[str, float]]:
    """Collect what random projections did to distances.

    Args:
        features: Prepared layers.

    Returns:
        Layer name -> what ``projection_distortion`` found, for projected layers.
    """
    pairs = zip(features.layers, features.reductions, strict=True)
    return {name: r.distortion for name, r in pairs if isinstance(r, Project) and r.distortion}


def _outputs(features: LayerFeatures, images: Tensor) -> dict[str, Tensor]:
    try:
        return features.outputs(images)
    except Exception as error:
        error.add_note(f"the network was given images {tuple(images.shape)}: does it take these?")
        raise
