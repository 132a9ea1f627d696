"""Merge the runs of the paper's protocol: figures, and one JSON per data set."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS as ALL_RESULTS
from benchmarks.paper.claims import gather, judge_claims
from benchmarks.paper.report import ALONE, WORST, as_text, example_figure
from benchmarks.paper.run import EXAMPLES_FILE, Study, code_versions, run_folder
from torchdnr.evaluation import LINE_SEARCH_PGD, SecurityCurve, attack_costs
from torchdnr.evaluation.figures import plot_curves, plot_examples, plot_threshold_sweep
from torchdnr.evaluation.metrics import Estimate
from torchdnr.evaluation.report.table import load_results
from torchdnr.evaluation.threshold_sweep import ThresholdSweep
from torchdnr.files import load_tensors, plain_json, read_json, write_json

RESULTS = ALL_RESULTS / "paper"
CLASSIFIERS = "DNN", "NR", "DNR"
_PER_THETA = "clean_accuracy", "false_rejection_rate"
_PER_EPS = "accuracy", "rejection_rate", "reattacked_accuracy", "reattacked_rejection_rate"


def write_report(
    study: Study, name: str, results: Path, variants: Sequence[str] | None = None
) -> str:
    """Merge what the folder holds, draw the figures, and write the numbers.

    Args:
        study: The experiments; nothing is made that the folder lacks.
        name: Beginning of the names of the files.
        results: Folder for the files.
        variants: Those that have to be of these settings; default: all. Others are left out, with
            a warning, where they are not.

    Returns:
        Tables as text.

    Raises:
        ValueError: If no run is complete, or one was made with other settings.
    """
    found = {}
    for variant in study.protocol.variants:
        try:
            found[variant] = _runs(study, variant)
        except ValueError as error:
            if variants is None or variant in variants:
                raise
            warnings.warn(f"the report leaves out {variant}: {error}", stacklevel=2)
    found = {variant: runs for variant, runs in found.items() if runs}
    if not found:
        raise ValueError(f"no run in {study.folder} is complete; call without --stage report")
    results.mkdir(parents=True, exist_ok=True)
    parts = {
        variant: _variant(study, variant, runs, results / f"{name}-{variant}")
        for variant, runs in found.items()
    }
    content = {
        "protocol": plain_json(study.protocol.to_dict()),
        "variants": parts,
        "reference": reference(),
        "environments": _environments(found),
        "code": _code(study, found),
        "cost": {variant: _costs(study, variant, runs) for variant, runs in found.items()},
    }
    write_json(results / f"{name}.json", content)
    return as_text(content)


def _runs(study: Study, variant: str) -> list[tuple[dict[str, SecurityCurve], dict, dict]]:
    """Load the complete runs of a variant: curves, settings, sweeps."""
    found = []
    wanted = {"classifiers": study.classifier_settings(), "attack": study.attack_settings()}
    for run in range(study.protocol.runs):
        path = run_folder(study, variant, run) / "results.json"
        if not path.exists():
            continue
        curves, settings = load_results(path)
        for key, value in {**wanted, "run": run, "variant": variant}.items():
            if settings.get(key) != value:
                raise ValueError(
                    f"{path} was made with another {key}: call without --stage report for run "
                    f"{run} of {variant}, or move its folder away"
                )
        found.append((curves, settings, read_json(path)["sweeps"]))
    if len({settings["network"]["digest"] for _, settings, _ in found}) > 1:
        raise ValueError(
            f"the runs of {variant} in {study.folder} are of different networks; train one, copy "
            "it to every machine, and only then make the runs"
        )
    return found


def _code(study: Study, found: Mapping[str, Sequence[tuple[dict, dict, dict]]]) -> list[str]:
    """List the versions of the library's code that made the pieces, each once."""
    folders = [study.folder] + [
        run_folder(study, variant, settings["run"])
        for variant, runs in found.items()
        for _, settings, _ in runs
    ]
    return sorted({version for folder in folders for version in code_versions(folder)})


def _environments(
    found: Mapping[str, Sequence[tuple[dict[str, SecurityCurve], dict, dict]]],
) -> list[dict[str, Any]]:
    """List the machines and versions, each once."""
    every = [curves["DNR"].environment for runs in found.values() for curves, _, _ in runs]
    return [entry for index, entry in enumerate(every) if entry not in every[:index]]


