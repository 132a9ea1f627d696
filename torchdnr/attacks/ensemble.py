"""Several attacks as one: the worst case per sample, and which of them found it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torchdnr.attacks.checks import check_like
from torchdnr.attacks.points import Judge, Points, better, call_attack, make_judge, put, unsolved
from torchdnr.decisions import evaluation_mode

NO_MEMBER = -1
"""Winner of a row whose input, or start, no member improved."""


@dataclass(frozen=True, eq=False)
class EnsembleResult:
    """What a line-up of attacks found.

    Attributes:
        points: The best point of each row, like the inputs.
        evading: Whether it is accepted and wrong, or accepted as the target, bool ``(n,)``.
        values: Its decision objective, ``(n,)``.
        winner: Number of the member that found it, -1 where none improved on the input or the
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

    A sample that is accepted and wrong is finished. A rejected one is not: the next member goes on
    with it. Members are called as
    ``member(model, inputs, labels, eps, start=..., norm=..., targets=..., bounds=...,
    batch_size=..., reject=..., **options)``; attacks of this package take these, others can be
    wrapped in a function that drops what they do not know. Options of one member are bound with
    ``functools.partial``.

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
        **options: object,
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
        *,
        norm: float = 2,
        targets: Tensor | None = None,
        bounds: tuple[float, float] = (0.0, 1.0),
        batch_size: int = 256,
        reject: bool | None = None,
        **options: object,
    ) -> EnsembleResult:
        """Run the members and keep per sample the best point by the decision objective.

        Args:
            model: Maps inputs to scores ``(n, c)``, or ``(n, c + 1)`` with the rejection threshold
                in the last column. Left as found; evaluated in evaluation mode.
            inputs: ``(n, ...)`` in ``bounds``, float32 or float64.
            labels: True classes, int64 ``(n,)``.
            eps: Largest perturbation >= 0, a number or ``(n,)``.
            start: Points to begin with, ``(n, ...)``; projected.
            norm: Norm of the perturbation; 1, 2 or infinity.
            targets: Class wanted for each input, int64 ``(n,)``; None: any but the true one.
            bounds: Smallest and largest value of an input.
            batch_size: Rows in one forward.
            reject: Whether the last column of the output is the threshold; None asks whether
                ``model.reject_index`` is set.
            **options: Passed to every member as they are: ``init_inputs``, ``seed``, ...

        Returns:
            ``EnsembleResult``. Points are never worse than the input and the start.

        Raises:
            ValueError: If there is no member, an argument is out of range, or a member returns
                points unlike its inputs.
        """
        if not self.members:
            raise ValueError("members must name at least one attack, got none")
        shared = {"norm": norm, "bounds": bounds, "batch_size": batch_size}
        with evaluation_mode(model), torch.no_grad():
            judge = make_judge(model, inputs, labels, eps, targets=targets, reject=reject, **shared)
            best = Points(*(field.clone() for field in judge.points(inputs)))
            if start is not None:
                check_like("start", start, inputs, same_length=True)
                _take(best, judge, start)
            winner = torch.full_like(labels, NO_MEMBER)
            for number, member in enumerate(self.members.values()):
                if len(rows := unsolved(best)) == 0:  # waits for the device, once per member
                    break
                first = best.inputs if self.chain else start
                found = call_attack(
                    member,
                    model,
                    inputs[rows],
                    labels[rows],
                    judge.region.eps[rows],
                    start=None if first is None else first[rows],
                    targets=None if targets is None else targets[rows],
                    reject=judge.target.reject,
                    **shared,
                    **options,
                )
                improved = _take(best, judge, found, rows)
                winner[rows] = torch.where(improved, number, winner[rows])
        return EnsembleResult(best.inputs, best.evading, best.values, winner, tuple(self.members))


def _take(best: Points, judge: Judge, points: Tensor, rows: Tensor | None = None) -> Tensor:
    """Put points in the place of worse ones; return where, bool."""
    if rows is None:
        rows = torch.arange(len(best.inputs), device=best.inputs.device)
    found = judge.points(points, rows)
    improved = better(found, best.rows(rows))
    put(best, rows, found, improved)
    return improved
