"""Figures of the rejection option: threshold sweep, ROC, and the price of easy rejection."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from torchdnr.evaluation.detection import Detection
from torchdnr.evaluation.figures import COLOURS, MARKERS, _norm_name, _save, _style
from torchdnr.evaluation.metrics import Estimate
from torchdnr.evaluation.stratified import StratifiedCurve
from torchdnr.evaluation.threshold_sweep import ThresholdSweep

OPERATING_POINT = 0.10
"""False rejection rate at which the paper's experiments are run."""


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
    panels = figure.subplots(1, len(sweeps), squeeze=False, sharex=not over_threshold, sharey=True)[
        0
    ]
    for axes, (name, sweep) in zip(panels, sweeps.items(), strict=True):
        _draw_sweep(axes, sweep, sizes, over_threshold)
        _style(axes)
        if marked is not None:
            axes.axvline(marked, color="0.3", linestyle="-.", linewidth=1.2, zorder=2.5)
        if over_threshold:
            axes.set_xlabel(r"rejection threshold $\theta$", fontsize=11)
        else:
            axes.set_xlim(0, None)
            axes.set_xlabel("false rejection rate (clean inputs)", fontsize=11)
        axes.set_title(name, fontsize=12, pad=8)
    panels[0].set_ylabel("accuracy under attack", fontsize=11)
    _sweep_legend(figure, sweeps, sizes, marked)
    _save(figure, path)


def plot_roc(detections: Mapping[str, Detection], path: str | Path) -> None:
    """Draw the ROC curves of the rejection score; a dot marks each classifier's own theta.

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
    for index, (name, found) in enumerate(detections.items()):
        colour, area = COLOURS[index % len(COLOURS)], found.auroc
        axes.plot(
            found.roc.false_positive_rate.tolist(),
            found.roc.true_positive_rate.tolist(),
            color=colour,
            linewidth=1.9,
            label=f"{name}: AUROC {area.value:.3f} [{area.low:.3f}, {area.high:.3f}]",
            clip_on=False,
        )
        if found.detected is not None:
            _cross(axes, found.false_rejection, found.detected, colour, MARKERS[index % 7])
    _style(axes)
    axes.set_xlim(0, 1)
    axes.set_aspect("equal")
    axes.set_xlabel("clean inputs rejected", fontsize=11)
    axes.set_ylabel("adversarial inputs rejected", fontsize=11)
    figure.legend(loc="outside upper center", fontsize=10.5, frameon=False)
    note = "Marker: the threshold in use. Bars and brackets: 95 % confidence intervals."
    figure.supxlabel(note, fontsize=9, color="0.35")
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
        marker = MARKERS[index % len(MARKERS)]
        colour = COLOURS[index % len(COLOURS)]
        _band(axes, curve.alphas, curve.robustness, colour, name, marker=marker)
    _style(axes)
    axes.set_xlim(0, 1)
    axes.set_xlabel(r"$\alpha$: to reject within $\alpha\,\epsilon$ is an error", fontsize=11)
    axes.set_ylabel(rf"robustness at $\epsilon$ = {eps:g} ({_norm_name(norm)})", fontsize=11)
    axes.legend(loc="upper right", fontsize=11, frameon=False)
    note = (
        r"Share neither accepted and wrong within $\epsilon$ nor rejected "
        "within $\\alpha\\,\\epsilon$.\nBand: 95 % confidence interval."
    )
    figure.supxlabel(note, fontsize=9, color="0.35")
    _save(figure, path)


def _draw_sweep(
    axes: Axes, sweep: ThresholdSweep, sizes: Sequence[float], over_threshold: bool
) -> None:
    x = [rate.value for rate in sweep.false_rejection_rate]
    if over_threshold:
        x = sweep.thresholds
    again = sweep.reattacked_accuracy
    _band(axes, x, sweep.clean_accuracy, "black", "", linestyle=":", band=False)
    for row, eps in enumerate(sweep.eps):
        index = sizes.index(eps)
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        options = {"marker": marker, "band": again is None, "hollow": again is not None}
        _band(axes, x, sweep.accuracy[row], colour, "", **options)
        if again is not None:
            _band(axes, x, again[row], colour, "", linestyle="--", marker=marker)


def _band(
    axes: Axes,
    x: Sequence[float],
    estimates: Sequence[Estimate],
    colour: str,
    label: str,
    *,
    band: bool = True,
    linestyle: str = "-",
    marker: str = "",
    hollow: bool = False,
) -> None:
    if band:
        low, high = [e.low for e in estimates], [e.high for e in estimates]
        axes.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
    axes.plot(
        x,
        [estimate.value for estimate in estimates],
        color=colour,
        linestyle=linestyle,
        marker=marker,
        markersize=5.5,
        markeredgecolor=colour if hollow else "white",
        markerfacecolor="white" if hollow else colour,
        linewidth=1.7,
        label=label,
        clip_on=False,  # a marker at 0 or 1 stays whole
        zorder=3,
    )


def _cross(axes: Axes, x: Estimate, y: Estimate, colour: str, marker: str) -> None:
    """Draw a point with its intervals in both directions."""
    axes.errorbar(
        [x.value],
        [y.value],
        xerr=[[x.value - x.low], [x.high - x.value]],
        yerr=[[y.value - y.low], [y.high - y.value]],
        color=colour,
        marker=marker,
        markersize=8,
        markeredgecolor="white",
        elinewidth=1.1,
        zorder=4,
        clip_on=False,
    )


def _sweep_legend(
    figure: Figure,
    sweeps: Mapping[str, ThresholdSweep],
    sizes: Sequence[float],
    marked: float | None,
) -> None:
    def line(label: str, **options: object) -> Line2D:
        return Line2D([], [], **{"linewidth": 1.7, "label": label} | options)

    again = any(sweep.reattacked_accuracy is not None for sweep in sweeps.values())
    handles = [
        line(
            rf"$\epsilon$ = {eps:g}",
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            linestyle="none" if again else "-",
        )
        for index, eps in enumerate(sizes)
    ]
    handles.append(line("no attack", color="black", linestyle=":"))
    if again:
        handles.append(line("fixed points", color="0.35", marker="o", markerfacecolor="white"))
        handles.append(line("attacked again", color="0.35", marker="o", linestyle="--"))
    columns = min(len(handles), 3 * len(sweeps))
    figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=columns,
        fontsize=10.5,
        frameon=False,
        handlelength=2.6,
    )
    note = f"{_norm_name(next(iter(sweeps.values())).norm)}. Band: "
    several = any(sweep.settings.get("runs", 1) > 1 for sweep in sweeps.values())
    note += "standard deviation over the runs" if several else "95 % confidence interval"
    note += " when attacked again." if again else "."
    if marked is not None:
        note += f" Vertical line: {100 * marked:g} %."
    figure.supxlabel(note, fontsize=9, color="0.35")