def _variant(
    study: Study, variant: str, runs: Sequence[tuple[dict, dict, dict]], figures: Path
) -> dict[str, Any]:
    """Draw the figures of a variant and collect its numbers."""
    several = {name: [curves[name] for curves, _, _ in runs] for name in runs[0][0]}
    plot_curves(several, f"{figures}-fig3.png")
    means = {
        name: average_sweeps(name, [sweeps[name] for _, _, sweeps in runs]) for name in runs[0][2]
    }
    plot_threshold_sweep(means, f"{figures}-fig4.png")
    number = example_figure(study.protocol.to_dict())
    _draw_examples(study, variant, runs[0][1]["run"], f"{figures}-fig{number}.png")
    alone = {
        name: [curve.attacks[LINE_SEARCH_PGD] for curve in curves]
        for name, curves in several.items()
    }
    eps, sweeps = study.protocol.nr_rejects_more_at, {key: m.to_dict() for key, m in means.items()}
    drawn = [study.test_rows(settings["run"]) for _, settings, _ in runs]
    attacked = [rows[: study.protocol.attacked] for rows in drawn]
    clean = {
        name: torch.tensor([one for _, s, _ in runs for one in s["clean"][name]["right"]]).bool()
        for name in several
    }
    claims = {
        part: judge_claims(
            clean,
            torch.cat(drawn),
            {key: gather(values, attacked) for key, values in curves.items()},
            eps,
            fitting,
        )
        for part, curves, fitting in ((WORST, several, sweeps), (ALONE, alone, None))
    }
    return {
        "network": {
            "name": study.protocol.variants[variant].network.__name__,
            **runs[0][1]["network"],
        },
        "runs": [settings["run"] for _, settings, _ in runs],
        "clean": [_without(settings["clean"], "right") for _, settings, _ in runs],
        "curves": {
            WORST: {key: _rates(value) for key, value in several.items()},
            ALONE: {key: _rates(value) for key, value in alone.items()},
        },
        "claims": {key: [claim.to_dict() for claim in found] for key, found in claims.items()},
        "sweeps": sweeps,
    }


def _without(entries: Mapping[str, Mapping[str, Any]], key: str) -> dict[str, dict[str, Any]]:
    return {name: {k: v for k, v in entry.items() if k != key} for name, entry in entries.items()}


def _rates(runs: Sequence[Any]) -> dict[str, Any]:
    """Collect rates per run, their mean and standard deviation (None for one run)."""
    found: dict[str, Any] = {"eps": list(runs[0].eps), "samples": [len(run.labels) for run in runs]}
    for rate in ("accuracy", "rejection_rate"):
        values = torch.tensor([getattr(run, rate) for run in runs], dtype=torch.float64)
        deviation = values.std(dim=0).tolist() if len(runs) > 1 else None
        found[rate] = {
            "runs": values.tolist(),
            "mean": values.mean(dim=0).tolist(),
            "standard_deviation": deviation,
        }
    return found


def _draw_examples(study: Study, variant: str, run: int, path: str) -> None:
    found, _ = load_tensors(run_folder(study, variant, run) / EXAMPLES_FILE, kind="examples")
    if len(found["images"]):
        plot_examples(
            path,
            found["images"],
            found["labels"],
            {name: found[f"{name}.points"] for name in CLASSIFIERS},
            {name: found[f"{name}.predictions"] for name in CLASSIFIERS},
            study.protocol.example_eps,
            study.data.classes,
        )


