"""Measure how time and memory of a fit grow with the samples and with the classes.

`python -m benchmarks.cost scale` fits one layer's SVM, each fit in a process of its own:

- samples: MNIST digits as pixels, d = 784, 10 classes; beyond 60,000 moved copies of them are added
- layer: overlapping Gaussian clusters, d = 64 as of a layer, 10 classes
- classes: the same with more and more classes, always the same number of samples

It counts kernel rows and multiply-adds beside processor time and the peak memory of the process,
fits the exponents of growth, and estimates from them what ImageNet would take.
That is no measurement: one layer's SVM with given (C, gamma), a search and its folds come on top,
and a GPU is supposed to speed up all of a fit as much as matrix products, which is the best case.

Numbers go to benchmarks/results/scale.json after every fit; a stopped run goes on where it was.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, ROOT, busy_cores, commit, load_results
from torchdnr.evaluation.environment import describe_environment
from torchdnr.files import write_json

SIZES = (1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 64_000)
LAYER_SIZES = (1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 64_000, 100_000)
CLASSES = (10, 30, 100, 300, 1_000)
CLASS_SAMPLES = 10_000
MEMORY_LIMIT = 6 * 2**30
"""Bytes for a fit: the rest of 8 GiB is for the features, torch and Python."""
GROWING = (
    "processor_seconds",
    "peak_memory_mib",
    "support_vectors",
    "kernel_rows",
    "products",
)
LAST = 4
"""Largest problems that an exponent is fitted to: small ones are all overhead."""


IMAGENET_IMAGES, IMAGENET_CLASSES = 1_281_167, 1_000
SUBSET = 100_000
GPU = {"name": "H100 SXM", "flops": 67e12, "memory_gib": 80}
"""float32 without tensor cores, by NVIDIA's data sheet: kernels are never evaluated in TF32."""
DOUBLE_ARRAYS = 8
"""Float64 arrays (samples, classes) that a fit holds whatever is solved together."""


def growth(entries: Sequence[Mapping[str, Any]], size: str) -> dict[str, dict[str, float]]:
    """Fit ``value = factor * size ** exponent`` to the largest problems, by least squares of logs.

    Args:
        entries: What the worker measured, by size.
        size: "n" or "classes".

    Returns:
        By what grows: exponent, factor, and the largest ratio of a value to the fitted one.
    """
    found, used = {}, entries[-LAST:]
    if len(used) < 2:
        return found
    logs = [math.log(entry[size]) for entry in used]
    for name in GROWING:
        if not all(entry[name] for entry in used):  # a memory that the system does not tell
            continue
        values = [math.log(entry[name]) for entry in used]
        line = statistics.linear_regression(logs, values)
        off = max(
            abs(value - line.intercept - line.slope * x)
            for x, value in zip(logs, values, strict=True)
        )
        found[name] = {
            "exponent": line.slope,
            "factor": math.exp(line.intercept),
            "largest_ratio": math.exp(off),
        }
    return found


def matrix_product_rate(size: int = 1024, repeats: int = 10) -> float:
    """Measure the floating-point operations per second of a float32 matrix product, processor time.

    Args:
        size: Rows and columns.
        repeats: Products after a first one that does not count.

    Returns:
        Operations per second of processor time.
    """
    one = torch.rand(size, size)
    one @ one
    began = time.process_time()
    for _ in range(repeats):
        one @ one
    return 2.0 * size**3 * repeats / (time.process_time() - began)


def carried_on(growth: Mapping[str, Any], what: str, size: float) -> float:
    """Evaluate a fitted power law."""
    return growth[what]["factor"] * size ** growth[what]["exponent"]


