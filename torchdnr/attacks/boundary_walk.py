"""Minimum-norm evasion: a walk along the boundary from accepted samples of other classes."""

from collections.abc import Callable

from torch import Tensor

from torchdnr.attacks.checks import check_count
from torchdnr.attacks.minimum_norm import MinimumNorm
from torchdnr.attacks.walk import walk


def boundary_walk(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    labels: Tensor,
    init_inputs: Tensor,
    *,
    init_labels: Tensor | None = None,
    targets: Tensor | None = None,
    eps: float | Tensor | None = None,
    norm: float = 2,
    steps: int = 100,
    neighbours: int = 60,
    starts: int = 20,
    restarts: int = 0,
    bounds: tuple[float, float] = (0.0, 1.0),
    reject: bool | None = None,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = False,
) -> Tensor:
    """Find the nearest evading (accepted and wrong) point of each input.

    From accepted pool samples of other classes the straight line to the input is bisected, and the
    nearest evading points become starts. The walk then shrinks its radius while it evades and grows
    it while it does not, each step along the normalised gradient of
    ``max(s_y, theta) - max_{j != y} s_j``; only the most promising starts are walked to the end.
    One run gives the whole security curve: an input is evaded at every eps from its norm on.

    Where the walk ends depends more on where it starts than on its length, so many starts are
    walked for a while. Step sizes follow cosine cycles of 100, 200, 400, ... steps, each from the
    best point so far: more steps are never worse, and 100, 300, 700, ... make the best use of them.
    Each step is one forward and backward of every start still walked; with the defaults an input
    costs about 690 of them, plus some 470 forwards.

    A point counts as evading only if it does so by more than rounding, so that it still evades when
    it is evaluated in another batch. An input that is wrong and accepted is returned as it is.

    Args:
        model: Maps inputs to scores ``(n, c)``, or ``(n, c + 1)`` with the rejection threshold in
            the last column; differentiable. Left as found; evaluated in evaluation mode.
        inputs: ``(n, ...)`` in ``bounds``, floating point.
        labels: True classes, int64 ``(n,)``.
        init_inputs: Samples to start from, of all classes, for instance training samples,
            ``(m, ...)``.
        init_labels: Class that the model assigns to each of them, -1 where it rejects, int64
            ``(m,)``; saves one forward over them. Their true classes serve as well.
        eps: Project farther points onto this radius, a number or ``(n,)``; they do not evade then.
            ``None`` returns the nearest evading points at any distance.
        targets: Class wanted for each input, int64 ``(n,)``; ``None``: any but the true one.
        norm: Norm of the perturbation; 1, 2 or infinity.
        steps: Steps of the walk.
        neighbours: Pool samples tried per input, half of them the nearest of each of the nearest
            classes.
        starts: Starts per input, of different classes as far as there are; half of them are dropped
            after 15, 30 and 45 steps.
        restarts: Further walks, each from the nearest of another random half of the pool.
        bounds: Smallest and largest value of an input.
        batch_size: Rows in one forward, and inputs attacked at a time.
        reject: Whether the last column of the output is the threshold; ``None`` asks whether
            ``model.reject_index`` is set.
        seed: Of the halves of the pool.
        progress: Whether to show a progress bar.

    Returns:
        Adversarial inputs, like ``inputs``. An input without any start is returned as it is.

    Raises:
        ValueError: If an argument is out of range, or shapes, dtypes or devices disagree.

    Warns once (``UserWarning``) with the number of inputs without a start: give a larger pool.

    Source: the radius as in Pintor et al., "Fast minimum-norm adversarial attacks through adaptive
    norm constraints", NeurIPS 2021; starts on the far side as in Brendel et al., "Accurate,
    reliable and fast robustness evaluation", NeurIPS 2019.
    """
    check_count("steps", steps, 0)
    common = MinimumNorm(
        model=model,
        inputs=inputs,
        labels=labels,
        norm=norm,
        init_inputs=init_inputs,
        eps=eps,
        targets=targets,
        init_labels=init_labels,
        neighbours=neighbours,
        starts=starts,
        restarts=restarts,
        bounds=bounds,
        batch_size=batch_size,
        reject=reject,
        seed=seed,
        progress=progress,
    )
    return common.run(
        lambda run: walk(run, steps), steps=steps, name="boundary walk", from_inputs=False
    )
