"""Tables, targets and page of the SVM benchmark, computed from its raw records only."""

from collections.abc import Callable, Iterable, Sequence
from statistics import median, median_high
from typing import Any

from benchmarks.common import Page, machine, table
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


def text_table(section: str, name: str, case: Record) -> str:
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


def _certificates(fits: Iterable[Record]) -> dict[str, float | None]:
    """Find the worst values of our certificates over all fits."""
    fits = [case for case in fits if case["peers"].get(OURS, {}).get("objective")]
    worst: dict[str, float | None] = {}
    for name in ("violation", "sum_over_C", "outside_box"):
        worst[name] = max((largest(case["peers"][OURS], name) for case in fits), default=None)
    excess = [
        (mine - theirs) / abs(theirs)
        for case in fits
        for mine, theirs in zip(
            case["peers"][OURS]["objective"],
            case["peers"].get("sklearn", {}).get("objective", []),
            strict=False,  # LIBSVM may have been timed on some of the classes only
        )
    ]
    worst["excess"] = max(excess, default=None)
    return worst


def targets(sections: dict[str, dict[str, Record]]) -> list[Record]:
    """Compare the measurements with what they are to reach.

    Args:
        sections: Section to name of a case to its record.

    Returns:
        One ``{"name", "value", "target", "status"}`` per target; the status is "reached",
        "missed" or "not measured". A name says in brackets which case is the worst.
    """
    fits, grids = sections.get("fit", {}), sections.get("grid", {})
    decisions, gradients = sections.get("decision", {}), sections.get("gradient", {})
    fit = {c["dataset"]: c for c in fits.values() if c["headline"]}
    worst = _certificates(fits.values())
    both, mnist = ("sklearn", "sklearnex"), decisions.get("mnist")
    least, half, where = _beside_sklearnex(fits)
    rows = [
        (f"every fit, x sklearnex{where}", least, ">=", 1.0),
        ("half of the fits, x sklearnex", half, ">=", 2.0),
        ("fit cifar10, x sklearnex", ratio(fit.get("cifar10"), "sklearnex"), ">=", 3.0),
        ("fit raw, x sklearn", ratio(fit.get("raw"), "sklearn"), ">=", 10.0),
        ("fit logits, x the faster peer", slower(fit.get("logits"), both), ">=", 2.0),
        ("grid raw, seconds", seconds(grids.get("raw"), OURS), "<=", 100.0),
        ("grid relu_fc1, seconds", seconds(grids.get("relu_fc1"), OURS), "<=", 30.0),
        ("decision mnist, x sklearn", ratio(mnist, "sklearn"), ">=", 60.0),
        ("decision mnist, x sklearnex", ratio(mnist, "sklearnex"), ">=", 4.0),
    ]
    for name in ("d=512", "mnist", "d=3072"):
        ours = decisions.get(name, {"peers": {}})["peers"].get(OURS, {})
        share = ours.get("share_of_product")
        rows.append((f"decision {name}, share of the rate of mm", share, ">=", 0.6))
    for d in (512, 30):
        value = slower(gradients.get(f"d={d}"), ("gpytorch", "cdist"))
        rows.append((f"gradient d={d}, x the faster of gpytorch and cdist", value, ">=", 1.8))
    rows += [
        ("largest violation of any fit", worst["violation"], "<=", 1e-3),
        ("largest |1'b| / C of any fit", worst["sum_over_C"], "<=", 1e-6),
        ("largest excess over the box / C", worst["outside_box"], "<=", 0.0),
        ("objective above LIBSVM's (tol 1e-3), relative", worst["excess"], "<=", 1e-6),
    ]
    return [_target(*row) for row in rows]


def _beside_sklearnex(fits: dict[str, Record]) -> tuple[float | None, float | None, str]:
    """Return the least ratio of all fits, what at least half of them reach, and the worst case.

    Fits that only one of the two was measured on leave the question open.
    """
    measured = {name: ratio(case, "sklearnex") for name, case in fits.items()}
    ratios = {name: value for name, value in measured.items() if value is not None}
    if not ratios or len(ratios) < len(measured):
        return None, None, ""
    worst = min(ratios, key=lambda name: ratios[name])
    return ratios[worst], median_high(ratios.values()), f" ({worst})"


def _target(name: str, value: float | None, sense: str, bound: float) -> Record:
    if value is None:
        status = "not measured"
    else:
        status = "reached" if (value >= bound if sense == ">=" else value <= bound) else "missed"
    return {"name": name, "value": value, "target": f"{sense} {bound:g}", "status": status}


