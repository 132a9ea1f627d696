"""Figure: decision regions, reject region and objective of a classifier of the plane, attacked."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Polygon, Rectangle
from torch import Tensor

from torchdnr.attacks.objectives import find_objective
from torchdnr.decisions import REJECT, has_reject_column, predict_labels, split_scores
from torchdnr.files import atomic_path

PALE = "#9ecae1", "#fdae6b", "#a1d99b", "#d4b9da", "#fdd0a2", "#c6dbef"
DARK = "#08519c", "#a63603", "#006d2c", "#762a83", "#8c6d31", "#2171b5"
SIDE = 300  # points of the grid along each axis


def plot_plane(
    path: str | Path,
    model: Callable[[Tensor], Tensor],
    samples: Tensor,
    labels: Tensor,
    source: Tensor,
    source_label: int,
    adversarial: Mapping[str, Tensor],
    eps: float,
    *,
    paths: Mapping[str, Tensor] | None = None,
    norm: float = 2,
    objective: str = "paper",
    bounds: tuple[float, float] = (0.0, 1.0),
    reject: bool | None = None,
) -> None:
    """Draw the decision regions on the left, and the objective of an attack on the right.

    Args:
        path: Image file, of a type that its suffix names; replaced atomically.
        model: Maps points of the plane ``(n, 2)`` to scores, with theta last if it rejects.
        samples: Training samples, ``(m, 2)``.
        labels: Their classes, ``(m,)``.
        source: The attacked sample, ``(2,)``.
        source_label: Its true class.
        adversarial: Name of an attack to the point that it found, ``(2,)``.
        eps: Radius of the ball around the source.
        paths: Name of a path to the points that an attack went through, ``(k, 2)``.
        norm: Norm of the ball; 1, 2 or infinity.
        objective: Name in ``OBJECTIVES``.
        bounds: Smallest and largest value of a coordinate.
        reject: Whether the last column is theta; None: ask ``model.reject_index``.

    Raises:
        ValueError: If the samples are not points of the plane.

    Source: Sotgiu et al., Fig. 2.
    """
    if samples.ndim != 2 or samples.shape[1] != 2 or source.shape != (2,):
        raise ValueError(
            f"samples must be (m, 2) and source (2,), got {tuple(samples.shape)} and "
            f"{tuple(source.shape)}: the plane has two coordinates"
        )
    reject = has_reject_column(model, reject)
    axis = torch.linspace(*bounds, SIDE, dtype=samples.dtype, device=samples.device)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        output = model(grid)
    regions = predict_labels(output, reject)
    truth = torch.full((len(grid),), source_label, device=grid.device)
    values = find_objective(objective)(*split_scores(output, reject), truth)

    figure = Figure(figsize=(10.4, 5.1), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    classes = output.shape[1] - reject
    _draw_regions(left, regions, bounds, classes)
    _draw_samples(left, samples, labels)
    left.set_title("decision regions (white: rejected)", fontsize=11)
    image = right.imshow(
        _picture(values), origin="lower", extent=(*bounds, *bounds), cmap="viridis", aspect="equal"
    )
    right.contour(
        *(axis.cpu().numpy(),) * 2,
        _picture((regions != REJECT).to(values)),
        levels=[0.5],
        colors="white",
        linewidths=1,
        linestyles="dashed",
    )
    right.set_title(f"objective ({objective}); dashed: edge of the reject region", fontsize=11)
    figure.colorbar(image, ax=right, shrink=0.8)
    for axes in (left, right):
        _draw_ball(axes, source, eps, norm)
        for name, points in (paths or {}).items():
            axes.plot(*points.cpu().T, ".-", color="black", linewidth=1.5, markersize=7, label=name)
        _draw_attack(axes, source, adversarial)
        axes.set_xlim(*bounds)
        axes.set_ylim(*bounds)
    handles, names = left.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=10, frameon=False)
    FigureCanvasAgg(figure)  # no window, whatever backend the caller has chosen
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix.lstrip(".") or "png", dpi=130)


def _picture(values: Tensor) -> "object":
    """Turn values of the grid into rows from bottom to top, as imshow and contour want them."""
    return values.reshape(SIDE, SIDE).T.cpu().numpy()


def _draw_regions(axes: Axes, regions: Tensor, bounds: tuple[float, float], classes: int) -> None:
    colours = ListedColormap(["white", *(PALE[k % len(PALE)] for k in range(classes))])
    axes.imshow(
        _picture(regions),
        origin="lower",
        extent=(*bounds, *bounds),
        cmap=colours,
        vmin=REJECT - 0.5,
        vmax=classes - 0.5,
        interpolation="nearest",
        aspect="equal",
    )


def _draw_samples(axes: Axes, samples: Tensor, labels: Tensor) -> None:
    for label in labels.unique().tolist():
        x, y = samples[labels == label].cpu().T
        colour = DARK[label % len(DARK)]
        axes.scatter(x, y, s=12, color=colour, label=f"class {label}", linewidths=0)


def _draw_ball(axes: Axes, source: Tensor, eps: float, norm: float) -> None:
    x, y = source.tolist()
    line = {"fill": False, "edgecolor": "black", "linewidth": 1.3}
    if norm == 2:
        ball = Circle((x, y), eps, **line)
    elif norm == math.inf:
        ball = Rectangle((x - eps, y - eps), 2 * eps, 2 * eps, **line)
    else:
        ball = Polygon([(x - eps, y), (x, y + eps), (x + eps, y), (x, y - eps)], **line)
    axes.add_patch(ball)


def _draw_attack(axes: Axes, source: Tensor, adversarial: Mapping[str, Tensor]) -> None:
    x, y = source.tolist()
    axes.plot(x, y, "H", color="#e31a1c", markersize=11, markeredgecolor="white", label="source")
    for (name, point), marker in zip(adversarial.items(), "*Pv^sd", strict=False):
        axes.plot(
            *point.tolist(),
            marker,
            markersize=19 if marker == "*" else 9,
            markeredgecolor="black",
            linestyle="none",
            label=name,
        )
