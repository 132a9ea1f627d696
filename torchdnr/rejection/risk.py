"""The threshold that promises an error: selective classification with a guaranteed risk.

A threshold theta is promised if the exact binomial test refuses that more than ``max_error`` of the
inputs accepted at it are wrong. The candidates are the scores of the calibration inputs themselves,
tested from the highest, which accepts least, down to the first that fails. So many tests need no
correction, since the first theta that would break the promise passes with probability ``1 -
confidence`` at most. One unlucky error among the highest scores must not end the walk, so it begins
anew at 1.5 times as many accepted inputs, and so on; the ``1 - confidence`` is divided among the
beginnings, and a walk that reaches the next one adds its part (the fallback procedure). Accepted
are scores above theta, and theta is itself the score of an input: given theta, the scores above it
are independent draws from all that it accepts. Exact where the error among the accepted does not
fall as theta falls.

Source: Geifman and El-Yaniv, "Selective classification for deep neural networks", NeurIPS 2017;
Angelopoulos et al., "Learn then test", 2021 (fixed sequences); Wiens and Dmitrienko, "The fallback
procedure for evaluating a single family of hypotheses", J. Biopharm. Stat. 15 (2005); Clopper and
Pearson, "The use of confidence or fiducial limits", Biometrika 26 (1934).
"""

import math
from statistics import NormalDist

import torch
from torch import Tensor

GROWTH = 1.5
"""Ratio of the numbers of accepted inputs at which the walk begins anew."""


def binomial_cdf(errors: int, n: int, rate: float) -> float:
    """Compute the probability of at most ``errors`` of n, each of probability ``rate``."""
    if errors >= n or rate == 0:
        return 1.0
    if rate == 1:
        return 0.0
    count = torch.arange(errors + 1, dtype=torch.float64)
    return _log_mass(count, torch.tensor(n, dtype=torch.float64), rate).logsumexp(0).exp().item()


def error_bound(errors: int, n: int, confidence: float = 0.95) -> float:
    """Compute the upper bound of a rate at which ``errors`` of n independent inputs are wrong.

    Clopper and Pearson's, one-sided: the rate at which so few errors have probability ``1 -
    confidence``. Exact: it is above the true rate with probability ``confidence`` at least.

    Args:
        errors: Inputs that are wrong, 0..n.
        n: Inputs, >= 1.
        confidence: Of the bound, in (0, 1).

    Returns:
        The bound, in (0, 1].

    Raises:
        ValueError: If a number is out of range.
    """
    if not 0 <= errors <= n or n < 1 or not 0 < confidence < 1:
        raise ValueError(
            "expected 0 <= errors <= n, n >= 1 and confidence in (0, 1), "
            f"got {errors}, {n} and {confidence}"
        )
    low, high = errors / n, 1.0
    while low < (middle := (low + high) / 2) < high:  # the CDF falls as the rate grows
        above = binomial_cdf(errors, n, middle) > 1 - confidence
        low, high = (middle, high) if above else (low, middle)
    return high


def threshold_at_error(
    best: Tensor, wrong: Tensor, max_error: float, confidence: float = 0.95
) -> Tensor:
    """Find the lowest threshold that promises an error among the inputs accepted, or refuse.

    With probability ``confidence`` over the draw of these inputs, at most ``max_error`` of all
    future ones with a score above the threshold are wrong.

    Args:
        best: Score of each input, by which it is accepted, ``(n,)``; finite.
        wrong: Whether it would be wrong if it were accepted, bool ``(n,)``.
        max_error: Bound of the error among the accepted, in (0, 1).
        confidence: Probability that the promise holds, in (0, 1).

    Returns:
        theta, a scalar: one of the scores. A tie with it rejects, so at least one input is.

    Raises:
        ValueError: If an argument is not as said above, or no threshold can be promised.
    """
    for name, value in (("max_error", max_error), ("confidence", confidence)):
        if not 0 < value < 1:
            raise ValueError(f"{name} must be in (0, 1), got {value}")
    order = best.argsort(descending=True)
    best, wrong = best[order], wrong[order]
    # How many can be accepted while the next is not: equal scores go together.
    accepted = ((best[:-1] > best[1:]).nonzero()[:, 0] + 1).tolist()
    if chosen := _most_accepted(wrong, accepted, max_error, confidence):
        return best[chosen]
    reason = _why_none(wrong, accepted, max_error, confidence)
    for percent in range(math.floor(100 * max_error) + 1, 100):
        if _most_accepted(wrong, accepted, percent / 100, confidence):
            reason += f"; with inputs like these {percent / 100:g} can be promised"
            break
    raise ValueError(reason)


