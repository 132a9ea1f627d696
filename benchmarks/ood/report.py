"""Page and figure on images that the classifier does not know."""

import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.common import Page, machine, table
from benchmarks.ood.images import CORRUPTED
from torchdnr.evaluation.figures import COLOURS, MARKERS, _save, _style

CONTROL = "MNIST's test digits"
STRENGTH = 2  # which of the five is in the table: the middle one
COLUMNS = 4  # of the figure
INTRODUCTION = """\
`python -m benchmarks.ood` (extras `peers` and `test`) asks how well the rejection score finds
images that are no clean digits, beside four detectors of pytorch-ood on the same network. This is
one network and one seed; nothing was tuned on unknown images. A corrupted digit that the network
still classifies correctly need not be rejected, so a low AUROC at small strengths is no fault.
MNIST's test digits are the control: the same kind of digits, which no detector should find."""
REMARK = """\
Mahalanobis on the layers after a ReLU is worse than chance on many of these sets: where features
shrink towards 0, they are nearer to a class centre, in its metric, than those of clean digits."""


def page(result: dict[str, Any]) -> str:
    """Format how well rejection finds unknown images.

    Args:
        result: Contents of ood-<device>.json.

    Returns:
        Markdown: what was run where, the detectors on noise, other data sets and corrupted images,
        and whether DNR beats each of them.
    """
    clean, *sets = result["sets"]
    whole = [entry for entry in sets if entry["kind"] != CORRUPTED]
    corrupted = [entry for entry in sets if entry["kind"] == CORRUPTED]
    strengths: dict[str, list[dict[str, Any]]] = {}
    for entry in corrupted:
        strengths.setdefault(entry["name"], []).append(entry)
    middle = [entries[STRENGTH] for entries in strengths.values()]
    lines = [
        INTRODUCTION,
        "",
        _conditions(result, clean, whole, corrupted),
        "",
        *_table(result, clean, whole),
        "",
        f"Corrupted digits, {len(next(iter(strengths.values())))} strengths of each kind; here the "
        "middle one, all of them in the figure:",
        "",
        *_table(result, clean, middle),
        "",
        *_verdict(sets),
        "",
        f"![AUROC over the strength of {len(strengths)} corruptions]"
        f"(ood-{result['environment']['device']}-severity.png)",
        "",
        REMARK,
    ]
    return "\n".join(lines)


def headline(result: dict[str, Any]) -> str:
    """Say which detectors DNR is better than, and which are better."""
    return f"as a detector of unknown images DNR is {_summary(_leads(result['sets'][1:]))}"


def _conditions(
    result: dict[str, Any],
    clean: dict[str, Any],
    whole: list[dict[str, Any]],
    corrupted: list[dict[str, Any]],
) -> str:
    settings, environment = result["settings"], result["environment"]
    halves = f"{corrupted[0]['images']} corrupted digits against {corrupted[0]['clean_images']}"
    sizes = sorted({entry["images"] for entry in whole})
    images = " to ".join(f"{size:,}" for size in dict.fromkeys([sizes[0], sizes[-1]]))
    text = (
        f"Data set {result['run']['dataset']}, seed {settings['seed']}; "
        f"{clean['images']:,} clean test digits, of which the network alone reads "
        f"{_percent(clean['accuracy'])} %; {images} images of every other set, "
        f"{halves} clean ones of others. Mahalanobis and kNN (k = {settings['neighbours']}) fitted "
        f"on the {settings['fit_images']:,} images of DNR's fit; NR reads {settings['nr_layer']}, "
        f"all layers are {', '.join(settings['layers'])}. {machine(environment)}, "
        f"pytorch-ood {result['versions']['pytorch-ood']}. Cells: AUROC; FPR at 95 % TPR, in "
        "percent with 95 % intervals; the unknown image is positive, so a high AUROC and a low "
        "FPR are good."
    )
    if result["missing"]:
        text += f" Not measured, as it could not be had: {', '.join(result['missing'])}."
    return f"{text} {result['note']}" if result["note"] else text


