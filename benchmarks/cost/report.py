"""The part of README.md on many samples and classes: written by this file.

`python benchmarks/scale_readme.py` rewrites it from benchmarks/results/scale.json.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.readme_part import rewrite

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/scale.json"
MARKERS = (
    "<!-- scale: written by benchmarks/scale_readme.py -->",
    "<!-- end of scale -->",
)
SIZES = {"samples": ("n", "images"), "layer": ("n", "samples"), "classes": ("classes", "classes")}


def readme_section(results: Mapping[str, Any]) -> str:
    """Format how a fit grows.

    Args:
        results: Contents of scale.json.

    Returns:
        Markdown: a table per way of growing, with exponents, and what ImageNet would take.
    """
    environment, settings = results["environment"], results["settings"]
    limit = settings["memory_limit"] / 2**30
    lines = [
        f'One layer\'s SVM, C = 10, gamma = "scale", on {settings["threads"]} thread of an '
        f"{environment['processor']}, torch {environment['torch']}; `memory_limit` {limit:g} GiB; "
        "seconds of the processor, memory of the whole process. All fits met the tolerance."
        if not _failures(results)
        else f"{_failures(results)} problems missed the tolerance.",
    ]
    for kind, (size, title) in SIZES.items():
        entries = sorted(results["sections"][kind].values(), key=lambda one: one[size])
        first = entries[0]
        what = {
            "samples": "MNIST digits as pixels, 10 classes, d = 784; beyond 60,000 moved copies",
            "layer": f"Gaussian clusters, d = {first['d']} as of a layer, 10 classes",
            "classes": f"Gaussian clusters, {first['n']:,} samples, d = {first['d']}",
        }[kind]
        lines += [
            "",
            f"{what}:",
            "",
            f"| {title} | seconds | memory, GiB | support vectors | kernel rows evaluated |",
            "|---|---|---|---|---|",
            *(_row(entry, size) for entry in entries),
            _exponents(results["growth"][kind]),
        ]
    return "\n".join([*lines, "", _estimate(results["estimate"])])


def _failures(results: Mapping[str, Any]) -> int:
    return sum(
        entry["not_converged"]
        for section in results["sections"].values()
        for entry in section.values()
    )


def _row(entry: Mapping[str, Any], size: str) -> str:
    memory = entry["peak_memory_mib"]
    cells = (
        f"{entry[size]:,}",
        f"{entry['processor_seconds']:.1f}",
        "-" if memory is None else f"{memory / 1024:.2f}",
        f"{entry['support_vectors']:,}",
        f"{entry['kernel_rows']:,}",
    )
    return f"| {' | '.join(cells)} |"


def _exponents(growth: Mapping[str, Any]) -> str:
    names = "processor_seconds", "peak_memory_mib", "support_vectors", "kernel_rows"
    cells = [f"{growth[name]['exponent']:.2f}" if name in growth else "-" for name in names]
    return f"| *exponent, last four* | {' | '.join(f'*{cell}*' for cell in cells)} |"


def _estimate(found: Mapping[str, Any]) -> str:
    whole, subset, gpu = found["all"], found["subset"], found["gpu"]
    fits = "is more than" if whole["state_gib"] > gpu["memory_gib"] else "just fits into"

    def span(entry: Mapping[str, Any], what: str) -> str:
        return f"{_time(entry['layer'][what])} to {_time(entry['samples'][what])}"

    return (
        f"**ImageNet, estimated, not measured**: {whole['images']:,} images, 1,000 classes, one "
        "layer, given (C, gamma). Carried on by these exponents a fit takes "
        f"{span(whole, 'processor_hours')} of such a core, if it grows as that to clusters or as "
        f"that to digits. An {gpu['name']} multiplies matrices {found['faster']:,.0f} times as "
        "fast; if all of a fit gained as much, which it will not, it would take "
        f"{span(whole, 'hours_one_gpu')} on one and {span(whole, 'hours_eight_gpus')} on eight. "
        f"Its state in float64 takes {whole['state_gib']:.0f} GiB on every GPU, which {fits} the "
        f"{gpu['memory_gib']} of one, and a search over 20 points in 5 folds takes many times all "
        f"that. {subset['images']:,} of the images take {span(subset, 'processor_hours')} of a "
        f"core and {subset['state_gib']:.1f} GiB: fit on such a part. No fit has run on a GPU yet."
    )


def _time(hours: float) -> str:
    for unit, name in ((24.0, "days"), (1.0, "hours"), (1 / 60, "minutes")):
        if hours >= 2 * unit:
            return f"{hours / unit:.0f} {name}"
    return f"{3600 * hours:.0f} seconds"


def main() -> int:
    """Rewrite the part of README.md between the markers."""
    return rewrite(MARKERS, readme_section(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    sys.exit(main())
