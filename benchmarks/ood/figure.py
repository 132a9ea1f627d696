"""The figure of bench_ood.py: AUROC over the strength of every corruption."""

import math
import statistics
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.ood.images import CORRUPTED
from torchdnr.evaluation.plots import COLOURS, MARKERS, _save, _style

COLUMNS = 4


def drawn_detectors(sets: list[dict[str, Any]]) -> list[str]:
    """Choose what is drawn: of Mahalanobis and of kNN, the layers with the best mean AUROC."""
    best: dict[str, tuple[float, str]] = {}
    measured = [entry["detectors"] for entry in sets if "kind" in entry]
    for name in measured[0]:
        mean = statistics.mean(found[name]["auroc"][0] for found in measured)
        family = name.partition(",")[0]
        best[family] = max(best.get(family, (0.0, name)), (mean, name))
    return [name for _, name in best.values()]


def plot_severities(sets: list[dict[str, Any]], path: Path) -> None:
    """Draw AUROC over strength, a panel per corruption; the band is DNR's 95 % interval.

    Args:
        sets: Entries of the results, see ood_measures.py.
        path: Image file; replaced atomically.

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
    areas = [e["detectors"][d]["auroc"][0] for found in panels.values() for e in found
             for d in detectors]  # fmt: skip
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
