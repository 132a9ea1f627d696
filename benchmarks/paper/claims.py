"""What the paper says about its experiments, and whether it is so in ours.

Two classifiers are compared image by image: only images that one of them gets right more often
than the other, over the runs that drew them, tell the two apart, by an exact sign test, at 5 % over
all eps of a claim (Holm). All runs share one network, and nothing is said of others. Where that
leaves a claim open, it is said how many images would decide it with a probability of 80 %, if all
rates stay as they are.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import binom, binomtest, norm
from torch import Tensor

from torchdnr.decisions import REJECT
from torchdnr.evaluation.curve import Predictions
from torchdnr.evaluation.metrics import wilson_interval

HOLDS, PARTLY, FAILS, OPEN = "holds", "holds partly", "does not hold", "cannot be told"
LEVEL, POWER = 0.05, 0.8
MOST = 1_000_000  # images; no claim is told that it takes more
_ZERO = 0.01  # an accuracy of at most this counts as none
_NEARLY_ZERO = 0.1  # and is believed where the interval ends below this
_EQUAL = 0.01  # a difference that is certain to be smaller counts as none


class Claim(NamedTuple):
    """A claim and what became of it.

    Attributes:
        claim: In our words.
        verdict: ``HOLDS``, ``PARTLY``, ``FAILS``, or ``OPEN`` where the samples are too few.
        numbers: What it rests on.
        needed: How many different images would decide an open claim; None if it is not open, or no
            number of images would.
    """

    claim: str
    verdict: str
    numbers: str
    needed: int | None = None

    def to_dict(self) -> dict[str, str | int]:
        """Convert to JSON values."""
        return {name: value for name, value in self._asdict().items() if value is not None}


@dataclass(frozen=True)
class Outcomes:
    """What happened to every sample of all runs, for one classifier.

    Attributes:
        eps: Sizes of the attack.
        right: Whether it counts as correct, bool ``(len(eps), n)``.
        rejected: Whether it was rejected, bool ``(len(eps), n)``.
        images: Which test image it is, int64 ``(n,)``; several runs may have drawn the same.
    """

    eps: Sequence[float]
    right: Tensor
    rejected: Tensor
    images: Tensor


def gather(runs: Sequence[Predictions], images: Sequence[Tensor]) -> Outcomes:
    """Put the samples of all runs side by side; ``images`` are their test images, run by run."""
    found = []
    for run in runs:
        rejected = run.predictions == REJECT
        right = run.predictions == run.labels
        attacked = torch.tensor(run.eps)[:, None] > 0
        found.append((right | (rejected & attacked), rejected))
    right, rejected = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    return Outcomes(list(runs[0].eps), right, rejected, torch.cat(list(images)))


def judge_claims(
    clean: Mapping[str, Tensor],
    clean_images: Tensor,
    outcomes: Mapping[str, Outcomes],
    nr_rejects_more_at: Sequence[float],
    sweeps: Mapping[str, Mapping[str, Any]] | None,
) -> list[Claim]:
    """Go through the paper's claims.

    Args:
        clean: Whether each clean sample of all runs is right, by classifier: "DNN", "NR", "DNR".
        clean_images: Which test images those are.
        outcomes: Of the same classifiers under the same attack.
        nr_rejects_more_at: eps at which the paper sees NR reject more than DNR.
        sweeps: Over theta, of "NR" and "DNR", averaged; None where they belong to another attack.

    Returns:
        The claims in the paper's order.

    Source: Sotgiu et al., Sec. IV-B; that a strong enough attack must succeed, Sec. I.
    """
    dnn, nr, dnr = (outcomes[name] for name in ("DNN", "NR", "DNR"))
    attacked = [index for index, eps in enumerate(nr.eps) if eps > 0]
    claims = [
        _clean_claim(clean, clean_images),
        _rises_then_falls(nr, dnr),
        _reaches_zero({"NR": nr, "DNR": dnr}),
        _ahead("under attack, NR is more accurate than DNN", nr, dnn, attacked),
        _ahead("under attack, DNR is more accurate than DNN", dnr, dnn, attacked),
        _ahead("under attack, DNR is slightly more accurate than NR", dnr, nr, attacked),
        _rejects_more(nr, dnr, nr_rejects_more_at),
    ]
    return claims if sweeps is None else [*claims, _trade(sweeps)]


def _by_image(one: Tensor, two: Tensor, images: Tensor) -> Tensor:
    """Average over the runs that drew an image by how much the first is true more often."""
    _, place = images.unique(return_inverse=True)
    difference, counts = one.double() - two.double(), place.bincount().double()
    return torch.zeros_like(counts).index_add(0, place, difference) / counts


def _signs(pairs: Sequence[tuple[Tensor, Tensor]], images: Tensor) -> list[int]:
    """Tell for each pair whether the first is true more often (1), less (-1), or neither (0)."""
    averages = [_by_image(one, two, images) for one, two in pairs]
    counts = [(int((found > 0).sum()), int((found < 0).sum())) for found in averages]
    levels = [binomtest(k, k + m).pvalue if k + m else 1.0 for k, m in counts]
    signs = [0] * len(pairs)
    for rank, index in enumerate(sorted(range(len(pairs)), key=levels.__getitem__)):
        if levels[index] > LEVEL / (len(pairs) - rank):
            break  # Holm: from here on nothing is certain
        signs[index] = 1 if counts[index][0] > counts[index][1] else -1
    return signs


def _same(one: Tensor, two: Tensor, images: Tensor) -> bool:
    """Tell whether two rates are certain to lie close together, from paired samples."""
    difference = _by_image(one, two, images)
    if len(difference) < 2:
        return False
    # Half a sample more on either side: no difference in a few samples is not certainty.
    error = 1.96 * difference.std().item() / len(difference) ** 0.5 + 1 / len(difference)
    enough = 3 / len(difference) < _EQUAL  # what may hide behind no discordant sample at all
    return enough and abs(difference.mean().item()) + error < _EQUAL


def images_to_tell_apart(one: Tensor, two: Tensor, images: Tensor, level: float) -> float:
    """Compute on how many images the sign test finds a difference as large as the one seen."""
    difference = _by_image(one, two, images)
    more, less = ((difference * sign > 0).double().mean().item() for sign in (1, -1))
    if more == less:
        return math.inf
    apart, share = more + less, max(more, less) / (more + less)
    n = 2.0
    while n < MOST:
        # How many images tell the two apart at all is chance as well.
        spread = 6 * math.sqrt(n * apart) + 6
        counts = np.arange(max(0, int(n * apart - spread)), int(min(n, n * apart + spread)) + 1)
        found = binom.sf(binom.isf(level / 2, counts, 0.5), counts, share)
        if (binom.pmf(counts, int(n), apart) * found).sum() >= POWER:
            return n
        n = max(n + 1, 1.02 * n)
    return math.inf


def images_to_be_the_same(one: Tensor, two: Tensor, images: Tensor) -> float:
    """Estimate on how many images ``_same`` is certain, for a difference as small as the seen."""
    difference = _by_image(one, two, images)
    left = _EQUAL - abs(difference.mean().item())
    if left <= 0 or len(difference) < 2:
        return math.inf
    # u = 1 / sqrt(n) solves u^2 + width u = left.
    width = (1.96 + norm.isf(1 - POWER)) * difference.std().item()
    u = (math.sqrt(width**2 + 4 * left) - width) / 2
    return max(1 / u**2, 3 / _EQUAL)


def _needed(
    verdict: str,
    signs: Sequence[int],
    same: Sequence[bool],
    pairs: Sequence[tuple[Tensor, Tensor]],
    images: Tensor,
    tests: int,
) -> int | None:
    """Estimate how many images decide what ``_verdict`` leaves open, one of ``tests`` by Holm.

    Either one pair is found ahead, or all that are open are found behind or the same.
    """
    if verdict != OPEN:
        return None
    ahead, rest = [math.inf], [0.0]
    for sign, equal, (one, two) in zip(signs, same, pairs, strict=True):
        if sign == 0 and not equal:
            apart = images_to_tell_apart(one, two, images, LEVEL / tests)
            if one.double().mean() > two.double().mean():
                ahead.append(apart)
            rest.append(min(apart, images_to_be_the_same(one, two, images)))
    return _whole(min(min(ahead), max(rest)))


def _whole(number: float) -> int | None:
    """Round up to two digits; None where it is infinite, or 0."""
    if not 0 < number < math.inf:
        return None
    unit = 10 ** max(0, math.floor(math.log10(number)) - 1)
    return math.ceil(number / unit) * unit


def _most(verdict: str, needs: Sequence[int | None]) -> int | None:
    """Return what decides all of several verdicts, if they are open together."""
    known = [need for need in needs if need is not None]
    return max(known) if verdict == OPEN and known else None


def _verdict(signs: Sequence[int], same: Sequence[bool]) -> str:
    """Judge a claim that one is ahead, by its signs and where the two are the same."""
    if signs and all(sign > 0 for sign in signs):
        return HOLDS
    if any(sign > 0 for sign in signs):
        return PARTLY
    certain = all(sign < 0 or equal for sign, equal in zip(signs, same, strict=True))
    return FAILS if signs and certain else OPEN


def _together(verdicts: Sequence[str]) -> str:
    """Judge a claim about several classifiers by the verdicts on each."""
    if len(set(verdicts)) == 1:
        return verdicts[0]
    return PARTLY if HOLDS in verdicts or PARTLY in verdicts else OPEN


def _percent(values: Tensor) -> str:
    return f"{100 * values.double().mean().item():.1f}"


def _pairs(
    one: Outcomes, two: Outcomes, rows: Sequence[int], which: Callable[[Outcomes], Tensor]
) -> str:
    return ", ".join(
        f"{_percent(which(one)[row])} against {_percent(which(two)[row])} at {one.eps[row]:g}"
        for row in rows
    )


def _clean_claim(clean: Mapping[str, Tensor], images: Tensor) -> Claim:
    verdicts, needs = [], []
    for name in ("NR", "DNR"):
        pair = clean["DNN"], clean[name]
        signs, same = _signs([pair], images), [_same(*pair, images)]
        verdicts.append(_verdict(signs, same))
        needs.append(_needed(verdicts[-1], signs, same, [pair], images, 1))
    verdict = _together(verdicts)
    told = ", ".join(f"{name} {_percent(right)}" for name, right in clean.items())
    return Claim(
        "without attack, DNN is slightly more accurate than NR and DNR",
        verdict,
        f"accuracy in percent on {len(clean['DNN']):,} images: {told}",
        _most(verdict, needs),
    )


def _ahead(claim: str, leader: Outcomes, other: Outcomes, rows: Sequence[int]) -> Claim:
    """Judge a lead in accuracy, at every eps at which either has more than 1 % left."""
    left = [row for row in rows if (leader.right[row] | other.right[row]).double().mean() > _ZERO]
    pairs = [(leader.right[row], other.right[row]) for row in left]
    signs = _signs(pairs, leader.images)
    told = _pairs(leader, other, rows, lambda found: found.right)
    marks = {1: "ahead", -1: "behind", 0: "no difference to be seen"}
    where = "; ".join(
        f"{word} at {', '.join(f'{leader.eps[row]:g}' for row in at)}"
        for sign, word in marks.items()
        if (at := [row for row, found in zip(left, signs, strict=True) if found == sign])
    )
    same = [_same(*pair, leader.images) for pair in pairs]
    verdict = _verdict(signs, same)
    needed = _needed(verdict, signs, same, pairs, leader.images, len(pairs))
    return Claim(claim, verdict, f"accuracy in percent: {told} ({where or 'none left'})", needed)


def _rises_then_falls(nr: Outcomes, dnr: Outcomes) -> Claim:
    """Look for an eps between the ends at which more is rejected than at either end."""
    verdicts, told, needs = [], [], []
    for name, found in (("NR", nr), ("DNR", dnr)):
        rates, last = found.rejected.double().mean(dim=1), len(found.rejected) - 1
        between = range(1, last)
        # All of them are tested: the largest alone would be the largest by chance as well.
        pairs = [(found.rejected[i], found.rejected[0]) for i in between]
        ends = [(found.rejected[i], found.rejected[last]) for i in between]
        signs = _signs(pairs + ends, found.images)
        rises, falls = signs[: len(between)], signs[len(between) :]
        same = [_same(*pair, found.images) for pair in pairs]
        if any(up > 0 and down > 0 for up, down in zip(rises, falls, strict=True)):
            verdicts.append(HOLDS)
        elif any(up > 0 for up in rises):
            verdicts.append(PARTLY)
        else:
            verdicts.append(_verdict(rises, same))
        tests = len(pairs + ends)
        needs.append(_needed(verdicts[-1], rises, same, pairs, found.images, tests))
        peak = int(rates.argmax())
        told.append(
            f"{name} "
            + ", ".join(
                f"{_percent(found.rejected[i])} at {found.eps[i]:g}"
                for i in dict.fromkeys((0, peak, last))
            )
        )
    verdict = _together(verdicts)
    return Claim(
        "the rejection rates of NR and DNR first rise with eps, then fall",
        verdict,
        f"rejected in percent, first, most, last: {'; '.join(told)}",
        _most(verdict, needs),
    )


def _reaches_zero(outcomes: Mapping[str, Outcomes]) -> Claim:
    verdicts, told, needs = [], [], []
    for name, found in outcomes.items():
        rate, n = found.right[-1].double().mean().item(), len(found.images.unique())
        low, high = wilson_interval(rate, n)
        if low > _ZERO:
            verdicts.append(FAILS)
        else:  # nothing left, and enough samples to say so
            verdicts.append(HOLDS if rate <= _ZERO and high <= _NEARLY_ZERO else OPEN)
        needs.append(_images_to_tell_zero(rate, n) if verdicts[-1] == OPEN else None)
        told.append(f"{name} {100 * rate:.1f}, at most {100 * high:.1f}")
    eps, verdict = next(iter(outcomes.values())).eps[-1], _together(verdicts)
    return Claim(
        f"a strong enough attack leaves NR and DNR no accuracy at all (here at {eps:g})",
        verdict,
        f"accuracy in percent, with the upper end of its interval: {'; '.join(told)}",
        _most(verdict, needs),
    )


def _images_to_tell_zero(rate: float, n: int) -> int | None:
    """Estimate how many images tell that a rate is, or is not, as good as zero."""
    while n < MOST:
        n = math.ceil(1.05 * n)
        spread = norm.isf(1 - POWER) * math.sqrt(rate * (1 - rate) / n)
        low, high = wilson_interval(rate, n)
        if (rate <= _ZERO and high <= _NEARLY_ZERO) or low - spread > _ZERO:
            return _whole(n)
    return None


def _rejects_more(nr: Outcomes, dnr: Outcomes, eps: Sequence[float]) -> Claim:
    rows = [list(nr.eps).index(value) for value in eps]
    more = [(nr.rejected[row], dnr.rejected[row]) for row in rows]
    less = [(dnr.right[row], nr.right[row]) for row in rows]
    both = [
        min(pair) for pair in zip(_signs(more, nr.images), _signs(less, nr.images), strict=True)
    ]
    same = [_same(*m, nr.images) or _same(*a, nr.images) for m, a in zip(more, less, strict=True)]
    named, verdict = ", ".join(f"{value:g}" for value in eps), _verdict(both, same)
    # Of either part the one that takes more: both have to be so.
    needs = [_needed(verdict, both, same, part, nr.images, len(rows)) for part in (more, less)]
    return Claim(
        f"NR rejects more than DNR and is less accurate all the same (at {named})",
        verdict,
        f"rejected in percent: {_pairs(nr, dnr, rows, lambda found: found.rejected)}; accuracy: "
        f"{_pairs(nr, dnr, rows, lambda found: found.right)}",
        _most(verdict, needs) if None not in needs else None,
    )


def _trade(sweeps: Mapping[str, Mapping[str, Any]]) -> Claim:
    """Look along theta: does accuracy under attack rise while clean samples are rejected?

    Of fixed points a higher theta can only reject more, so that they prove nothing; attacked again,
    points count at every lower theta, so that accuracy cannot fall either. Only whether it rises by
    more than its intervals is judged.
    """
    signs, told, again = [], [], all(sweep["reattacked_accuracy"] for sweep in sweeps.values())
    for name, sweep in sweeps.items():
        rates = sweep["reattacked_accuracy" if again else "accuracy"]
        ends = sweep["false_rejection_rate"]
        moved = []
        for eps, row in zip(sweep["eps"], rates, strict=True):
            signs.append(int(row[0]["high"] < row[-1]["low"]))
            moved.append(f"{100 * row[0]['value']:.0f} to {100 * row[-1]['value']:.0f} at {eps:g}")
        shares = f"{100 * ends[0]['value']:.0f} to {100 * ends[-1]['value']:.0f} %"
        told.append(f"{name}, rejecting {shares} of clean samples: {', '.join(moved)}")
    how = "attacked again at every theta" if again else "fixed points, for which it must be so"
    return Claim(
        "a higher theta buys accuracy under attack for clean samples rejected",
        _verdict(signs, [False] * len(signs)) if again else OPEN,
        f"accuracy in percent, {how}: {'; '.join(told)}",
    )
