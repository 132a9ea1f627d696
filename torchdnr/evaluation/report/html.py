"""The report as one web page that needs nothing else: tables, figures, checks, explanations."""

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from torchdnr.evaluation.checks.result import ORDER, broken_off
from torchdnr.evaluation.curve import SecurityCurve
from torchdnr.files import atomic_write_bytes

PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 68rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: left; border-bottom: 1px solid #ddd;
  vertical-align: top; }
tr:first-child th { border-bottom: 2px solid #999; vertical-align: bottom; }
.ci { color: #777; font-size: .85em; white-space: nowrap; }
.note { color: #555; max-width: 46rem; }
.mark { display: inline-block; border-radius: .3rem; padding: 0 .4rem; font-size: .8rem;
  font-weight: 600; white-space: nowrap; background: #e8e8e8; color: #444; }
.mark.fail { background: #a40000; color: #fff; } .mark.warn { background: #ffdb8a; color: #5a3d00; }
.mark.pass { background: #d8efdc; color: #0b4f1a; }
ul { padding-left: 0; list-style: none; margin: .3rem 0; }
li { padding: .15rem .6rem; border-left: .3rem solid #bbb; margin: .3rem 0; }
li.fail { border-color: #a40000; } li.warn { border-color: #e0a100; }
li.pass { border-color: #3a9a4f; }
figure { margin: 1.5rem 0; } figure img { max-width: 100%; } figcaption { color: #555; }
pre { background: #f4f4f4; padding: .7rem; white-space: pre-wrap; overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>$title</h1>
$body
</body>
</html>
""")

EXPLANATIONS = {
    "worst": (
        "An attack succeeds on an image if the changed image is <b>accepted and wrong</b>. "
        "<b>Accuracy</b>: at eps = 0, without an attack, the share of images given their true "
        "class, and to reject is an error; beyond it the share given their true class or rejected. "
        "<b>Rejected</b>: the share that the classifier refuses to decide on. <b>Worst case</b>: "
        "for each image the most harmful of all attacks, at this and all smaller eps. "
        "<b>eps</b>: largest change allowed, in the norm of the attack, of pixels in [0, 1]. In "
        "brackets the 95 % confidence interval for the number of images. A number is an upper "
        "bound: a better attack can only lower it."
    ),
    "attacks": (
        "Accuracy in percent if this were the only attack, in brackets the share rejected. The "
        "worst case is lower than the best of them where they succeed on different images."
    ),
    "clean": (
        "On all test images, none of them attacked. A rejected image counts as an error. "
        "<b>theta</b>: an image is rejected if its best score is not above it."
    ),
    "detection": (
        "How well the best score tells attacked from clean images. Counted are attacked images "
        "whose best score is that of a wrong class, accepted or not, and clean images whose best "
        "score is that of the true one. <b>AUROC</b>: probability that the attacked one of two "
        "images is the more suspicious; 0.5 is chance. <b>FPR95</b>: share of clean images "
        "rejected by a threshold that rejects 95 % of the attacked ones; lower is better. "
        "<b>Detected</b> and <b>false rejections</b>: share of attacked and of clean images "
        "rejected at the classifier's own theta. <b>Robust error</b>: of the images accepted, "
        "clean or attacked, the share accepted and wrong, at its own theta, or at the one that "
        "accepts 99 % of the right calibration images. A dash: there is none to count."
    ),
}
NO_CHECKS = "no checks were made"
LONG_LIST = 20
"""Entries of a list that the table of settings shows."""

_escape = html.escape


def save_html(
    path: str | Path,
    curves: Mapping[str, SecurityCurve],
    *,
    settings: Mapping[str, Any],
    checks: Mapping[str, Mapping[str, Any]],
    measures: Mapping[str, Mapping[str, Any]],
    figures: Mapping[str, str | Path],
    title: str,
    command: str,
) -> None:
    """Write the report, atomically: an earlier one stays until the new one is complete.

    Args:
        path: File to write.
        curves: Classifier name to its curve.
        settings: What the numbers depend on; "classifiers" and "environment" get tables of their
            own where they are there.
        checks: Classifier name to ``CheckReport.to_dict()``; empty if none were made.
        measures: Classifier name to ``Measures.to_dict()``.
        figures: Caption to a PNG file, embedded in this order.
        title: Heading of the page.
        command: How to reproduce it.

    Raises:
        OSError: If the file cannot be written, or a figure cannot be read.
        ValueError: If there is no curve.
    """
    if not curves:
        raise ValueError("curves is empty: give at least one security curve")
    parts = [
        _section("Are the numbers to be trusted?", _verdicts(curves, checks)),
        _section("Worst case over all attacks", _worst_case(curves, checks), "worst"),
        *(_figure(caption, file) for caption, file in figures.items()),
        _section("Each attack alone", _attacks(curves), "attacks"),
        _section("Clean images", _classifiers(settings.get("classifiers", {})), "clean"),
        _section("Detection", _detection(measures), "detection"),
        _section("All checks", _all_checks(checks)),
        _section("What the attacks cost", _costs(curves)),
        _section("Environment", _pairs(settings.get("environment", {}))),
        _section("Reproduce", f"<pre>{_escape(command)}</pre>" + _settings(settings)),
    ]
    page = PAGE.substitute(title=_escape(title), body="\n".join(parts))
    atomic_write_bytes(path, page.encode())


def _section(title: str, content: str, explained: str | None = None) -> str:
    note = f'<p class="note">{EXPLANATIONS[explained]}</p>' if explained else ""
    return f"<section><h2>{_escape(title)}</h2>{content}{note}</section>" if content else ""


def _figure(caption: str, path: str | Path) -> str:
    data = base64.b64encode(Path(path).read_bytes()).decode()
    text = _escape(caption)
    return (
        f'<figure><img alt="{text}" src="data:image/png;base64,{data}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Make a table; cells are HTML already, the first of each row is its head."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join(
        f"<tr><th>{first}</th>{''.join(f'<td>{cell}</td>' for cell in rest)}</tr>"
        for first, *rest in rows
    )
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f}"


def _with_interval(rate: float, interval: Sequence[float]) -> str:
    low, high = interval
    return f'{_percent(rate)} <span class="ci">[{_percent(low)}, {_percent(high)}]</span>'


def _estimate(entry: Mapping[str, Any] | None, percent: bool = True) -> str:
    if entry is None or entry["n"] == 0:
        return "-"
    if percent:
        return _with_interval(entry["value"], (entry["low"], entry["high"]))
    value, low, high = (f"{float(entry[key]):.3g}" for key in ("value", "low", "high"))
    return f'{value} <span class="ci">[{low}, {high}]</span>'


def _status(checks: Mapping[str, Mapping[str, Any]], name: str) -> str:
    """Make the mark that stands beside every number of a classifier."""
    if name not in checks:
        return '<span class="mark skipped">not checked</span>'
    entries = checks[name]["checks"]
    counts = {status: sum(entry["status"] == status for entry in entries) for status in ORDER}
    found = ", ".join(f"{counts[status]} {status}" for status in ORDER[:2] if counts[status])
    status = checks[name]["status"]
    return f'<span class="mark {status}">checks: {found or status}</span>'


def _verdicts(curves: Mapping[str, SecurityCurve], checks: Mapping[str, Mapping[str, Any]]) -> str:
    """List for each classifier what failed or is doubtful, the worst first."""
    parts = []
    for name, curve in curves.items():
        entries = checks.get(name, {}).get("checks", ())
        doubtful = [entry for status in ORDER[:2] for entry in entries if entry["status"] == status]
        lines = [_check_line(entry) for entry in (*doubtful, *broken_off(entries))]
        for attack, alone in curve.attacks.items():
            if count := sum(alone.violations):
                text = f"{attack} left the ball or the box {count} times and was projected back."
                lines.append(f'<li class="fail"><b>constraints</b>: {_escape(text)}</li>')
        if missing := curve.settings.get("left_out"):
            text = f"{', '.join(missing)}: the model lacks what they need."
            lines.append(f'<li class="skipped"><b>left out</b>: {_escape(text)}</li>')
        if name not in checks:
            lines.append(f'<li class="skipped">{NO_CHECKS}: the attacks may have been weak.</li>')
        elif not lines and checks[name]["status"] == "pass":
            lines = ['<li class="pass">No check found a reason for doubt.</li>']
        elif not lines:
            lines = [f'<li class="skipped">{NO_CHECKS}: the attacks may have been weak.</li>']
        head = f"<h3>{_escape(name)} {_status(checks, name)}</h3>"
        parts.append(f"{head}<ul>{''.join(lines)}</ul>")
    return "".join(parts)


def _check_line(entry: Mapping[str, Any]) -> str:
    advice = f" <i>{_escape(entry['advice'])}</i>" if entry["advice"] else ""
    status, name = entry["status"], _escape(entry["name"])
    return f'<li class="{status}"><b>{status}: {name}</b>. {_escape(entry["message"])}{advice}</li>'


def _worst_case(
    curves: Mapping[str, SecurityCurve], checks: Mapping[str, Mapping[str, Any]]
) -> str:
    header = ["eps"]
    for name, curve in curves.items():
        header += [f"{_escape(name)}: accuracy, % {_status(checks, name)}"]
        header += ["rejected, %"] * curve.rejects
    rows = []
    for eps in sorted({value for curve in curves.values() for value in curve.eps}):
        row = [f"{eps:g}"]
        for curve in curves.values():
            there = eps in curve.eps
            index = curve.eps.index(eps) if there else 0
            pairs = [(curve.accuracy, curve.accuracy_interval)]
            pairs += [(curve.rejection_rate, curve.rejection_interval)] * curve.rejects
            row += [_with_interval(r[index], i[index]) if there else "-" for r, i in pairs]
        rows.append(row)
    medians = ", ".join(
        f"{_escape(name)} {curve.median_evasion_norm:.3g}" for name, curve in curves.items()
    )
    samples = len(next(iter(curves.values())).labels)
    note = f"<p>{samples} images. Median norm at which an image is evaded: {medians}.</p>"
    return _table(header, rows) + note


def _attacks(curves: Mapping[str, SecurityCurve]) -> str:
    parts = []
    for name, curve in curves.items():
        header = ["attack", *(f"eps {eps:g}" for eps in curve.eps)]
        several = {**curve.attacks, "worst case": curve}
        rows = [
            [_escape(attack)]
            + [
                _with_interval(rate, interval)
                + (f" ({_percent(rejected)})" if curve.rejects else "")
                for rate, interval, rejected in zip(
                    alone.accuracy, alone.accuracy_interval, alone.rejection_rate, strict=True
                )
            ]
            for attack, alone in several.items()
        ]
        parts.append(f"<h3>{_escape(name)}</h3>{_table(header, rows)}")
    return "".join(parts)


def _classifiers(found: Mapping[str, Mapping[str, Any]]) -> str:
    keys = {
        "test_accuracy": "accuracy, %",
        "test_rejection_rate": "rejected, %",
        "calibration_rejection_rate": "rejected where theta was set, %",
    }
    rows = [
        [
            _escape(name),
            *(_clean_rate(entry, key) for key in keys),
            f"{entry['threshold']:.4g}" if "threshold" in entry else "-",
        ]
        for name, entry in found.items()
    ]
    return _table(["classifier", *keys.values(), "theta"], rows) if rows else ""


def _clean_rate(entry: Mapping[str, Any], key: str) -> str:
    if key not in entry:
        return "-"
    interval = entry.get(f"{key}_interval")
    return _percent(entry[key]) if interval is None else _with_interval(entry[key], interval)


def _detection(measures: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, entry in measures.items():
        for eps, found in entry["detection"].items():
            own = entry["robust_error"][eps]
            found = found or {}
            rows.append(
                [
                    f"{_escape(name)}, eps {eps}",
                    _estimate(found.get("auroc"), percent=False),
                    _estimate(found.get("fpr_at_tpr")),
                    _estimate(found.get("detected")),
                    _estimate(found.get("false_rejection")),
                    _estimate(own["own"]),
                    _estimate(own.get("99%")),
                ]
            )
    header = ["", "AUROC", "FPR95, %", "detected, %", "false rejections, %"]
    header += ["robust error, %", "robust error at 99 % TPR, %"]
    return _table(header, rows) if rows else ""


def _all_checks(checks: Mapping[str, Mapping[str, Any]]) -> str:
    parts = []
    for name, report in checks.items():
        entries = sorted(report["checks"], key=lambda entry: ORDER.index(entry["status"]))
        rows = [
            [
                f'<span class="mark {entry["status"]}">{entry["status"]}</span> '
                + _escape(entry["name"]),
                _escape(entry["message"]),
                _escape(entry["advice"]),
            ]
            for entry in entries
        ]
        parts.append(f"<h3>{_escape(name)}</h3>{_table(['check', 'found', 'advice'], rows)}")
    return "".join(parts)


def _costs(curves: Mapping[str, SecurityCurve]) -> str:
    rows = [
        [
            f"{_escape(name)}: {_escape(attack)}",
            f"{sum(alone.seconds):.1f}",
            f"{sum(alone.forwards):,}",
            f"{sum(alone.backwards):,}",
        ]
        for name, curve in curves.items()
        for attack, alone in curve.attacks.items()
    ]
    return _table(["attack", "seconds", "images forwards", "images backwards"], rows)


def _pairs(content: Mapping[str, Any]) -> str:
    rows = [[_escape(str(key)), _escape(_shortened(value))] for key, value in content.items()]
    return _table(["", ""], rows) if rows else ""


def _shortened(value: object) -> str:
    """Write a setting; of a long list, such as the names of 1,000 classes, its beginning."""
    if not isinstance(value, list) or len(value) <= LONG_LIST:
        return str(value)
    return f"{str(value[:LONG_LIST])[:-1]}, and {len(value) - LONG_LIST:,} more]"


def _settings(settings: Mapping[str, Any]) -> str:
    parts = [
        f"<h3>{title}</h3>{_pairs(settings[title])}"
        for title in ("run", "attack")
        if title in settings
    ]
    return f"<details><summary>All settings</summary>{''.join(parts)}</details>" if parts else ""
