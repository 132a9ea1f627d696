"""Points made on surrogates, tried on the model under attack."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from torchdnr.attacks.checks import check_count
from torchdnr.attacks.ensemble import call_attack, passed_on
from torchdnr.attacks.options import only_shared
from torchdnr.attacks.problem import problem
from torchdnr.attacks.target import keep_better


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
        best, inputs = attacked.best_given(), attacked.region.center
        same = options | passed_on(shared, options) | {"reject": surrogate_reject}
        for objective in objectives:
            same["objective"] = objective
            crafted = call_attack(attack, surrogate, inputs, labels, attacked.region.eps, **same)
            for share in range(1, shares + 1):
                point = inputs + (share / shares) * (crafted - inputs)
                best = keep_better(best, attacked.points(point))
    return best.inputs
