"""The part of README.md on many samples and classes: written by this file.

`python benchmarks/scale_readme.py` rewrites it from benchmarks/results/scale.json.
"""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchdnr.files import atomic_write_bytes

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/scale.json"
MARKERS = (
    "<!-- scale: written by benchmarks/scale_readme.py -->",
    "<!-- end of scale -->",
)
SIZES = {"samples": ("n", "images"), "classes": ("classes", "classes")}


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
        what = (
            "MNIST digits as pixels, 10 classes; beyond 60,000 moved copies of them"
            if kind == "samples"
            else f"Gaussian clusters, {first['n']:,} samples, d = {first['d']}"
        )
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

    def hours(entry: Mapping[str, Any], name: str) -> str:
        value = entry[name]
        return f"{value:.0f} hours" if value >= 1 else f"{60 * value:.0f} minutes"

    def flop(value: float) -> str:
        digits, power = f"{value:.0e}".split("e")
        return f"{digits}e{int(power)}"

    return (
        f"**ImageNet, estimated, not measured**: {whole['images']:,} images, 1,000 classes, one "
        f"layer of {whole['dimension']} features. Carried on by these exponents a fit evaluates "
        f"{whole['kernel_rows']:,.0f} kernel rows, {flop(whole['kernel_flop'])} operations, and "
        f"multiplies them by coefficients of 1,000 problems, {flop(whole['product_flop'])} more. "
        f"At what an {gpu['name']} can do at best that is {hours(whole, 'hours_one_gpu')} on one "
        f"and {hours(whole, 'hours_eight_gpus')} on eight, rows that have to be evaluated again "
        f"not counted; and the state of 1,000 problems takes {whole['state_gib']:.0f} GiB on every "
        f"GPU, which {'is more than' if whole['state_gib'] > gpu['memory_gib'] else 'fits into'} "
        f"its {gpu['memory_gib']}. A search over 20 points in 5 folds takes many times that. "
        f"{subset['images']:,} of the images take {hours(subset, 'hours_one_gpu')} at best and "
        f"{subset['state_gib']:.1f} GiB: fit on such a part, with given (C, gamma)."
    )


def main() -> int:
    """Rewrite the part of README.md between the markers."""
    readme = ROOT / "README.md"
    between = re.compile(
        "(?<=" + re.escape(MARKERS[0]) + r").*?(?=" + re.escape(MARKERS[1]) + ")", re.S
    )
    section = readme_section(json.loads(RESULTS.read_text()))
    found = readme.read_text()
    if not between.search(found):
        print(f"README.md has no markers {MARKERS[0]} and {MARKERS[1]}", file=sys.stderr)
        return 2
    text = between.sub(lambda _: f"\n{section}\n", found)
    atomic_write_bytes(readme, text.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
