"""What bench_svm.py is to show, whether it did, and what took no part or failed."""

from collections.abc import Iterable

from benchmarks.svm.contenders import OURS
from benchmarks.svm.report import Record, largest, number, ratio, slower


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
        "missed" or "not measured".
    """
    fits, grids = sections.get("fit", {}), sections.get("grid", {})
    decisions, gradients = sections.get("decision", {}), sections.get("gradient", {})
    fit = {c["dataset"]: c for c in fits.values() if c["headline"]}
    worst = _certificates(fits.values())
    both, mnist = ("sklearn", "sklearnex"), decisions.get("mnist")
    rows = [
        ("fit raw, x sklearn", ratio(fit.get("raw"), "sklearn"), ">=", 20.0),
        ("fit raw, x sklearnex", ratio(fit.get("raw"), "sklearnex"), ">=", 3.0),
        ("fit relu_fc1, x the faster peer", slower(fit.get("relu_fc1"), both), ">=", 4.0),
        ("fit logits, x the faster peer", slower(fit.get("logits"), both), ">=", 4.0),
        ("grid relu_fc1, x sklearn", ratio(grids.get("relu_fc1"), "sklearn"), ">=", 5.0),
        ("grid raw, x sklearn", ratio(grids.get("raw"), "sklearn"), ">=", 30.0),
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
