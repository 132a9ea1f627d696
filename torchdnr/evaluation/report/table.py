"""The results of several classifiers side by side: a table to read, a JSON file to keep."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchdnr.evaluation.curve import Predictions, SecurityCurve, read_json, write_json

WORST_CASE = "worst case"
EXPLANATION = """\
accuracy: eps = 0 (no attack): share given its true class, to reject is an error.
          eps > 0 (attacked): share given its true class or rejected; the rest evades.
reject:   share rejected. To evade is to be accepted and wrong. "worst case": per sample, the most
          harmful of all attacks at this and the smaller eps."""


def format_table(curves: Mapping[str, SecurityCurve]) -> str:
    """Format the results as plain text: accuracy and rejection rate in percent.

    Args:
        curves: Classifier name to its curve.

    Returns:
        Table with a row per eps and classifier and a pair of columns per attack and worst case,
        a note on how to read it, and what to be careful about.

    Raises:
        ValueError: If there is no curve.
    """
    if not curves:
        raise ValueError("curves is empty: give at least one security curve")
    attacks = list(dict.fromkeys(name for curve in curves.values() for name in curve.attacks))
    first = max(len("classifier"), *map(len, curves))
    columns = [(name, max(16, len(name))) for name in [*attacks, WORST_CASE]]
    lines = [
        " | ".join([f"{'':>6}  {'':<{first}}", *(f"{name:^{width}}" for name, width in columns)]),
        " | ".join(
            [
                f"{'eps':>6}  {'classifier':<{first}}",
                *(f"{'accuracy  reject':>{width}}" for _, width in columns),
            ]
        ),
    ]
    lines.append("-" * len(lines[-1]))
    for eps in sorted({value for curve in curves.values() for value in curve.eps}):
        for name, curve in curves.items():
            if eps in curve.eps:
                cells = [
                    _format_cell(curve.attacks.get(attack), curve, eps, width)
                    for attack, width in columns[:-1]
                ]
                cells.append(_format_cell(curve, curve, eps, columns[-1][1]))
                lines.append(" | ".join([f"{eps:>6g}  {name:<{first}}", *cells]))
        lines.append("")
    return "\n".join([*(line.rstrip() for line in lines), EXPLANATION, "", *_remarks(curves)])


def save_results(
    path: str | Path,
    curves: Mapping[str, SecurityCurve],
    settings: Mapping[str, Any] | None = None,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Write the curves of all classifiers to one JSON file, atomically.

    Args:
        path: File to write.
        curves: Classifier name to its curve.
        settings: What else the numbers depend on: data set, seed, layers, thresholds, ...
        more: Further results by name, other than "settings" and "curves": checks, measures, ...
    """
    content = {name: curve.to_dict() for name, curve in curves.items()}
    write_json(path, {"settings": dict(settings or {}), **(more or {}), "curves": content})


def load_results(path: str | Path) -> tuple[dict[str, SecurityCurve], dict[str, Any]]:
    """Read what ``save_results`` wrote.

    Returns:
        Curves by classifier name, and the settings.

    Raises:
        ValueError: If the file does not hold results.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("curves"), dict):
        raise ValueError(f"{path} does not hold results: expected an object with curves")
    curves = content["curves"].items()
    return {name: SecurityCurve.from_dict(curve) for name, curve in curves}, content["settings"]


def _format_cell(
    predictions: Predictions | None, curve: SecurityCurve, eps: float, width: int
) -> str:
    if predictions is None:
        return f"{'-':>{width}}"
    index = curve.eps.index(eps)
    reject = f"{100 * predictions.rejection_rate[index]:.1f}" if curve.rejects else "-"
    return f"{f'{100 * predictions.accuracy[index]:8.1f}  {reject:>6}':>{width}}"


def _remarks(curves: Mapping[str, SecurityCurve]) -> list[str]:
    """List sample counts, evasion norms, and what makes the numbers doubtful."""
    lines = []
    for name, curve in curves.items():
        median = curve.median_evasion_norm
        evasion = f"{median:.3g}" if math.isfinite(median) else "not reached"
        half = max((high - low) / 2 for low, high in curve.accuracy_interval)
        lines.append(
            f"{name}: {len(curve.labels)} samples, accuracy +- {100 * half:.1f} at most (95 %), "
            f"median evasion norm {evasion}, {curve.seconds:.0f} s of attacks."
        )
        if curve.eps[-1] > 0 and curve.accuracy[-1] > 0:
            left = f"{100 * curve.accuracy[-1]:.1f} % is left at eps = {curve.eps[-1]:g}"
            lines.append(
                f"  Note: {left}. Every defence has to fail at some eps: "
                "try a larger one, or stronger attacks."
            )
        if missing := curve.settings.get("left_out"):
            names = ", ".join(missing)
            lines.append(f"  Note: left out, as the model lacks what they need: {names}.")
        for attack, alone in curve.attacks.items():
            if sum(alone.violations):
                lines.append(
                    f"  WARNING: {attack} left the ball or the box {sum(alone.violations)} times; "
                    "these points were projected back."
                )
    return lines
