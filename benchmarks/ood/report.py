"""The part of README.md on unknown images: written by this file.

`python benchmarks/ood_readme.py` rewrites it from benchmarks/results/ood-cpu.json.
"""

import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.readme_part import rewrite

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/ood-cpu.json"
MARKERS = (
    "<!-- unknown images: written by benchmarks/ood_readme.py -->",
    ("<!-- end of unknown images -->"),
)
CONTROL = "MNIST's test digits"
CORRUPTED = "corrupted"
STRENGTH = 2  # which of the five is in the table: the middle one


def readme_section(results: dict[str, Any]) -> str:
    """Format how well rejection finds unknown images.

    Args:
        results: Contents of ood-cpu.json.

    Returns:
        Markdown: what was run where, the detectors on noise, other data sets and corrupted images,
        and whether DNR beats each of them.
    """
    clean, *sets = results["sets"]
    whole = [entry for entry in sets if entry["kind"] != CORRUPTED]
    corrupted = [entry for entry in sets if entry["kind"] == CORRUPTED]
    strengths: dict[str, list[dict[str, Any]]] = {}
    for entry in corrupted:
        strengths.setdefault(entry["name"], []).append(entry)
    middle = [entries[STRENGTH] for entries in strengths.values()]
    lines = [
        _conditions(results, clean, whole, corrupted),
        "",
        *_table(results, clean, whole),
        "",
        f"Corrupted digits, {len(next(iter(strengths.values())))} strengths of each kind; here the "
        "middle one, all of them in the figure:",
        "",
        *_table(results, clean, middle),
        "",
        *_verdict(sets),
    ]
    return "\n".join(lines)


def _conditions(
    results: dict[str, Any],
    clean: dict[str, Any],
    whole: list[dict[str, Any]],
    corrupted: list[dict[str, Any]],
) -> str:
    settings, environment = results["settings"], results["environment"]
    halves = f"{corrupted[0]['images']} corrupted digits against {corrupted[0]['clean_images']}"
    sizes = sorted({entry["images"] for entry in whole})
    images = " to ".join(f"{size:,}" for size in dict.fromkeys([sizes[0], sizes[-1]]))
    text = (
        f"Data set {results['run']['dataset']}, seed {settings['seed']}; "
        f"{clean['images']:,} clean test digits, of which the network alone reads "
        f"{_percent(clean['accuracy'])} %; {images} images of every other set, "
        f"{halves} clean ones of others. Mahalanobis and kNN (k = {settings['neighbours']}) fitted "
        f"on the {settings['fit_images']:,} images of DNR's fit; NR reads {settings['nr_layer']}, "
        f"all layers are {', '.join(settings['layers'])}. {environment['threads']} thread of an "
        f"{environment['processor']}, torch {environment['torch']}, pytorch-ood "
        f"{results['versions']['pytorch-ood']}. Cells: AUROC; FPR at 95 % TPR, in percent with "
        "95 % intervals; the unknown image is positive, so a high AUROC and a low FPR are good."
    )
    if results["missing"]:
        text += f" Not measured, as it could not be had: {', '.join(results['missing'])}."
    return f"{text} {results['note']}" if results["note"] else text


def _table(
    results: dict[str, Any], clean: dict[str, Any], entries: list[dict[str, Any]]
) -> list[str]:
    titles = []
    for entry in entries:
        name, _, unit = entry["name"].partition(", ")
        strength = "" if entry["strength"] is None else f", {unit} {entry['strength']:g}"
        titles.append(f"{name}{strength}")
    lines = [f"| | {' | '.join(titles)} |", "|---|" + "---|" * len(titles)]
    for name in _rows(results, entries[0]["detectors"]):
        found = [entry["detectors"][name] for entry in entries]
        cells = [f"{_interval(one['auroc'])}; {_interval(one['fpr'])}" for one in found]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for name in ("DNR", "NR"):
        cells = [_percent(entry["detectors"][name]["rejected"]) for entry in entries]
        own = _percent(clean["detectors"][name]["rejected"])
        lines.append(f"| rejected by {name} (clean: {own}) | {' | '.join(cells)} |")
    cells = [_percent(e["accuracy"]) if e["accuracy"] else "-" for e in entries]
    return [*lines, f"| read rightly by the network alone | {' | '.join(cells)} |"]


def _rows(results: dict[str, Any], names: dict[str, Any]) -> list[str]:
    """Choose detectors: of those on features, what NR and what DNR reads."""
    views = results["settings"]["nr_layer"], "all layers"
    return [name for name in names if ", " not in name or name.partition(", ")[2] in views]


def _verdict(sets: list[dict[str, Any]]) -> list[str]:
    """Count where DNR's AUROC is higher and lower than that of each other detector."""
    judged = [entry for entry in sets if entry["name"] != CONTROL]
    groups = [
        [entry for entry in judged if (entry["kind"] == CORRUPTED) == corrupted]
        for corrupted in (False, True)
    ]
    lines = [
        f"Is DNR better? On how many sets (all strengths, without {CONTROL}) its AUROC is higher, "
        "and on how many lower, by a 95 % interval of the difference on the same images:",
        "",
        f"| DNR against | of {len(groups[0])} sets, not corrupted: higher, lower | of "
        f"{len(groups[1])} corrupted: higher, lower | mean difference over all, points |",
        "|---|---|---|---|",
    ]
    leads = {}
    for name in [name for name in judged[0]["detectors"] if name != "DNR"]:
        counts = [_count(group, name) for group in groups]
        mean = statistics.mean(entry["detectors"][name]["dnr_ahead"][0] for entry in judged)
        cells = [f"{higher}, {lower}" for higher, lower in counts]
        lines.append(f"| {name} | {' | '.join(cells)} | {100 * mean:+.1f} |")
        leads[name] = sum(higher - lower for higher, lower in counts)
    words = {
        "worse than": [name for name, lead in leads.items() if lead < 0],
        "better than": [name for name, lead in leads.items() if lead > 0],
        "neither better nor worse than": [name for name, lead in leads.items() if lead == 0],
    }
    told = [f"{word} {_enumerate(names, leads)}" for word, names in words.items() if names]
    return [*lines, "", f"On more sets than the other way round, DNR is {'; '.join(told)}."]


def _count(sets: list[dict[str, Any]], name: str) -> tuple[int, int]:
    ahead = [entry["detectors"][name]["dnr_ahead"] for entry in sets]
    return sum(low > 0 for _, low, _ in ahead), sum(high < 0 for _, _, high in ahead)


def _enumerate(names: list[str], among: Iterable[str]) -> str:
    """List names; a detector all of whose layers are among them is named once."""
    views: dict[str, list[str]] = {}
    for name in names:
        family, _, view = name.partition(", ")
        views.setdefault(family, []).append(view)
    told = []
    for family, found in views.items():
        several = sum(name.startswith(f"{family}, ") for name in among)
        if several == 0:
            told.append(family)
        elif several == len(found):
            told.append(f"{family} on any layers")
        else:
            told.append(f"{family} on {' or '.join(found)}")
    return ", ".join(told)


def _interval(ends: list[float]) -> str:
    value, low, high = (f"{100 * end:.1f}" for end in ends)
    return f"{value} ({low} to {high})"


def _percent(ends: list[float]) -> str:
    return f"{100 * ends[0]:.1f}"


def main() -> int:
    """Rewrite the part of README.md between the markers."""
    return rewrite(MARKERS, readme_section(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    sys.exit(main())