def _table(
    result: dict[str, Any], clean: dict[str, Any], entries: list[dict[str, Any]]
) -> list[str]:
    titles = []
    for entry in entries:
        name, _, unit = entry["name"].partition(", ")
        strength = "" if entry["strength"] is None else f", {unit} {entry['strength']:g}"
        titles.append(f"{name}{strength}")
    rows = []
    for name in _rows(result, entries[0]["detectors"]):
        measured = [entry["detectors"][name] for entry in entries]
        rows.append(
            [name, *(f"{_interval(one['auroc'])}; {_interval(one['fpr'])}" for one in measured)]
        )
    for name in ("DNR", "NR"):
        cells = [_percent(entry["detectors"][name]["rejected"]) for entry in entries]
        share = _percent(clean["detectors"][name]["rejected"])
        rows.append([f"rejected by {name} (clean: {share})", *cells])
    cells = [_percent(e["accuracy"]) if e["accuracy"] else "-" for e in entries]
    return table(["", *titles], [*rows, ["classified correctly by the network alone", *cells]])


def _rows(result: dict[str, Any], names: dict[str, Any]) -> list[str]:
    """Choose detectors: of those on features, what NR and what DNR reads."""
    views = result["settings"]["nr_layer"], "all layers"
    return [name for name in names if ", " not in name or name.partition(", ")[2] in views]


def _judged(sets: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry for entry in sets if entry["name"] != CONTROL]


def _verdict(sets: list[dict[str, Any]]) -> list[str]:
    """Count where DNR's AUROC is higher and lower than that of each other detector."""
    judged = _judged(sets)
    whole, corrupted = (
        [entry for entry in judged if (entry["kind"] == CORRUPTED) == kind]
        for kind in (False, True)
    )
    rows = []
    for name in _leads(sets):
        counts = [_count(group, name) for group in (whole, corrupted)]
        mean = statistics.mean(entry["detectors"][name]["dnr_ahead"][0] for entry in judged)
        cells = [f"{higher}, {lower}" for higher, lower in counts]
        rows.append([name, *cells, f"{100 * mean:+.1f}"])
    header = [
        "DNR against",
        f"of {len(whole)} sets, not corrupted: higher, lower",
        f"of {len(corrupted)} corrupted: higher, lower",
        "mean difference over all, points",
    ]
    return [
        f"Is DNR better? On how many sets (all strengths, without {CONTROL}) its AUROC is higher, "
        "and on how many lower, by a 95 % interval of the difference on the same images:",
        "",
        *table(header, rows),
        "",
        f"On more sets than the other way round, DNR is {_summary(_leads(sets))}.",
    ]


def _leads(sets: list[dict[str, Any]]) -> dict[str, int]:
    """Count, by detector, on how many more sets DNR is ahead of it than behind."""
    judged = _judged(sets)
    names = [name for name in judged[0]["detectors"] if name != "DNR"]
    counts = {name: _count(judged, name) for name in names}
    return {name: higher - lower for name, (higher, lower) in counts.items()}


def _summary(leads: dict[str, int]) -> str:
    words = {
        "worse than": [name for name, lead in leads.items() if lead < 0],
        "better than": [name for name, lead in leads.items() if lead > 0],
        "neither better nor worse than": [name for name, lead in leads.items() if lead == 0],
    }
    return "; ".join(f"{word} {_enumerate(names, leads)}" for word, names in words.items() if names)


def _count(sets: list[dict[str, Any]], name: str) -> tuple[int, int]:
    ahead = [entry["detectors"][name]["dnr_ahead"] for entry in sets]
    return sum(low > 0 for _, low, _ in ahead), sum(high < 0 for _, _, high in ahead)


def _enumerate(names: list[str], among: Iterable[str]) -> str:
    """List names; a detector all of whose layers are among them is named once."""
    views: dict[str, list[str]] = {}
    for name in names:
        family, _, view = name.partition(", ")
        views.setdefault(family, []).append(view)
    parts = []
    for family, chosen in views.items():
        layers = sum(name.startswith(f"{family}, ") for name in among)
        if layers == 0:
            parts.append(family)
        elif layers == len(chosen):
            parts.append(f"{family} on any layers")
        else:
            parts.append(f"{family} on {' or '.join(chosen)}")
    return ", ".join(parts)


