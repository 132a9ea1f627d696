"""Page and figure on poisoned training data."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from benchmarks.common import Page, machine, table
from torchdnr.evaluation.figures import COLOURS, MARKERS, _save, _style

CLEAN = ""
RANDOM_LABELS, LABELS = "random labels", "chosen labels"
RANDOM, GRADIENT, EVASION = "random points", "moved points", "moved points, for evasion"
KINDS = RANDOM_LABELS, LABELS, RANDOM, GRADIENT
SHOWN_SHARE = "0.05"
INTRODUCTION = """\
An attacker who knows everything changes labels of the training data, or adds points with labels of
his choice; the network is trained on other, clean digits. `python -m benchmarks.poisoning` fits NR
and DNR on {samples} MNIST digits, or retrains the network's last layer on them ("DNN"), with a
share of poison on top, and measures them on clean test digits then. Hyper-parameters are those
chosen on clean data; a DNN rejects nothing.

- random labels, random points: labels changed at random; other digits with random wrong labels.
- chosen labels: changed where that raises the loss on {validation} digits of the attacker's own
  the most, by its derivative through the fit.
- moved points: digits and wrong labels chosen in the same way, then moved in the image box by
  gradient ascent of that loss, through network and fit.
- moved points, for evasion: the same, but what shall rise is the loss on points on the way to
  evasions of the clean classifier.

"accuracy" is that of the best score, rejected or not. The old theta is that of the clean
classifier, the new one is calibrated after the poisoning, on clean digits, to reject a tenth.
"norm": median l2 norm of the smallest evasions of {attacked} digits that the boundary walk finds at
the old theta. "noticed": the share of the added points that the clean classifier rejects. Means of
{runs} runs, each with a network and digits of its own."""


def page(result: Mapping[str, Any]) -> str:
    """Format what poison does, the contents of poisoning-cpu.json."""
    settings = result["settings"]
    words = {**settings, "runs": len(settings["seeds"])}
    shares = [share for share in next(iter(result["classifiers"].values())) if float(share)]
    lines = [INTRODUCTION.format(**words), "", f"{machine(result['environment'])}.", ""]
    lines += ["## Accuracy over the share of poison, percent", ""]
    rows = [
        [name, kind, percent(runs["0"], CLEAN, "accuracy")]
        + [percent(runs[share], kind, "accuracy") for share in shares]
        for name, runs in result["classifiers"].items()
        for kind in KINDS
    ]
    lines += table(["classifier", "poison", "0", *(f"{float(s):.0%}" for s in shares)], rows)
    lines += ["", *_verdicts(result), "", "![Accuracy over the share](poisoning-cpu.png)", ""]
    for share in shares:
        lines += [f"## {float(share):.0%} of poison", "", *_details(result, share), ""]
    return "\n".join(lines).rstrip()


def values(runs: list[Any], kind: str, what: str) -> list[float]:
    """Collect a number over the runs that have it."""
    return [run["kinds"][kind][what] for run in runs if what in run["kinds"].get(kind, {})]


def percent(runs: list[Any], kind: str, what: str) -> str:
    """Format the mean over the runs, in percent; "-" where none has it."""
    some = values(runs, kind, what)
    return f"{100 * fmean(some):.1f}" if some else "-"


def _details(result: Mapping[str, Any], share: str) -> list[str]:
    rows = []
    for name, runs in result["classifiers"].items():
        for kind in (CLEAN, *KINDS, EVASION):
            some = runs["0" if kind == CLEAN else share]
            norms = values(some, kind, "norm")
            if not norms:
                continue
            old, new = (
                " / ".join(
                    percent(some, kind, f"{what}, {theta}") for what in ("right", "rejected")
                )
                for theta in ("old theta", "new theta")
            )
            old, new = (cell if "-" not in cell else "-" for cell in (old, new))
            noticed = percent(some, kind, "noticed")
            rows.append([name, kind or "none", old, new, f"{fmean(norms):.2f}", noticed])
    header = ["classifier", "poison", "right / rejected, old theta", "new theta", "norm", "noticed"]
    return table(header, rows)


def _verdicts(result: Mapping[str, Any]) -> Iterator[str]:
    """Count the runs in which what follows gradients does more harm than chance."""
    for name, shares in result["classifiers"].items():
        for kind, others in ((LABELS, [RANDOM_LABELS]), (GRADIENT, [RANDOM_LABELS, RANDOM])):
            poisoned = {share: runs for share, runs in shares.items() if float(share)}
            beaten = {
                share: sum(
                    run["kinds"][kind]["accuracy"]
                    < min(run["kinds"][other]["accuracy"] for other in others)
                    for run in runs
                )
                for share, runs in poisoned.items()
            }
            counts = ", ".join(
                f"{count} of {len(poisoned[share])} at {float(share):.0%}"
                for share, count in beaten.items()
            )
            yield f"- {name}: {kind} lower the accuracy more than {' and '.join(others)}: {counts}"


def headline(result: Mapping[str, Any]) -> str:
    """Name the accuracy before and after, and what rejection notices of it."""
    parts = []
    for name, shares in result["classifiers"].items():
        clean = percent(shares["0"], CLEAN, "accuracy")
        after = percent(shares[SHOWN_SHARE], GRADIENT, "accuracy")
        parts.append(f"{name} {clean} to {after} %")
    noticed = percent(result["classifiers"]["DNR"][SHOWN_SHARE], GRADIENT, "noticed")
    return (
        f"{float(SHOWN_SHARE):.0%} of training points moved by gradients, accuracy: "
        f"{', '.join(parts)}; a clean DNR rejects {noticed} % of them"
    )


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draw the accuracy over the share of poison, with the smallest and largest of the runs."""
    figure = Figure(figsize=(9.0, 3.4), layout="constrained")
    panels = figure.subplots(1, len(result["classifiers"]), sharey=True)
    for axes, (name, shares) in zip(panels, result["classifiers"].items(), strict=True):
        for kind, colour, marker in zip(KINDS, COLOURS, MARKERS, strict=False):
            runs = {
                100 * float(share): values(some, kind if float(share) else CLEAN, "accuracy")
                for share, some in shares.items()
            }
            low, high = ([100 * end(some) for some in runs.values()] for end in (min, max))
            means = [100 * fmean(some) for some in runs.values()]
            axes.plot(list(runs), means, color=colour, marker=marker, label=kind)
            axes.fill_between(list(runs), low, high, color=colour, alpha=0.15, linewidth=0)
        _style(axes, "poison, percent", "accuracy, percent" if axes is panels[0] else "")
        axes.set_title(name)
    panels[0].autoscale(axis="y")
    panels[0].legend(frameon=False)
    _save(figure, path)


PAGES = {"poisoning": Page("Poisoned training data", page, headline)}
