"""Write the report of an evaluation into its run folder, or find the one that is there."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from textwrap import wrap
from typing import Any

from torchdnr.cli.attack import Evaluation
from torchdnr.cli.console import Console, peak_memory_mib
from torchdnr.cli.run_folder import NETWORK_OPTIONS
from torchdnr.evaluation.checks.result import ORDER, broken_off
from torchdnr.evaluation.curve import SecurityCurve, most_telling_eps
from torchdnr.evaluation.detection import Measures
from torchdnr.evaluation.environment import describe_environment
from torchdnr.evaluation.figures import plot_curves, plot_examples
from torchdnr.evaluation.report.html import save_html
from torchdnr.evaluation.report.rejection_figures import plot_roc
from torchdnr.evaluation.report.table import (
    attack_costs,
    attack_rates,
    format_table,
    load_results,
    save_csv,
    save_results,
)
from torchdnr.files import read_json

RESULTS = "results.json"  # written last: it tells that all is done
FILES = "report.html", RESULTS, "results.csv", "curve.png", "examples.png", "roc.png"


def find_report(evaluation: Evaluation) -> str | None:
    """Format the results that the run folder holds, if they are those of this evaluation.

    Returns:
        Table and checks as text; None if there are none, or others.
    """
    folder, known = evaluation.job.folder, evaluation.identity
    try:
        curves, settings = load_results(folder / RESULTS)
        checks = read_json(folder / RESULTS)["checks"]
        made = settings["files"]
    except (OSError, ValueError, KeyError):
        return None  # none yet, or damaged: written again
    same = {key: settings.get(key) for key in known} == known
    complete = all((folder / name).exists() for name in made)
    return _as_text(curves, checks) if same and complete else None


def write_report(
    evaluation: Evaluation,
    curves: Mapping[str, SecurityCurve],
    checks: Mapping[str, Mapping[str, Any]],
    console: Console,
) -> str:
    """Draw the figures and write every file of the report.

    Args:
        evaluation: What was attacked, and how.
        curves: Classifier name to its curve.
        checks: Classifier name to its checks; empty if none were made.
        console: For messages.

    Returns:
        Table and checks as text.

    Raises:
        OSError: If a file cannot be written; an earlier one then stays as it was.
    """
    folder, identity = evaluation.job.folder, evaluation.identity
    measures = evaluation.measure(curves)
    plot_curves(curves, folder / "curve.png")
    figures = {"Accuracy under attack and rejection rate": folder / "curve.png"}
    if _draw_examples(evaluation, folder / "examples.png", console):
        figures["Adversarial examples"] = folder / "examples.png"
    if _draw_roc(curves, measures, folder / "roc.png"):
        figures["Detection of adversarial images at every threshold"] = folder / "roc.png"
    save_csv(folder / "results.csv", curves)
    files = ["report.html", "results.csv", *(path.name for path in figures.values())]
    settings = {
        **identity,
        "environment": describe_environment(evaluation.job.device),
        "processes": evaluation.processes.count,
        "command": command_of(evaluation),
        "files": files,
    }
    measured = {name: found.to_dict() for name, found in measures.items()}
    save_html(
        folder / "report.html",
        curves,
        settings=settings,
        checks=checks,
        measures=measured,
        figures=figures,
        title=f"Security evaluation: {identity['run']['dataset']}",
        command=settings["command"],
    )
    settings["cost"] = {
        "stage_seconds": console.seconds,
        "seconds": console.total_seconds,
        "peak_memory_mib": peak_memory_mib(),
    }
    more = {
        "checks": checks,
        "measures": measured,
        "rates": attack_rates(curves),
        "costs": attack_costs(curves),
    }
    save_results(folder / RESULTS, curves, settings, more)
    return _as_text(curves, checks)


def command_of(evaluation: Evaluation) -> str:
    """Write the command that makes the same numbers, with every option that they depend on."""
    run, attack = evaluation.identity["run"], evaluation.identity["attack"]
    options = {
        "dataset": run["dataset"],
        "seed": run["seed"],
        **{f"{part}-samples": run[f"{part}_samples"] for part in ("network", "svm", "threshold")},
        **{name.replace("_", "-"): run.get(name) for name in NETWORK_OPTIONS},
        **{name: run[name] for name in ("epochs", "lr", "momentum")},
        "train-batch-size": run["batch_size"],
        "layers": run["layers"],
        "rejection-rate": run["rejection_rate"],
        "attack": attack["attacks"],
        **{name: attack[name] for name in ("norm", "eps", "samples", "objective", "steps")},
        "restarts": attack["restarts"],
        "batch-size": attack["batch_size"],
        "check-samples": attack["check_samples"],
        "examples": attack["examples"],
        "example-eps": attack["example_eps"],
    }
    words = ["python", "attack.py"]
    for name, value in options.items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *(_word(entry) for entry in values)]
    return shlex.join(words + ([] if attack["checks"] else ["--no-checks"]))


def _word(value: object) -> str:
    whole = isinstance(value, float) and value.is_integer()
    return str(int(value)) if whole else str(value)  # all digits: it makes the same numbers


def _as_text(curves: Mapping[str, SecurityCurve], checks: Mapping[str, Mapping[str, Any]]) -> str:
    """Format what the checks say of each classifier, failures in full, then the table."""
    if not checks:
        return (
            "checks: none were made, so whether the attacks were strong enough is unknown\n\n"
            f"{format_table(curves)}"
        )
    lines = ["checks of the evaluation (all of them in full: report.html):"]
    for name, report in checks.items():
        found = [entry["status"] for entry in report["checks"]]
        counts = ", ".join(f"{found.count(status)} {status}" for status in ORDER)
        lines.append(f"  {name}: {report['status'].upper()} ({counts})")
        entries = report["checks"]
        doubtful = [entry for status in ORDER[:2] for entry in entries if entry["status"] == status]
        for entry in (*doubtful, *broken_off(entries)):
            status = entry["status"].upper()
            text = f"{status} {entry['name']}: {entry['message']} {entry['advice']}"
            lines += wrap(text, 98, initial_indent="    ", subsequent_indent="      ")
    return "\n".join(lines) + f"\n\n{format_table(curves)}"


def _draw_examples(evaluation: Evaluation, path: Path, console: Console) -> bool:
    found = evaluation.examples()
    if found is None:
        if evaluation.settings["examples"]:
            console.say("no examples.png: no attacked image is right for all classifiers")
        path.unlink(missing_ok=True)  # it would show other results than these
        return False
    images, labels, adversarials = found
    plot_examples(
        path,
        images,
        labels,
        adversarials,
        {name: evaluation.predict(name, points) for name, points in adversarials.items()},
        evaluation.settings["example_eps"],
        evaluation.job.dataset.classes,
        norm=evaluation.norm,
    )
    return True


def _draw_roc(
    curves: Mapping[str, SecurityCurve], measures: Mapping[str, Measures], path: Path
) -> bool:
    """Draw each rejecting classifier at the eps that tells most about it."""
    lines = {}
    for name, curve in curves.items():
        eps = most_telling_eps(curve)
        if curve.rejects and eps is not None and (found := measures[name].detection[eps]):
            lines[f"{name}, eps {eps:g}"] = found
    if lines:
        plot_roc(lines, path)
    else:
        path.unlink(missing_ok=True)
    return bool(lines)
