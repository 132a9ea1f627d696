"""What all attacks at a given eps share: checks, batches, starts and restarts, the best point kept.

An attack of this kind is a loop that goes on from first points. It is run from the input (or a
given start), from the best accepted sample of another class, and from random points of the ball;
the best point that any of these runs evaluated is returned.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from torchdnr.attacks.checks import check_count, check_eps, check_inputs, check_like, check_targets
from torchdnr.attacks.objectives import find_objective
from torchdnr.attacks.points import Points, best_column, better, evaluated, put
from torchdnr.attacks.projections import Region, project, random_points
from torchdnr.attacks.starts import assigned_classes, check_pool, nearest_other_class
from torchdnr.attacks.target import Target, check_classes
from torchdnr.decisions import evaluation_mode, has_reject_column

_CANDIDATES = 10  # pool samples tried per input as its second start


@dataclass(frozen=True)
class Run:
    """What a loop is given: one batch, where it starts, and what it may draw from.

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


@dataclass(frozen=True, kw_only=True, eq=False)
class FixedEps:
    """The options that all attacks at a given eps have; see the attacks for what they mean."""

    model: Callable[[Tensor], Tensor]
    inputs: Tensor
    labels: Tensor
    eps: float | Tensor
    norm: float
    objective: str
    targets: Tensor | None = None
    start: Tensor | None = None
    init_inputs: Tensor | None = None
    init_labels: Tensor | None = None
    restarts: int = 0
    bounds: tuple[float, float] = (0.0, 1.0)
    batch_size: int = 256
    reject: bool | None = None
    seed: int = 0
    progress: bool = False

    def run(
        self,
        loop: Callable[[Run], Points],
        *,
        steps: int,
        name: str,
        go_on: bool = False,
        random_start: bool = False,
    ) -> Tensor:
        """Check the options, run a loop from every start, and return the best points.

        Args:
            loop: The attack.
            steps: Its steps, for the progress bar.
            name: Its name, for the progress bar.
            go_on: Whether rows that succeed already are attacked from further starts too.
            random_start: Whether the first start is a random point of the ball as well, unless
                ``start`` is given; the input itself is evaluated in any case.

        Returns:
            Adversarial inputs, like ``inputs``.

        Raises:
            ValueError: If an option is out of range, or shapes, dtypes or devices disagree.
        """
        eps, target = self._checked()
        classes = self.labels if self.targets is None else self.targets
        generator = torch.Generator(device=self.inputs.device).manual_seed(self.seed)
        with evaluation_mode(self.model), torch.no_grad():
            check_classes(target, self.inputs, classes)
            pool = None
            if self.init_inputs is not None:
                given = self.init_labels
                given = assigned_classes(target, self.init_inputs) if given is None else given
                pool = (self.init_inputs, given)
            results = []
            for rows in torch.arange(len(self.inputs), device=eps.device).split(self.batch_size):
                region = Region(self.inputs[rows], eps[rows], self.norm, self.bounds)
                own = None if self.start is None else self.start[rows]
                batch = _Batch(target, region, classes[rows], own, pool, generator)
                results.append(self._attack(batch, loop, steps, name, go_on, random_start))
        return torch.cat(results)

    def _checked(self) -> tuple[Tensor, Target]:
        check_inputs(self.inputs, self.labels, self.norm, self.bounds)
        check_count("restarts", self.restarts, 0)
        check_count("batch_size", self.batch_size, 1)
        check_targets(self.targets, self.labels)
        if self.start is not None:
            check_like("start", self.start, self.inputs, same_length=True)
        if self.init_inputs is not None:
            check_pool(self.init_inputs, self.init_labels, self.inputs, self.bounds)
        target = Target(
            self.model,
            find_objective(self.objective),
            has_reject_column(self.model, self.reject),
            self.batch_size,
            self.targets is not None,
        )
        return check_eps(self.eps, self.inputs), target

    def _attack(
        self,
        batch: "_Batch",
        loop: Callable[[Run], Points],
        steps: int,
        name: str,
        go_on: bool,
        random_start: bool,
    ) -> Tensor:
        best = evaluated(batch.target, batch.region.center, batch.labels)
        reference = best.values.clone()
        best = Points(*(field.clone() for field in best))
        for rows, first in batch.starts(best, self.restarts, go_on, random_start):
            with tqdm(total=steps, disable=not self.progress, desc=name, leave=False) as bar:
                found = loop(
                    Run(
                        batch.target,
                        batch.region.rows(rows),
                        batch.labels[rows],
                        first,
                        reference[rows],
                        batch.generator,
                        bar,
                    )
                )
            put(best, rows, found, better(found, best.rows(rows)))
        return best.inputs


@dataclass(frozen=True)
class _Batch:
    target: Target
    region: Region
    labels: Tensor
    start: Tensor | None
    pool: tuple[Tensor, Tensor] | None
    generator: torch.Generator

    def starts(
        self, best: Points, restarts: int, go_on: bool, random_start: bool
    ) -> Iterator[tuple[Tensor, Points]]:
        """Yield rows and where to start them; ``best`` grows in between."""
        rows = self._unsolved(best, go_on)
        if len(rows):
            first = best.rows(rows)
            if self.start is not None:
                warm = project(self.start[rows], *self.region.rows(rows))
                warm = evaluated(self.target, warm, self.labels[rows])
                first = Points(*(field.clone() for field in first))
                put(first, torch.arange(len(rows), device=rows.device), warm, better(warm, first))
            elif random_start:
                first = self._random(rows)
            yield rows, first
        if self.pool is not None and len(rows := self._unsolved(best, go_on)):
            owner, first = self._pool_points(rows)
            if len(owner):
                yield rows[owner], first
        for _ in range(restarts):
            if len(rows := self._unsolved(best, go_on)):
                yield rows, self._random(rows)

    def _unsolved(self, best: Points, go_on: bool) -> Tensor:
        """Return the rows that are not done; waits for the device, once per start."""
        if go_on:
            return torch.arange(len(self.labels), device=self.labels.device)
        return (~best.evading).nonzero()[:, 0]

    def _random(self, rows: Tensor) -> Points:
        points = random_points(self.region.rows(rows), self.generator)
        return evaluated(self.target, points, self.labels[rows])

    def _pool_points(self, rows: Tensor) -> tuple[Tensor, Points]:
        """Find the best pool sample for each row after projection; rows without one are absent."""
        pool, classes = self.pool
        region, labels, targeted = self.region.rows(rows), self.labels[rows], self.target.targeted
        nearest, usable = nearest_other_class(
            region.center, labels, pool, classes, _CANDIDATES, targeted
        )
        owner = usable.any(dim=1).nonzero()[:, 0]
        nearest, usable = nearest[owner], usable[owner]
        count = nearest.shape[1]
        found = [Points(region.center[:0], region.center.new_zeros(0), usable[:0, 0])]
        at_once = max(1, self.target.batch_size // count)
        for part in torch.arange(len(owner), device=owner.device).split(at_once):
            repeated = owner[part].repeat_interleave(count)
            points = project(pool[nearest[part].flatten()], *region.rows(repeated))
            tried = evaluated(self.target, points, labels[repeated])
            values = torch.where(usable[part], tried.values.view(-1, count), torch.inf)
            column = best_column(values, tried.evading.view(-1, count) & usable[part])
            chosen = torch.arange(len(part), device=owner.device) * count + column
            found.append(tried.rows(chosen))
        return owner, Points(*map(torch.cat, zip(*found, strict=True)))