def _interval(ends: list[float]) -> str:
    value, low, high = (f"{100 * end:.1f}" for end in ends)
    return f"{value} ({low} to {high})"


def _percent(ends: list[float]) -> str:
    return f"{100 * ends[0]:.1f}"


def drawn_detectors(sets: list[dict[str, Any]]) -> list[str]:
    """Choose what is drawn: of Mahalanobis and of kNN, the layers with the best mean AUROC."""
    best: dict[str, tuple[float, str]] = {}
    measured = [entry["detectors"] for entry in sets if "kind" in entry]
    for name in measured[0]:
        mean = statistics.mean(entry[name]["auroc"][0] for entry in measured)
        family = name.partition(",")[0]
        best[family] = max(best.get(family, (0.0, name)), (mean, name))
    return [name for _, name in best.values()]


def plot_severities(sets: list[dict[str, Any]], path: Path) -> Figure:
    """Draw AUROC over strength, a panel per corruption; the band is DNR's 95 % interval.

    Args:
        sets: Entries of the result.
        path: Image file; replaced atomically.

    Returns:
        The figure.

    Raises:
        ValueError: If no set is of corrupted images.
    """
    panels: dict[str, list[dict[str, Any]]] = {}
    for entry in sets:
        if entry.get("kind") == CORRUPTED:
            panels.setdefault(entry["name"], []).append(entry)
    if not panels:
        raise ValueError("sets holds no corrupted images: there is nothing to draw")
    rows = -(-(len(panels) + 1) // COLUMNS)  # one more for the legend
    figure = Figure(figsize=(1 + 3.2 * COLUMNS, 0.4 + 3.4 * rows), layout="constrained")
    axes = list(figure.subplots(rows, COLUMNS, sharey=True, squeeze=False).flat)
    detectors = drawn_detectors(sets)
    for panel, (name, entries) in zip(axes, panels.items(), strict=False):
        _draw(panel, name, entries, detectors)
    for panel in axes[len(panels) :]:
        panel.set_axis_off()
    for index in range(0, len(panels), COLUMNS):
        axes[index].set_ylabel("AUROC", fontsize=11)
    shown = [entry["detectors"] for entries in panels.values() for entry in entries]
    areas = [entry[detector]["auroc"][0] for entry in shown for detector in detectors]
    axes[0].set_ylim(math.floor(10 * min(0.5, *areas)) / 10, 1)
    handles, labels = axes[0].get_legend_handles_labels()
    axes[-1].legend(handles, labels, loc="center", fontsize=11, frameon=False)
    note = (
        "Corrupted against clean digits. Brackets: how many of the corrupted ones the network "
        "alone still reads. Band: 95 % confidence interval of DNR. Mahalanobis and kNN on the "
        "layers that suit them best."
    )
    figure.supxlabel(note, fontsize=9, color="0.35")
    _save(figure, path)
    return figure


def _draw(axes: Axes, name: str, entries: list[dict[str, Any]], detectors: list[str]) -> None:
    places = range(len(entries))
    _style(axes)
    axes.axhline(0.5, color="0.75", linewidth=1, linestyle="--")
    for index, detector in enumerate(detectors):
        colour = COLOURS[index % len(COLOURS)]
        values, low, high = zip(*(e["detectors"][detector]["auroc"] for e in entries), strict=True)
        axes.plot(
            places,
            values,
            color=colour,
            marker=MARKERS[index % len(MARKERS)],
            markersize=6,
            markeredgecolor="white",
            linewidth=1.6,
            label=detector,
            clip_on=False,  # a marker at 1 stays whole
            zorder=4 if detector == "DNR" else 3,
        )
        if detector == "DNR":
            axes.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
    ticks = [f"{entry['strength']:g}\n({100 * entry['accuracy'][0]:.0f} %)" for entry in entries]
    axes.set_xticks(places, ticks)
    title, _, unit = name.partition(", ")
    axes.set_title(title, fontsize=12, pad=10)
    axes.set_xlabel(unit, fontsize=10)


PAGES = {"ood": Page("Images that the classifier does not know", page, headline)}