def estimate(results: Mapping[str, Any]) -> dict[str, Any]:
    """Estimate the fit of one layer's SVM to all of ImageNet, and to a subset.

    Args:
        results: Contents of scale.json, with ``growth`` and ``matrix_product_rate``.

    Returns:
        Under "all" and "subset": images, classes, GiB of float64 state, and under "layer" and
        "samples", as the fits to those grew: kernel rows, processor hours, hours on one and on
        eight GPUs at best.
    """
    by_c = results["growth"]["classes"]
    faster = GPU["flops"] / results["matrix_product_rate"]
    found: dict[str, Any] = {"gpu": GPU, "faster": faster}
    for name, images in (("all", IMAGENET_IMAGES), ("subset", SUBSET)):
        state = DOUBLE_ARRAYS * 8 * images * IMAGENET_CLASSES / 2**30
        found[name] = {"images": images, "classes": IMAGENET_CLASSES, "state_gib": state}
        for kind in ("layer", "samples"):
            few = next(iter(results["sections"][kind].values()))["classes"]
            rows, seconds = (
                carried_on(results["growth"][kind], what, images)
                # More classes at the same samples: as measured, relative to few.
                * carried_on(by_c, what, IMAGENET_CLASSES)
                / carried_on(by_c, what, few)
                for what in ("kernel_rows", "processor_seconds")
            )
            found[name][kind] = {
                "kernel_rows": min(images, rows),
                "processor_hours": seconds / 3600,
                "hours_one_gpu": seconds / 3600 / faster,
                "hours_eight_gpus": seconds / 3600 / faster / 8,
            }
    return found


def tasks(options: argparse.Namespace) -> list[dict[str, Any]]:
    """List the fits, smallest first."""
    shared = {
        "threads": options.threads,
        "memory_limit": options.memory_limit,
        "data_root": options.data_root,
    }
    by_n = [{"kind": "samples", "n": n} for n in sorted(options.sizes)]
    by_n += [{"kind": "layer", "n": n, "classes": 10} for n in sorted(options.layer_sizes)]
    by_c = [
        {"kind": "classes", "n": options.class_samples, "classes": c}
        for c in sorted(options.classes)
    ]
    return [task | shared for task in by_n + by_c]


def run(task: Mapping[str, Any]) -> dict[str, Any]:
    """Run one fit in a process of its own.

    Raises:
        RuntimeError: If it fails, with what it wrote.
    """
    command = [sys.executable, "-m", "benchmarks.cost.scale_worker", json.dumps(task)]
    busy = busy_cores()
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode:
        raise RuntimeError(f"the fit of {task} failed:\n{found.stderr[-2000:]}")
    return json.loads(found.stdout.splitlines()[-1]) | {"busy_cores": busy, "commit": commit()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--sizes", type=int, nargs="+", default=SIZES, metavar="N", help="digits")
    option("--layer-sizes", type=int, nargs="+", default=LAYER_SIZES, metavar="N")
    option("--classes", type=int, nargs="+", default=CLASSES, metavar="C")
    option("--class-samples", type=int, default=CLASS_SAMPLES, metavar="N")
    option("--memory-limit", type=int, default=MEMORY_LIMIT, metavar="BYTES", help="of a fit")
    option("--threads", type=int, default=1, metavar="N")
    option("--data-root", default=str(ROOT / "data"), metavar="DIR", help="holds MNIST, or gets it")
    option("--output", type=Path, default=RESULTS / "scale.json", metavar="FILE")
    option("--fresh", action="store_true", help="replace what was measured under other conditions")
    options = parser.parse_args(argv)
    header = {
        "environment": describe_environment("cpu"),
        "versions": {},
        "settings": {"memory_limit": options.memory_limit, "threads": options.threads},
    }
    results = load_results(options.output, header, options.fresh)
    torch.set_num_threads(options.threads)
    results.setdefault("matrix_product_rate", matrix_product_rate())
    for task in tasks(options):
        key = f"classes={task['classes']}" if task["kind"] == "classes" else f"n={task['n']}"
        section = results["sections"].setdefault(task["kind"], {})
        if key not in section:
            section[key] = run(task)
        print(f"{task['kind']}, {key}: {section[key]['processor_seconds']:.1f} s of a processor")
        summarise(results)
        write_json(options.output, results)
    return 0


def summarise(results: dict[str, Any]) -> None:
    """Fit the exponents and the estimate to what was measured so far."""
    results["growth"] = {}
    for kind, size in (("samples", "n"), ("layer", "n"), ("classes", "classes")):
        entries = sorted(results["sections"].get(kind, {}).values(), key=lambda one: one[size])
        results["growth"][kind] = growth(entries, size)
    if all(results["growth"].values()):
        results["estimate"] = estimate(results)


if __name__ == "__main__":
    sys.exit(main())