def _costs(
    study: Study, variant: str, runs: Sequence[tuple[dict, dict, dict]]
) -> dict[str, dict[str, Any]]:
    """Collect what every stage cost, per classifier: of the network, and of each run."""
    network = study.protocol.variants[variant].network.__name__
    path = study.folder / f"{network}-costs.json"
    trained = [read_json(path)["network"]] if path.exists() else []
    found: dict[str, Any] = {"DNN": {"network": trained}}
    for name in CLASSIFIERS:
        for curves, settings, _ in runs:
            for cost in attack_costs({name: curves[name]}):
                spent = {"seconds": cost["seconds"], "peak_memory_mib": None, "calls": 1}
                key = f"attack: {cost['attack']}"
                found.setdefault(name, {}).setdefault(key, []).append(spent)
            own = run_folder(study, variant, settings["run"]) / f"{name.lower()}-costs.json"
            for stage, cost in (read_json(own) if own.exists() else {}).items():
                if stage == "attack":  # the curve knows what a stopped run had spent before
                    cost |= {"seconds": curves[name].seconds}
                found.setdefault(name, {}).setdefault(stage, []).append(cost)
    return found


def reference() -> dict[str, Any]:
    """Look up what the authors' library needs, where benchmarks.attacks.secml has measured it.

    Returns:
        On MNIST digits, one thread. "attack": processor seconds of one attack on one image, by
        eps; "fit": seconds and MiB of the fit of DNR, of ours beside it, and the images.
    """
    path = RESULTS.parent / "secml-cpu.json"
    if not path.exists():
        return {}
    record = read_json(path)
    found: dict[str, Any] = {
        "attack": {
            key: case["secml"]["PGDExp"]["cpu_seconds_per_sample"]
            for key, case in record["compare"]["found"].items()
            if key.startswith("eps ")
        }
    }
    if "fit" in record:
        fit = record["fit"]["found"]
        found["fit"] = {
            "samples": fit["samples"],
            "secml": fit["secml"],
            "ours": {
                "seconds": fit["ours"]["seconds"][0],  # the first: secml fits once
                "peak_memory_mib": fit["ours"]["peak_memory_mib"],
            },
        }
    return found


# --- averages over theta ---


def average_sweeps(name: str, sweeps: Sequence[Mapping[str, Any]]) -> ThresholdSweep:
    """Average the sweeps of several runs whose thresholds reject the same shares.

    The thresholds of the runs differ, and so do the rates that they reach on clean inputs; the
    k-th thresholds of all runs are put together. Of several runs the ends of every interval are
    mean minus and plus standard deviation; of one they are its own confidence interval.

    Args:
        name: Name of the classifier.
        sweeps: ``ThresholdSweep.to_dict()`` of each run.

    Returns:
        ``ThresholdSweep`` of means.

    Raises:
        ValueError: If there is none, or they differ in eps or in the number of thresholds.
    """
    shapes = {(tuple(sweep["eps"]), len(sweep["thresholds"]), sweep["norm"]) for sweep in sweeps}
    if len(shapes) != 1:
        raise ValueError(
            "sweeps must be at least one, over the same eps, norm and number of thresholds, got "
            f"{len(shapes)} kinds"
        )
    first = sweeps[0]
    rows: dict[str, Any] = {key: _average([sweep[key] for sweep in sweeps]) for key in _PER_THETA}
    for key in _PER_EPS:
        known = all(sweep[key] is not None for sweep in sweeps)
        rows[key] = None
        if known:
            rows[key] = [
                _average([sweep[key][row] for sweep in sweeps]) for row in range(len(first["eps"]))
            ]
    thetas = torch.tensor([sweep["thresholds"] for sweep in sweeps], dtype=torch.float64)
    return ThresholdSweep(
        name=name,
        norm=first["norm"],
        eps=list(first["eps"]),
        thresholds=thetas.mean(dim=0).tolist(),
        settings={**first["settings"], "runs": len(sweeps)},
        **rows,
    )


def _average(runs: Sequence[Sequence[Mapping[str, Any]]]) -> list[Estimate]:
    """Average estimates over the runs, theta by theta."""
    if len(runs) == 1:
        return [Estimate(**entry) for entry in runs[0]]
    values = torch.tensor([[entry["value"] for entry in run] for run in runs], dtype=torch.float64)
    middle, deviation = values.mean(dim=0), values.std(dim=0)
    low, high = (middle - deviation).clamp(0, 1), (middle + deviation).clamp(0, 1)
    counts = [sum(run[index]["n"] for run in runs) for index in range(len(runs[0]))]
    columns = zip(middle.tolist(), low.tolist(), high.tolist(), counts, strict=True)
    return [Estimate(*column) for column in columns]
