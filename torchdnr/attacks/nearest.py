"""The nearest evading point of each row, as a minimum-norm attack goes along."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from torchdnr.attacks.minimum_norm import Nearest, NearRun, lengths
from torchdnr.attacks.starts import bisect, keep_nearest
from torchdnr.attacks.target import evaluate

_HALVINGS = 10  # bisections towards the input in the end


class Kept(NamedTuple):
    """The nearest evading point of each row, and its norm: infinite where there is none."""

    points: Tensor
    norms: Tensor

    @classmethod
    def nothing(cls, first: Tensor) -> "Kept":
        """Begin without any evading point, beside points ``(r, ...)``."""
        return cls(first, torch.full_like(first.flatten(1)[:, 0], torch.inf))

    def update(self, points: Tensor, norms: Tensor, evading: Tensor) -> "Kept":
        """Take the points that evade and are nearer."""
        nearer = evading & (norms < self.norms)
        wide = nearer.view(-1, *[1] * (points.ndim - 1))
        return Kept(torch.where(wide, points, self.points), torch.where(nearer, norms, self.norms))

    def finish(self, run: NearRun, last: Tensor) -> Nearest:
        """Look at the last points too, then move the best straight towards the inputs."""
        center, labels = run.center[run.owner], run.labels[run.owner]

        def evading(points: Tensor) -> Tensor:
            return evaluate(run.target, points, labels)[0] < 0

        kept = self.update(last, lengths(last, center, run.norm), evading(last))
        # Where nothing evades there is nothing to move: the far end is where it stays.
        found = kept.norms.isfinite().view(-1, *[1] * (center.ndim - 1))
        nearer = bisect(evading, center, torch.where(found, kept.points, center), _HALVINGS)
        norms = lengths(nearer, center, run.norm)
        norms = torch.where(kept.norms.isfinite(), norms, torch.inf)
        first = keep_nearest(run.owner, norms, 1)
        return Nearest(run.owner[first], nearer[first], norms[first])


def cosine(step: int, steps: int, first: float, last: float) -> float:
    """Fade from the first to the last value along half a cosine."""
    fade = (1 + math.cos(math.pi * step / max(1, steps - 1))) / 2
    return last + (first - last) * fade


def dual_norm(vectors: Tensor, norm: float) -> Tensor:
    """Compute the norm dual to that of the attack, ``(n,)``."""
    dual = {1: math.inf, 2: 2, math.inf: 1}[norm]
    return torch.linalg.vector_norm(vectors.flatten(1), dual, dim=1)
