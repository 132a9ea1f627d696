"""Attacks made of other attacks: an ensemble, one run per target class, and transfer.

Each keeps per sample the best point that any of the runs reached.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchdnr.attacks.checks import check_count
from torchdnr.attacks.options import Options, only_shared
from torchdnr.attacks.pgd import pgd
from torchdnr.attacks.problem import Problem, problem
from torchdnr.attacks.target import Points, Target, better, keep_better, put, unsolved
from torchdnr.decisions import split_scores

NO_MEMBER = -1
"""Winner of a row whose input, or start, no member improved."""


@dataclass(frozen=True, eq=False)
class EnsembleResult:
    """The worst case over the members of an ensemble.

    Attributes:
        points: The best point of each row, like the inputs.
        evading: Whether it is accepted and wrong, or accepted as the target, bool ``(n,)``.
        values: Its decision objective, ``(n,)``.
        winner: Number of the member that reached it, -1 where none improved on the input or the
            start, int64 ``(n,)``.
        names: Names of the members, by number.
    """

    points: Tensor
    evading: Tensor
    values: Tensor
    winner: Tensor
    names: tuple[str, ...]

    def wins(self) -> dict[str, int]:
        """Count the rows that each member won."""
        counts = (self.winner[:, None] == torch.arange(len(self.names)).to(self.winner)).sum(dim=0)
        return dict(zip(self.names, counts.tolist(), strict=True))


@dataclass(frozen=True, eq=False)
class EnsembleAttack:
    """Attacks that are run one after the other, each on the samples that do not evade yet.

    A sample that is accepted and wrong is finished. A rejected one is not: the next member attacks
    it. Members are called as
    ``member(model, inputs, labels, eps, start=..., norm=..., targets=..., bounds=...,
    batch_size=..., reject=..., **options)``; the attacks at a given eps of this package accept
    these, others can be wrapped in a function that drops what they do not know. Options of one
    member are bound with ``functools.partial``.

    Attributes:
        members: Attacks by name, in the order in which they run.
        chain: Whether a member starts from the best points so far. Without it every member starts
            as it would alone, so that the ensemble is at least as strong per sample as each of its
            members (one that draws random numbers: with the draws it makes here).
    """

    members: Mapping[str, Callable[..., Tensor]]
    chain: bool = False

    def __call__(
        self,
        model: Callable[[Tensor], Tensor],
        inputs: Tensor,
        labels: Tensor,
        eps: float | Tensor,
        start: Tensor | None = None,
        **options: Any,  # noqa: ANN401 - see ``run``
    ) -> Tensor:
        """Return the best points; the arguments are those of ``run``."""
        return self.run(model, inputs, labels, eps, start, **options).points

    def run(
        self,
        model: Callable[[Tensor], Tensor],
        inputs: Tensor,
        labels: Tensor,
        eps: float | Tensor,
        start: Tensor | None = None,
        **options: Any,  # noqa: ANN401 - documented below
    ) -> EnsembleResult:
        """Run the members and keep per sample the best point by the decision objective.

        Args:
            model: Maps inputs to scores ``(n, c)``, or ``(n, c + 1)`` with the threshold last.
            inputs: ``(n, ...)`` in ``bounds``, float32 or float64.
            labels: True classes, int64 ``(n,)``.
            eps: Largest perturbation >= 0, a number or ``(n,)``.
            start: Points to begin with, ``(n, ...)``; projected.
            **options: Passed to every member: the shared ones, see ``FixedEpsOptions``, and any
                other that all members have.

        Returns:
            ``EnsembleResult``. Points are never worse than the input and the start.

        Raises:
            ValueError: If there is no member, an argument is out of range, or a member returns
                points unlike its inputs.
        """
        if not self.members:
            raise ValueError("members must name at least one attack, got none")
        shared = only_shared({**options, "start": start})
        with problem(model, inputs, labels, eps, shared) as attacked:
            best = attacked.best_given()
            winner = torch.full_like(labels, NO_MEMBER)
            for number, member in enumerate(self.members.values()):
                begin = best.inputs if self.chain else start
                improved = _improve(
                    attacked, best, member, labels, options, targets=shared.targets, start=begin
                )
                winner = torch.where(improved, number, winner)
        return EnsembleResult(best.inputs, best.evading, best.values, winner, tuple(self.members))


def multi_target(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    labels: Tensor,
    eps: float | Tensor,
    *,
    attack: Callable[..., Tensor] = pgd,
    classes: int | None = None,
    **options: Any,  # noqa: ANN401 - documented below
) -> Tensor:
    """Attack towards every other class in turn, and keep the best point.

    An untargeted attack follows the class that is ahead where it stands, and may end in a corner
    where that class is never accepted. Here each sample is pulled towards the other classes one by
    one, in the order of their scores at the input, until it evades.

    Args:
        model: Maps inputs to scores ``(n, c)``, or ``(n, c + 1)`` with the threshold last.
        inputs: ``(n, ...)`` in ``bounds``, float32 or float64.
        labels: True classes, int64 ``(n,)``.
        eps: Largest perturbation >= 0, a number or ``(n,)``.
        attack: ``attack(model, inputs, labels, eps, targets=..., norm=..., ...) -> points``.
        classes: Classes tried per sample, at most c - 1; None: all of them.
        **options: Options of the attack, except ``targets``: the shared ones, see
            ``FixedEpsOptions``, and its own.

    Returns:
        Adversarial inputs, like ``inputs``: by the untargeted decision objective never worse than
        the input and the start.

    Raises:
        ValueError: If an argument is out of range, or shapes, dtypes or devices disagree.

    Source: Gowal et al., "An alternative surrogate loss for PGD-based adversarial testing", 2019.
    """
    if "targets" in options:
        raise ValueError("targets are chosen by multi_target; call the attack itself for one class")
    if classes is not None:
        check_count("classes", classes, 1)
    with problem(model, inputs, labels, eps, only_shared(options)) as attacked:
        best = attacked.best_given()
        order = _other_classes(attacked.target, inputs, labels)
        for wanted in order[:, :classes].unbind(dim=1):
            start = attacked.options.start
            _improve(attacked, best, attack, labels, options, targets=wanted, start=start)
    return best.inputs


def _other_classes(target: Target, inputs: Tensor, labels: Tensor) -> Tensor:
    """Return the classes other than the label, by falling score, ``(n, c - 1)``."""
    chunks = inputs.split(target.batch_size)
    scores = torch.cat([split_scores(target.model(chunk), target.reject)[0] for chunk in chunks])
    least = torch.finfo(scores.dtype).min  # NaN would come first; the true class comes last
    scores = scores.nan_to_num(nan=least, neginf=least)
    return scores.scatter(1, labels[:, None], -torch.inf).argsort(
        dim=1, descending=True, stable=True
    )[:, :-1]


def transfer(
    attack: Callable[..., Tensor],
    surrogate: Callable[[Tensor], Tensor],
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    labels: Tensor,
    eps: float | Tensor,
    *,
    objectives: Sequence[str] = ("decision", "cross-entropy"),
    shares: int = 4,
    surrogate_reject: bool | None = None,
    **options: Any,  # noqa: ANN401 - documented below
) -> Tensor:
    """Craft points on a surrogate and return those that are best on the model.

    The model need not be differentiable. Its gradients may be masked where those of the surrogate,
    for instance the network without its defence, are not; so an evasion by these points that the
    attacks on the model itself miss shows that those are too weak.

    A point that goes far on the surrogate may be rejected by the model where a nearer one is not:
    points on the line from the input to each crafted one are tried as well.

    Args:
        attack: ``attack(model, inputs, labels, eps, norm=..., objective=..., ...) -> points``, such
            as ``pgd``.
        surrogate: Model to craft on, with the classes of ``model``.
        model: Maps inputs to scores ``(n, c)``, or ``(n, c + 1)`` with the threshold last.
        inputs: ``(n, ...)`` in ``bounds``, float32 or float64.
        labels: True classes, int64 ``(n,)``.
        eps: Largest perturbation >= 0, a number or ``(n,)``.
        objectives: Names in ``OBJECTIVES``; the attack is run with each of them.
        shares: Points on each line, at equal distances; 1: the crafted ones alone.
        surrogate_reject: Option ``reject`` for ``surrogate``; that of ``options`` is for ``model``.
        **options: Options of the attack: the shared ones, see ``FixedEpsOptions``, and its own.

    Returns:
        Per sample the best of all these points, the input and the start by the decision objective
        of the model, like ``inputs``.

    Raises:
        ValueError: If an argument is out of range, or shapes, dtypes or devices disagree.

    Source: Papernot et al., "Transferability in machine learning: from phenomena to black-box
    attacks using adversarial samples", 2016.
    """
    check_count("objectives", len(objectives), 1)
    check_count("shares", shares, 1)
    shared = only_shared(options)
    with problem(model, inputs, labels, eps, shared) as attacked:
        best = attacked.best_given()
        same = options | _passed_on(shared) | {"start": shared.start, "targets": shared.targets}
        same["reject"] = surrogate_reject
        for objective in objectives:
            same["objective"] = objective
            crafted = _call_attack(attack, surrogate, inputs, labels, attacked.region.eps, **same)
            for share in range(1, shares + 1):
                point = inputs + (share / shares) * (crafted - inputs)
                best = keep_better(best, attacked.points(point))
    return best.inputs


def _passed_on(options: Options) -> dict[str, Any]:
    """Return the shared options that every member of a composed attack is given alike."""
    return {"norm": options.norm, "bounds": options.bounds, "batch_size": options.batch_size}


def _improve(
    problem: Problem,
    best: Points,
    attack: Callable[..., Tensor],
    labels: Tensor,
    options: Mapping[str, Any],
    *,
    targets: Tensor | None,
    start: Tensor | None,
) -> Tensor:
    """Run an attack on the rows that do not evade; write better points into the best of all rows.

    Returns:
        Which rows are better, bool ``(n,)``.
    """
    improved = torch.zeros_like(best.evading)
    rows = unsolved(best)  # waits for the device, once per attack
    if len(rows):
        part = problem.rows(rows)
        target, region, _, shared = part
        same = {**options, **_passed_on(shared), "reject": target.reject}
        same["targets"] = None if targets is None else targets[rows]
        same["start"] = None if start is None else start[rows]
        given = target.model, region.center, labels[rows], region.eps
        new = part.points(_call_attack(attack, *given, **same))
        improved[rows] = better(new, best.rows(rows))
        put(best, rows, new, improved[rows])
    return improved


def _call_attack(
    attack: Callable[..., Tensor],
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    *arguments: Tensor,
    **options: Any,  # noqa: ANN401 - options of any attack
) -> Tensor:
    """Run an attack and refuse what it returns if it is not like its inputs: ValueError."""
    with torch.enable_grad():  # an attack that is not of this package may rely on it
        points = attack(model, inputs, *arguments, **options)
    described = []
    for tensor in (inputs, points):
        shape = tuple(getattr(tensor, "shape", ()))
        described.append((shape, getattr(tensor, "dtype", None), getattr(tensor, "device", None)))
    if described[0] != described[1]:
        raise ValueError(
            f"an attack must return points like its inputs, {described[0]}, got {described[1]}"
        )
    return points.detach()
