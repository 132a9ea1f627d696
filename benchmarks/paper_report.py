"""Merge the runs of the paper's protocol: figures, one JSON per data set, and the README's part."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from paper_claims import Claim, gather, judge_claims
from paper_run import examples, network_accuracy
from paper_study import Study, run_folder
from paper_tables import ALONE, WORST, as_text, example_figure, readme_section

from torchdnr.evaluation import LINE_SEARCH_PGD, SecurityCurve
from torchdnr.evaluation.curve import plain_json, read_json, write_json
from torchdnr.evaluation.environment import describe_environment
from torchdnr.evaluation.plots import plot_curves, plot_examples
from torchdnr.evaluation.plots_rejection import plot_threshold_sweep
from torchdnr.evaluation.report import load_results
from torchdnr.evaluation.sweep_average import average_sweeps
from torchdnr.files import atomic_write_bytes

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/paper"


def write_report(study: Study, name: str) -> str:
    """Merge what the folder holds, draw the figures, and write the numbers.

    Args:
        study: The experiments.
        name: Beginning of the names of the files.

    Returns:
        Tables as text.

    Raises:
        ValueError: If no run is complete.
    """
    found = {variant: _runs(study, variant) for variant in study.protocol.variants}
    found = {variant: runs for variant, runs in found.items() if runs}
    if not found:
        raise ValueError(f"no run in {study.folder} is complete; call without --stage report")
    RESULTS.mkdir(parents=True, exist_ok=True)
    variants = {
        variant: _variant(study, variant, runs, RESULTS / f"{name}-{variant}")
        for variant, runs in found.items()
    }
    first = next(iter(found.values()))[0][0]["DNR"]
    content = {
        "protocol": plain_json(study.protocol.to_dict()),
        "environment": first.environment,
        "reported_on": describe_environment(study.device),
        "variants": variants,
        "reference": reference(),
        "cost": {variant: _costs(study, variant, runs) for variant, runs in found.items()},
    }
    write_json(RESULTS / f"{name}.json", content)
    _rewrite_readme(name, content)
    return as_text(content)


def _runs(study: Study, variant: str) -> list[tuple[dict[str, SecurityCurve], dict, dict]]:
    """Load the complete runs of a variant, made with these attacks: curves, settings, sweeps."""
    found = []
    for run in range(study.protocol.runs):
        path = run_folder(study, variant, run) / "results.json"
        if path.exists():
            curves, settings = load_results(path)
            if settings["attack"] == study.attack_settings:
                found.append((curves, settings, read_json(path)["sweeps"]))
    return found


def _variant(
    study: Study, variant: str, runs: Sequence[tuple[dict, dict, dict]], figures: Path
) -> dict[str, Any]:
    """Draw the figures of a variant and collect its numbers."""
    several = {name: [curves[name] for curves, _, _ in runs] for name in runs[0][0]}
    plot_curves(several, f"{figures}-fig3.png")
    sweeps = {name: [found[name] for _, _, found in runs] for name in runs[0][2]}
    means = {name: average_sweeps(name, parts) for name, parts in sweeps.items()}
    plot_threshold_sweep(means, f"{figures}-fig4.png")
    number = example_figure(study.protocol.to_dict())
    _draw_examples(study, variant, f"{figures}-fig{number}.png")
    alone = {
        name: [curve.attacks[LINE_SEARCH_PGD] for curve in curves]
        for name, curves in several.items()
    }
    eps = study.protocol.nr_rejects_more_at
    worst = judge_claims({key: gather(value) for key, value in several.items()}, eps, sweeps)
    paper = judge_claims({key: gather(value) for key, value in alone.items()}, eps, None)
    return {
        "network": {
            "name": study.protocol.variants[variant].network.__name__,
            "test_accuracy": network_accuracy(study, study.protocol.variants[variant]),
        },
        "runs": [settings["run"] for _, settings, _ in runs],
        "clean": [settings["clean"] for _, settings, _ in runs],
        "curves": {
            WORST: {key: _rates(value) for key, value in several.items()},
            ALONE: {key: _rates(value) for key, value in alone.items()},
        },
        "claims": {
            WORST: [claim.to_dict() for claim in worst],
            ALONE: [claim.to_dict() for claim in paper],
        },
        "sweeps": {name: mean.to_dict() for name, mean in means.items()},
    }


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


def _draw_examples(study: Study, variant: str, path: str) -> None:
    images, labels, found, predicted = examples(study, variant)
    if len(images):
        plot_examples(
            path,
            images,
            labels,
            found,
            predicted,
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
    for name in ("DNN", "NR", "DNR"):
        for curves, settings, _ in runs:
            for key, attack in curves[name].attacks.items():
                spent = {"seconds": sum(attack.seconds), "peak_memory_mib": None, "calls": 1}
                found.setdefault(name, {}).setdefault(f"attack: {key}", []).append(spent)
            own = run_folder(study, variant, settings["run"]) / f"{name.lower()}-costs.json"
            for stage, cost in (read_json(own) if own.exists() else {}).items():
                found.setdefault(name, {}).setdefault(stage, []).append(cost)
    return found


def reference() -> dict[str, float]:
    """Look up what the authors' library needs, where bench_secml.py has measured it.

    Returns:
        Processor seconds of one attack on one image, by eps; on MNIST digits, one thread.
    """
    path = RESULTS.parent / "secml-cpu.json"
    if not path.exists():
        return {}
    cases = read_json(path)["compare"]["found"]
    return {
        key: case["secml"]["PGDExp"]["cpu_seconds_per_sample"]
        for key, case in cases.items()
        if key.startswith("eps ")
    }


def _rewrite_readme(name: str, content: Mapping[str, Any]) -> None:
    """Put the tables between the markers of README.md, if it has them for this data set."""
    begin, end = markers(name)
    readme = ROOT / "README.md"
    between = re.compile("(?<=" + re.escape(begin) + r").*?(?=" + re.escape(end) + ")", re.S)
    text = between.sub(lambda _: f"\n{readme_section(name, content)}\n", readme.read_text())
    atomic_write_bytes(readme, text.encode())


def markers(name: str) -> tuple[str, str]:
    """Name the markers of a data set's part of README.md."""
    return f"<!-- paper {name}: written by benchmarks/paper.py -->", f"<!-- end of paper {name} -->"


__all__ = ["Claim", "markers", "readme_section", "write_report"]
