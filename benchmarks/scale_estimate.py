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
        For "all" and "subset": images, classes, kernel rows, processor hours, hours on one and on
        eight GPUs at best, and GiB of float64 state.
    """
    by_n, by_c = results["growth"]["layer"], results["growth"]["classes"]
    few = next(iter(results["sections"]["layer"].values()))["classes"]
    faster = GPU["flops"] / results["matrix_product_rate"]

    def at(what: str, images: int) -> float:
        # More classes at the same samples: as measured on the clusters, relative to few.
        more = carried_on(by_c, what, CLASSES) / carried_on(by_c, what, few)
        return more * carried_on(by_n, what, images)

    found = {}
    for name, images in (("all", IMAGES), ("subset", SUBSET)):
        hours = at("processor_seconds", images) / 3600
        found[name] = {
            "images": images,
            "classes": CLASSES,
            "kernel_rows": min(images, at("kernel_rows", images)),
            "processor_hours": hours,
            "hours_one_gpu": hours / faster,
            "hours_eight_gpus": hours / faster / 8,
            "state_gib": DOUBLE_ARRAYS * 8 * images * CLASSES / 2**30,
        }
    return {"gpu": GPU, "faster": faster, **found}