def _most_accepted(wrong: Tensor, accepted: list[int], max_error: float, confidence: float) -> int:
    """Return how many inputs can be accepted, of these numbers; 0 if none can be promised."""
    p_values = [1.0, *_p_values(wrong, max_error).tolist()]
    starts = _starts(len(wrong) - 1, max_error, 1 - confidence)
    part = (1 - confidence) / len(starts)
    chosen, level = 0, 0.0
    for m in accepted:
        while starts and starts[0] <= m:
            level += part
            del starts[0]
        if p_values[m] <= level:
            chosen = m
        else:
            level = 0.0
    return chosen


def fewest_accepted(max_error: float, level: float) -> int:
    """Return how many inputs have to be accepted for a promise, even if none of them is wrong.

    ``level`` is what the promise may fail by, ``1 - confidence``.
    """
    return max(1, math.ceil(math.log(level) / math.log1p(-max_error) - 1e-9))


def _log_mass(count: Tensor, n: Tensor, rate: float) -> Tensor:
    """Compute the log-probability of ``count`` of n, each of probability ``rate`` in (0, 1)."""
    log_ways = torch.lgamma(n + 1) - torch.lgamma(count + 1) - torch.lgamma(n - count + 1)
    return log_ways + count * math.log(rate) + (n - count) * math.log1p(-rate)


def _p_values(wrong: Tensor, max_error: float) -> Tensor:
    """Compute ``P(X <= errors among the first m)``, X ~ Binomial(m, max_error), for m = 1..n.

    From m to m + 1 the CDF falls by ``max_error * P(X = e)`` if the next input is right, and rises
    by ``(1 - max_error) * P(X = e + 1)`` if it is wrong.
    """
    wrong = wrong.cpu().double()  # some devices have no float64
    before = wrong.cumsum(0) - wrong
    seen = torch.arange(len(wrong), dtype=torch.float64)
    mass = _log_mass(before + wrong, seen, max_error).exp()  # 0 for more errors than inputs
    steps = torch.where(wrong > 0, (1 - max_error) * mass, -max_error * mass)
    return (1 + steps.cumsum(0)).clamp_min(torch.finfo(torch.float64).tiny)


def _starts(most: int, max_error: float, level: float) -> list[int]:
    """List how many accepted inputs the walk begins at, and begins anew, up to ``most`` of them."""
    count = 1
    while fewest_accepted(max_error, level / (count + 1)) * GROWTH**count <= most:
        count += 1
    return [math.ceil(fewest_accepted(max_error, level / count) * GROWTH**i) for i in range(count)]


def _why_none(
    wrong: Tensor,
    accepted: list[int],
    max_error: float,
    confidence: float,
) -> str:
    """Say why no threshold can be promised, and how many inputs could change that."""
    n, left = len(wrong), 1 - confidence
    p_values = [1.0, *_p_values(wrong, max_error).tolist()]
    head = (
        f"no threshold promises an error of at most {max_error:g} among accepted inputs with "
        f"confidence {confidence:g}"
    )
    fewest = _starts(n - 1, max_error, left)[0]
    possible = [m for m in accepted if m >= fewest]
    if not possible:
        return (
            f"{head}: expected {fewest + 1} inputs at least, with different scores, even if none "
            f"of them is wrong, got {n}; pass more, or a larger max_error"
        )
    m = min(possible, key=p_values.__getitem__)
    errors = int(wrong[:m].sum())
    head += f": of the {m} of {n} inputs with the highest scores {errors} are wrong"
    if errors >= max_error * m:
        return f"{head}, and more inputs like these would not help; pass a larger max_error"
    needed, spread = m, math.sqrt(max_error * (1 - max_error)) / (max_error - errors / m)
    for _ in range(5):  # by the normal distribution; the level depends on the number, hardly
        level = left / len(_starts(needed, max_error, left))
        needed = max(m, math.ceil((NormalDist().inv_cdf(1 - level) * spread) ** 2))
    needed = math.ceil(needed * n / m)
    return f"{head}; pass about {needed} inputs or more, or a larger max_error"
