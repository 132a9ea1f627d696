"""The part of README.md on compressed classifiers: written by this file.

`python benchmarks/compress_readme.py` rewrites it from benchmarks/results/compress-cpu.json.
"""

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.readme_part import rewrite
from torchdnr.evaluation.metrics import wilson_interval

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/compress-cpu.json"
MARKERS = (
    "<!-- compression: written by benchmarks/compress_readme.py -->",
    "<!-- end of compression -->",
)


def readme_section(results: dict[str, Any]) -> str:
    """Format what compression lost and gained.

    Args:
        results: Contents of compress-cpu.json.

    Returns:
        Markdown: what was run where, a row per classifier and size, and what the rows show.
    """
    environment, models = results["environment"], results["models"]
    samples, first = results["settings"]["samples"], next(iter(models.values()))
    eps = [value for value in first["attack"]["eps"] if value > 0]
    low, high = wilson_interval(0.5, samples)
    lines = [
        f"Data set {results['run']['dataset']}, seed {results['run']['seed']}; one thread of an "
        f"{environment['processor']}, torch {environment['torch']}. Theta set again on the same "
        "calibration images. Clean: accuracy in percent (rejected share) on "
        f"{first['test_samples']:,} test images. Under attack: accuracy in percent, worst case of "
        f"the default line-up run afresh on each model, {samples} of those images "
        f"(95 % interval at 50: {100 * low:.0f} to {100 * high:.0f}), and the median norm at which "
        "an image evades. Times faster: processor time of the SVMs and of the whole model, forward "
        f"/ with gradient, {first['speed']['rows']} images.",
        "",
        "| classifier | vectors | R^2 of test scores | same label | clean | "
        + " | ".join(f"eps {value:g}" for value in eps)
        + " | median norm | SVMs, times faster | model, times faster |",
        "|---|" + "---|" * (7 + len(eps)),
    ]
    lines += [_row(name, entry, models[entry["of"]]) for name, entry in models.items()]
    return "\n".join([*lines, "", *_what_was_lost(models)])


def _row(name: str, entry: dict[str, Any], original: dict[str, Any]) -> str:
    final = list(entry["losses"]["test"].values())[-1] if "losses" in entry else None
    attack = entry["attack"]
    accuracy = [
        f"{100 * rate:.0f}"
        for rate, eps in zip(attack["accuracy"], attack["eps"], strict=True)
        if eps > 0
    ]
    speeds = []
    for part in ("SVMs", "model"):
        ratios = [
            original["speed"]["seconds"][f"{part}, {what}"]
            / entry["speed"]["seconds"][f"{part}, {what}"]
            for what in ("forward", "gradient")
        ]
        speeds.append(" / ".join(f"{ratio:.1f}" for ratio in ratios) if final else "1")
    cells = [
        name,
        f"{entry['total_vectors']:,}",
        f"{final['r2']:.4f}" if final else "-",
        f"{100 * final['label_agreement']:.1f}" if final else "-",
        f"{100 * entry['test_accuracy']:.1f} ({100 * entry['test_rejection_rate']:.1f})",
        *accuracy,
        f"{float(attack['median_evasion_norm']):.2f}",
        *speeds,
    ]
    return f"| {' | '.join(cells)} |"


def _what_was_lost(models: dict[str, Any]) -> list[str]:
    """Count the images whose decision under attack changed, over all eps, size by size."""
    lines = ["Images under attack that evade after compression only, and before it only:", ""]
    for name, entry in models.items():
        attack = entry["attack"]
        if "newly_evaded" not in attack:
            continue
        counts = [
            f"eps {eps:g}: {new} and {old}"
            for eps, new, old in zip(
                attack["eps"], attack["newly_evaded"], attack["no_longer_evaded"], strict=True
            )
            if eps > 0
        ]
        moved = sum(attack["transferred"])
        lines.append(
            f"- {name}: {'; '.join(counts)}; evaded by the original's points alone: {moved}"
        )
    return lines


def main() -> int:
    """Rewrite the part of README.md between the markers."""
    return rewrite(MARKERS, readme_section(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    sys.exit(main())