def summary(results: Record) -> str:
    """Format targets, missing peers and failures: the end of the output.

    Args:
        results: The whole JSON.

    Returns:
        Lines of text.
    """
    lines = ["targets:"]
    for row in results["targets"]:
        value = number(row["value"], ".4g")
        lines.append(f"  {row['status']:<12}  {row['name']}: {value} (target {row['target']})")
    counts = {
        status: sum(row["status"] == status for row in results["targets"])
        for status in ("reached", "missed", "not measured")
    }
    lines.append("  " + ", ".join(f"{count} {status}" for status, count in counts.items()))
    absent = {p: s for p, s in results["peer_status"].items() if s != "installed"}
    named = ", ".join(f"{peer} ({status})" for peer, status in absent.items()) or "none"
    lines.append(f"peers that took no part: {len(absent)}: {named}")
    failed = failures(results["sections"])
    lines.append(f"measurements that failed: {len(failed)}" + "".join(f"\n  {f}" for f in failed))
    return "\n".join(lines)


def failures(sections: dict[str, dict[str, Record]]) -> list[str]:
    """List the measurements that ended in an error."""
    return [
        f"{section}, {name}, {peer}: {record['error']}"
        for section, cases in sections.items()
        for name, case in cases.items()
        for peer, record in case["peers"].items()
        if "error" in record
    ]


# --- page ---

INTRODUCTION = """\
`python -m benchmarks.svm` (extra `bench`) measures fits, searches, decision values and gradients
beside other libraries, on one machine in one run."""
COLUMNS = {"sklearn": "scikit-learn", "sklearnex": "scikit-learn-intelex"}


def page(result: Record) -> str:
    """Format times and targets.

    Args:
        result: Contents of svm-<device>.json.

    Returns:
        Markdown: what was run where, who fits faster where, and two tables.
    """
    settings, versions = result["settings"], result["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in sorted(versions) if versions[name])
    size, rows = f", n={settings['samples']}", []
    for section, verb in (
        ("fit", "one-vs-rest fits"),
        ("grid", "5-fold search of 20 points"),
        ("decision", f"{settings['samples'] // 5:,} decisions"),
    ):
        for name, case in result["sections"].get(section, {}).items():
            if ", n=" not in name or name.endswith(size):
                rows.append([f"{verb}: {name.removesuffix(size)}", *_times(case), _methods(case)])
    targets = [
        [f"{row['name']} {row['target']}".replace("|", "\\|"), number(row["value"]), row["status"]]
        for row in result["targets"]
    ]
    lines = [
        INTRODUCTION,
        "",
        _faster_peers(result),
        "",
        f"{machine(result['environment'])}; {named}. Medians of up to {settings['repeats']} runs; "
        "\\* marks a time extrapolated from a part. All solutions are certified in float64.",
        "",
        *table([f"n = {settings['samples']:,}", OURS, *COLUMNS.values(), "ours solved by"], rows),
        "",
        *table(["target", "reached", ""], targets),
    ]
    return "\n".join(lines)


def _times(case: Record) -> list[str]:
    cells = [f"{number(seconds(case, OURS))} s"]
    for peer in COLUMNS:
        if seconds(case, peer) is None:
            cells.append("-")
            continue
        mark = "\\*" if "extrapolated_from" in case["peers"][peer] else ""
        cells.append(f"{number(seconds(case, peer))} s{mark} ({number(ratio(case, peer), '.2g')}x)")
    return cells


def _methods(case: Record) -> str:
    """Say how many problems of a fit each of our ways of solving solved."""
    counts = case["peers"].get(OURS, {}).get("reported", {}).get("method", {})
    return "; ".join(f"{method}: {count}" for method, count in counts.items()) or "-"


def _full_fits(result: Record) -> dict[str, Record]:
    """Return the fits on as many samples as the run is of, by name without that number."""
    n = result["settings"]["samples"]
    fits = result["sections"].get("fit", {}).items()
    return {name.removesuffix(f", n={n}"): case for name, case in fits if case["n"] == n}


def _faster_peers(result: Record) -> str:
    """Say on which fits a peer is faster than ours."""
    fits, sentences = _full_fits(result), []
    for peer, name in COLUMNS.items():
        ratios = {case: ratio(record, peer) for case, record in fits.items()}
        known = {case: value for case, value in ratios.items() if value is not None}
        faster = [case for case, value in known.items() if value < 1.0]
        if known:
            named = f": {'; '.join(faster)}" if faster else ""
            sentences.append(f"{name} is faster on {len(faster)} of {len(known)} fits{named}.")
    return " ".join(sentences)


def headline(result: Record) -> str:
    """Say how much faster than the peers ours fits, from least to most, and what is reached."""
    spans, fits = [], _full_fits(result).values()
    for peer, name in COLUMNS.items():
        ratios = [times for case in fits if (times := ratio(case, peer)) is not None]
        if ratios:
            spans.append(f"{min(ratios):.2g} to {max(ratios):.2g} times as fast as {name}")
    reached = sum(row["status"] == "reached" for row in result["targets"])
    return f"fits {', '.join(spans)}; {reached} of {len(result['targets'])} targets reached"


PAGES = {"svm": Page("How fast the SVMs are", page, headline)}
