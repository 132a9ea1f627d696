"""The part of README.md on the cost of DNR beside its network: written by this file.

`python benchmarks/forward_readme.py` rewrites it from benchmarks/results/forward-cpu.json.
"""

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.readme_part import rewrite

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/forward-cpu.json"
MARKERS = (
    "<!-- forward: written by benchmarks/forward_readme.py -->",
    "<!-- end of forward -->",
)


def readme_section(results: dict[str, Any]) -> str:
    """Format what DNR costs beside its network.

    Args:
        results: Contents of forward-cpu.json.

    Returns:
        Markdown: what was run where, a row per network, classes and batch size, and the target.
    """
    environment, settings = results["environment"], results["settings"]
    lines = [
        f"One thread of an {environment['processor']}, torch {environment['torch']}; "
        f"{settings['vectors']:,} support vectors in each SVM (made up: nothing is fitted, and the "
        "networks have random weights, which does not change the times). Processor time, medians; "
        "other programs ran beside it. Network: milliseconds per batch of the bare network, usual "
        "format / `channels_last`. Overhead: time of DNR over that of its network, less 1, in "
        "percent, usual format / `channels_last`; in brackets the bound, the matrix products "
        "alone that exact scores and gradients need. Compiled: time under `torch.compile` over "
        "that without, in percent, network / DNR, usual format; compiled scores differ from the "
        f"others by at most {_largest_difference(results, 'scores'):.0e} of the largest, "
        f"gradients by at most {_largest_difference(results, 'gradient'):.0e}. "
        "Shares: network, kernels, combiner and the rest (hooks, copies, reductions, noise) of "
        "DNR's time in the usual format, in percent.",
        "",
        "| network | classes | batch | pass | network, ms | overhead (bound), % | compiled, % "
        "| shares, % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in results["cases"]:
        for n, entry in case["batches"].items():
            lines += [_row(case, n, mode, entry[mode]) for mode in ("forward", "gradient")]
    return "\n".join([*lines, "", *_target_lines(results)])


def _largest_difference(results: dict[str, Any], what: str) -> float:
    entries = (entry for case in results["cases"] for entry in case["batches"].values())
    return max(entry["compiled_difference"][what] for entry in entries)


def _row(case: dict[str, Any], n: str, mode: str, found: dict[str, Any]) -> str:
    forms = [found[name] for name in ("DNR", "DNR, channels_last")]
    times = found["seconds"]
    seconds = [times[name] for name in ("network", "network, channels_last")]
    compiled = [times[f"{name}, compiled"] / times[name] for name in ("network", "DNR")]
    cells = [
        case["network"],
        f"{case['classes']:,}",
        n,
        mode,
        " / ".join(f"{1_000 * value:,.1f}" for value in seconds),
        " / ".join(f"{100 * form['overhead']:.0f} ({100 * form['bound']:.0f})" for form in forms),
        " / ".join(f"{100 * ratio:.0f}" for ratio in compiled),
        ", ".join(f"{100 * found['share'][name]:.0f}" for name in found["share"]),
    ]
    return f"| {' | '.join(cells)} |"


def _target_lines(results: dict[str, Any]) -> list[str]:
    """Say where the target is reached, and by how much it is missed elsewhere."""
    target = results["settings"]["target"]
    lines = [
        f"Target: an overhead of at most {100 * target['overhead']:.0f} % on {target['network']}, "
        "forward, usual format:",
        "",
    ]
    for case in results["cases"]:
        if case["network"] != target["network"]:
            continue
        for n, entry in case["batches"].items():
            found = entry["forward"]["DNR"]
            over = found["overhead"] - target["overhead"]
            verdict = "reached" if over <= 0 else f"missed by {100 * over:.0f} points"
            low, high = (f"{100 * value:.0f}" for value in found["quartiles"])
            lines.append(
                f"- {case['classes']:,} classes, batch of {n}: {100 * found['overhead']:.0f} % "
                f"(quartiles {low} to {high}), {verdict}; the products alone take "
                f"{100 * found['bound']:.0f} %"
            )
    return lines


def main() -> int:
    """Rewrite the part of README.md between the markers."""
    return rewrite(MARKERS, readme_section(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    sys.exit(main())
