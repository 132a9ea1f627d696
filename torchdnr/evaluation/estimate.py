"""How long attacks will take: what is known before they start, and corrected as they go on."""

import time
from collections.abc import Callable, Collection
from functools import partial
from typing import NamedTuple, Self

import torch

from torchdnr.attacks.objectives import decision_objective
from torchdnr.attacks.target import Target, slope_at
from torchdnr.evaluation.cascade import Cascade
from torchdnr.evaluation.judging import Task
from torchdnr.resources import progress_bar, synchronize

_ROWS = 32  # of the batch that is timed: enough to tell, and little memory


class PassSeconds(NamedTuple):
    """Seconds that one input row takes on its way through a model."""

    forward: float
    backward: float  # more than the forward that comes before it


def _measure_passes(task: Task) -> PassSeconds:
    """Measure a batch without and with gradients, each the second time that it runs."""
    rows = torch.arange(min(task.batch_size, _ROWS), device=task.inputs.device) % len(task.inputs)
    part = task.part(rows)
    target = Target(task.model, decision_objective, task.reject, task.batch_size)

    def forward() -> None:
        with torch.no_grad():
            target.output(part.inputs)

    def both() -> None:
        try:
            slope_at(target, part.inputs, part.labels)
        except (RuntimeError, ValueError):
            forward()  # not differentiable: no attack that works on it needs its gradient

    alone, whole = (_second_run(run, part.inputs.device) / len(rows) for run in (forward, both))
    return PassSeconds(alone, max(0.0, whole - alone))


def _second_run(run: Callable[[], None], device: torch.device) -> float:
    run()
    synchronize(device)
    began = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - began


class Meter:
    """One progress bar over all attacks, in seconds of passes through the models.

    The attacks are announced before the first begins. Each that ends on a share corrects what is
    left of it on the others.
    """

    def __init__(self, progress: bool) -> None:
        form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
        self.bar = progress_bar(progress, total=0.0, desc="attacks", bar_format=form)
        self.shown = not self.bar.disable
        self._left: dict[tuple[str, str], list[float]] = {}  # by classifier and attack: each share
        self._spent: dict[tuple[str, str], tuple[float, float]] = {}  # estimated, and measured
        self._current = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    @property
    def seconds(self) -> float:
        """What is left, by the estimates."""
        left = 0.0
        for key, shares in self._left.items():
            estimated, measured = self._spent.get(key, (1.0, 1.0))
            left += sum(shares) * measured / estimated
        return left

    def announce(self, name: str, shares: Collection[Cascade]) -> None:
        """Add the attacks on a classifier, after measuring what a pass through it takes."""
        if not shares:  # more processes than shares
            return
        seconds = _measure_passes(next(iter(shares)).task)
        for cascade in shares:
            cascade.model.on_passes = partial(self._spend, seconds)
            for attack in cascade.keys:
                passes = cascade.passes(attack)
                time_left = passes.forwards * seconds.forward + passes.backwards * seconds.backward
                self._left.setdefault((name, attack), []).append(time_left)
        self.bar.total = self.seconds

    def _spend(self, seconds: PassSeconds, forwards: int, backwards: int) -> None:
        spent = forwards * seconds.forward + backwards * seconds.backward
        self._current += spent
        self.bar.update(spent)

    def finish(self, name: str, attack: str) -> None:
        """End an attack on the next share, and correct what is left of it."""
        if not self._left:  # nothing was announced
            return
        key = name, attack
        planned, before = self._left[key].pop(0), self._spent.get(key, (0.0, 0.0))
        if planned > 0:  # else it was finished before
            self._spent[key] = before[0] + planned, before[1] + self._current
        self._current = 0.0
        self.bar.total = self.bar.n + self.seconds
        self.bar.refresh()


def in_words(seconds: float) -> str:
    """Write a time roughly: 'about 4 minutes'."""
    for name, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 1.75 * size:
            return f"about {seconds / size:.0f} {name}"
    return f"about {max(1, round(seconds))} seconds" if seconds >= 1.5 else "about a second"
