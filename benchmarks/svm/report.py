"""Tables of bench_svm.py, computed from its raw records only."""

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from benchmarks.svm.contenders import OURS

Record = dict[str, Any]
FEASIBLE = 1e-6
"""|1'b| and excess over the box, as shares of C, up to which b counts as a feasible solution."""


def seconds(case: Record | None, peer: str) -> float | None:
    """Return the median time of a contender in a case; None where it has none."""
    values = ((case or {}).get("peers", {}).get(peer) or {}).get("seconds")
    return median(values) if values else None


def ratio(case: Record | None, peer: str) -> float | None:
    """Return how many times as long as ours a contender takes."""
    ours, theirs = seconds(case, OURS), seconds(case, peer)
    return theirs / ours if ours and theirs else None


def slower(case: Record | None, peers: Sequence[str]) -> float | None:
    """Return the smallest ratio over several contenders; None unless all were measured."""
    ratios = [ratio(case, peer) for peer in peers]
    return None if None in ratios else min(ratios)


def best_objectives(case: Record) -> list[float | None]:
    """Find the smallest dual objective of each class over the feasible solutions of a fit."""
    found: list[float | None] = []
    for record in case["peers"].values():
        for k, value in enumerate(record.get("objective", [])):
            found += [None] * (k + 1 - len(found))
            off = max(record["sum_over_C"][k], record["outside_box"][k])
            if off <= FEASIBLE and (found[k] is None or value < found[k]):
                found[k] = value
    return found


def gaps(case: Record, peer: str) -> tuple[float | None, float | None]:
    """Compute a contender's largest relative distances to the best objective, dual and primal.

    Args:
        case: Record of a fit.
        peer: Contender.

    Returns:
        Largest excess of its dual objective over the best feasible one, and of its primal
        objective over the same, as shares of it. Negative where an infeasible b is "better".
    """
    record, best = case["peers"][peer], best_objectives(case)
    pairs = [
        (dual, primal, reference)
        for dual, primal, reference in zip(
            record.get("objective", []), record.get("primal", []), best, strict=False
        )
        if reference
    ]
    if not pairs:
        return None, None
    duals = [(dual - reference) / abs(reference) for dual, _, reference in pairs]
    primals = [(primal + reference) / abs(reference) for _, primal, reference in pairs]
    return max(duals), max(primals)


def number(value: float | None, form: str = ".3g") -> str:
    """Format a number, or a dash where there is none."""
    return "-" if value is None else format(value, form)


def largest(record: Record, name: str) -> float | None:
    """Return the largest of one value per class; None where it was not measured."""
    return max(record[name]) if record.get(name) else None


def _time(record: Record) -> str:
    values = record["seconds"]
    text = f"{median(values):.4g} [{min(values):.4g}, {max(values):.4g}]"
    return text + (" *" if "extrapolated_from" in record else "")


def _fit_cells(case: Record, peer: str) -> list[str]:
    record = case["peers"][peer]
    dual, primal = gaps(case, peer)
    checks = [number(largest(record, n), ".1e") for n in ("violation", "sum_over_C")]
    accuracy = record.get("test_accuracy")
    return [
        number(dual, ".1e"),
        number(primal, ".1e"),
        *checks,
        number(largest(record, "outside_box"), ".1e"),
        str(record.get("all_support_vectors", "-")),
        number(None if accuracy is None else 100 * accuracy, ".2f"),
        number(record.get("peak_device_mib", record.get("peak_mib")), ".0f"),
    ]


def _grid_cells(case: Record, peer: str) -> list[str]:
    record = case["peers"][peer]
    accuracy = record.get("best_accuracy")
    percent = number(None if accuracy is None else 100 * accuracy, ".2f")
    return [percent, number(record.get("best_C")), number(record.get("best_multiple"))]


def _decision_cells(case: Record, peer: str) -> list[str]:
    record = case["peers"][peer]
    names = ("gflops", "share_of_product", "largest_error")
    return [str(record.get("support_vectors", "-")), *(number(record.get(n)) for n in names)]


def _gradient_cells(case: Record, peer: str) -> list[str]:
    record = case["peers"][peer]
    return [
        number(record.get("peak_tensor_mib"), ".1f"),
        number(record.get("relative_error"), ".1e"),
    ]


FIT_HEADER = "dual gap,primal gap,violation,|1'b|/C,off box,SVs,test %,peak MiB"
TABLES: dict[str, tuple[list[str], Callable[[Record, str], list[str]]]] = {
    "fit": (FIT_HEADER.split(","), _fit_cells),
    "grid": (["best %", "C", "x scale"], _grid_cells),
    "decision": (["SVs", "GFLOP/s", "of mm", "error"], _decision_cells),
    "gradient": (["tensors MiB", "rel. error"], _gradient_cells),
}


def table(section: str, name: str, case: Record) -> str:
    """Format one case.

    Args:
        section: One of TABLES.
        name: Of the case.
        case: Its record.

    Returns:
        Lines of text.
    """
    header, cells = TABLES[section]
    rows = [["", "seconds: median [min, max]", "x ours", *header]]
    notes = []
    for peer, record in case["peers"].items():
        if not record.get("seconds"):
            rows.append([peer, f"failed: {record.get('error', 'not measured')}"[:60]])
            continue
        rows.append([peer, _time(record), number(ratio(case, peer)), *cells(case, peer)])
        if "extrapolated_from" in record:
            notes.append(f"* {peer}: extrapolated from {record['extrapolated_from']}")
    full = [row for row in rows if len(row) == len(rows[0])]
    widths = [max(len(row[k]) for row in full) for k in range(len(rows[0]))]
    lines = [
        "  ".join([cell.ljust(width) for cell, width in zip(row, widths, strict=False)]).rstrip()
        for row in rows
    ]
    sizes = ", ".join(f"{k} = {case[k]}" for k in ("n", "d", "m", "batch", "vectors") if k in case)
    return "\n".join([f"{section}: {name} ({sizes})", *lines, *notes])
