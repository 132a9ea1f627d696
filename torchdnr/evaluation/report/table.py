"""The results of classifiers side by side: rows, a table to read, JSON and CSV files."""

import csv
import io
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torchdnr.evaluation.curve import AttackCurve, Predictions, Refinement, SecurityCurve
from torchdnr.evaluation.metrics import DecisionRates, to_plain
from torchdnr.files import atomic_write_bytes, read_json, write_json

WORST_CASE = "worst case"
ROUNDED = "8-bit images"
COSTS = "seconds", "forwards", "backwards"
EXPLANATION = """\
accuracy: eps = 0 (no attack): share given its true class, to reject is an error.
          eps > 0 (attacked): share given its true class or rejected; the rest evades.
reject:   share rejected. To evade is to be accepted and wrong. "worst case": per sample, the most
          harmful of all attacks at this and the smaller eps.
8-bit:    the same points rounded to k / 255, which is what an image file keeps of them."""


COLUMNS = (
    *("classifier", "attack", "norm", "eps", "samples"),
    *("accuracy", "accuracy_low", "accuracy_high"),
    *("rejection_rate", "rejection_low", "rejection_high"),
    *("evasion_rate", "evasion_low", "evasion_high"),
    *("mean_norm", *COSTS),
)


def attack_rates(
    curves: Mapping[str, SecurityCurve], *, confidence: float = 0.95
) -> list[dict[str, Any]]:
    """Tabulate every rate, per classifier, attack and eps.

    Args:
        curves: Classifier name to its curve.
        confidence: Coverage of the intervals, in (0, 1).

    Returns:
        Rows with the classifier, the attack (None: the worst case over all; ``ROUNDED``: its points
        rounded to 8 bits), eps, and a dictionary with value, low, high and n for each of
        ``DecisionRates``.
    """
    rows: list[dict[str, Any]] = []
    for name, curve in curves.items():
        for attack, alone in each_line(curve):
            of_attack = None if alone is curve else attack
            for eps, rates in zip(alone.eps, alone.estimates(confidence), strict=True):
                row = {"classifier": name, "attack": of_attack, "eps": eps}
                rows.append(row | to_plain(rates))
    return rows


def attack_costs(curves: Mapping[str, SecurityCurve]) -> list[dict[str, Any]]:
    """Tabulate what each attack cost over all eps, and what it reached.

    Args:
        curves: Classifier name to its curve.

    Returns:
        Rows with the classifier, the attack, its number of samples, seconds, forwards and backwards
        in total and per sample, and points that left their constraints. Of an attack that serves
        every eps also the number of positive eps, and ``evasion`` at the largest: the share
        accepted and wrong, with its interval. Of the others how many samples they ``tried`` below
        the norms found, and on how many they came ``nearer``.
    """
    rows = []
    for name, curve in curves.items():
        samples = len(curve.labels)
        for attack, alone in (curve.attacks | curve.refinements).items():
            spent, violations = total_costs(alone)
            row = {"classifier": name, "attack": attack, "samples": samples, **spent}
            row |= {f"{key}_per_sample": value / samples for key, value in spent.items()}
            row["violations"] = violations
            if isinstance(alone, Refinement):
                row |= {"tried": alone.tried, "nearer": alone.nearer}
            else:
                row["positive_eps"] = sum(eps > 0 for eps in alone.eps)
                row["largest_eps"] = alone.eps[-1]
                row["evasion"] = alone.estimates()[-1].evasion.to_dict()
            rows.append(row)
    return rows


def total_costs(attack: AttackCurve | Refinement) -> tuple[dict[str, float], int]:
    """Return what an attack cost over all eps, and how many points left their constraints."""
    if isinstance(attack, Refinement):
        return {key: getattr(attack, key) for key in COSTS}, attack.violations
    return {key: sum(getattr(attack, key)) for key in COSTS}, sum(attack.violations)


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
    rounded = [ROUNDED] * any(curve.rounded is not None for curve in curves.values())
    columns = [(name, max(16, len(name))) for name in [*attacks, WORST_CASE, *rounded]]
    names = [f"{name:^{width}}" for name, width in columns]
    rates_of = [f"{'accuracy  reject':>{width}}" for _, width in columns]
    lines = [
        " | ".join([f"{'':>6}  {'':<{first}}", *names]),
        " | ".join([f"{'eps':>6}  {'classifier':<{first}}", *rates_of]),
    ]
    lines.append("-" * len(lines[-1]))
    rates = {
        (name, attack): dict(zip(alone.eps, alone.estimates(), strict=True))
        for name, curve in curves.items()
        for attack, alone in each_line(curve)
    }
    for eps in sorted({value for curve in curves.values() for value in curve.eps}):
        for name, curve in curves.items():
            if eps in curve.eps:
                cells = [
                    _cell(rates.get((name, attack), {}).get(eps), curve.rejects, width)
                    for attack, width in columns
                ]
                lines.append(" | ".join([f"{eps:>6g}  {name:<{first}}", *cells]))
        lines.append("")
    return "\n".join([*(line.rstrip() for line in lines), EXPLANATION, "", *_remarks(curves)])


