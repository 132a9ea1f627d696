"""Where an attack starts from other than the attacked input: accepted samples of other classes.

Far from the training data an RBF score is flat, so that a descent from the attacked input alone
stalls; a sample that the model accepts as another class is on the far side already.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from torchdnr.attacks.projections import Region, per_row, project_box, rows_of
from torchdnr.attacks.target import Target, evaluate
from torchdnr.decisions import REJECT, predict_labels

_DISTANCES = 1 << 22  # entries of the distance matrix held at once
LINE_HALVINGS = 5
"""Bisections of the line to each pool sample; the walk does the rest."""


class Pool(NamedTuple):
    """Samples to start from, ``(m, ...)``, and their assigned classes, -1 for none, ``(m,)``."""

    samples: Tensor
    classes: Tensor


def make_pool(target: Target, samples: Tensor | None, classes: Tensor | None) -> Pool | None:
    """Join samples and their classes, which the model assigns where they are not given."""
    if samples is None:
        return None
    return Pool(samples, assigned_classes(target, samples) if classes is None else classes)


@torch.no_grad()
def assigned_classes(target: Target, pool: Tensor) -> Tensor:
    """Return the class that the model assigns to each sample, or ``REJECT``, ``(m,)``."""
    outputs = (target.output(chunk) for chunk in pool.split(target.batch_size))
    return torch.cat([predict_labels(output, target.reject) for output in outputs])


def nearest_other_class(
    inputs: Tensor,
    labels: Tensor,
    pool: Tensor,
    classes: Tensor,
    neighbours: int,
    targeted: bool = False,
) -> tuple[Tensor, Tensor]:
    """Find near pool samples that are assigned to classes other than the label, or to the target.

    Half of them are the nearest samples of the nearest classes, one per class, and the rest the
    nearest of all others: the nearest sample need not be of the class that is easiest to reach.
    Returns indices into the pool ``(n, k)``, k <= ``neighbours``, and which are usable, ``(n, k)``.
    """
    points, samples = inputs.flatten(1), pool.flatten(1)
    present = classes[classes != REJECT].unique()
    members = classes == present[:, None]
    neighbours = min(neighbours, len(samples))
    indices, usable = [], []
    rows = max(1, _DISTANCES // (len(samples) * max(1, len(present))))
    for chunk, chunk_labels in zip(points.split(rows), labels.split(rows), strict=True):
        # Differences, not a matrix product: an input's neighbours do not depend on its batch.
        distances = torch.cdist(chunk, samples, compute_mode="donot_use_mm_for_euclid_dist")
        fits = (classes == chunk_labels[:, None]) == targeted
        fits = fits & (classes != REJECT)
        distances = torch.where(fits, distances, torch.inf)
        if len(present):
            per_class = torch.where(members, distances[:, None], torch.inf).min(dim=2)
            leaders = per_class.values.topk(min((neighbours + 1) // 2, len(present)), largest=False)
            picked = per_class.indices.gather(1, leaders.indices)
            leading = torch.where(leaders.values.isfinite(), -1, torch.inf).to(distances.dtype)
            # Before all others. A class without a usable sample picks any: it must change nothing.
            distances = distances.scatter_reduce(1, picked, leading, "amin")
        nearest = distances.topk(neighbours, largest=False)
        indices.append(nearest.indices)
        usable.append(nearest.values.isfinite())
    return torch.cat(indices), torch.cat(usable)


def bisect(target: Target, labels: Tensor, near: Tensor, far: Tensor, halvings: int) -> Tensor:
    """Move each far point, which evades, towards its near point for as long as it evades."""
    low = far.new_zeros(len(far))
    high = far.new_ones(len(far))
    for _ in range(halvings):
        middle = (low + high) / 2
        points = near + per_row(middle, far) * (far - near)
        good = evaluate(target, points, labels).values < 0
        low, high = torch.where(good, low, middle), torch.where(good, middle, high)
    reached = near + per_row(high, far) * (far - near)
    return torch.where(per_row(high == 1, far), far, reached)


def keep_nearest(groups: Tensor, distances: Tensor, count: int) -> Tensor:
    """Return the rows that hold the ``count`` smallest distances of each group."""
    order = distances.argsort(stable=True)
    order = order[groups[order].argsort(stable=True)]
    ordered = groups[order]
    rank = torch.arange(len(ordered), device=ordered.device) - torch.searchsorted(ordered, ordered)
    return order[rank < count]


def evading_starts(
    target: Target,
    region: Region,
    labels: Tensor,
    pool: Pool,
    neighbours: int,
    starts: int,
) -> tuple[Tensor, Tensor]:
    """Find evading points near each input: the nearest of each class, then the nearest of all.

    Tries ``neighbours`` pool samples per input, whose norm and box are those of ``region``. Returns
    the input that each point belongs to ``(r,)``, and the points, at most ``starts`` per input.
    """
    center, _, norm, bounds = region
    nearest, usable = nearest_other_class(center, labels, *pool, neighbours, target.targeted)
    owner, column = usable.nonzero(as_tuple=True)
    sample = nearest[owner, column]
    if len(sample) == 0:  # not all networks take an empty batch
        return owner, center[:0]
    points = project_box(pool.samples[sample], rows_of(bounds, owner))  # a mask leaves a part of it
    good = evaluate(target, points, labels[owner]).values < 0
    owner, sample, points = owner[good], sample[good], points[good]
    if len(sample) == 0:
        return owner, points
    points = bisect(target, labels[owner], center[owner], points, LINE_HALVINGS)
    distance = lengths(points, center[owner], norm)
    leaders = keep_nearest(owner * (pool.classes.max() + 1) + pool.classes[sample], distance, 1)
    farthest = torch.linalg.vector_norm(region.farthest(), norm, dim=1).amax()
    rank = (distance + farthest).index_copy(0, leaders, distance[leaders])  # leaders come first
    keep = keep_nearest(owner, rank, starts)
    return owner[keep], points[keep]


def lengths(points: Tensor, center: Tensor, norm: float) -> Tensor:
    """Compute the norm of each perturbation, ``(n,)``."""
    return torch.linalg.vector_norm((points - center).flatten(1), norm, dim=1)
