"""An ensemble of attacks: the worst case per sample, and which of them reached it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchdnr.attacks.options import only_shared
from torchdnr.attacks.points import unsolved
from torchdnr.attacks.problem import call_member, problem

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
                if len(rows := unsolved(best)) == 0:  # waits for the device, once per member
                    break
                points = call_member(
                    member,
                    attacked,
                    labels,
                    rows,
                    options,
                    targets=shared.targets,
                    start=best.inputs if self.chain else start,
                )
                improved = attacked.improve(best, points, rows)
                winner[rows] = torch.where(improved, number, winner[rows])
        return EnsembleResult(best.inputs, best.evading, best.values, winner, tuple(self.members))
