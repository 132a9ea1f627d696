"""The report as one web page that needs nothing else: tables, figures, checks, explanations."""

import base64
import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from torchdnr.evaluation.checks.result import ORDER, broken_off
from torchdnr.evaluation.curve import SecurityCurve
from torchdnr.evaluation.report.table import attack_costs, each_line, refinement_text, total_costs
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
        "worst case is lower than the best of them where they succeed on different images. Attacks "
        "without a row ran only below the smallest change that the others had found for an image."
    ),
    "clean": (
        "On all test images, none of them attacked. A rejected image counts as an error. "
        "<b>theta</b>: an image is rejected if its best score is not above it."
    ),
    "detection": (
        "How well the best score separates attacked from clean images. Counted are attacked images "
        "whose best score is that of a wrong class, accepted or not, and clean images whose best "
        "score is that of the true one. <b>AUROC</b>: probability that the attacked one of two "
        "images is the more suspicious; 0.5 is chance. <b>FPR95</b>: share of clean images "
        "rejected by a threshold that rejects 95 % of the attacked ones; lower is better. "
        "<b>Detected</b> and <b>false rejections</b>: share of attacked and of clean images "
        "rejected at the theta in use. <b>Robust error</b>: of the images accepted, "
        "clean or attacked, the share accepted and wrong, at the theta in use, or at the one that "
        "accepts 99 % of the right calibration images. A dash: there is none to count."
    ),
}
NO_CHECKS = "no checks were made"
LONG_LIST = 20  # entries of a list that the table of settings shows
Checks = Mapping[str, Mapping[str, Any]]  # ``CheckReport.to_dict()`` by classifier

_escape = html.escape


