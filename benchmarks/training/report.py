"""Page and figure on training against attacks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from benchmarks.common import Page, machine, table
from torchdnr.evaluation.figures import COLOURS, MARKERS, _save, _style

PLAIN, NR, DNR = "plain network, no rejection", "NR", "DNR"
ROBUST, END_TO_END = "trained to reject, logit", "DNR end to end"
SHOWN = PLAIN, NR, DNR, ROBUST, END_TO_END
MAIN = "small, norm 2"
ALPHAS = 0, 0.25, 0.5, 1
MISSED = 0.05
INTRODUCTION = """\
`python -m benchmarks.training --images N --epochs E --samples K --seeds ...` trains a network on
MNIST or CIFAR-10, plainly and then against attacks of size eps on every batch, with four losses;
and NR and DNR, fitted on the plain network, together with it (end to end). All thresholds reject a
tenth of 1,000 clean images of their own, but those "as often right as" another classifier: these
leave as many clean images accepted and right as that one does. "right" and "rejected" are of the
10,000 clean test images. The median is that of the smallest norms that evade (accepted and wrong),
by the whole line-up, Square, and the points found on every other classifier of the table: how many
samples these alone evaded nearer is the column "transfer". "kept": images that no attack evades at
that size, in percent."""


def merged(seeds: Mapping[str, Mapping[str, Any]], name: str) -> list[Mapping[str, Any]]:
    """Collect the results of a classifier over the seeds that have it."""
    return [results[name] for results in seeds.values() if name in results]


def median_of_seeds(study: Mapping[str, Any], name: str) -> float | None:
    """Average the median norms of a classifier over seeds; None if there is none."""
    runs = merged(study["seeds"], name)
    return fmean(run["median"] for run in runs) if runs else None


def page(result: Mapping[str, Any]) -> str:
    """Format how much training against attacks adds, the contents of training-cpu.json."""
    lines = [INTRODUCTION, ""]
    for key, study in result["studies"].items():
        lines += [f"## {key}: {_budget(study)}", ""]
        lines += [f"{machine(study['environment'])}; seconds of a processor.", ""]
        lines += [*_table(study), ""]
        lines += [*_overrated(study), *_examined(study)]
    lines.append("![Images kept over the size of the perturbation](training-cpu.png)")
    return "\n".join(lines)


def _budget(study: Mapping[str, Any]) -> str:
    return (
        f"eps {study['eps']:g}, {study['images']:,} images x {study['epochs']} epochs, "
        f"{_plural(len(study['seeds']), 'seed')}"
    )


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _table(study: Mapping[str, Any]) -> list[str]:
    seeds = study["seeds"]
    names = list(dict.fromkeys(name for results in seeds.values() for name in results))
    some = next(iter(next(iter(seeds.values())).values()))
    sizes = [eps for eps in some["eps"] if eps > 0]
    rows = []
    for name in names:
        runs = merged(seeds, name)
        medians = [run["median"] for run in runs]
        spread = f" ({min(medians):.2f} to {max(medians):.2f})" if len(runs) > 1 else ""
        kept = [fmean(run["kept"][1 + index] for run in runs) for index in range(len(sizes))]
        seconds = [run["training_seconds"] for run in runs if run["training_seconds"] is not None]
        rows.append(
            [
                name,
                str(len(runs)),
                f"{fmean(run['right'] for run in runs):.1%}",
                f"{fmean(run['rejected'] for run in runs):.1%}",
                f"{fmean(medians):.2f}{spread}",
                *(f"{100 * value:.0f}" for value in kept),
                f"{sum(run['transfer'] for run in runs)} of {sum(run['samples'] for run in runs)}",
                f"{fmean(seconds):.0f}" if seconds else "-",
            ]
        )
    header = ["classifier", "seeds", "right", "rejected", "median norm"]
    header += [f"kept at {eps:g}" for eps in sizes]
    return table([*header, "transfer", "training s"], rows)


def _overrated(study: Mapping[str, Any]) -> list[str]:
    """Name the classifiers on which the line-up alone missed much that others' points found."""
    names = dict.fromkeys(name for results in study["seeds"].values() for name in results)
    missed = []
    for name in names:
        runs = merged(study["seeds"], name)
        if sum(run["transfer"] for run in runs) > MISSED * sum(run["samples"] for run in runs):
            missed.append(name)
    if not missed:
        return []
    return [
        f"The line-up alone overrates {' and '.join(missed)}: points of other classifiers evade "
        f"nearer on more than {MISSED:.0%} of the images, and the true norms may be smaller still.",
        "",
    ]


def _examined(study: Mapping[str, Any]) -> list[str]:
    """Format checks, stratified curve and corrupted digits of those classifiers that have them."""
    found = {
        name: [run["examined"] for run in merged(study["seeds"], name) if "examined" in run]
        for name in SHOWN
    }
    found = {name: runs for name, runs in found.items() if runs}
    if not found:
        return []
    rows = []
    for name, runs in found.items():
        failed = [check for run in runs for check in run["checks"]["fail"] + run["checks"]["warn"]]
        alphas = runs[0].get("alphas", [])
        kept = {a: fmean(run["robustness"][i] for run in runs) for i, a in enumerate(alphas)}
        right, rejected = (
            fmean(value[i] for run in runs for value in run["corrupted"].values()) for i in (0, 1)
        )
        few = ", ".join(f"{100 * kept[a]:.0f} at {a:g}" for a in ALPHAS if a in kept)
        checks = f"all but: {', '.join(sorted(set(failed)))}" if failed else "all"
        rows.append([name, checks, few or "-", f"{right:.0%}, {rejected:.0%}"])
    eps = next((run["eps"] for runs in found.values() for run in runs if "eps" in run), None)
    header = [
        "classifier",
        "checks passed",
        f"kept at eps {eps:g}, unless rejected within alpha eps",
    ]
    return [*table([*header, "corrupted digits: right, rejected"], rows), ""]


def headline(result: Mapping[str, Any]) -> str:
    """Say what the paper's DNR is worth, and what training adds."""
    study = result["studies"][MAIN]
    medians = {name: median_of_seeds(study, name) for name in SHOWN}
    words = {PLAIN: "plain network", DNR: "DNR", END_TO_END: "DNR trained end to end"}
    words[ROBUST] = "network trained to reject"
    parts = [f"{words[n]} {medians[n]:.2f}" for n in words if medians[n] is not None]
    return f"median l2 norm of an evasion, MNIST: {', '.join(parts)}"


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draw which share of the images is kept over eps, mean over the seeds."""
    study = result["studies"][MAIN]
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    names: Sequence[str] = [name for name in SHOWN if merged(study["seeds"], name)]
    for name, colour, marker in zip(names, COLOURS, MARKERS, strict=False):
        runs = merged(study["seeds"], name)
        sizes = runs[0]["eps"]
        kept = [fmean(run["kept"][index] for run in runs) for index in range(len(sizes))]
        axes.plot(sizes, [100 * k for k in kept], color=colour, marker=marker, label=name)
    _style(axes, "eps, size of the perturbation in the l2 norm", "right or rejected, percent")
    axes.set_ylim(0, 102)
    axes.legend(frameon=False)
    _save(figure, path)


PAGES = {"training": Page("What training against attacks adds", page, headline)}
