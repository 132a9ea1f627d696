"""Write the report of an evaluation into its run folder, or load the one that is there."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from textwrap import wrap
from typing import Any

from torchdnr.cli.evaluation import Evaluation
from torchdnr.cli.options import option_words
from torchdnr.cli.settings import AttackSettings
from torchdnr.evaluation.checks.result import ORDER, broken_off
from torchdnr.evaluation.curve import SecurityCurve, most_telling_eps
from torchdnr.evaluation.detection import Measures
from torchdnr.evaluation.environment import describe_environment
from torchdnr.evaluation.explanation import explain
from torchdnr.evaluation.figures import (
    plot_curves,
    plot_examples,
    plot_risk_coverage,
    plot_roc,
    plot_stratified,
    plot_threshold_sweep,
)
from torchdnr.evaluation.images import save_images
from torchdnr.evaluation.report.html import save_html
from torchdnr.evaluation.report.table import (
    attack_costs,
    attack_rates,
    format_table,
    load_results,
    save_csv,
    save_results,
)
from torchdnr.evaluation.risk_coverage import RiskCoverage
from torchdnr.evaluation.stratified import StratifiedCurve
from torchdnr.evaluation.threshold_sweep import ThresholdSweep
from torchdnr.files import read_json
from torchdnr.resources import process_peak_mib

RESULTS = "results.json"  # written last: where it is there, all is done
CAPTIONS = {
    "curve.png": "Accuracy under attack and rejection rate",
    "examples.png": "Adversarial examples",
    "explanation.png": "Training images that decided on adversarial examples",
    "roc.png": "Detection of adversarial images at every threshold",
    "risk-coverage.png": "Wrong of the accepted clean images over the share accepted",
    "stratified.png": "Robustness where early rejection is an error",
    "sweep.png": "Accuracy under attack over the false rejection rate",
}
COVERAGES = 0.8, 0.9, 0.95, 1.0
"""Shares of accepted clean images at which the report tells the error."""
FILES = "report.html", RESULTS, "results.csv", *CAPTIONS


def load_report(evaluation: Evaluation) -> str | None:
    """Format the results that the run folder holds; None unless they are of this evaluation."""
    folder, known = evaluation.job.folder, evaluation.identity(evaluation.settings)
    try:
        curves, settings = load_results(folder / RESULTS)
        checks = read_json(folder / RESULTS)["checks"]
        same = AttackSettings.from_json(settings["attack"]) == evaluation.settings
        files = settings["files"]
    except (OSError, ValueError, KeyError):
        return None  # none yet, or damaged: written again
    same = same and all(settings.get(key) == known[key] for key in known if key != "attack")
    complete = all((folder / name).exists() for name in files)
    return _as_text(curves, checks, known["classifiers"]) if same and complete else None


def write_report(
    evaluation: Evaluation,
    curves: Mapping[str, SecurityCurve],
    results: Mapping[str, Mapping[str, Any]],
) -> str:
    """Draw the figures and write every file of the report; return table and checks as text.

    The results are those of ``Evaluation.examine``.
    """
    folder, console = evaluation.job.folder, evaluation.console
    options = option_words(evaluation.job.settings) + option_words(evaluation.settings)
    identity = evaluation.identity(evaluation.settings)
    measures = evaluation.measure(curves)
    figures = _draw(evaluation, curves, measures, results)
    save_csv(folder / "results.csv", curves)
    if evaluation.settings.save_images:
        for curve in curves.values():
            save_images(folder / "images", curve)
    settings = {
        **identity,
        "environment": describe_environment(evaluation.job.device),
        "processes": evaluation.processes.count,
        # Makes the same numbers: with every option that they depend on.
        "command": shlex.join(["python", "attack.py", *options]),
        "files": ["report.html", "results.csv", *(path.name for path in figures.values())],
    }
    measured = {name: measure.to_dict() for name, measure in measures.items()}
    save_html(
        folder / "report.html",
        curves,
        settings=settings,
        checks=results["checks"],
        measures=measured,
        figures=figures,
        tables=_risk_table(evaluation.clean.risks) | _tables(results) | _warnings(identity),
        title=f"Security evaluation: {identity['run']['dataset']}",
        command=settings["command"],
    )
    settings["cost"] = {
        "stage_seconds": console.seconds,
        "seconds": console.total_seconds,
        "peak_memory_mib": process_peak_mib(),
    }
    more = {
        **results,
        "measures": measured,
        "rates": attack_rates(curves),
        "costs": attack_costs(curves),
    }
    save_results(folder / RESULTS, curves, settings, more)
    return _as_text(curves, results["checks"], identity["classifiers"])


def _as_text(
    curves: Mapping[str, SecurityCurve],
    checks: Mapping[str, Mapping[str, Any]],
    classifiers: Mapping[str, Mapping[str, Any]],
) -> str:
    """Format what the checks and trainings say of each classifier, then the table."""
    lines = [
        line
        for name, entry in classifiers.items()
        for text in entry.get("warnings", ())
        for line in wrap(f"WARNING {name}: {text}", 98, subsequent_indent="  ")
    ]
    if not checks:
        lines.append("checks: none were made, so whether the attacks were strong enough is unknown")
        return "\n".join(lines) + f"\n\n{format_table(curves)}"
    lines += ["checks of the evaluation (all of them in full: report.html):"]
    for name, report in checks.items():
        statuses = [entry["status"] for entry in report["checks"]]
        counts = ", ".join(f"{statuses.count(status)} {status}" for status in ORDER)
        lines.append(f"  {name}: {report['status'].upper()} ({counts})")
        entries = report["checks"]
        doubtful = [entry for status in ORDER[:2] for entry in entries if entry["status"] == status]
        for entry in (*doubtful, *broken_off(entries)):
            status = entry["status"].upper()
            text = f"{status} {entry['name']}: {entry['message']} {entry['advice']}"
            lines += wrap(text, 98, initial_indent="    ", subsequent_indent="      ")
    return "\n".join(lines) + f"\n\n{format_table(curves)}"


def _draw(
    evaluation: Evaluation,
    curves: Mapping[str, SecurityCurve],
    measures: Mapping[str, Measures],
    results: Mapping[str, Mapping[str, Any]],
) -> dict[str, Path]:
    """Draw what there is to draw, caption to file; a figure of other results is removed."""
    folder = evaluation.job.folder
    drawn = ["curve.png"]
    plot_curves(curves, folder / "curve.png")
    if _draw_examples(evaluation, curves, folder / "examples.png"):
        drawn.append("examples.png")
    if _draw_explanation(evaluation, curves, folder / "explanation.png"):
        drawn.append("explanation.png")
    if _draw_roc(curves, measures, folder / "roc.png"):
        drawn.append("roc.png")
    plot_risk_coverage(evaluation.clean.risks, folder / "risk-coverage.png")
    drawn.append("risk-coverage.png")
    if stratified := results.get("stratified"):
        lines = {name: StratifiedCurve.from_dict(curve) for name, curve in stratified.items()}
        plot_stratified(lines, folder / "stratified.png")
        drawn.append("stratified.png")
    if sweeps := results.get("sweeps"):
        panels = {name: ThresholdSweep.from_dict(sweep) for name, sweep in sweeps.items()}
        plot_threshold_sweep(panels, folder / "sweep.png")
        drawn.append("sweep.png")
    for name in CAPTIONS.keys() - drawn:
        (folder / name).unlink(missing_ok=True)
    return {CAPTIONS[name]: folder / name for name in drawn}


def _draw_examples(evaluation: Evaluation, curves: Mapping[str, SecurityCurve], path: Path) -> bool:
    eps = evaluation.example_eps()
    examples = None if eps is None else evaluation.examples(curves, eps)
    if eps is None or examples is None:
        if evaluation.settings.examples:
            text = "no examples.png: no image was attacked that is right for all classifiers"
            evaluation.console.say(text)
        return False
    images, labels, adversarials = examples
    plot_examples(
        path,
        images,
        labels,
        adversarials,
        {name: evaluation.predict(name, points) for name, points in adversarials.items()},
        eps,
        evaluation.job.dataset.classes,
        norm=evaluation.settings.norm,
    )
    return True


def _draw_explanation(
    evaluation: Evaluation, curves: Mapping[str, SecurityCurve], path: Path
) -> bool:
    """Draw what the examples of DNR, or else NR, were decided by; return whether there are any."""
    eps = evaluation.example_eps()
    examples = None if eps is None else evaluation.examples(curves, eps)
    name = next((name for name in ("DNR", "NR") if name in curves), None)
    if examples is None or name is None:
        return False
    job = evaluation.job
    model: Any = evaluation.classifiers[name]
    explain(model, examples[2][name], path, job.images("svm"), job.dataset.classes)
    return True


def _draw_roc(
    curves: Mapping[str, SecurityCurve], measures: Mapping[str, Measures], path: Path
) -> bool:
    """Draw each rejecting classifier at its most telling eps; return whether there is any."""
    lines = {}
    for name, curve in curves.items():
        eps = most_telling_eps(curve)
        if curve.rejects and eps is not None:
            detection = measures[name].detection[eps]
            if detection is not None:
                lines[f"{name}, eps {eps:g}"] = detection
    if lines:
        plot_roc(lines, path)
    return bool(lines)


def _risk_table(risks: Mapping[str, RiskCoverage]) -> dict[str, list[list[Any]]]:
    """List the error among the accepted clean test images at some shares accepted."""
    header = ["", "AURC, %", "accepted, %", "wrong of these, %"]
    header += [f"wrong of {share:.0%} accepted, %" for share in COVERAGES]
    rows = [
        [
            name,
            f"{100 * risk.aurc:.2g}",
            risk.accepted.to_dict() if risk.accepted else "-",
            risk.error.to_dict() if risk.error else "-",
            *(risk.at(share).to_dict() for share in COVERAGES),
        ]
        for name, risk in risks.items()
    ]
    return {"Risk and coverage, clean images": [header, *rows]}


def _warnings(identity: Mapping[str, Any]) -> dict[str, list[list[Any]]]:
    """List what the trainings of the classifiers warned of, if anything."""
    entries = identity["classifiers"].items()
    rows = [[name, text] for name, entry in entries for text in entry.get("warnings", ())]
    return {"Warnings of the training": [["", "warning"], *rows]} if rows else {}


def _tables(results: Mapping[str, Mapping[str, Any]]) -> dict[str, list[list[Any]]]:
    """List the rates of the stratified curves and the sweeps: title to rows, the first a header."""
    tables: dict[str, list[list[Any]]] = {}
    curves, sweeps = results.get("stratified", {}), results.get("sweeps", {})
    if curves:
        title, header = "Stratified robustness", ["", "alpha", "robustness, %", "rejected, %"]
        tables[title] = [header] + [
            [f"{name}, eps {curve['eps']:g}", f"{alpha:g}", robust, rejected]
            for name, curve in curves.items()
            for alpha, robust, rejected in zip(
                curve["alphas"], curve["robustness"], curve["rejection"], strict=True
            )
        ]
    if sweeps:
        header = ["", "theta", "clean accuracy, %", "false rejections, %"]
        header += ["accuracy on fixed points, %", "attacked again, %"]
        tables["Threshold sweep"] = [header] + [
            [
                f"{name}, eps {eps:g}",
                f"{theta:.4g}",
                sweep["clean_accuracy"][column],
                sweep["false_rejection_rate"][column],
                sweep["accuracy"][row][column],
                sweep["reattacked_accuracy"][row][column],
            ]
            for name, sweep in sweeps.items()
            for row, eps in enumerate(sweep["eps"])
            for column, theta in enumerate(sweep["thresholds"])
        ]
    return tables
