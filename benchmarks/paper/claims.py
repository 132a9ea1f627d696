"""What the paper says about its experiments, and whether it is so in ours.

Two classifiers are compared image by image: only images that one of them gets right more often
than the other, over the runs that drew them, tell the two apart, by an exact sign test, at 5 % over
all eps of a claim (Holm). All runs share one network, and nothing is said of others.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from scipy.stats import binomtest
from torch import Tensor

from torchdnr.decisions import REJECT
from torchdnr.evaluation.curve import Predictions
from torchdnr.evaluation.metrics import wilson_interval

HOLDS, PARTLY, FAILS, OPEN = "holds", "holds partly", "does not hold", "cannot be told"
LEVEL = 0.05
_ZERO = 0.01  # an accuracy of at most this counts as none
_NEARLY_ZERO = 0.1  # and is believed where the interval ends below this
_EQUAL = 0.01  # a difference that is certain to be smaller counts as none


class Claim(NamedTuple):
    """A claim and what became of it.

    Attributes:
        claim: In our words.
        verdict: ``HOLDS``, ``PARTLY``, ``FAILS``, or ``OPEN`` where the samples are too few.
        numbers: What it rests on.
    """

    claim: str
    verdict: str
    numbers: str

    def to_dict(self) -> dict[str, str]:
        """Convert to JSON values."""
        return self._asdict()


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
    verdicts = []
    for name in ("NR", "DNR"):
        pair = clean["DNN"], clean[name]
        verdicts.append(_verdict(_signs([pair], images), [_same(*pair, images)]))
    told = ", ".join(f"{name} {_percent(right)}" for name, right in clean.items())
    return Claim(
        "without attack, DNN is slightly more accurate than NR and DNR",
        _together(verdicts),
        f"accuracy in percent on {len(clean['DNN']):,} images: {told}",
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
    verdict = _verdict(signs, [_same(*pair, leader.images) for pair in pairs])
    return Claim(claim, verdict, f"accuracy in percent: {told} ({where or 'none left'})")


def _rises_then_falls(nr: Outcomes, dnr: Outcomes) -> Claim:
    """Look for an eps between the ends at which more is rejected than at either end."""
    verdicts, told = [], []
    for name, found in (("NR", nr), ("DNR", dnr)):
        rates, last = found.rejected.double().mean(dim=1), len(found.rejected) - 1
        between = range(1, last)
        # All of them are tested: the largest alone would be the largest by chance as well.
        signs = _signs(
            [(found.rejected[i], found.rejected[0]) for i in between]
            + [(found.rejected[i], found.rejected[last]) for i in between],
            found.images,
        )
        rises, falls = signs[: len(between)], signs[len(between) :]
        same = [_same(found.rejected[i], found.rejected[0], found.images) for i in between]
        if any(up > 0 and down > 0 for up, down in zip(rises, falls, strict=True)):
            verdicts.append(HOLDS)
        elif any(up > 0 for up in rises):
            verdicts.append(PARTLY)
        else:
            verdicts.append(_verdict(rises, same))
        peak = int(rates.argmax())
        told.append(
            f"{name} "
            + ", ".join(
                f"{_percent(found.rejected[i])} at {found.eps[i]:g}"
                for i in dict.fromkeys((0, peak, last))
            )
        )
    return Claim(
        "the rejection rates of NR and DNR first rise with eps, then fall",
        _together(verdicts),
        f"rejected in percent, first, most, last: {'; '.join(told)}",
    )


def _reaches_zero(outcomes: Mapping[str, Outcomes]) -> Claim:
    verdicts, told = [], []
    for name, found in outcomes.items():
        rate, n = found.right[-1].double().mean().item(), len(found.images.unique())
        low, high = wilson_interval(rate, n)
        if low > _ZERO:
            verdicts.append(FAILS)
        else:  # nothing left, and enough samples to say so
            verdicts.append(HOLDS if rate <= _ZERO and high <= _NEARLY_ZERO else OPEN)
        told.append(f"{name} {100 * rate:.1f}, at most {100 * high:.1f}")
    eps = next(iter(outcomes.values())).eps[-1]
    return Claim(
        f"a strong enough attack leaves NR and DNR no accuracy at all (here at {eps:g})",
        _together(verdicts),
        f"accuracy in percent, with the upper end of its interval: {'; '.join(told)}",
    )


def _rejects_more(nr: Outcomes, dnr: Outcomes, eps: Sequence[float]) -> Claim:
    rows = [list(nr.eps).index(value) for value in eps]
    more = [(nr.rejected[row], dnr.rejected[row]) for row in rows]
    less = [(dnr.right[row], nr.right[row]) for row in rows]
    both = [
        min(pair) for pair in zip(_signs(more, nr.images), _signs(less, nr.images), strict=True)
    ]
    same = [_same(*m, nr.images) or _same(*a, nr.images) for m, a in zip(more, less, strict=True)]
    named = ", ".join(f"{value:g}" for value in eps)
    return Claim(
        f"NR rejects more than DNR and is less accurate all the same (at {named})",
        _verdict(both, same),
        f"rejected in percent: {_pairs(nr, dnr, rows, lambda found: found.rejected)}; accuracy: "
        f"{_pairs(nr, dnr, rows, lambda found: found.right)}",
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
