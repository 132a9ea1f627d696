"""Record a run of attack.py on photographs: results and figures here, its numbers in README.md.

The run comes first, which takes an hour and more on one core; it goes on where it was stopped. Its
command is in README.md.

`python benchmarks/photographs.py --run runs/imagenette` then rewrites
`benchmarks/results/imagenette*` and the part of README.md between the markers.
"""

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.readme_part import rewrite
from torchdnr.evaluation import BOUNDARY_WALK, LINE_SEARCH_PGD, SecurityCurve, load_results
from torchdnr.evaluation.metrics import wilson_interval
from torchdnr.files import atomic_path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
NAME = "imagenette"
FINER = (0.1, 0.2, 0.3, 0.4)
"""Sizes of perturbations at which the nearest points alone are told."""
MARKERS = (
    "<!-- photographs: written by benchmarks/photographs.py -->",
    "<!-- end of photographs -->",
)


def readme_section(curves: dict[str, SecurityCurve], settings: dict[str, Any]) -> str:
    """Format the numbers of a run on photographs for README.md.

    Args:
        curves: Classifier name to its curve.
        settings: Of the run, with environment, classifiers and cost.

    Returns:
        Markdown: what was run where, clean numbers on all test images, and the table.
    """
    run, environment = settings["run"], settings["environment"]
    samples = len(next(iter(curves.values())).labels)
    low, high = wilson_interval(0.5, samples)
    minutes = sum(curve.seconds for curve in curves.values()) / 60  # also before a run was stopped
    medians = ", ".join(f"{name} {curve.median_evasion_norm:.2f}" for name, curve in curves.items())
    channels, *size = run["image_shape"]
    clean = "; ".join(
        f"{name} {100 * found['test_accuracy']:.1f} % right"
        + (
            f", {100 * found['test_rejection_rate']:.1f} % rejected"
            if "test_rejection_rate" in found
            else ""
        )
        for name, found in settings["classifiers"].items()
    )
    return "\n".join(
        [
            f"torchvision's {run['network']}, not trained further, {len(run['classes'])} of its "
            f"outputs; {' x '.join(map(str, size))} pixels, {channels} channels; DNR on "
            f"{', '.join(run['layers'])}, fitted to {run['svm_samples']:,} images, theta on "
            f"{run['threshold_samples']:,} others. On {run['test_samples']:,} clean test images: "
            f"{clean}. Attacked: {samples} of these, with the whole default line-up; "
            f"{minutes:.0f} minutes on {environment['threads']} thread of an "
            f"{environment['processor']}, other programs beside it, torch {environment['torch']}. "
            "Accuracy in percent, rejected share in brackets; 95 % interval at 50: "
            f"{100 * low:.0f} to {100 * high:.0f}.",
            "",
            *_table(curves),
            "",
            f"Median norm at which an image evades: {medians}. Between these eps, by the nearest "
            "points found at any of them: share not evaded within "
            f"{', '.join(map(str, FINER))}, in percent: "
            f"{'; '.join(_finer(name, curve) for name, curve in curves.items())}.",
        ]
    )


def _finer(name: str, curve: SecurityCurve) -> str:
    """Tell the share of images that are right or rejected, at most, at smaller eps."""
    left = [(curve.evasion_norm > eps).float().mean().item() for eps in FINER]
    return f"{name} " + ", ".join(f"{100 * share:.0f}" for share in left)


def _table(curves: dict[str, SecurityCurve]) -> list[str]:
    dnr = curves["DNR"].attacks
    columns = {
        **{f"{name}, worst case": curve for name, curve in curves.items()},
        **{f"DNR, {name} alone": dnr[name] for name in (LINE_SEARCH_PGD, BOUNDARY_WALK)},
    }
    lines = ["| eps | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for index, eps in enumerate(curves["DNR"].eps):
        cells = [
            f"{100 * curve.accuracy[index]:.0f}"
            + ("" if name.startswith("DNN") else f" ({100 * curve.rejection_rate[index]:.0f})")
            for name, curve in columns.items()
        ]
        lines.append(f"| {eps:g} | " + " | ".join(cells) + " |")
    return lines


def main() -> int:
    """Copy what a finished run folder holds, and rewrite README.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="finished run")
    folder = parser.parse_args().run
    curves, settings = load_results(folder / "results.json")
    used = (settings["run"]["dataset"].partition(":")[2], settings["run"]["weights"])
    if absolute := [path for path in used if Path(path).is_absolute()]:
        print(
            f"the record would carry paths of this machine: {', '.join(absolute)}; make the run "
            "with relative ones",
            file=sys.stderr,
        )
        return 2
    for name, made in ((f"{NAME}.json", "results.json"), (f"{NAME}-curve.png", "curve.png")):
        with atomic_path(RESULTS / name) as path:
            shutil.copyfile(folder / made, path)
    with (
        Image.open(folder / "examples.png") as picture,
        atomic_path(RESULTS / f"{NAME}-examples.jpg") as path,
    ):
        picture.convert("RGB").save(path, "JPEG", quality=90)  # a fifth of the bytes
    return rewrite(MARKERS, readme_section(curves, settings))


if __name__ == "__main__":
    sys.exit(main())
