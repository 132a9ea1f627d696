"""What a fit on ImageNet would take on GPUs, from counts that were measured on smaller problems.

Not a measurement. Counts of kernel rows and multiply-adds are carried on by their exponents, then
divided by what a GPU can do at best. One layer's SVM; the search and the folds come on top.
"""

from collections.abc import Mapping
from typing import Any

IMAGES, CLASSES = 1_281_167, 1_000
SUBSET = 100_000
DIMENSION = 512
"""Features of a layer: what a ResNet-18 has after its pooling, or a projection."""
GPU = {"name": "H100 SXM", "single": 67e12, "double": 34e12, "memory_gib": 80}
"""Without tensor cores, by NVIDIA's data sheet: kernels are evaluated in float32, never in TF32,
and their products with coefficients are accumulated in float64."""
DOUBLE_ARRAYS = 8
"""Float64 arrays (samples, classes) that a fit holds whatever is solved together."""


def carried_on(growth: Mapping[str, Any], what: str, size: float) -> float:
    """Evaluate a fitted power law."""
    return growth[what]["factor"] * size ** growth[what]["exponent"]


def estimate(results: Mapping[str, Any]) -> dict[str, Any]:
    """Estimate the fit of one layer's SVM to all of ImageNet, and to a subset.

    Args:
        results: Contents of scale.json, with ``growth``.

    Returns:
        For "all" and "subset": images, kernel rows, floating-point operations of the kernels and of
        the products, hours on one and on eight GPUs at the bound, and GiB of float64 state.
    """
    by_n, by_c = results["growth"]["samples"], results["growth"]["classes"]
    few = results["sections"]["samples"]
    base_classes = next(iter(few.values()))["classes"]
    # More classes at the same samples: as measured on the clusters, relative to ten of them.
    more = carried_on(by_c, "products", CLASSES) / carried_on(by_c, "products", base_classes)
    found = {}
    for name, images in (("all", IMAGES), ("subset", SUBSET)):
        rows = min(images, carried_on(by_n, "kernel_rows", images))
        if "kernel_rows" in by_c:  # more classes need more of the samples
            rows = min(
                images,
                rows
                * carried_on(by_c, "kernel_rows", CLASSES)
                / carried_on(by_c, "kernel_rows", base_classes),
            )
        kernels = 2.0 * rows * images * DIMENSION
        products = 2.0 * more * carried_on(by_n, "products", images)
        hours = (kernels / GPU["single"] + products / GPU["double"]) / 3600
        found[name] = {
            "images": images,
            "classes": CLASSES,
            "dimension": DIMENSION,
            "kernel_rows": rows,
            "kernel_flop": kernels,
            "product_flop": products,
            "hours_one_gpu": hours,
            "hours_eight_gpus": hours / 8,
            "state_gib": DOUBLE_ARRAYS * 8 * images * CLASSES / 2**30,
        }
    return {"gpu": GPU, **found}
