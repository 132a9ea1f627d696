"""Minimum-norm attacks: a descent is run from many starts, and the nearest evading point kept.

A descent goes on from first points, the inputs themselves or evading points near samples of other
classes, and returns the nearest evading point of each input that it reaches.
"""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from torchdnr.attacks.checks import check_count
from torchdnr.attacks.objectives import decision_objective
from torchdnr.attacks.problem import Problem
from torchdnr.attacks.projections import Region, per_row, random_points
from torchdnr.attacks.starts import Pool, bisect, evading_starts, keep_nearest, lengths, make_pool
from torchdnr.attacks.target import Target, evaluate, unsolved

_SLACK = 512  # roundings of the spread of the scores by which an evading point must evade
_FLOOR = 4  # roundings of the largest score, the least difference that counts
_VALUES = 1 << 26  # of the points of all inputs that are attacked at a time
_HALVINGS = 10  # bisections towards the input in the end
_PART = 0.1  # share of the pool from which a restart starts
_LEAST_PART = 4  # times the neighbours, of a small pool, up to half of it


def safe_decision_objective(
    scores: Tensor, threshold: Tensor | None, classes: Tensor, targeted: bool = False
) -> Tensor:
    """Compute the "decision" objective plus a slack that rounding of the scores does not exceed.

    It is relative to their spread: a constant added to all scores decides nothing.
    """
    values = scores.detach()
    if threshold is not None:
        values = torch.cat([values, threshold.detach()[:, None]], dim=1)
    spread = values.amax(dim=1) - values.amin(dim=1)
    slack = _SLACK * spread + _FLOOR * values.abs().amax(dim=1)
    slack = slack * torch.finfo(scores.dtype).eps
    return decision_objective(scores, threshold, classes, targeted) + slack


class NearRun(NamedTuple):
    """What a descent is given: the inputs of a batch, and points to start from."""

    target: Target  # with an objective that is negative iff a point evades
    region: Region  # of the attacked inputs; its balls hold all of the box
    labels: Tensor  # true classes, or targets, (n,)
    owner: Tensor  # the input that each start belongs to, (r,)
    first: Tensor  # where to start, (r, ...)
    starts: int  # of one input, at the most
    restart: int  # number of this run
    bar: tqdm  # to be updated once per step


class Nearest(NamedTuple):
    """Evading points: the input they belong to, the points, and their norms (infinite: none)."""

    owner: Tensor
    points: Tensor
    norms: Tensor


def nearest_evading(
    problem: Problem,
    descend: Callable[[NearRun], Nearest],
    neighbours: int,
    starts: int,
    *,
    steps: int,
    name: str,
    from_inputs: bool = True,
) -> Tensor:
    """Run a descent from every start, batch by batch, and return the nearest evading points.

    ``from_inputs`` says whether the attack can start at the inputs too, which do not evade. Points
    farther than the eps of the problem are projected on it in the end. An input that evades, or for
    which there is no evading point, is returned as it is; a warning counts the latter.
    """
    check_count("neighbours", neighbours, 1)
    check_count("starts", starts, 1)
    target, region, labels, options = problem
    inputs = region.center
    generator = torch.Generator(device=inputs.device).manual_seed(options.seed)
    pool = make_pool(target, options.init_inputs, options.init_labels)
    nearest, without = inputs.clone(), torch.zeros_like(labels[0])
    unlimited = region._replace(eps=torch.full_like(region.eps, torch.inf)).within_reach()
    left = unsolved(evaluate(target, inputs, labels))
    # An input takes as much memory as it has starts, or pool samples tried, whatever the batch.
    most = max(1, _VALUES // (max(neighbours, starts) * inputs[:1].numel() or 1))
    for rows in left.split(min(target.batch_size, most)) if len(left) else ():
        whole, classes = unlimited.rows(rows), labels[rows]
        center = whole.center
        norms = torch.full_like(center.flatten(1)[:, 0], torch.inf)
        best = center.clone()
        for restart in range(1 + options.restarts):
            ball = whole._replace(eps=norms)
            owner, first = rows[:0], center[:0]
            if pool is not None:
                some = _part(pool, neighbours, generator) if restart else pool
                owner, first = evading_starts(target, ball, classes, some, neighbours, starts)
            if from_inputs:
                elsewhere = random_points(ball, generator) if restart else center
                every = torch.arange(len(center), device=center.device)
                owner, first = torch.cat([every, owner]), torch.cat([elsewhere, first])
            with options.bar(steps, name) as bar:
                reached = descend(
                    NearRun(target, whole, classes, owner, first, starts, restart, bar)
                )
            nearer = reached.norms < norms[reached.owner]
            owner = reached.owner[nearer]
            best[owner], norms[owner] = reached.points[nearer], reached.norms[nearer]
        evading = norms.isfinite().nonzero()[:, 0] if options.levels is not None else rows[:0]
        if len(evading):
            part = problem.rows(rows[evading])._replace(region=whole.rows(evading))
            best[evading] = part.on_levels(best[evading])
            lost = evaluate(target, best[evading], classes[evading]).values >= 0
            norms[evading[lost]] = torch.inf
        nearest[rows], without = best, without + (~norms.isfinite()).sum()
    if without:
        warnings.warn(
            f"found no evading point for {int(without)} of {len(inputs)} inputs, returned as they "
            "are; pass init_inputs with more samples of all classes, or more steps",
            stacklevel=3,
        )
    return problem.inside(nearest)


def _part(pool: Pool, neighbours: int, generator: torch.Generator) -> Pool:
    """Draw a random part of the pool, in which other samples are the nearest.

    In half of it most of the nearest are still there, and restarts found little that was new.
    """
    samples, classes = pool
    share = max(_PART, min(0.5, _LEAST_PART * neighbours / len(samples)))
    part = torch.rand(len(samples), generator=generator, device=samples.device) < share
    part = part | ~part.any()  # none is no pool
    return Pool(samples[part], classes[part])


class Kept(NamedTuple):
    """The nearest evading point of each row, and its norm: infinite where there is none."""

    points: Tensor
    norms: Tensor

    def update(self, points: Tensor, norms: Tensor, evading: Tensor) -> "Kept":
        """Keep the points that evade and are nearer."""
        nearer = evading & (norms < self.norms)
        return Kept(
            torch.where(per_row(nearer, points), points, self.points),
            torch.where(nearer, norms, self.norms),
        )

    def finish(self, run: NearRun, last: Tensor) -> Nearest:
        """Evaluate the last points too, then move the best straight towards the inputs."""
        center, labels = run.region.center[run.owner], run.labels[run.owner]
        norm = run.region.norm
        evading = evaluate(run.target, last, labels).values < 0
        kept = self.update(last, lengths(last, center, norm), evading)
        # Where nothing evades there is nothing to move: the far end is where it stays.
        exists = kept.norms.isfinite()
        far = torch.where(per_row(exists, center), kept.points, center)
        nearer = bisect(run.target, labels, center, far, _HALVINGS)
        norms = torch.where(exists, lengths(nearer, center, norm), torch.inf)
        first = keep_nearest(run.owner, norms, 1)
        return Nearest(run.owner[first], nearer[first], norms[first])
