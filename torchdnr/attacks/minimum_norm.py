"""What all minimum-norm attacks share: checks, batches, starts, restarts, the nearest point kept.

An attack of this kind is a loop that goes on from first points, the inputs themselves or evading
points near samples of other classes, and returns the nearest evading point of each input.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from torchdnr.attacks.checks import check_count, check_eps, check_inputs, check_targets
from torchdnr.attacks.objectives import decision_objective
from torchdnr.attacks.projections import Region, project, random_points
from torchdnr.attacks.starts import (
    assigned_classes,
    bisect,
    check_pool,
    evading_starts,
    keep_nearest,
)
from torchdnr.attacks.target import Target, check_classes, evaluate
from torchdnr.decisions import evaluation_mode, has_reject_column

_SLACK = 512  # roundings of the spread of the scores by which an evading point must evade
_FLOOR = 4  # roundings of the largest score, the least that can be told apart


class NearRun(NamedTuple):
    """What a loop is given: the inputs of a batch, and points to start from.

    Attributes:
        target: Model, with an objective that is negative iff a point evades.
        center: Attacked inputs, ``(n, ...)``.
        labels: Their true classes, or targets, ``(n,)``.
        owner: Input that each start belongs to, ``(r,)``.
        first: Where to start, ``(r, ...)``.
        starts: Largest number of starts of one input.
        norm: Norm of the perturbation.
        bounds: Smallest and largest value of an input.
        bar: Progress; ``update`` it once per step.
    """

    target: Target
    center: Tensor
    labels: Tensor
    owner: Tensor
    first: Tensor
    starts: int
    norm: float
    bounds: tuple[float, float]
    bar: tqdm


class Nearest(NamedTuple):
    """Evading points: the input they belong to, the points, and their norms (infinite: none)."""

    owner: Tensor
    points: Tensor
    norms: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class MinimumNorm:
    """The options that all minimum-norm attacks have; see the attacks for what they mean."""

    model: Callable[[Tensor], Tensor]
    inputs: Tensor
    labels: Tensor
    norm: float
    init_inputs: Tensor | None
    eps: float | Tensor | None = None
    targets: Tensor | None = None
    init_labels: Tensor | None = None
    neighbours: int = 20
    starts: int = 1
    restarts: int = 0
    bounds: tuple[float, float] = (0.0, 1.0)
    batch_size: int = 256
    reject: bool | None = None
    seed: int = 0
    progress: bool = False

    def run(
        self,
        loop: Callable[[NearRun], Nearest],
        *,
        steps: int,
        name: str,
        from_inputs: bool,
    ) -> Tensor:
        """Check the options, run a loop from every start, and return the nearest evading points.

        Args:
            loop: The attack.
            steps: Its steps, for the progress bar.
            name: Its name, for the progress bar.
            from_inputs: Whether it can start at the inputs too, that do not evade.

        Returns:
            Points, like ``inputs``. An input that evades, or for which no evading point was found,
            is returned as it is.

        Raises:
            ValueError: If an option is out of range, or shapes, dtypes or devices disagree.
        """
        radius, target = self._checked()
        classes = self.labels if self.targets is None else self.targets
        generator = torch.Generator(device=self.inputs.device).manual_seed(self.seed)
        nearest, lost = self.inputs.clone(), 0
        with evaluation_mode(self.model), torch.no_grad():
            check_classes(target, self.inputs, classes)
            pool = None
            if self.init_inputs is not None:
                given = self.init_labels
                given = assigned_classes(target, self.init_inputs) if given is None else given
                pool = (self.init_inputs, given)
            unsolved = (~evaluate(target, self.inputs, classes)[1]).nonzero()[:, 0]
            for rows in unsolved.split(self.batch_size) if len(unsolved) else ():
                batch = _Batch(self, target, self.inputs[rows], classes[rows], pool, generator)
                points, norms = batch.attack(loop, steps, name, from_inputs)
                nearest[rows], lost = points, lost + (~norms.isfinite()).sum()
        if lost:
            warnings.warn(
                f"found no evading point for {int(lost)} of {len(self.inputs)} inputs, returned as "
                "they are; pass init_inputs with more samples of all classes, or more steps",
                stacklevel=3,
            )
        if radius is None:
            return nearest
        return project(nearest, self.inputs, radius, self.norm, self.bounds)

    def _checked(self) -> tuple[Tensor | None, Target]:
        check_inputs(self.inputs, self.labels, self.norm, self.bounds)
        check_targets(self.targets, self.labels)
        check_count("restarts", self.restarts, 0)
        for name in ("neighbours", "starts", "batch_size"):
            check_count(name, getattr(self, name), 1)
        if self.init_inputs is not None:
            check_pool(self.init_inputs, self.init_labels, self.inputs, self.bounds)
        reject = has_reject_column(self.model, self.reject)
        targeted = self.targets is not None
        target = Target(self.model, _safe_decision, reject, self.batch_size, targeted)
        return None if self.eps is None else check_eps(self.eps, self.inputs), target


class _Batch(NamedTuple):
    options: MinimumNorm
    target: Target
    center: Tensor
    labels: Tensor
    pool: tuple[Tensor, Tensor] | None
    generator: torch.Generator

    def attack(
        self, loop: Callable[[NearRun], Nearest], steps: int, name: str, from_inputs: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the nearest points of all starts ``(n, ...)``, and their norms ``(n,)``."""
        best = self.center.clone()
        norms = torch.full_like(self.center.flatten(1)[:, 0], torch.inf)
        for restart in range(1 + self.options.restarts):
            owner, first = self._starts(restart, from_inputs, norms)
            with tqdm(
                total=steps, disable=not self.options.progress, desc=name, leave=False
            ) as bar:
                shared = (self.options.starts, self.options.norm, self.options.bounds, bar)
                found = loop(NearRun(self.target, self.center, self.labels, owner, first, *shared))
            nearer = found.norms < norms[found.owner]
            rows = found.owner[nearer]
            best[rows], norms[rows] = found.points[nearer], found.norms[nearer]
        return best, norms

    def _starts(self, restart: int, from_inputs: bool, norms: Tensor) -> tuple[Tensor, Tensor]:
        """Return where to start: near other classes, and, for loops that can, elsewhere too."""
        rows = torch.arange(len(self.center), device=self.center.device)
        options, owner, first = self.options, rows[:0], self.center[:0]
        if self.pool is not None:
            pool, classes = self.pool
            if restart:  # the nearest of a random half: others than before
                half = torch.rand(len(pool), generator=self.generator, device=rows.device) < 0.5
                half = half | ~half.any()  # none is no pool
                pool, classes = pool[half], classes[half]
            owner, first = evading_starts(
                self.target,
                self.center,
                self.labels,
                pool,
                classes,
                options.neighbours,
                options.starts,
                options.norm,
                options.bounds,
            )
        if from_inputs:
            own = self.center
            if restart:
                region = Region(self.center, norms, options.norm, options.bounds)
                own = random_points(region, self.generator)
            owner, first = torch.cat([rows, owner]), torch.cat([own, first])
        return owner, first


def lengths(points: Tensor, center: Tensor, norm: float) -> Tensor:
    """Compute the norm of each perturbation, ``(n,)``."""
    return torch.linalg.vector_norm((points - center).flatten(1), norm, dim=1)


def _safe_decision(
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
