"""The attacks of an evaluation: never one alone, as each has a weakness that flatters a defence."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

from torch import Tensor

from torchdnr.attacks import boundary_walk, line_search_pgd

LINE_SEARCH_PGD = "line-search PGD"
BOUNDARY_WALK = "boundary walk"


@dataclass(frozen=True)
class Attack:
    """An attack of the line-up.

    Attributes:
        run: ``run(model, inputs, labels, eps, start) -> points``, each within ``eps`` of its
            input. It is called with the samples that do not evade at a smaller eps; ``start``
            holds their points there, at first the inputs themselves.
            With ``minimum_norm``: ``run(model, inputs, labels) -> points``, the nearest evading
            points, whatever their norm; run once, it serves every eps.
        minimum_norm: Which of the two signatures ``run`` has.
        settings: Every option that changes the points, seed included: stored with the results,
            and a checkpoint is only resumed if they are the same.
    """

    run: Callable[..., Tensor]
    minimum_norm: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)


def default_line_up(
    init_inputs: Tensor,
    *,
    norm: float = 2,
    bounds: tuple[float, float] = (0.0, 1.0),
    batch_size: int = 256,
    reject: bool | None = None,
    progress: bool = False,
    line_search_options: Mapping[str, Any] | None = None,
    walk_options: Mapping[str, Any] | None = None,
) -> dict[str, Attack]:
    """Build the default line-up: the paper's attack, and a walk that starts on the far side.

    The line-search PGD descends from the input, and from an accepted input of another class that
    is projected on the ball; it stalls where scores are flat or kinked. The boundary walk starts
    at accepted inputs of other classes and comes nearer.

    Args:
        init_inputs: Inputs from which both attacks may start, ``(m, ...)``.
        norm: Norm of the perturbation; 2.
        bounds: Smallest and largest value of an input.
        batch_size: Inputs per batch.
        reject: Whether the last column of the output is theta; None: ask the model.
        progress: Whether to show progress bars.
        line_search_options: Other options of ``line_search_pgd``: steps, objective, ...
        walk_options: Other options of ``boundary_walk``: steps, starts, ...

    Returns:
        Attacks by name.
    """
    shared = {"norm": norm, "bounds": bounds, "reject": reject}
    search = shared | {"objective": "paper"} | dict(line_search_options or {})
    walk = shared | dict(walk_options or {})
    running = {"batch_size": batch_size, "progress": progress}

    def run_search(
        model: Callable[[Tensor], Tensor],
        inputs: Tensor,
        labels: Tensor,
        eps: float,
        start: Tensor,
    ) -> Tensor:
        options = {"start": start, "init_inputs": init_inputs, **search, **running}
        return line_search_pgd(model, inputs, labels, eps, **options)

    def run_walk(model: Callable[[Tensor], Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
        return boundary_walk(model, inputs, labels, init_inputs, **walk, **running)

    return {
        LINE_SEARCH_PGD: Attack(run_search, settings=_defaults(line_search_pgd) | search),
        BOUNDARY_WALK: Attack(
            run_walk, minimum_norm=True, settings=_defaults(boundary_walk) | walk
        ),
    }


def _defaults(attack: Callable[..., Tensor]) -> dict[str, Any]:
    """Read the options that an attack takes if none are given, as far as they change its points."""
    skip = {"start", "init_inputs", "init_labels", "batch_size", "progress"}
    return {
        name: parameter.default
        for name, parameter in signature(attack).parameters.items()
        if parameter.default is not parameter.empty and name not in skip
    }
