"""benchmarks/cost/scale.py: what it counts, how it fits exponents, what it says of ImageNet."""

import pytest
import torch

from benchmarks.cost import scale
from benchmarks.cost import scale_worker as worker
from benchmarks.cost.report import readable, scale_page
from torchdnr.data import Dataset
from torchdnr.svm import RBFSVM

FACTORS = {
    "processor_seconds": (1e-3, 1.5),
    "peak_memory_mib": (2.0, 0.5),
    "support_vectors": (1.0, 0.8),
    "kernel_rows": (2.0, 0.8),
    "products": (10.0, 2.0),
}


def entries(sizes, name):
    """Sizes that grow by known power laws."""
    return [
        {name: size, **{k: a * size**p for k, (a, p) in FACTORS.items()}, "n": size, "d": 8}
        | {"classes": 10 if name == "n" else size, "not_converged": 0}
        for size in sizes
    ]


def test_known_exponents_are_found_from_the_largest_problems():
    measured = entries((100, 1000, 2000, 4000, 8000), "n")
    measured[0]["processor_seconds"] = 1e9  # all overhead
    found = scale.growth(measured, "n")
    for name, (factor, exponent) in FACTORS.items():
        assert found[name]["exponent"] == pytest.approx(exponent)
        assert found[name]["factor"] == pytest.approx(factor)
        assert found[name]["largest_ratio"] == pytest.approx(1.0)
    measured[-1]["peak_memory_mib"] = None
    measured[-1]["processor_seconds"] *= 1.3
    found = scale.growth(measured, "n")
    assert "peak_memory_mib" not in found
    assert 1.0 < found["processor_seconds"]["largest_ratio"] < 1.3
    assert scale.growth(measured[:1], "n") == {}


def test_the_worker_counts_rows_and_products_of_the_fit():
    features, labels = worker.clusters(240, 6)
    assert features.shape == (240, 64) and labels.bincount().tolist() == [40] * 6
    with worker.counted_products() as counts:
        svm = RBFSVM(10.0).fit(features, labels)
    at_least = 6 * svm.solution.kernel_rows  # each row meets coefficients once, in the certificate
    assert at_least <= counts[0] // 240
    found = worker.measure(features, labels, 2**30)
    assert found["products"] == counts[0]
    assert found["kernel_rows"] == svm.solution.kernel_rows
    assert found["support_vectors"] == len(svm.support)
    assert (found["n"], found["classes"], found["not_converged"]) == (240, 6, 0)
    assert found["violation"] <= 1e-3 and found["processor_seconds"] > 0


def test_digits_of_a_smaller_n_are_the_beginning_and_copies_are_moved():
    images = torch.rand(50, 1, 28, 28)
    labels = torch.arange(50) % 10
    few = Dataset("few", tuple("0123456789"), images, labels)
    small, large = worker.digits(30, few), worker.digits(70, few)
    assert torch.equal(large[0][:30], small[0]) and large[0].shape == (70, 784)
    assert torch.equal(large[1][50:], large[1][:20])
    assert not torch.equal(large[0][50:], large[0][:20])
    assert torch.equal(worker.digits(70, few)[0], large[0])


def test_the_estimate_carries_the_times_on():
    by_n = entries((1000, 2000, 4000, 8000), "n")
    by_c = entries((10, 100, 1000), "classes")
    results = {
        "matrix_product_rate": 67e9,
        "sections": {
            "samples": {
                str(e["n"]): e | {"processor_seconds": 2 * e["processor_seconds"]} for e in by_n
            },
            "layer": {str(e["n"]): e for e in by_n},
            "classes": {str(e["classes"]): e for e in by_c},
        },
    }
    scale.summarise(results)
    whole = results["estimate"]["all"]
    n, c = scale.IMAGENET_IMAGES, 1000 / 10
    for kind, factor in (("layer", 1), ("samples", 2)):
        found = whole[kind]
        assert found["kernel_rows"] == pytest.approx(min(n, 2 * n**0.8 * c**0.8))
        assert found["processor_hours"] == pytest.approx(factor * 1e-3 * n**1.5 * c**1.5 / 3600)
        assert found["hours_one_gpu"] == pytest.approx(found["processor_hours"] / 1000)
        assert found["hours_one_gpu"] == pytest.approx(8 * found["hours_eight_gpus"])
    assert whole["state_gib"] == pytest.approx(8 * 8 * n * 1000 / 2**30)
    results |= {"environment": {"processor": "toy", "torch": "2"}}
    results |= {"settings": {"memory_limit": 2**30, "threads": 1}}
    text = scale_page(results)
    assert "*1.50*" in text and "estimated, not measured" in text


def test_times_are_given_in_the_unit_that_fits():
    times = [readable(hours) for hours in (100, 30, 1.5, 0.01)]
    assert times == ["4 days", "30 hours", "90 minutes", "36 seconds"]


def test_the_rate_of_matrix_products_is_that_of_this_machine():
    assert 1e8 < scale.matrix_product_rate(256, 3) < 1e14
