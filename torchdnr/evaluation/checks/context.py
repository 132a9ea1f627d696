"""What the checks look at, and how they grade what they see."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from torchdnr.arrays import as_features
from torchdnr.attacks.objectives import find_objective
from torchdnr.attacks.starts import assigned_classes
from torchdnr.attacks.target import Target
from torchdnr.decisions import is_evasion, predict_labels
from torchdnr.evaluation.checks.result import CannotRun, Finding, Status
from torchdnr.evaluation.curve import SecurityCurve, most_telling_eps
from torchdnr.evaluation.judging import CountedModel, Task, outputs
from torchdnr.evaluation.line_up import Attack
from torchdnr.resources import in_float64, synchronize

Model = Callable[[Tensor], Tensor]

SMALL_DROP = 0.02  # fall of the accuracy, by an attack that ought to be weaker, that fails


@dataclass(frozen=True, eq=False, kw_only=True)
class Context(Task):
    """One evaluation under examination."""

    counters: list[CountedModel]  # whatever rows are sent through; the first is ``model``
    curve: SecurityCurve
    index: int  # where in ``curve.eps`` attacks are compared
    pool: Tensor  # inputs of all classes to start from, (m, ...)
    attacks: Mapping[str, Attack]  # line-up of the evaluation
    surrogate: Model | None  # undefended classifier, (n, ...) to (n, c)
    reference: SecurityCurve | Mapping[float, float] | None  # robust accuracy without rejection
    options: Mapping[str, int]  # samples, recorded, draws, noise_draws, steps, queries, passes
    seed: int  # of everything that is drawn
    cache: dict[str, Any] = field(default_factory=dict)  # what more than one check uses

    @property
    def eps(self) -> float:
        """The one eps at which attacks are compared, > 0."""
        return self.curve.eps[self.index]

    @cached_property
    def points(self) -> Tensor:
        """Worst-case points of the evaluation at that eps; the inputs where none are stored."""
        stored = self.curve.adversarial
        return self.inputs if stored is None else stored[self.index].to(self.inputs)

    @cached_property
    def evading(self) -> Tensor:
        """Which samples the evaluation evades at that eps, on the CPU, bool ``(n,)``."""
        return is_evasion(self.curve.predictions[self.index], self.curve.labels)

    @cached_property
    def rows(self) -> Tensor:
        """The first samples that it does not evade, ``(s,)``."""
        rows = (~self.evading).nonzero()[:, 0]
        return rows[: self.options["samples"]].to(self.inputs.device)

    @property
    def first(self) -> Tensor:
        """The first samples, evaded or not, ``(s,)``."""
        count = min(self.options["samples"], len(self.inputs))
        return torch.arange(count, device=self.inputs.device)

    @property
    def width(self) -> float:
        """Width of the box."""
        return self.bounds[1] - self.bounds[0]

    @property
    def diameter(self) -> float:
        """Largest distance of two inputs in the norm of the attack: a larger eps bounds nothing."""
        return self.width * self.inputs[0].numel() ** (1 / self.norm)

    def spent(self) -> dict[str, Any]:
        """Return the time, and the input rows that the model and what was counted have seen."""
        synchronize(self.inputs.device)  # kernels run on after their call
        forwards = sum(model.forwards for model in self.counters)
        backwards = sum(model.backwards for model in self.counters)
        return {"seconds": time.perf_counter(), "forwards": forwards, "backwards": backwards}

    def counted(self, model: Model) -> Model:
        """Count the rows that are sent through another model too."""
        self.counters.append(CountedModel(model))
        return self.counters[-1]

    def generator(self) -> torch.Generator:
        """Return a fresh generator on the device of the inputs."""
        return torch.Generator(device=self.inputs.device).manual_seed(self.seed)

    def target(self, objective: str = "decision") -> Target:
        """Return the model with an objective to lower."""
        return Target(self.model, find_objective(objective), self.reject, self.batch_size)

    def attack(
        self,
        attack: Callable[..., Tensor],
        rows: Tensor,
        *,
        model: Model | None = None,
        **options: Any,  # noqa: ANN401 - options of any attack
    ) -> Tensor:
        """Attack given samples ``(s,)`` at the eps of the comparison; returns points ``(s, ...)``.

        A ``model`` that is attacked instead has no theta in its output.
        """
        shared: dict[str, Any] = {
            "eps": self.eps,
            "norm": self.norm,
            "bounds": self.bounds,
            "batch_size": self.batch_size,
            "reject": self.reject and model is None,
            "seed": self.seed,
            **self.given(rows),
        }
        attacked = self.model if model is None else model
        return attack(attacked, self.inputs[rows], self.labels[rows], **shared | options)

    def run(
        self, attack: Attack, rows: Tensor, *, model: Model | None = None, eps: float | None = None
    ) -> Tensor:
        """Run an attack of the line-up on given samples, from the inputs; returns ``(s, ...)``.

        At the eps of the comparison if none is given; one of minimum norm has no bound.
        """
        inputs, given = self.inputs[rows], self.given(rows)
        if attack.pool is not None:
            given["init_labels"] = self.classes(attack.pool)
        radius = math.inf if attack.minimum_norm else self.eps if eps is None else eps
        at = self.labels[rows], radius, inputs
        points = attack.run(model or self.model, inputs, *at, **given)
        return points.detach().to(inputs)

    def classes(self, pool: Tensor) -> Tensor:
        """Return the classes that the model assigns to samples, -1 where it rejects, ``(m,)``."""
        pool = as_features("init_inputs", pool, self.inputs)
        known = self.cache.setdefault("classes", [])
        for samples, classes in known:
            if samples.shape == pool.shape and torch.equal(samples.to(pool), pool):
                return classes
        known.append((pool, assigned_classes(self.target(), pool)))
        return known[-1][1]

    def unevaded(self) -> Tensor:
        """Return the samples that the evaluation did not evade; there must be some."""
        if len(self.rows) == 0:
            raise CannotRun(f"the evaluation evades every sample at eps = {self.eps:g} already")
        return self.rows


def choose_eps(curve: SecurityCurve, eps: float | None) -> int:
    """Choose where in the curve attacks are compared: at ``eps``, or the most telling one."""
    telling = most_telling_eps(curve)
    if telling is None:
        raise ValueError("curve has no eps > 0: evaluate the model under attack first")
    if eps is not None and eps not in [value for value in curve.eps if value > 0]:
        raise ValueError(f"eps must be one of those of the curve, {curve.eps}, got {eps}")
    return curve.eps.index(telling if eps is None else eps)


def evades_at(context: Context, points: Tensor, rows: Tensor, eps: float | None = None) -> Tensor:
    """Tell which points of given samples evade, projected into ball and box; bool ``(s,)``.

    The ball is that of the comparison if no eps is given.
    """
    inside = context.inside(points, context.eps if eps is None else eps, rows)
    output = outputs(context.model, inside, context.batch_size)
    return is_evasion(predict_labels(output, context.reject), context.labels[rows])


def missed_evasions(
    context: Context, attack: str, evaded: Tensor, advice: str, allowed: float = SMALL_DROP
) -> Finding:
    """Grade an attack, which evades some of ``context.rows``, bool ``(s,)``.

    One evasion warns. It fails where the accuracy at that eps would fall by more than ``allowed``.
    """
    count, total = int(evaded.sum()), len(evaded)
    status, drop = drop_status(context, count, total, allowed)
    message = (
        f"{attack} evaded {count} of {total} samples that the evaluation did not evade at "
        f"eps = {context.eps:g}"
    )
    message += f": its accuracy is too high by about {100 * drop:.1f} points." if count else "."
    counts = {"samples": total, "evaded": count, "accuracy_drop": drop}
    return Finding(status, counts, message, advice)


def drop_status(context: Context, count: int, samples: int, allowed: float) -> tuple[Status, float]:
    """Grade missed evasions by the fall of the accuracy that they amount to."""
    drop = count / samples * in_float64(~context.evading).mean().item()
    return ("pass" if count == 0 else "warn" if drop <= allowed else "fail"), drop


def share_status(count: int, total: int, *, warn: float = 0.1, fail: float = 0.5) -> Status:
    """Grade a count by its share of the total: above a tenth it warns, above half it fails."""
    share = count / total if total else 0.0
    return "fail" if share > fail else "warn" if share > warn else "pass"


def uniform_like(points: Tensor, generator: torch.Generator) -> Tensor:
    """Draw from [0, 1) in the shape and dtype of points."""
    return points.new_empty(points.shape).uniform_(generator=generator)
