"""What the checks look at: model, evaluation, the samples it did not evade, and where to start."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchdnr.attacks.objectives import find_objective
from torchdnr.attacks.projections import project
from torchdnr.attacks.target import Target
from torchdnr.decisions import is_evasion, predict_labels
from torchdnr.evaluation.checks.result import CannotRun, Check, Status
from torchdnr.evaluation.curve import SecurityCurve
from torchdnr.evaluation.judging import CountedModel, outputs
from torchdnr.evaluation.line_up import Attack

Model = Callable[[Tensor], Tensor]

SMALL_DROP = 0.02
"""Fall of the accuracy, by an attack that ought to be weaker, above which a check fails."""


@dataclass(frozen=True, eq=False)
class Context:
    """One evaluation under examination.

    Attributes:
        model: The model, counting what passes through it.
        original: The model as it was given.
        inputs: Clean inputs, ``(n, ...)``.
        labels: True labels, ``(n,)``.
        curve: The evaluation.
        norm: Norm of the perturbations.
        bounds: Smallest and largest value of an input.
        reject: Whether the last column of the output is theta.
        batch_size: Rows in one forward.
        eps: The one eps at which attacks are compared, > 0.
        points: Worst-case points of the evaluation at that eps; the inputs where none are stored.
        evading: Which samples the evaluation evades at that eps, bool ``(n,)``.
        clean: Predictions for the inputs as they are, ``(n,)``.
        rows: The first of those that it does not, ``(s,)``.
        first: The first samples, evaded or not, ``(s,)``.
        pool: Inputs of all classes to start from, ``(m, ...)``.
        pool_labels: Classes that the model assigns to them, -1 where it rejects, ``(m,)``.
        attacks: Line-up of the evaluation.
        surrogate: Undefended classifier, ``(n, ...)`` to ``(n, c)``, or None.
        reference: Robust accuracy of a classifier without rejection, or None.
        options: Sizes: samples, recorded, draws, noise_draws, steps, queries, passes.
        seed: Of everything that is drawn.
        cache: Results that several checks use.
    """

    model: CountedModel
    original: Model
    inputs: Tensor
    labels: Tensor
    curve: SecurityCurve
    norm: float
    bounds: tuple[float, float]
    reject: bool
    batch_size: int
    eps: float
    points: Tensor
    evading: Tensor
    clean: Tensor
    rows: Tensor
    first: Tensor
    pool: Tensor
    pool_labels: Tensor
    attacks: Mapping[str, Attack]
    surrogate: Model | None
    reference: SecurityCurve | Mapping[float, float] | None
    options: Mapping[str, int]
    seed: int
    cache: dict[str, Any] = field(default_factory=dict)

    @property
    def width(self) -> float:
        """Width of the box."""
        return self.bounds[1] - self.bounds[0]

    @property
    def diameter(self) -> float:
        """Largest distance of two inputs in the norm of the attack: a larger eps bounds nothing."""
        return self.width * self.inputs[0].numel() ** (1 / self.norm)

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
        reject: bool = False,
        **options: Any,  # noqa: ANN401 - options of any attack
    ) -> Tensor:
        """Attack some samples at the one eps.

        Args:
            attack: Function of ``torchdnr.attacks``.
            rows: Samples, ``(s,)``.
            model: What to attack; None: the model.
            reject: Whether the output of another ``model`` has theta in the last column.
            **options: Of the attack.

        Returns:
            Points, ``(s, ...)``.
        """
        shared = {
            "eps": self.eps,
            "norm": self.norm,
            "bounds": self.bounds,
            "batch_size": self.batch_size,
            "seed": self.seed,
        }
        if model is None:
            model, reject = self.model, self.reject
        inputs, labels = self.inputs[rows], self.labels[rows]
        return attack(model, inputs, labels, **(shared | options), reject=reject)

    def unevaded(self) -> Tensor:
        """Return the samples that the evaluation did not evade.

        Raises:
            CannotRun: If there is none.
        """
        if len(self.rows) == 0:
            raise CannotRun(f"the evaluation evades every sample at eps = {self.eps:g} already")
        return self.rows


def choose_eps(curve: SecurityCurve, eps: float | None) -> int:
    """Find at which eps attacks are compared: where the accuracy is nearest to one half.

    There most is at stake; of several the largest.

    Raises:
        ValueError: If the curve has no positive eps, or not the one asked for.
    """
    positive = [index for index, value in enumerate(curve.eps) if value > 0]
    if not positive:
        raise ValueError("curve has no eps > 0: evaluate the model under attack first")
    if eps is None:
        return min(positive, key=lambda i: (abs(curve.accuracy[i] - 0.5), -curve.eps[i]))
    if eps not in [curve.eps[i] for i in positive]:
        raise ValueError(f"eps must be one of those of the curve, {curve.eps}, got {eps}")
    return curve.eps.index(eps)


def evades_at(context: Context, points: Tensor, rows: Tensor) -> Tensor:
    """Tell which points of some samples, projected into ball and box, evade; bool ``(s,)``."""
    inside = project(points, context.inputs[rows], context.eps, context.norm, context.bounds)
    output = outputs(context.model, inside, context.batch_size)
    return is_evasion(predict_labels(output, context.reject), context.labels[rows])


def weaker_attack(context: Context, name: str, what: str, found: Tensor, advice: str) -> Check:
    """Judge an attack that ought to find nothing where the evaluation found nothing.

    One such sample warns. It fails where the accuracy at that eps would fall by more than
    ``SMALL_DROP``.

    Args:
        context: What is checked.
        name: Name of the check.
        what: The attack, as the subject of a sentence.
        found: Which of ``context.rows`` it evades, bool ``(s,)``.
        advice: What to do if it finds any.
    """
    count = int(found.sum())
    status, drop = drop_status(context, count, len(found), SMALL_DROP)
    message = (
        f"{what} evaded {count} of {len(found)} samples that the evaluation did not evade at "
        f"eps = {context.eps:g}"
    )
    message += f": its accuracy is too high by about {100 * drop:.1f} points." if count else "."
    counts = {"samples": len(found), "evaded": count, "accuracy_drop": drop}
    return Check(name, status, counts, message, advice if count else "")


def drop_status(context: Context, count: int, samples: int, allowed: float) -> tuple[Status, float]:
    """Grade evasions the evaluation missed, by the fall of the accuracy that they amount to."""
    drop = count / samples * (~context.evading).double().mean().item()
    return ("pass" if count == 0 else "warn" if drop <= allowed else "fail"), drop


def share_status(count: int, total: int, *, warn: float = 0.1, fail: float = 0.5) -> Status:
    """Grade a count by its share of the total."""
    share = count / total if total else 0.0
    return "fail" if share > fail else "warn" if share > warn else "pass"
