"""Attacks at a given eps: a descent is run from more than one start, and its best point kept.

It is run from the input (or a given start), from the best accepted sample of another class, and
from random points of the ball; the best point that any of these runs evaluated is returned.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from torchdnr.attacks.points import (
    Points,
    best_column,
    better,
    evaluated,
    keep_better,
    put,
    unsolved,
)
from torchdnr.attacks.problem import Problem
from torchdnr.attacks.projections import Region, project, random_points
from torchdnr.attacks.starts import Pool, make_pool, nearest_other_class
from torchdnr.attacks.target import Target

_CANDIDATES = 10  # pool samples tried per input as its second start


class Run(NamedTuple):
    """What a descent is given: one batch, where it starts, and its random numbers.

    Attributes:
        target: Model and objective.
        region: Ball and box of each row.
        labels: True classes, or targets, ``(n,)``.
        first: Where each row starts, evaluated.
        reference: Objective at the centres, ``(n,)``.
        generator: For random numbers, on the device of the inputs.
        bar: Progress; ``update`` it once per step.
    """

    target: Target
    region: Region
    labels: Tensor
    first: Points
    reference: Tensor
    generator: torch.Generator
    bar: tqdm


def best_within(
    problem: Problem,
    descend: Callable[[Run], Points],
    *,
    steps: int,
    name: str,
    after_evasion: bool = False,
    random_start: bool = False,
) -> Tensor:
    """Run a descent from every start, batch by batch, and return the best points.

    Args:
        problem: What is attacked.
        descend: The attack: returns the best point of each row that it evaluated.
        steps: Its steps, for the progress bar.
        name: Its name, for the progress bar.
        after_evasion: Whether rows that evade already are attacked from further starts too.
        random_start: Whether the first start is a random point of the ball as well, unless
            ``start`` is given; the input itself is evaluated in any case.

    Returns:
        Adversarial inputs, like the inputs.
    """
    target, region, labels, options = problem
    generator = torch.Generator(device=labels.device).manual_seed(options.seed)
    pool = make_pool(target, options.init_inputs, options.init_labels)
    results = []
    for rows in torch.arange(len(labels), device=labels.device).split(options.batch_size):
        start = None if options.start is None else options.start[rows]
        batch = _Batch(target, region.rows(rows), labels[rows], start, pool, generator)
        clean = evaluated(target, batch.region.center, batch.labels)
        best = clean.clone()
        for some, first in batch.starts(best, options.restarts, after_evasion, random_start):
            part = target, batch.region.rows(some), batch.labels[some], first, clean.values[some]
            with tqdm(total=steps, disable=not options.progress, desc=name, leave=False) as bar:
                reached = descend(Run(*part, generator, bar))
            put(best, some, reached, better(reached, best.rows(some)))
        results.append(best.inputs)
    return torch.cat(results)


class _Batch(NamedTuple):
    """The rows of one batch with everything that starting points depend on."""

    target: Target
    region: Region
    labels: Tensor
    start: Tensor | None
    pool: Pool | None
    generator: torch.Generator

    def starts(
        self, best: Points, restarts: int, after_evasion: bool, random_start: bool
    ) -> Iterator[tuple[Tensor, Points]]:
        """Yield rows and where to start them; the caller updates ``best`` in between."""

        def left() -> Tensor:
            every = torch.arange(len(self.labels), device=self.labels.device)
            return every if after_evasion else unsolved(best)  # waits, once per start

        if len(rows := left()):
            first = best.rows(rows)
            if self.start is not None:
                start = project(self.start[rows], *self.region.rows(rows))
                first = keep_better(first, evaluated(self.target, start, self.labels[rows]))
            elif random_start:
                first = self._random(rows)
            yield rows, first
        if self.pool is not None and len(rows := left()):
            owner, first = self._from_pool(self.pool, rows)
            if len(owner):
                yield rows[owner], first
        for _ in range(restarts):
            if len(rows := left()):
                yield rows, self._random(rows)

    def _random(self, rows: Tensor) -> Points:
        points = random_points(self.region.rows(rows), self.generator)
        return evaluated(self.target, points, self.labels[rows])

    def _from_pool(self, pool: Pool, rows: Tensor) -> tuple[Tensor, Points]:
        """Find the best pool sample for each row after projection; rows without one are absent."""
        region, labels, targeted = self.region.rows(rows), self.labels[rows], self.target.targeted
        nearest, usable = nearest_other_class(region.center, labels, *pool, _CANDIDATES, targeted)
        owner = usable.any(dim=1).nonzero()[:, 0]
        nearest, usable = nearest[owner], usable[owner]
        count = nearest.shape[1]
        chosen = [Points(region.center[:0], region.center.new_zeros(0), usable[:0, 0])]
        at_once = max(1, self.target.batch_size // count)
        for part in torch.arange(len(owner), device=owner.device).split(at_once):
            repeated = owner[part].repeat_interleave(count)
            points = project(pool.samples[nearest[part].flatten()], *region.rows(repeated))
            tried = evaluated(self.target, points, labels[repeated])
            values = torch.where(usable[part], tried.values.view(-1, count), torch.inf)
            column = best_column(values, tried.evading.view(-1, count) & usable[part])
            chosen.append(tried.rows(torch.arange(len(part), device=owner.device) * count + column))
        return owner, Points(*map(torch.cat, zip(*chosen, strict=True)))
