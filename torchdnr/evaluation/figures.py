"""Figures: curves of all kinds, and adversarial examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from torchdnr.decisions import REJECT
from torchdnr.evaluation.line_up import LINE_SEARCH_PGD
from torchdnr.evaluation.metrics import Estimate
from torchdnr.files import atomic_path
from torchdnr.resources import in_float64

if TYPE_CHECKING:  # a curve can draw itself
    from torchdnr.evaluation.curve import Predictions, SecurityCurve
    from torchdnr.evaluation.detection import Detection
    from torchdnr.evaluation.risk_coverage import RiskCoverage
    from torchdnr.evaluation.stratified import StratifiedCurve
    from torchdnr.evaluation.threshold_sweep import ThresholdSweep

# Okabe and Ito's colours, which colour-blind readers can tell apart; markers for print in grey
COLOURS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"
MARKERS = "osD^vP*"
OPERATING_POINT = 0.10  # false rejection rate at which the paper's experiments are run
WIDE = 20  # ratio of the largest to the smallest eps above which the axis is logarithmic


def plot_curves(
    curves: Mapping[str, SecurityCurve | Sequence[SecurityCurve]],
    path: str | Path,
    *,
    attack: str = LINE_SEARCH_PGD,
) -> None:
    """Draw accuracy under attack and rejection rate over eps, one line per classifier.

    Left the worst case over the line-up, right one attack alone; below the accuracy the rejection
    rate of the classifiers that reject. The band is the 95 % confidence interval of one run, or,
    for repeated runs over the same eps, mean and standard deviation.

    Args:
        curves: Classifier name to its curve, or to the curves of repeated runs.
        path: Image file, of a type that its suffix names; replaced atomically.
        attack: Attack of the right column, left out if no classifier has it.

    Raises:
        ValueError: If there is no curve, or the runs of a classifier differ in eps.

    Source: Sotgiu et al., Fig. 3.
    """
    runs = {
        name: list(curve) if isinstance(curve, Sequence) else [curve]
        for name, curve in curves.items()
    }
    if not runs or not all(runs.values()):
        raise ValueError("curves is empty: give at least one security curve")
    for name, group in runs.items():
        if any(run.eps != group[0].eps for run in group):
            raise ValueError(f"the runs of {name} must be over the same eps")
    alone = {
        name: [run.attacks[attack] for run in group]
        for name, group in runs.items()
        if all(attack in run.attacks for run in group)
    }
    columns: dict[str, Mapping[str, Sequence[Predictions]]] = {"Worst case over all attacks": runs}
    if alone:
        columns[f"{attack[0].upper()}{attack[1:]} alone"] = alone
    rejecting = [name for name, group in runs.items() if group[0].rejects]
    rows = {"accuracy": "accuracy under attack"}
    rows |= {"rejection": "rejection rate"} if rejecting else {}

    figure = Figure(figsize=(1.0 + 4.6 * len(columns), 0.9 + 2.7 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(columns), squeeze=False, sharex=True, sharey=True)
    norm = next(iter(runs.values()))[0].norm
    for axes_column, (title, lines) in zip(grid.T, columns.items(), strict=True):
        axes_column[0].set_title(title, fontsize=12, pad=10)
        for axes, rate in zip(axes_column, rows, strict=True):
            for index, name in enumerate(runs):
                if name in lines and (rate == "accuracy" or name in rejecting):
                    averaged = _averaged(lines[name], rate)
                    _draw_estimates(axes, lines[name][0].eps, averaged, index, name)
            _style(axes)
        label = rf"perturbation size $\epsilon$ ({_norm_name(norm)})"
        axes_column[-1].set_xlabel(label, fontsize=11)
    _scale_eps(grid[0, 0], {eps for group in runs.values() for run in group for eps in run.eps})
    for axes, label in zip(grid[:, 0], rows.values(), strict=True):
        axes.set_ylabel(label, fontsize=11)
    handles = grid[0, 0].get_legend_handles_labels()[0]
    _legend(figure, handles, min(len(handles), 3 * len(columns)))
    note = r"$\epsilon = 0$: a reject counts as an error; $\epsilon > 0$: as correct. Band: "
    counts = {len(group) for group in runs.values()}
    bands = ["95 % confidence interval"] * (1 in counts)
    bands += ["standard deviation over the runs"] * (max(counts) > 1)
    _footnote(figure, note + " or ".join(bands) + ".")
    _save(figure, path)


def plot_examples(
    path: str | Path,
    inputs: Tensor,
    labels: Tensor,
    adversarials: Mapping[str, Tensor],
    predictions: Mapping[str, Tensor],
    eps: float,
    class_names: Sequence[str] | None = None,
    *,
    norm: float = 2,
) -> None:
    """Draw images, and per classifier the magnified perturbation and the decision on the result.

    A perturbation is stretched so that its largest entry, which is printed, has full contrast; on
    grey images purple means brighter and orange darker.

    Args:
        path: Image file, of a type that its suffix names; replaced atomically.
        inputs: Source images in [0, 1], ``(n, 1, H, W)`` or ``(n, 3, H, W)``; a row each, so few.
        labels: True labels, ``(n,)``.
        adversarials: Classifier name to its adversarial images, each like ``inputs``.
        predictions: Classifier name to its labels of these, or ``REJECT``, ``(n,)``.
        eps: Perturbation size, for the title.
        class_names: Names of the classes; None: their numbers.
        norm: Norm in which the perturbations are measured.

    Raises:
        ValueError: If the images are neither grey nor RGB, or the shapes do not fit together.

    Source: Sotgiu et al., Figs. 5 and 6.
    """
    if inputs.ndim != 4 or inputs.shape[1] not in (1, 3) or len(inputs) == 0:
        raise ValueError(
            f"inputs must be (n, 1, H, W) or (n, 3, H, W) with n >= 1, got {tuple(inputs.shape)}"
        )
    for name, images in adversarials.items():
        if images.shape != inputs.shape or predictions[name].shape != labels.shape:
            raise ValueError(
                f"the adversarial images of {name} must be {tuple(inputs.shape)} with predictions "
                f"(n,), got {tuple(images.shape)} and {tuple(predictions[name].shape)}"
            )

    def name_of(label: int) -> str:
        return "rejected" if label == REJECT else class_names[label] if class_names else str(label)

    n, pairs = len(inputs), len(adversarials)
    figure = Figure(figsize=(1.75 * (1 + 2 * pairs), 0.75 + 2.0 * n), layout="constrained")
    parts = figure.subfigures(
        1, 1 + pairs, width_ratios=[1.0] + [2.0] * pairs, squeeze=False, wspace=0.02
    )[0]
    parts[0].suptitle("source", fontsize=12)
    for row, axes in enumerate(parts[0].subplots(n, 1, squeeze=False)[:, 0]):
        _show(axes, inputs[row], f"true: {name_of(int(labels[row]))}")
    for part, (name, images) in zip(parts[1:], adversarials.items(), strict=True):
        part.suptitle(name, fontsize=12)
        for row, (left, right) in enumerate(part.subplots(n, 2, squeeze=False)):
            change = in_float64(images[row] - inputs[row]).cpu()
            size = torch.linalg.vector_norm(change.flatten(), norm).item()
            largest = change.abs().max().item()
            stretched = 0.5 + change / (2 * largest) if largest > 0 else 0.5 + change
            title = rf"$\|\delta\|$ = {size:.2f}, largest {largest:.2g}"
            _show(left, stretched, title, cmap="PuOr")
            predicted = int(predictions[name][row])
            right_or_rejected = predicted in (REJECT, int(labels[row]))
            colour = "#0072B2" if right_or_rejected else "#D55E00"
            verdict = name_of(predicted) if predicted == REJECT else f"as {name_of(predicted)}"
            _show(right, images[row], verdict, colour=colour)
    title = rf"Adversarial examples, $\epsilon$ = {eps:g} ({_norm_name(norm)})"
    figure.suptitle(title, fontsize=12)
    _save(figure, path)


def plot_explanations(
    path: str | Path,
    images: Tensor,
    titles: Sequence[str],
    examples: Mapping[str, Sequence[tuple[Sequence[int], Sequence[int]]]],
    training_images: Tensor,
    training_labels: Tensor,
    class_names: Sequence[str] | None = None,
) -> None:
    """Draw images, and by SVM the training images that support and oppose each decision most.

    Args:
        path: Image file, of a type that its suffix names; replaced atomically.
        images: ``(n, 1, H, W)`` or ``(n, 3, H, W)`` in [0, 1]; a row each, so few.
        titles: What was decided on each.
        examples: SVM to supporting and opposing training images of each row, see
            ``Influence.strongest``.
        training_images: What the SVMs were fitted on, ``(m, ...)``.
        training_labels: ``(m,)``.
        class_names: Names of the classes; None: their numbers.

    Raises:
        ValueError: If there is no image.
    """
    if len(images) == 0:
        raise ValueError("images is empty: give at least one")
    most = max(len(side) for rows in examples.values() for row in rows for side in row)
    width = 2 * most * len(examples)
    figure = Figure(figsize=(1.6 + 0.85 * width, 0.8 + 1.25 * len(images)), layout="constrained")
    ratios = [1.6] + [0.85 * most] * 2 * len(examples)
    parts = figure.subfigures(1, 1 + 2 * len(examples), width_ratios=ratios, squeeze=False)[0]
    parts[0].suptitle("decided", fontsize=10)
    for row, axes in enumerate(parts[0].subplots(len(images), 1, squeeze=False)[:, 0]):
        _show(axes, images[row], titles[row])
    for place, (name, rows) in enumerate(examples.items()):
        for side, word in enumerate(("for", "against")):
            part = parts[1 + 2 * place + side]
            part.suptitle(f"{name}: {word}", fontsize=10)
            part.set_facecolor("0.96" if place % 2 else "white")
            for row, line in enumerate(part.subplots(len(images), most, squeeze=False)):
                chosen = rows[row][side]
                for axes, index in zip(line, chosen, strict=False):
                    k = int(training_labels[index])
                    _show(axes, training_images[index], class_names[k] if class_names else str(k))
                for axes in line[len(chosen) :]:
                    axes.set_axis_off()
    _save(figure, path)


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
        _style(axes, label)
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
    _style(axes, "clean inputs rejected", "adversarial inputs rejected")
    axes.set_xlim(0, 1)
    axes.set_aspect("equal")
    _legend(figure, axes.get_legend_handles_labels()[0])
    _footnote(figure, "Marker: the threshold in use. Bars and brackets: 95 % confidence intervals.")
    _save(figure, path)


def plot_risk_coverage(curves: Mapping[str, RiskCoverage], path: str | Path) -> None:
    """Draw the error among accepted inputs over the share accepted; a marker stands at each theta.

    Args:
        curves: Classifier name to its curve.
        path: Image file, of a type that its suffix names; replaced atomically.

    Raises:
        ValueError: If there is no curve.

    Source: Geifman and El-Yaniv, "Selective classification for deep neural networks" (2017).
    """
    if not curves:
        raise ValueError("curves is empty: give at least one")
    figure = Figure(figsize=(6.2, 4.6), layout="constrained")
    axes = figure.subplots()
    for index, (name, curve) in enumerate(curves.items()):
        colour, label = COLOURS[index % len(COLOURS)], f"{name}: AURC {curve.aurc:.2g}"
        x, y = curve.coverage.tolist(), curve.risk.tolist()
        axes.plot(x, y, color=colour, linewidth=1.8, label=label)
        accepted, error = curve.accepted, curve.error
        if accepted is not None and error is not None and error.n:
            x = [accepted.value, accepted.value]
            axes.plot(x, [error.low, error.high], color=colour, linewidth=1.1)
            _draw_estimates(axes, x[:1], [error], index, band=False)
    top = max(curve.risk.max().item() for curve in curves.values())
    _style(axes, "share accepted (clean inputs)", "wrong of the accepted")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, min(1, 1.1 * top + 0.01))
    axes.legend(loc="upper left", fontsize=11, frameon=False)
    _footnote(figure, "Marker: the threshold in use, with its 95 % confidence interval.")
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
        _draw_estimates(axes, curve.alphas, curve.robustness, index, name)
    x = r"$\alpha$: to reject within $\alpha\,\epsilon$ is an error"
    _style(axes, x, rf"robustness at $\epsilon$ = {eps:g} ({_norm_name(norm)})")
    axes.set_xlim(0, 1)
    axes.legend(loc="upper right", fontsize=11, frameon=False)
    note = (
        r"Share neither accepted and wrong within $\epsilon$ nor rejected "
        "within $\\alpha\\,\\epsilon$.\nBand: 95 % confidence interval."
    )
    _footnote(figure, note)
    _save(figure, path)


def _averaged(runs: Sequence[Predictions], rate: str) -> list[Estimate]:
    """Return a rate of one run at each eps, or mean and standard deviation over repeated runs."""
    estimates = [[getattr(rates, rate) for rates in run.estimates()] for run in runs]
    if len(runs) == 1:
        return estimates[0]
    values = torch.tensor([[e.value for e in run] for run in estimates], dtype=torch.float64)
    mean, deviation = values.mean(dim=0), values.std(dim=0)
    ends = (mean - deviation).clamp(0, 1), (mean + deviation).clamp(0, 1)
    columns = torch.stack([mean, *ends], dim=1).tolist()
    return [Estimate(middle, low, high, len(runs)) for middle, low, high in columns]


def _draw_estimates(
    axes: Axes,
    x: Sequence[float],
    estimates: Sequence[Estimate],
    index: int | None,
    label: str = "",
    *,
    band: bool = True,
    linestyle: str = "-",
    hollow: bool = False,
) -> None:
    """Draw values as a line with markers, and their intervals as a band.

    ``index`` numbers the colour and the marker; None: black, without markers.
    """
    colour = "black" if index is None else COLOURS[index % len(COLOURS)]
    if band:
        low, high = [e.low for e in estimates], [e.high for e in estimates]
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.plot(
        x,
        [e.value for e in estimates],
        color=colour,
        linestyle=linestyle,
        marker="" if index is None else MARKERS[index % len(MARKERS)],
        markersize=6,
        markeredgecolor=colour if hollow else "white",
        markerfacecolor="white" if hollow else colour,
        linewidth=1.8,
        label=label,
        clip_on=False,  # a marker at 0 or 1 stays whole
        zorder=3,
    )


def _draw_sweep(
    axes: Axes, x: Sequence[float], sweep: ThresholdSweep, sizes: Sequence[float]
) -> None:
    again = sweep.reattacked_accuracy
    _draw_estimates(axes, x, sweep.clean_accuracy, None, linestyle=":", band=False)
    for row, eps in enumerate(sweep.eps):
        index, fixed = sizes.index(eps), sweep.accuracy[row]
        _draw_estimates(axes, x, fixed, index, band=again is None, hollow=again is not None)
        if again is not None:
            _draw_estimates(axes, x, again[row], index, linestyle="--")


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


def _legend(figure: Figure, handles: Sequence[Artist], columns: int = 1) -> None:
    figure.legend(
        handles=handles, loc="outside upper center", ncols=columns, fontsize=11, frameon=False
    )


def _footnote(figure: Figure, text: str) -> None:
    figure.supxlabel(text, fontsize=9, color="0.35")


def _style(axes: Axes, x: str = "", y: str = "") -> None:
    axes.set_xlabel(x, fontsize=11)
    axes.set_ylabel(y, fontsize=11)
    axes.set_ylim(0, 1)
    axes.grid(color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=10)


def _scale_eps(axes: Axes, eps: set[float]) -> None:
    values = sorted(eps)
    positive = [value for value in values if value > 0]
    if positive and positive[-1] > WIDE * positive[0]:
        axes.set_xscale("symlog", linthresh=positive[0], linscale=0.5)
        axes.set_xlim(values[0] - 0.2 * positive[0], 1.15 * positive[-1])
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.minorticks_off()


def _norm_name(norm: float) -> str:
    return r"$\ell_\infty$ norm" if norm == float("inf") else rf"$\ell_{{{norm:g}}}$ norm"


def _show(axes: Axes, image: Tensor, title: str, cmap: str = "gray", colour: str = "black") -> None:
    pixels: Any = image.detach().cpu().clamp(0, 1).permute(1, 2, 0).numpy()
    axes.imshow(
        pixels.squeeze(-1) if len(image) == 1 else pixels,
        cmap=cmap,
        vmin=0,
        vmax=1,
        interpolation="nearest",
    )
    axes.set_title(title, fontsize=9, color=colour, pad=3)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_edgecolor("0.7")


def _save(figure: Figure, path: str | Path) -> None:
    FigureCanvasAgg(figure)  # no window, whatever backend the caller has chosen
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix.lstrip(".") or "png", dpi=150)
