"""The learning rate over the steps of a training."""

import math

SCHEDULES = "constant", "one-cycle"
RISE = 0.3  # share of the steps over which "one-cycle" rises


def relative_learning_rate(schedule: str, step: int, *, warmup: int, total: int) -> float:
    """Compute the learning rate of a step, relative to the largest.

    Args:
        schedule: "constant": linear from 0 over ``warmup`` steps, then 1. "one-cycle": linear over
            the first 30 % of the steps, then a cosine down to 0.
        step: 1 for the first.
        warmup: Steps of the warm-up, >= 0.
        total: Steps of the whole training, >= 1.

    Returns:
        A factor in [0, 1].

    Source: Smith, Topin, "Super-convergence: very fast training of neural networks using large
    learning rates", 2018, for the cycle; its fall is a cosine here.
    """
    if schedule == "constant":
        return min(1.0, step / max(1, warmup))
    rise = max(1, round(RISE * total))
    if step <= rise:
        return step / rise
    return (1 + math.cos(math.pi * (step - rise) / max(1, total - rise))) / 2
