"""Merge the runs of the paper's protocol: figures, one JSON per data set, and the README's part."""

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.paper.claims import gather, judge_claims
from benchmarks.paper.run import EXAMPLES_FILE
from benchmarks.paper.study import Study, code_versions, run_folder
from benchmarks.paper.sweep_average import average_sweeps
from benchmarks.paper.tables import ALONE, WORST, as_text, example_figure, readme_section
from torchdnr.evaluation import LINE_SEARCH_PGD, SecurityCurve
from torchdnr.evaluation.curve import plain_json, read_json, write_json
from torchdnr.evaluation.plots import plot_curves, plot_examples
from torchdnr.evaluation.plots_rejection import plot_threshold_sweep
from torchdnr.evaluation.report import load_results
from torchdnr.files import atomic_write_bytes, load_tensors

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/paper"
CLASSIFIERS = "DNN", "NR", "DNR"


def write_report(
    study: Study, name: str, results: Path, variants: Sequence[str] | None = None
) -> str:
    """Merge what the folder holds, draw the figures, and write the numbers.

    Args:
        study: The experiments; nothing is made that the folder lacks.
        name: Beginning of the names of the files.
        results: Folder for the files; that of the repository also brings README.md up to date.
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
    if results == RESULTS:
        _rewrite_readme(name, content)
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
            for key, attack in curves[name].attacks.items():
                spent = {"seconds": sum(attack.seconds), "peak_memory_mib": None, "calls": 1}
                found.setdefault(name, {}).setdefault(f"attack: {key}", []).append(spent)
            own = run_folder(study, variant, settings["run"]) / f"{name.lower()}-costs.json"
            for stage, cost in (read_json(own) if own.exists() else {}).items():
                if stage == "attack":  # the curve knows what a stopped run had spent before
                    cost |= {"seconds": curves[name].seconds}
                found.setdefault(name, {}).setdefault(stage, []).append(cost)
    return found


def reference() -> dict[str, Any]:
    """Look up what the authors' library needs, where bench_secml.py has measured it.

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


def _rewrite_readme(name: str, content: Mapping[str, Any]) -> None:
    """Put the tables between the markers of README.md; new ones come after the other data sets."""
    readme = ROOT / "README.md"
    text = with_section(readme.read_text(), name, readme_section(name, content))
    atomic_write_bytes(readme, text.encode())


def with_section(text: str, name: str, section: str) -> str:
    """Replace a data set's section of README.md, or add it after the last one.

    Raises:
        ValueError: If the text has no such section of any data set.
    """
    begin, end = markers(name)
    if begin not in text:
        last = list(re.finditer(r"<!-- end of paper \S+ -->\n", text))
        if not last:
            raise ValueError(f"README.md has no place for these numbers: add {begin} and {end}")
        place = last[-1].end()
        text = f"{text[:place]}\n{begin}\n{end}\n{text[place:]}"
    between = re.compile("(?<=" + re.escape(begin) + r").*?(?=" + re.escape(end) + ")", re.S)
    return between.sub(lambda _: f"\n{section}\n", text)


def markers(name: str) -> tuple[str, str]:
    """Name the markers of a data set's part of README.md."""
    return f"<!-- paper {name}: written by benchmarks/paper.py -->", f"<!-- end of paper {name} -->"
