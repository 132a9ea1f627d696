"""Attacks at a given eps: a descent is run from more than one start, and its best point kept.

It is run from the input (or a given start), from the best accepted sample of another class, in
smaller balls where the ball is much of the box, and from random points of the ball; the best point
that any of these runs evaluated is returned.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from torchdnr.attacks.problem import Problem
from torchdnr.attacks.projections import Region, random_points
from torchdnr.attacks.starts import Pool, make_pool, nearest_other_class
from torchdnr.attacks.target import (
    Points,
    Target,
    best_trials,
    better,
    evaluate,
    keep_better,
    put,
    unsolved,
)

_CANDIDATES = 10  # pool samples tried per input as its second start
# Where eps is more than a third of the way to the farthest corner of the box, long steps pass over
# what shorter ones find: the descent is run in these shares of that way too, if they are less.
_LARGE, _SMALLER = 1 / 3, (1 / 2, 1 / 4, 1 / 8)


class Run(NamedTuple):
    """What a descent is given: one batch, where it starts, and its random numbers."""

    target: Target
    region: Region
    labels: Tensor  # true classes, or targets, (n,)
    first: Points  # where each row starts
    reference: Tensor  # objective at the centres, (n,)
    generator: torch.Generator
    bar: tqdm  # to be updated once per step


def best_within(
    problem: Problem,
    descend: Callable[[Run], Points],
    *,
    steps: int,
    name: str,
    after_evasion: bool = False,
    random_start: bool = False,
) -> Tensor:
    """Run a descent from every start, batch by batch, and return the best points, ``(n, ...)``.

    ``descend`` returns the best point of each row that it evaluated. With ``after_evasion`` rows
    that evade already are attacked from further starts too; with ``random_start`` the first start
    is a random point of the ball, unless ``start`` is given: the input is evaluated in any case.
    """
    target, _, labels, options = problem
    generator = torch.Generator(device=labels.device).manual_seed(options.seed)
    pool = make_pool(target, options.init_inputs, options.init_labels)
    results = []
    for rows in torch.arange(len(labels), device=labels.device).split(target.batch_size):
        batch = problem.rows(rows)
        clean = evaluate(target, batch.region.center, batch.labels)
        best = clean.clone()
        starts = _starts(batch, best, pool, generator, after_evasion, random_start)
        for some, region, first in starts:
            part = target, region, batch.labels[some], first, clean.values[some]
            with options.bar(steps, name) as bar:
                reached = descend(Run(*part, generator, bar))
            put(best, some, reached, better(reached, best.rows(some)))
        results.append(batch.on_levels(best.inputs))
    return torch.cat(results)


def _starts(
    batch: Problem,
    best: Points,
    pool: Pool | None,
    generator: torch.Generator,
    after_evasion: bool,
    random_start: bool,
) -> Iterator[tuple[Tensor, Region, Points]]:
    """Yield rows, their balls and where to start; the caller updates ``best`` in between."""
    clean = best.clone()

    def left() -> Tensor:
        every = torch.arange(len(batch.labels), device=batch.labels.device)
        return every if after_evasion else unsolved(best)  # waits, once per start

    def at_random(rows: Tensor, region: Region) -> Points:
        return evaluate(batch.target, random_points(region, generator), batch.labels[rows])

    if len(rows := left()):
        first = best.rows(rows)
        if batch.options.start is not None:
            first = keep_better(first, batch.rows(rows).points(batch.options.start[rows]))
        elif random_start:
            first = at_random(rows, batch.region.rows(rows))
        yield rows, batch.region.rows(rows), first
    if pool is not None and len(rows := left()):
        owner, first = _from_pool(batch, pool, rows)
        if len(owner):
            yield owner, batch.region.rows(owner), first
    whole = batch.region._replace(eps=torch.full_like(batch.region.eps, torch.inf)).within_reach()
    large = batch.region.eps > _LARGE * whole.eps
    for share in _SMALLER:
        radius = share * whole.eps
        rows = (large & (radius < batch.region.eps) & ~best.evading).nonzero()[:, 0]
        if len(rows):
            region = batch.region._replace(eps=radius).rows(rows)
            yield rows, region, at_random(rows, region) if random_start else clean.rows(rows)
    for _ in range(batch.options.restarts):
        if len(rows := left()):
            yield rows, batch.region.rows(rows), at_random(rows, batch.region.rows(rows))


def _from_pool(batch: Problem, pool: Pool, rows: Tensor) -> tuple[Tensor, Points]:
    """Find the best pool sample after projection for each of the rows that have one."""
    target, region, labels, _ = batch
    nearest, usable = nearest_other_class(
        region.center[rows], labels[rows], *pool, _CANDIDATES, target.targeted
    )
    some = usable.any(dim=1)
    rows, nearest, usable = rows[some], nearest[some], usable[some]
    if len(rows) == 0:
        return rows, Points(region.center[rows], region.eps[rows], some[:0])

    def samples(part: Tensor) -> Tensor:
        return pool.samples[nearest[part].flatten()]

    return rows, best_trials(target, region.rows(rows), labels[rows], samples, usable)[1]
