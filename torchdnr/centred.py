"""Vectors moved to the training mean, kept from one call to the next."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class Moved(NamedTuple):
    """What distances to vectors need of them.

    Attributes:
        vectors: Less the centre, ``(m, d)``.
        norms: Their squared norms, ``(m,)``.
    """

    vectors: Tensor
    norms: Tensor


class _Kept(NamedTuple):
    center: Tensor
    versions: tuple[int, int]
    moved: Moved


_KEPT: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # for as long as the vectors live


def centred(vectors: Tensor, center: Tensor) -> Moved | None:
    """Return vectors less their centre, and their squared norms, made once while both are the same.

    To make them costs two passes over all vectors, which for few inputs is as much as the distances
    themselves. A copy of the vectors is held as long as they live. Another centre, or a change in
    place that autograd knows of, has them made again.

    Args:
        vectors: ``(m, d)``.
        center: ``(d,)``.

    Returns:
        Tensors without gradient; None where changes could not be seen, or derivatives by one of
        the two are wanted.
    """
    if any(t.requires_grad or t.is_inference() for t in (vectors, center)):
        return None
    versions = (vectors._version, center._version)
    kept = _KEPT.get(vectors)
    if kept is None or kept.center is not center or kept.versions != versions:
        _KEPT.pop(vectors, None)  # frees it before there is another
        with torch.inference_mode(False), torch.no_grad():
            moved = vectors - center
            norms = torch.linalg.vector_norm(moved, dim=1).square_()
        _KEPT[vectors] = kept = _Kept(center, versions, Moved(moved, norms))
    return kept.moved
