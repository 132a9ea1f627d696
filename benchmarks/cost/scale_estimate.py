"""What a fit on ImageNet would take, carried on from times that were measured on smaller problems.

Not a measurement. One layer's SVM with given (C, gamma); a search and its folds come on top. For a
GPU it is supposed that all of a fit gains as much as matrix products do, which is the best case.
"""

import time
from collections.abc import Mapping
from typing import Any

import torch

IMAGES, CLASSES = 1_281_167, 1_000
SUBSET = 100_000
GPU = {"name": "H100 SXM", "flops": 67e12, "memory_gib": 80}
"""float32 without tensor cores, by NVIDIA's data sheet: kernels are never evaluated in TF32."""
DOUBLE_ARRAYS = 8
"""Float64 arrays (samples, classes) that a fit holds whatever is solved together."""


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
    for name, images in (("all", IMAGES), ("subset", SUBSET)):
        state = DOUBLE_ARRAYS * 8 * images * CLASSES / 2**30
        found[name] = {"images": images, "classes": CLASSES, "state_gib": state}
        for kind in ("layer", "samples"):
            few = next(iter(results["sections"][kind].values()))["classes"]
            rows, seconds = (
                carried_on(results["growth"][kind], what, images)
                # More classes at the same samples: as measured, relative to few.
                * carried_on(by_c, what, CLASSES)
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
