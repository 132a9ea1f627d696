"""Transfer: points crafted on a model at hand, tried on the model under attack."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torchdnr.attacks.checks import check_count, check_like
from torchdnr.attacks.points import call_attack, keep_better, make_judge
from torchdnr.decisions import evaluation_mode


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
    norm: float = 2,
    targets: Tensor | None = None,
    start: Tensor | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    batch_size: int = 256,
    reject: bool | None = None,
    surrogate_reject: bool | None = None,
    **options: object,
) -> Tensor:
    """Craft points on a surrogate and return those that are best on the model.

    The model need not be differentiable. Its gradients may be masked where those of the surrogate,
    for instance the network without its defence, are not; so an evasion that is found like this
    and not by the attacks on the model itself shows that those are too weak.

    A point that goes far on the surrogate may be rejected by the model where a nearer one is not:
    points on the line from the input to each crafted one are tried as well.

    Args:
        attack: ``attack(model, inputs, labels, eps, norm=..., objective=..., ...) -> points``, such
            as ``pgd``.
        surrogate: Model to craft on, with the classes of ``model``; left as found.
        model: Maps inputs to scores ``(n, c)``, or ``(n, c + 1)`` with the rejection threshold in
            the last column. Left as found; evaluated in evaluation mode.
        inputs: ``(n, ...)`` in ``bounds``, float32 or float64.
        labels: True classes, int64 ``(n,)``.
        eps: Largest perturbation >= 0, a number or ``(n,)``.
        objectives: Names in ``OBJECTIVES``; the attack is run with each of them.
        shares: Points on each line, at equal distances; 1: the crafted ones alone.
        norm: Norm of the perturbation; 1, 2 or infinity.
        targets: Class wanted for each input, int64 ``(n,)``; ``None``: any but the true one.
        start: Where the attack starts, ``(n, ...)``; judged on the model too.
        bounds: Smallest and largest value of an input.
        batch_size: Rows in one forward.
        reject: Whether the last column of the output of ``model`` is the threshold; ``None`` asks
            whether ``model.reject_index`` is set.
        surrogate_reject: The same for ``surrogate``.
        **options: Further options of the attack: ``steps``, ``restarts``, ``seed``, ...

    Returns:
        Per sample the best of all these points and the input itself by the decision objective of
        the model, like ``inputs``.

    Raises:
        ValueError: If an argument is out of range, or shapes, dtypes or devices disagree.

    Source: Papernot et al., "Transferability in machine learning: from phenomena to black-box
    attacks using adversarial samples", 2016.
    """
    check_count("objectives", len(objectives), 1)
    check_count("shares", shares, 1)
    shared = {"norm": norm, "bounds": bounds, "batch_size": batch_size, "targets": targets}
    with evaluation_mode(model), torch.no_grad():
        judge = make_judge(model, inputs, labels, eps, reject=reject, **shared)
        best = judge.points(inputs)
        if start is not None:
            check_like("start", start, inputs, same_length=True)
            best = keep_better(best, judge.points(start))
        for objective in objectives:
            crafted = call_attack(
                attack,
                surrogate,
                inputs,
                labels,
                judge.region.eps,
                objective=objective,
                start=start,
                reject=surrogate_reject,
                **shared,
                **options,
            )
            for share in range(1, shares + 1):
                point = inputs + (share / shares) * (crafted - inputs)
                best = keep_better(best, judge.points(point))
    return best.inputs
