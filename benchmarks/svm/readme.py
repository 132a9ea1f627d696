"""The part of README.md that holds the numbers of bench_svm.py: written and checked by this file.

`python benchmarks/svm_readme.py` rewrites it from benchmarks/results/svm-cpu.json.
"""

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.readme_part import rewrite
from benchmarks.svm.contenders import OURS
from benchmarks.svm.report import number, ratio, seconds

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/svm-cpu.json"
MARKERS = "<!-- svm: written by benchmarks/svm_readme.py -->", "<!-- end of svm -->"
PEERS = ("sklearn", "sklearnex")


def readme_section(results: dict[str, Any]) -> str:
    """Format times and targets.

    Args:
        results: The whole JSON.

    Returns:
        Markdown: one line on what was run where, and two tables.
    """
    environment, settings = results["environment"], results["settings"]
    versions = results["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in sorted(versions) if versions[name])
    lines = [
        f"{environment['threads']} threads of an {environment['processor']}, torch "
        f"{environment['torch']}; {named}. Medians of up to {settings['repeats']} runs; "
        "\\* marks a time extrapolated from a part. All solutions are certified in float64.",
        "",
        "| n = 10,000 unless said otherwise | ours | scikit-learn | scikit-learn-intelex |",
        "|---|---|---|---|",
    ]
    for section, verb in (("fit", "10 one-vs-rest fits"), ("grid", "5-fold search of 20 points")):
        for name, case in results["sections"].get(section, {}).items():
            if ", n=" in name and not name.endswith(f"n={settings['samples']}"):
                continue
            label = name.removesuffix(f", n={settings['samples']}")
            lines.append(f"| {verb}: {label} | {' | '.join(_cells(case))} |")
    for name, case in results["sections"].get("decision", {}).items():
        lines.append(f"| 2,000 decisions: {name} | {' | '.join(_cells(case))} |")
    lines += ["", "| target | reached | |", "|---|---|---|"]
    for row in results["targets"]:
        value = number(row["value"], ".3g")
        name = row["name"].replace("|", "\\|")  # a bare one would end the cell
        lines.append(f"| {name} {row['target']} | {value} | {row['status']} |")
    return "\n".join(lines)


def _cells(case: dict[str, Any]) -> list[str]:
    ours = seconds(case, OURS)
    cells = [f"{number(ours)} s"]
    for peer in PEERS:
        if seconds(case, peer) is None:
            cells.append("-")
            continue
        mark = "\\*" if "extrapolated_from" in case["peers"][peer] else ""
        cells.append(f"{number(seconds(case, peer))} s{mark} ({number(ratio(case, peer), '.2g')}x)")
    return cells


def main() -> int:
    """Rewrite the part of README.md between the markers."""
    return rewrite(MARKERS, readme_section(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    sys.exit(main())
