"""The attack that wants to be rejected: the point near an input whose best score is lowest.

A classifier that rejects easily looks robust. What that costs shows where it rejects inputs that
are perturbed so little that it should not.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from torchdnr.attacks.checks import check_count, check_eps, check_inputs, check_like
from torchdnr.attacks.projections import project
from torchdnr.attacks.target import Target, evaluate, slope_at
from torchdnr.decisions import evaluation_mode, has_reject_column

_FLOOR = 0.01  # the last step relative to the first


def confidence_objective(
    scores: Tensor, threshold: Tensor | None, classes: Tensor, targeted: bool = False
) -> Tensor:
    """Compute ``max_k s_k - theta``, whatever the classes: rejected iff it is <= 0."""
    best = scores.amax(dim=1)  # amax: classes that tie for the maximum share its gradient
    return best if threshold is None else best - threshold


def lowest_confidence(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    eps: float | Tensor,
    *,
    norm: float = 2,
    steps: int = 100,
    step_size: float = 0.5,
    momentum: float = 0.9,
    restarts: int = 5,
    start: Tensor | None = None,
    seed: int = 0,
    bounds: tuple[float, float] = (0.0, 1.0),
    reject: bool | None = None,
    batch_size: int = 256,
    progress: bool = False,
) -> Tensor:
    """Minimise the best score ``max_k s_k`` within a ball, to be rejected if that is possible.

    Projected descent with momentum along gradients of unit norm, as RBF scores are flat far from
    the training data; in the l-infinity norm along the signs. The step shrinks along half a cosine.
    The first descent begins at ``start``, the others at points drawn from the ball; the best
    point evaluated is kept. Every input of one call is given the same draws, shifted to it, so
    that its result depends neither on its batch nor on its place in it.

    Args:
        model: Maps inputs to scores ``(n, c)``, or ``(n, c + 1)`` with the rejection threshold in
            the last column; differentiable. Left as found; evaluated in evaluation mode.
        inputs: ``(n, ...)`` in ``bounds``, floating point.
        eps: Radius of the ball, a number or ``(n,)``, finite.
        norm: Norm of the perturbation; 1, 2 or infinity.
        steps: Steps of each descent, one forward and backward each.
        step_size: First step, relative to ``eps``.
        momentum: Share of the previous direction that is kept, in [0, 1).
        restarts: Descents, >= 1.
        start: Where the first begins, ``(n, ...)``, for instance the result at a smaller eps;
            projected; None: at the inputs.
        seed: Of the draws.
        bounds: Smallest and largest value of an input.
        reject: Whether the last column of the output is the threshold; ``None`` asks whether
            ``model.reject_index`` is set.
        batch_size: Rows in one forward.
        progress: Whether to show a progress bar.

    Returns:
        Points of the lowest best score found, like ``inputs``; never worse than the input itself
        or ``start``.

    Raises:
        ValueError: If an argument is out of range, or shapes, dtypes or devices disagree.

    Source: the inner attack of Chen et al., "Stratified adversarial robustness with rejection",
    ICML 2023, there on the softmax; here on the scores that decide about rejection.
    """
    labels = torch.zeros(inputs.shape[:1], dtype=torch.int64, device=inputs.device)  # not used
    check_inputs(inputs, labels, norm, bounds)
    eps = check_eps(eps, inputs)
    _check_options(eps, steps, step_size, momentum, restarts, batch_size)
    if start is not None:
        check_like("start", start, inputs, same_length=True)
    target = Target(model, confidence_objective, has_reject_column(model, reject), batch_size)
    generator = torch.Generator().manual_seed(seed)
    best = inputs.clone()
    bar = tqdm(total=restarts * steps, disable=not progress, desc="lowest confidence", leave=False)
    with evaluation_mode(model), torch.no_grad(), bar:
        best_value, _ = evaluate(target, best, labels)
        for restart in range(restarts):
            if restart > 0:
                drawn = draw_from_ball(inputs.shape[1:], norm, generator).to(inputs)
                points = inputs + _per_row(eps, inputs) * drawn
            else:
                points = inputs if start is None else start
            points = project(points, inputs, eps, norm, bounds)
            velocity = torch.zeros_like(points)
            for step in range(steps):
                slope = slope_at(target, points, labels)
                best, best_value = _keep(best, best_value, points, slope.values)
                velocity = momentum * velocity + slope.direction
                size = step_size * _schedule(step, steps) * eps
                points = points + _per_row(size, points) * _steepest(velocity, norm)
                points = project(points, inputs, eps, norm, bounds)
                bar.update()
            best, best_value = _keep(best, best_value, points, evaluate(target, points, labels)[0])
    return best


def draw_from_ball(shape: torch.Size, norm: float, generator: torch.Generator) -> Tensor:
    """Draw a point uniformly from the unit ball, float64 on the CPU.

    Args:
        shape: Shape of one point.
        norm: Norm of the ball; 1, 2 or infinity.
        generator: Source of randomness, on the CPU.

    Returns:
        The point, of ``shape``.

    Source: Barthe et al., "A probabilistic approach to the geometry of the l_p^n-ball", Annals of
    Probability 33 (2005): direction of independent p-normal coordinates, radius U^(1 / d).
    """
    options = {"generator": generator, "dtype": torch.float64}
    if norm == math.inf:
        return 2 * torch.rand(shape, **options) - 1
    if norm == 2:
        direction = torch.randn(shape, **options)
    else:
        uniform = torch.rand(shape, **options)
        direction = -torch.log1p(-uniform) * torch.randn(shape, **options).sign()
    radius = torch.rand((), **options) ** (1 / direction.numel())
    return radius * direction / torch.linalg.vector_norm(direction, norm)


def _keep(
    best: Tensor, best_value: Tensor, points: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """Keep per row the point of lower value."""
    lower = values < best_value
    return torch.where(_per_row(lower, best), points, best), torch.where(lower, values, best_value)


def _schedule(step: int, steps: int) -> float:
    """Fall from 1 to the floor along half a cosine."""
    wave = (1 + math.cos(math.pi * step / max(1, steps - 1))) / 2
    return _FLOOR + (1 - _FLOOR) * wave


def _steepest(velocity: Tensor, norm: float) -> Tensor:
    """Return the direction to step into: signs, or the unit vector; zero where there is none."""
    if norm == math.inf:
        return velocity.sign()
    length = velocity.flatten(1).norm(dim=1)
    return velocity / _per_row(torch.where(length > 0, length, 1), velocity)


def _per_row(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))


def _check_options(
    eps: Tensor, steps: int, step_size: float, momentum: float, restarts: int, batch_size: int
) -> None:
    check_count("steps", steps, 0)
    check_count("restarts", restarts, 1)
    check_count("batch_size", batch_size, 1)
    if not 0 < step_size < math.inf:
        raise ValueError(f"step_size must be > 0 and finite, got {step_size}")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}")
    if eps.isinf().any():
        raise ValueError("eps must be finite: steps and starts are relative to it")
