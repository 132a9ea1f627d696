"""The results as a table for spreadsheets and plotting programs: one row per number of interest."""

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torchdnr.evaluation.curve import Predictions, SecurityCurve
from torchdnr.evaluation.report.table import WORST_CASE
from torchdnr.files import atomic_write_bytes

COSTS = "seconds", "forwards", "backwards"
COLUMNS = (
    *("classifier", "attack", "norm", "eps", "samples"),
    *("accuracy", "accuracy_low", "accuracy_high"),
    *("rejection_rate", "rejection_low", "rejection_high"),
    *("evasion_rate", "evasion_low", "evasion_high"),
    *("mean_norm", *COSTS),
)


def save_csv(path: str | Path, curves: Mapping[str, SecurityCurve]) -> None:
    """Write a row per classifier, attack and eps, and for the worst case over the attacks.

    Rates are shares in [0, 1], low and high the ends of their 95 % confidence intervals. The cost
    of a minimum-norm attack is in the row of its first positive eps; the worst case has the sum.

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
        for attack, alone in {**curve.attacks, WORST_CASE: curve}.items():
            writer.writerows(_rows(name, attack, alone, curve))
    atomic_write_bytes(path, text.getvalue().encode())


def _rows(
    name: str, attack: str, alone: Predictions, curve: SecurityCurve
) -> Iterator[dict[str, Any]]:
    several = curve.attacks.values() if alone is curve else [alone]
    for index, eps in enumerate(alone.eps):
        row = {
            "classifier": name,
            "attack": attack,
            "norm": f"{curve.norm:g}",
            "eps": eps,
            "samples": len(alone.labels),
            "mean_norm": alone.mean_norm[index],
        }
        for key, rate in (("accuracy", "accuracy"), ("rejection", "rejection_rate")):
            row[rate] = getattr(alone, rate)[index]
            row[f"{key}_low"], row[f"{key}_high"] = getattr(alone, f"{key}_interval")[index]
        row["evasion_rate"] = alone.evasion_rate[index]
        row["evasion_low"], row["evasion_high"] = alone.evasion_interval[index]
        for cost in COSTS:
            row[cost] = sum(getattr(one, cost)[index] for one in several)
        yield row
