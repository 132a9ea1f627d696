"""What the paper says about its experiments, and whether it is so in ours.

Every comparison is made sample by sample: a difference counts if it is more than twice its standard
error over the samples of all runs, so that a handful of samples decides nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchdnr.evaluation.curve import Predictions
from torchdnr.rejection import REJECT

HOLDS, PARTLY, FAILS, OPEN = "holds", "holds partly", "does not hold", "cannot be told"
_ZERO = 0.01  # an accuracy of at most this counts as none: one sample in a hundred


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
    """

    eps: Sequence[float]
    right: Tensor
    rejected: Tensor


def gather(runs: Sequence[Predictions]) -> Outcomes:
    """Put the samples of all runs side by side."""
    found = []
    for run in runs:
        rejected = run.predictions == REJECT
        right = run.predictions == run.labels
        attacked = torch.tensor(run.eps)[:, None] > 0
        found.append((right | (rejected & attacked), rejected))
    right, rejected = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    return Outcomes(runs[0].eps, right, rejected)


def judge_claims(
    outcomes: Mapping[str, Outcomes],
    nr_rejects_more_at: Sequence[float],
    sweeps: Mapping[str, Sequence[Mapping[str, Any]]] | None,
) -> list[Claim]:
    """Go through the paper's claims.

    Args:
        outcomes: Of "DNN", "NR" and "DNR", under the same attack.
        nr_rejects_more_at: eps at which the paper sees NR reject more than DNR.
        sweeps: Of "NR" and "DNR", one per run; None where they belong to another attack.

    Returns:
        The claims in the paper's order.

    Source: Sotgiu et al., Sec. IV-B.
    """
    dnn, nr, dnr = (outcomes[name] for name in ("DNN", "NR", "DNR"))
    claims = [
        _ahead("without attack, DNN is more accurate than NR and DNR", (dnn,), (nr, dnr), [0]),
        _rises_then_falls(nr, dnr),
        _reaches_zero(outcomes),
        _ahead("under attack, NR is more accurate than DNN", (nr,), (dnn,), _attacked(nr)),
        _ahead("under attack, DNR is more accurate than DNN", (dnr,), (dnn,), _attacked(nr)),
        _ahead("under attack, DNR is slightly more accurate than NR", (dnr,), (nr,), _attacked(nr)),
        _rejects_more(nr, dnr, nr_rejects_more_at),
    ]
    if sweeps is not None:
        claims.append(_trade(sweeps))
    return claims


def _attacked(outcomes: Outcomes) -> list[int]:
    return [index for index, eps in enumerate(outcomes.eps) if eps > 0]


def _sign(one: Tensor, two: Tensor) -> int:
    """Tell whether one rate is above another: 1, -1, or 0 where the samples do not tell."""
    difference = one.double() - two.double()
    error = difference.std() / len(difference) ** 0.5
    mean = difference.mean()
    return 0 if mean.abs() <= 2 * error else int(mean.sign())


def _verdict(signs: Sequence[int]) -> str:
    if 1 in signs:
        return PARTLY if -1 in signs else HOLDS
    return FAILS if -1 in signs else OPEN


def _percent(values: Tensor) -> str:
    return f"{100 * values.double().mean().item():.1f}"


def _pairs(
    one: Outcomes, two: Outcomes, rows: Sequence[int], which: Callable[[Outcomes], Tensor]
) -> str:
    return ", ".join(
        f"{_percent(which(one)[row])} against {_percent(which(two)[row])} at {one.eps[row]:g}"
        for row in rows
    )


def _ahead(
    claim: str, leaders: Sequence[Outcomes], others: Sequence[Outcomes], rows: Sequence[int]
) -> Claim:
    pairs = [(leader, other) for leader in leaders for other in others]
    signs = [_sign(one.right[row], two.right[row]) for one, two in pairs for row in rows]
    told = "; ".join(_pairs(one, two, rows, lambda found: found.right) for one, two in pairs)
    return Claim(claim, _verdict(signs), f"accuracy in percent: {told}")


def _rises_then_falls(nr: Outcomes, dnr: Outcomes) -> Claim:
    moves, told = [], []
    for name, found in (("NR", nr), ("DNR", dnr)):
        rates = found.rejected.double().mean(dim=1)
        peak = int(rates.argmax())
        moves.append(_sign(found.rejected[peak], found.rejected[0]))
        moves.append(_sign(found.rejected[peak], found.rejected[-1]))
        told.append(
            f"{name} {_percent(found.rejected[0])} at {found.eps[0]:g}, "
            f"{_percent(found.rejected[peak])} at {found.eps[peak]:g}, "
            f"{_percent(found.rejected[-1])} at {found.eps[-1]:g}"
        )
    # Two moves each: up to the peak, and down from it. A peak at an end is no move.
    verdict = HOLDS if min(moves) > 0 else PARTLY if max(moves) > 0 else FAILS
    return Claim(
        "the rejection rates of NR and DNR first rise with eps, then fall",
        verdict,
        f"rejected in percent: {'; '.join(told)}",
    )


def _reaches_zero(outcomes: Mapping[str, Outcomes]) -> Claim:
    last = {name: found.right[-1].double().mean().item() for name, found in outcomes.items()}
    at_zero = [value <= _ZERO for value in last.values()]
    verdict = HOLDS if all(at_zero) else PARTLY if any(at_zero) else FAILS
    eps = next(iter(outcomes.values())).eps[-1]
    told = ", ".join(f"{name} {100 * value:.1f}" for name, value in last.items())
    return Claim(
        f"a strong enough attack leaves no accuracy at all (here at {eps:g})",
        verdict,
        f"accuracy in percent: {told}",
    )


def _rejects_more(nr: Outcomes, dnr: Outcomes, eps: Sequence[float]) -> Claim:
    rows = [list(nr.eps).index(value) for value in eps]
    more = [_sign(nr.rejected[row], dnr.rejected[row]) for row in rows]
    worse = [_sign(dnr.right[row], nr.right[row]) for row in rows]
    both = [
        1 if rejects > 0 and less > 0 else -1 if rejects < 0 or less < 0 else 0
        for rejects, less in zip(more, worse, strict=True)
    ]
    named = ", ".join(f"{value:g}" for value in eps)
    return Claim(
        f"NR rejects more than DNR and is less accurate all the same (at {named})",
        _verdict(both),
        f"rejected in percent: {_pairs(nr, dnr, rows, lambda found: found.rejected)}; accuracy: "
        f"{_pairs(nr, dnr, rows, lambda found: found.right)}",
    )


def _trade(sweeps: Mapping[str, Sequence[Mapping[str, Any]]]) -> Claim:
    """Look along theta: does accuracy under attack rise while clean accuracy falls?"""
    signs, told = [], []
    for name, runs in sweeps.items():
        for run in runs:
            for row, eps in enumerate(run["eps"]):
                low, high = run["accuracy"][row][0], run["accuracy"][row][-1]
                apart = low["high"] < high["low"], high["high"] < low["low"]
                signs.append(1 if apart[0] else -1 if apart[1] else 0)
                if run is runs[0]:
                    told.append(
                        f"{name} {100 * low['value']:.0f} to {100 * high['value']:.0f} at {eps:g}"
                    )
    first = next(iter(sweeps.values()))[0]["false_rejection_rate"]
    ends = f"{100 * first[0]['value']:.0f} to {100 * first[-1]['value']:.0f} % of clean samples"
    return Claim(
        "a higher theta buys accuracy under attack for clean samples rejected",
        _verdict(signs),
        f"rejecting {ends} takes the accuracy in percent from (fixed attacks): {', '.join(told)}",
    )
