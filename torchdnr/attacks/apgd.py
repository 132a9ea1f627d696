"""Auto-PGD at a given eps: momentum, and steps that shrink when progress stalls."""

from collections.abc import Callable

from torch import Tensor

from torchdnr.attacks.apgd_loop import descend_adaptively, descend_adaptively_l1
from torchdnr.attacks.checks import check_count
from torchdnr.attacks.fixed_eps import FixedEps, Run
from torchdnr.attacks.points import Points


def apgd(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    labels: Tensor,
    eps: float | Tensor,
    *,
    norm: float = 2,
    objective: str = "decision",
    targets: Tensor | None = None,
    steps: int = 100,
    start: Tensor | None = None,
    init_inputs: Tensor | None = None,
    init_labels: Tensor | None = None,
    restarts: int = 0,
    random_start: bool = False,
    bounds: tuple[float, float] = (0.0, 1.0),
    batch_size: int = 256,
    reject: bool | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Tensor:
    """Minimise the objective within ``eps`` of each input by Auto-PGD; keep the best point.

    A step goes 2 eps far, is projected, and mixed with the last move. At checkpoints that come
    closer and closer a row that stalls halves its step and goes back to its lowest point. In the l1
    norm a step moves a share of the coordinates that shrinks as well, and the radius falls from
    3 eps over 2 eps to eps. A step costs one forward and one backward; nothing in it waits for the
    device.

    The objective replaces the difference-of-logits ratio of the source: rejection is no success,
    and the length of the gradient does not matter here.

    Args:
        model: Maps inputs to scores ``(n, c)``, or ``(n, c + 1)`` with the rejection threshold in
            the last column; differentiable. Left as found; evaluated in evaluation mode.
        inputs: ``(n, ...)`` in ``bounds``, float32 or float64.
        labels: True classes, int64 ``(n,)``.
        eps: Largest perturbation >= 0, a number or ``(n,)``; several sizes can share a batch.
        norm: Norm of the perturbation; 1, 2 or infinity.
        objective: Name in ``OBJECTIVES``.
        targets: Class wanted for each input, int64 ``(n,)``; ``None``: any but the true one.
        steps: Number of steps of each run.
        start: Where to start, ``(n, ...)``, for instance the result at a smaller eps; projected,
            and used where it is better than the input itself.
        init_inputs: Samples of any class, ``(m, ...)``: the best one that is accepted as another
            class starts a second run of those that did not evade.
        init_labels: Class that the model assigns to each of them, -1 where it rejects, ``(m,)``.
        restarts: Further runs, from random points of the ball, of those that did not evade.
        random_start: Whether the first run starts at a random point too.
        bounds: Smallest and largest value of an input.
        batch_size: Rows in one forward, and inputs attacked at a time.
        reject: Whether the last column of the output is the threshold; ``None`` asks whether
            ``model.reject_index`` is set.
        seed: Of the random points.
        progress: Whether to show a progress bar.

    Returns:
        Adversarial inputs, like ``inputs``: the best point evaluated. One that evades (accepted and
        wrong, or accepted as the target) beats any other, then the lower objective counts.

    Raises:
        ValueError: If an argument is out of range, or shapes, dtypes or devices disagree.

    Source: Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of
    diverse parameter-free attacks", ICML 2020; l1: "Mind the box", ICML 2021.
    """
    check_count("steps", steps, 1)
    common = FixedEps(
        model=model,
        inputs=inputs,
        labels=labels,
        eps=eps,
        norm=norm,
        objective=objective,
        targets=targets,
        start=start,
        init_inputs=init_inputs,
        init_labels=init_labels,
        restarts=restarts,
        bounds=bounds,
        batch_size=batch_size,
        reject=reject,
        seed=seed,
        progress=progress,
    )

    def loop(run: Run) -> Points:
        descend = descend_adaptively_l1 if norm == 1 else descend_adaptively
        return descend(run, steps)

    return common.run(loop, steps=steps, name="APGD", random_start=random_start)
