"""Record the default run of attack.py: results and figures here, its numbers in README.md.

`python benchmarks/mnist_5k.py` runs `attack.py` in a new run folder (about ten minutes on two
cores) and rewrites `benchmarks/results/mnist-5k*` and the part of README.md between the markers.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.readme_part import rewrite
from torchdnr.evaluation import BOUNDARY_WALK, LINE_SEARCH_PGD, SecurityCurve, load_results

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
MARKERS = "<!-- mnist-5k: written by benchmarks/mnist_5k.py -->", "<!-- end of mnist-5k -->"


def readme_section(curves: dict[str, SecurityCurve], settings: dict[str, Any]) -> str:
    """Format the numbers of the default run for README.md.

    Args:
        curves: Classifier name to its curve.
        settings: Of the run, with environment and cost.

    Returns:
        Markdown: one line on what was run where, and the table.
    """
    environment, cost = settings["environment"], settings["cost"]
    samples = len(next(iter(curves.values())).labels)
    lines = [
        f"{samples} test digits, seed {settings['run']['seed']}; "
        f"{cost['seconds']:.0f} s and {cost['peak_memory_mib'] / 1024:.1f} GiB on "
        f"{environment['threads']} threads of a CPU, torch {environment['torch']}. Accuracy in "
        "percent, rejected share in brackets:",
        "",
        "| eps | " + " | ".join(f"{name}, worst case" for name in curves) + " | "
        f"DNR, {LINE_SEARCH_PGD} alone | DNR, {BOUNDARY_WALK} alone |",
        "|---|" + "---|" * (len(curves) + 2),
    ]
    dnr = curves["DNR"].attacks
    for index, eps in enumerate(curves["DNR"].eps):
        columns = [*curves.values(), dnr[LINE_SEARCH_PGD], dnr[BOUNDARY_WALK]]
        cells = [
            f"{100 * curve.accuracy[index]:.0f}"
            + (f" ({100 * curve.rejection_rate[index]:.0f})" if name != "DNN" else "")
            for name, curve in zip([*curves, "DNR", "DNR"], columns, strict=True)
        ]
        lines.append(f"| {eps:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Run attack.py and record what it found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--run", help="run folder to keep (default: a temporary one)")
    with tempfile.TemporaryDirectory() as temporary:
        folder = parser.parse_args().run or temporary
        command = [sys.executable, "attack.py", "--run", folder]
        if status := subprocess.run(command, cwd=ROOT, check=False).returncode:
            return status
        RESULTS.mkdir(exist_ok=True)
        shutil.copyfile(Path(folder) / "results.json", RESULTS / "mnist-5k.json")
        for name in ("curve", "examples"):
            shutil.copyfile(Path(folder) / f"{name}.png", RESULTS / f"mnist-5k-{name}.png")
    return rewrite(MARKERS, readme_section(*load_results(RESULTS / "mnist-5k.json")))


if __name__ == "__main__":
    sys.exit(main())