def save_html(
    path: str | Path,
    curves: Mapping[str, SecurityCurve],
    *,
    settings: Mapping[str, Any],
    checks: Checks,
    measures: Mapping[str, Mapping[str, Any]],
    figures: Mapping[str, str | Path],
    title: str,
    command: str,
    tables: Mapping[str, Sequence[Sequence[Any]]] | None = None,
) -> None:
    """Write the report, atomically: an earlier one stays until the new one is complete.

    By classifier: ``curves``, of which there is one at least, ``CheckReport.to_dict()`` in
    ``checks``, empty if none were made, and ``Measures.to_dict()`` in ``measures``. ``settings``
    are what the numbers depend on; "classifiers" and "environment", if given, each get a table.
    ``figures`` maps captions to PNG files, embedded in this order; ``command`` is what reproduces
    it. ``tables`` maps titles to the rows of further tables, the first a header; a cell is text or
    the ``to_dict()`` of a share.
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
        *(_section(heading, _rates(rows)) for heading, rows in (tables or {}).items()),
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


def _estimate(entry: Mapping[str, Any] | None, form: Callable[[float], str] = _percent) -> str:
    if entry is None or entry["n"] == 0:
        return "-"
    value, low, high = (form(float(entry[key])) for key in ("value", "low", "high"))
    return f'{value} <span class="ci">[{low}, {high}]</span>'


def _mark(status: str, text: str) -> str:
    return f'<span class="mark {status}">{text}</span>'


def _status(checks: Checks, name: str) -> str:
    """Make the mark that stands beside every number of a classifier."""
    if name not in checks:
        return _mark("skipped", "not checked")
    statuses = [entry["status"] for entry in checks[name]["checks"]]
    doubts = [f"{statuses.count(status)} {status}" for status in ORDER[:2] if status in statuses]
    status = checks[name]["status"]
    return _mark(status, f"checks: {', '.join(doubts) or status}")


def _item(status: str, head: str, text: str) -> str:
    return f'<li class="{status}"><b>{head}</b>{text}</li>'


def _verdicts(curves: Mapping[str, SecurityCurve], checks: Checks) -> str:
    """List for each classifier what failed or is doubtful, the worst first."""
    parts = []
    for name, curve in curves.items():
        entries = checks.get(name, {}).get("checks", ())
        doubtful = [entry for status in ORDER[:2] for entry in entries if entry["status"] == status]
        items = []
        for entry in (*doubtful, *broken_off(entries)):
            advice = f" <i>{_escape(entry['advice'])}</i>" if entry["advice"] else ""
            head = f"{entry['status']}: {_escape(entry['name'])}"
            items.append(_item(entry["status"], head, f". {_escape(entry['message'])}{advice}"))
        for attack, alone in (curve.attacks | curve.refinements).items():
            if count := total_costs(alone)[1]:
                text = f"{attack} left the ball or the box {count} times and was projected back."
                items.append(_item("fail", "constraints", f": {_escape(text)}"))
        if missing := curve.settings.get("left_out"):
            text = f"{', '.join(missing)}: the model lacks what they need."
            items.append(_item("skipped", "left out", f": {_escape(text)}"))
        passed = name in checks and checks[name]["status"] == "pass"
        if passed and not items:
            items = ['<li class="pass">No check found a reason for doubt.</li>']
        elif name not in checks or not items:
            items.append(f'<li class="skipped">{NO_CHECKS}: the attacks may have been weak.</li>')
        head = f"<h3>{_escape(name)} {_status(checks, name)}</h3>"
        parts.append(f"{head}<ul>{''.join(items)}</ul>")
    return "".join(parts)


def _worst_case(curves: Mapping[str, SecurityCurve], checks: Checks) -> str:
    header = ["eps"]
    rows = {eps: [f"{eps:g}"] for eps in sorted({e for c in curves.values() for e in c.eps})}
    for name, curve in curves.items():
        header += [f"{_escape(name)}: accuracy, % {_status(checks, name)}"]
        header += ["rejected, %"] * curve.rejects
        rates = dict(zip(curve.eps, curve.estimates(), strict=True))
        for eps, row in rows.items():
            at = rates.get(eps)
            row.append(_estimate(at and at.accuracy.to_dict()))
            row += [_estimate(at and at.rejection.to_dict())] * curve.rejects
    medians = ", ".join(
        f"{_escape(name)} {curve.median_evasion_norm:.3g}" for name, curve in curves.items()
    )
    samples = len(next(iter(curves.values())).labels)
    note = f"<p>{samples} images. Median norm at which an image is evaded: {medians}.</p>"
    return _table(header, rows.values()) + note


def _attacks(curves: Mapping[str, SecurityCurve]) -> str:
    parts = []
    for name, curve in curves.items():
        rows = []
        for attack, alone in each_line(curve):
            row = [_escape(attack)]
            for rates in alone.estimates():
                rejected = f" ({_percent(rates.rejection.value)})" if curve.rejects else ""
                row.append(_estimate(rates.accuracy.to_dict()) + rejected)
            rows.append(row)
        header = ["attack", *(f"eps {eps:g}" for eps in curve.eps)]
        parts.append(f"<h3>{_escape(name)}</h3>{_table(header, rows)}")
        parts += [
            f"<p>{_escape(attack)}: {refinement_text(added)}.</p>"
            for attack, added in curve.refinements.items()
        ]
    return "".join(parts)


def _classifiers(clean: Mapping[str, Mapping[str, Any]]) -> str:
    columns = {
        "test_accuracy": "accuracy, %",
        "test_rejection_rate": "rejected, %",
        "calibration_rejection_rate": "rejected where theta was set, %",
        "test_error_if_accepted": "wrong of the accepted, %",
    }
    rows = []
    for name, entry in clean.items():
        row = [_escape(name)]
        for key in columns:
            if (interval := entry.get(f"{key}_interval")) is not None:
                ends = dict(zip(("low", "high"), interval, strict=True))
                row.append(_estimate({"value": entry[key], "n": 1, **ends}))
            else:
                row.append(_percent(entry[key]) if key in entry else "-")
        rows.append([*row, f"{entry['threshold']:.4g}" if "threshold" in entry else "-"])
    return _table(["classifier", *columns.values(), "theta"], rows) if rows else ""


def _detection(measures: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, entry in measures.items():
        for eps, detection in entry["detection"].items():
            errors, rates = entry["robust_error"][eps], detection or {}
            keys = "fpr_at_tpr", "detected", "false_rejection"
            rows.append(
                [
                    f"{_escape(name)}, eps {eps}",
                    _estimate(rates.get("auroc"), lambda value: f"{value:.3g}"),
                    *(_estimate(rates.get(key)) for key in keys),
                    *(_estimate(errors.get(key)) for key in ("own", "99%")),
                ]
            )
    header = ["", "AUROC", "FPR95, %", "detected, %", "false rejections, %"]
    header += ["robust error, %", "robust error at 99 % TPR, %"]
    return _table(header, rows) if rows else ""


def _rates(rows: Sequence[Sequence[Any]]) -> str:
    header, *body = [
        [_estimate(cell) if isinstance(cell, Mapping) else _escape(cell) for cell in row]
        for row in rows
    ]
    return _table(header, body)


def _all_checks(checks: Checks) -> str:
    parts = []
    for name, report in checks.items():
        entries = sorted(report["checks"], key=lambda entry: ORDER.index(entry["status"]))
        rows = [
            [
                f"{_mark(entry['status'], entry['status'])} {_escape(entry['name'])}",
                _escape(entry["message"]),
                _escape(entry["advice"]),
            ]
            for entry in entries
        ]
        parts.append(f"<h3>{_escape(name)}</h3>{_table(['check', 'result', 'advice'], rows)}")
    return "".join(parts)


def _costs(curves: Mapping[str, SecurityCurve]) -> str:
    rows = [
        [
            f"{_escape(cost['classifier'])}: {_escape(cost['attack'])}",
            f"{cost['seconds']:.1f}",
            *(f"{cost[key]:,}" for key in ("forwards", "backwards")),
        ]
        for cost in attack_costs(curves)
    ]
    return _table(["attack", "seconds", "images forwards", "images backwards"], rows)


def _pairs(content: Mapping[str, Any]) -> str:
    rows = []
    for key, value in content.items():
        text = str(value)
        if isinstance(value, list) and len(value) > LONG_LIST:  # such as 1,000 names of classes
            text = f"{str(value[:LONG_LIST])[:-1]}, and {len(value) - LONG_LIST:,} more]"
        rows.append([_escape(str(key)), _escape(text)])
    return _table(["", ""], rows) if rows else ""


def _settings(settings: Mapping[str, Any]) -> str:
    parts = [
        f"<h3>{title}</h3>{_pairs(settings[title])}"
        for title in ("run", "attack")
        if title in settings
    ]
    return f"<details><summary>All settings</summary>{''.join(parts)}</details>" if parts else ""