def each_line(curve: SecurityCurve) -> list[tuple[str, Predictions]]:
    """List each attack alone, then the worst case, and what rounding to 8 bits leaves of that."""
    lines = [*curve.attacks.items(), (WORST_CASE, curve)]
    return lines if curve.rounded is None else [*lines, (ROUNDED, curve.rounded)]


def _cell(rates: DecisionRates | None, rejects: bool, width: int) -> str:
    if rates is None:
        return f"{'-':>{width}}"
    reject = f"{100 * rates.rejection.value:.1f}" if rejects else "-"
    return f"{f'{100 * rates.accuracy.value:8.1f}  {reject:>6}':>{width}}"


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
        if curve.targets is not None:
            reached = ", ".join(
                f"{100 * rate:.1f} % at eps = {eps:g}"
                for eps, rate in zip(curve.eps, curve.evasion_rate, strict=True)
            )
            lines.append(f"  Note: the attacks wanted one class each, accepted as it: {reached}.")
        if curve.settings.get("masked"):
            lines.append("  Note: the attacks could change only what a mask lets them.")
        if missing := curve.settings.get("left_out"):
            names = ", ".join(missing)
            lines.append(f"  Note: left out, as the model lacks what they need: {names}.")
        for attack, added in curve.refinements.items():
            lines.append(f"  {attack}: {refinement_text(added)}.")
        for attack, alone in (curve.attacks | curve.refinements).items():
            if violations := total_costs(alone)[1]:
                lines.append(
                    f"  WARNING: {attack} left the ball or the box {violations} times; "
                    "these points were projected back."
                )
    return lines


def refinement_text(added: Refinement) -> str:
    """Say what an attack added below the norms that the others had found."""
    return (
        f"nearer on {added.nearer} of the {added.tried} samples tried below the norms found "
        f"({added.seconds:.0f} s, {added.forwards:,} forwards, {added.backwards:,} backwards)"
    )


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


def save_csv(path: str | Path, curves: Mapping[str, SecurityCurve]) -> None:
    """Write a row per classifier, attack and eps, and for the worst case over the attacks.

    Rates are shares in [0, 1], low and high the ends of their 95 % confidence intervals. The cost
    of a minimum-norm attack is in the row of its first positive eps; the worst case has the sum,
    there that of the attacks below the norms found too.

    Args:
        path: File to write, atomically.
        curves: Classifier name to its curve.

    Raises:
        OSError: If the file cannot be written.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for name, curve in curves.items():
        for attack, alone in each_line(curve):
            writer.writerows(_rows(name, attack, alone, curve))
    atomic_write_bytes(path, text.getvalue().encode())


def _rows(
    classifier: str, attack: str, alone: Predictions, curve: SecurityCurve
) -> Iterator[dict[str, Any]]:
    attacks = [curve.attacks[attack]] if attack in curve.attacks else [*curve.attacks.values()]
    more = [] if attack in curve.attacks else [*curve.refinements.values()]
    first = next((eps for eps in alone.eps if eps > 0), None)
    for index, (eps, rates) in enumerate(zip(alone.eps, alone.estimates(), strict=True)):
        row = {"classifier": classifier, "attack": attack, "norm": f"{curve.norm:g}", "eps": eps}
        row |= {"samples": len(alone.labels), "mean_norm": alone.mean_norm[index]}
        for name in ("accuracy", "rejection", "evasion"):
            rate = getattr(rates, name)
            column = name if name == "accuracy" else f"{name}_rate"
            row |= {column: rate.value, f"{name}_low": rate.low, f"{name}_high": rate.high}
        for cost in COSTS:
            row[cost] = sum(getattr(one, cost)[index] for one in attacks)
            row[cost] += sum(getattr(one, cost) for one in more if eps == first)
        yield row
