"""Figures of the rejection option: threshold sweep, ROC, and the price of easy rejection."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from torchdnr.evaluation.detection import Detection
from torchdnr.evaluation.figures import (
    COLOURS,
    MARKERS,
    _footnote,
    _legend,
    _norm_name,
    _save,
    _style,
    draw_estimates,
)
from torchdnr.evaluation.stratified import StratifiedCurve
from torchdnr.evaluation.threshold_sweep import ThresholdSweep

OPERATING_POINT = 0.10  # false rejection rate at which the paper's experiments are run


def plot_threshold_sweep(
    sweeps: Mapping[str, ThresholdSweep],
    path: str | Path,
    *,
    operating_point: float | None = OPERATING_POINT,
    over_threshold: bool = False,
) -> None:
    """Draw accuracy under attack over the false rejection rate, one panel per classifier.

    Solid lines with hollow markers are of fixed points, dashed ones with full markers attacked
    again at each threshold; the band is the 95 % confidence interval of the latter, or, without
    them, of the former, and of averaged sweeps their standard deviation. The dotted line is the
    accuracy without attack.

    Args:
        sweeps: Classifier name to its sweep.
        path: Image file, of a type that its suffix names; replaced atomically.
        operating_point: False rejection rate marked by a vertical line; None: no line.
        over_threshold: Draw over theta instead; then there is no operating point.

    Raises:
        ValueError: If there is no sweep.

    Source: Sotgiu et al., Fig. 4.
    """
    if not sweeps:
        raise ValueError("sweeps is empty: give at least one threshold sweep")
    sizes = sorted({eps for sweep in sweeps.values() for eps in sweep.eps})
    marked = None if over_threshold else operating_point
    figure = Figure(figsize=(1.0 + 4.6 * len(sweeps), 4.9), layout="constrained")
    grid = figure.subplots(1, len(sweeps), squeeze=False, sharex=not over_threshold, sharey=True)
    for axes, (name, sweep) in zip(grid[0], sweeps.items(), strict=True):
        x, label = sweep.thresholds, r"rejection threshold $\theta$"
        if not over_threshold:
            x = [rate.value for rate in sweep.false_rejection_rate]
            label = "false rejection rate (clean inputs)"
        _draw_sweep(axes, x, sweep, sizes)
        axes.set_xlabel(label, fontsize=11)
        _style(axes)
        if marked is not None:
            axes.axvline(marked, color="0.3", linestyle="-.", linewidth=1.2, zorder=2.5)
        axes.set_title(name, fontsize=12, pad=8)
    if not over_threshold:
        grid[0, 0].set_xlim(0, None)  # of all panels, so after the last is drawn
    grid[0, 0].set_ylabel("accuracy under attack", fontsize=11)
    again = any(sweep.reattacked_accuracy is not None for sweep in sweeps.values())
    handles = _sweep_handles(sizes, again)
    _legend(figure, handles, min(len(handles), 3 * len(sweeps)))
    averaged = any(sweep.settings.get("runs", 1) > 1 for sweep in sweeps.values())
    note = f"{_norm_name(next(iter(sweeps.values())).norm)}. Band: "
    note += "standard deviation over the runs" if averaged else "95 % confidence interval"
    note += " when attacked again." if again else "."
    note += "" if marked is None else f" Vertical line: {100 * marked:g} %."
    _footnote(figure, note)
    _save(figure, path)


def plot_roc(detections: Mapping[str, Detection], path: str | Path) -> None:
    """Draw the ROC curves of the rejection score; a marker stands at each classifier's theta.

    Args:
        detections: Classifier name, or another label, to what was measured.
        path: Image file, of a type that its suffix names; replaced atomically.

    Raises:
        ValueError: If there is nothing to draw.
    """
    if not detections:
        raise ValueError("detections is empty: give at least one")
    figure = Figure(figsize=(5.4, 5.6), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.75", linewidth=1, linestyle="--")
    for index, (name, detection) in enumerate(detections.items()):
        colour, area = COLOURS[index % len(COLOURS)], detection.auroc
        axes.plot(
            detection.roc.false_positive_rate.tolist(),
            detection.roc.true_positive_rate.tolist(),
            color=colour,
            linewidth=1.9,
            label=f"{name}: AUROC {area.value:.3f} [{area.low:.3f}, {area.high:.3f}]",
            clip_on=False,
        )
        if detection.detected is not None and detection.false_rejection is not None:
            x, y = detection.false_rejection, detection.detected
            axes.errorbar(
                [x.value],
                [y.value],
                xerr=[[x.value - x.low], [x.high - x.value]],
                yerr=[[y.value - y.low], [y.high - y.value]],
                color=colour,
                marker=MARKERS[index % len(MARKERS)],
                markersize=8,
                markeredgecolor="white",
                elinewidth=1.1,
                zorder=4,
                clip_on=False,
            )
    _style(axes)
    axes.set_xlim(0, 1)
    axes.set_aspect("equal")
    axes.set_xlabel("clean inputs rejected", fontsize=11)
    axes.set_ylabel("adversarial inputs rejected", fontsize=11)
    _legend(figure, axes.get_legend_handles_labels()[0])
    _footnote(figure, "Marker: the threshold in use. Bars and brackets: 95 % confidence intervals.")
    _save(figure, path)


def plot_stratified(curves: Mapping[str, StratifiedCurve], path: str | Path) -> None:
    """Draw robustness over the share of eps within which to reject is an error.

    Args:
        curves: Classifier name to its curve, all at the same eps and norm.
        path: Image file, of a type that its suffix names; replaced atomically.

    Raises:
        ValueError: If there is no curve, or they differ in eps or norm.

    Source: Chen et al., "Stratified adversarial robustness with rejection", ICML 2023.
    """
    sizes = {(curve.eps, curve.norm) for curve in curves.values()}
    if len(sizes) != 1:
        raise ValueError(f"expected curves at one eps and norm, got {sorted(sizes)}")
    ((eps, norm),) = sizes
    figure = Figure(figsize=(6.2, 4.6), layout="constrained")
    axes = figure.subplots()
    for index, (name, curve) in enumerate(curves.items()):
        draw_estimates(axes, curve.alphas, curve.robustness, index, name)
    _style(axes)
    axes.set_xlim(0, 1)
    axes.set_xlabel(r"$\alpha$: to reject within $\alpha\,\epsilon$ is an error", fontsize=11)
    axes.set_ylabel(rf"robustness at $\epsilon$ = {eps:g} ({_norm_name(norm)})", fontsize=11)
    axes.legend(loc="upper right", fontsize=11, frameon=False)
    note = (
        r"Share neither accepted and wrong within $\epsilon$ nor rejected "
        "within $\\alpha\\,\\epsilon$.\nBand: 95 % confidence interval."
    )
    _footnote(figure, note)
    _save(figure, path)


def _draw_sweep(
    axes: Axes, x: Sequence[float], sweep: ThresholdSweep, sizes: Sequence[float]
) -> None:
    again = sweep.reattacked_accuracy
    draw_estimates(axes, x, sweep.clean_accuracy, None, linestyle=":", band=False)
    for row, eps in enumerate(sweep.eps):
        index, fixed = sizes.index(eps), sweep.accuracy[row]
        draw_estimates(axes, x, fixed, index, band=again is None, hollow=again is not None)
        if again is not None:
            draw_estimates(axes, x, again[row], index, linestyle="--")


def _sweep_handles(sizes: Sequence[float], again: bool) -> list[Line2D]:
    lines: list[dict[str, Any]] = [
        {
            "label": rf"$\epsilon$ = {eps:g}",
            "color": COLOURS[index % len(COLOURS)],
            "marker": MARKERS[index % len(MARKERS)],
            "linestyle": "none" if again else "-",
        }
        for index, eps in enumerate(sizes)
    ]
    lines.append({"label": "no attack", "color": "black", "linestyle": ":"})
    if again:
        grey = {"color": "0.35", "marker": "o"}
        lines.append({"label": "fixed points", "markerfacecolor": "white", **grey})
        lines.append({"label": "attacked again", "linestyle": "--", **grey})
    return [Line2D([], [], **line) for line in lines]
