"""Vectors moved to the training mean, kept from one call to the next."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Moved(NamedTuple):
    """What distances to vectors need of them.

    Attributes:
        vectors: Less the centre, ``(m, d)``.
        norms: Their squared norms, ``(m,)``.
    """

    vectors: Tensor
    norms: Tensor


class CentredVectors:
    """Keep vectors less their centre, and their squared norms, as long as both stay the same.

    To make them costs two passes over all vectors, which for few inputs is as much as the distances
    themselves. It holds a copy of the vectors from the first call on. Another tensor in the place
    of one of the two, or a change in place that autograd knows of, has them made again.
    """

    def __init__(self) -> None:
        self._kept: tuple[Tensor, Tensor, tuple[int, int], Moved] | None = None

    def of(self, vectors: Tensor, center: Tensor) -> Moved | None:
        """Return what is kept of these tensors, made now if need be.

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
        kept = self._kept  # read once: another thread may set it
        if kept is None or kept[0] is not vectors or kept[1] is not center or kept[2] != versions:
            self._kept = None  # frees it before there is another
            with torch.inference_mode(False), torch.no_grad():
                moved = vectors - center
                norms = torch.linalg.vector_norm(moved, dim=1).square_()
            self._kept = kept = (vectors, center, versions, Moved(moved, norms))
        return kept[3]

    def __deepcopy__(self, memo: dict[int, Any]) -> "CentredVectors":
        return CentredVectors()

    def __reduce__(self) -> tuple[type["CentredVectors"], tuple[()]]:
        return CentredVectors, ()
