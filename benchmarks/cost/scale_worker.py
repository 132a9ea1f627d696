"""One fit of scale.py, in a process of its own, whose memory nothing else has touched."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torchvision.transforms import v2

from torchdnr.data import Dataset, load_dataset
from torchdnr.resources import process_peak_mib
from torchdnr.svm import RBFSVM
from torchdnr.svm.kernel_rows import KernelRows

C = 10.0
CLUSTER_DIMENSION = 64
CLUSTER_NOISE = 1.0
WARM_UP = 500


def digits(n: int, data: Dataset) -> tuple[Tensor, Tensor]:
    """Take the first n of all MNIST training digits in random order, then of moved copies of them.

    Args:
        n: Up to 120,000.
        data: MNIST.

    Returns:
        Pixels, ``(n, 784)``, and labels, ``(n,)``; those of a smaller n are the beginning.
    """
    order = torch.randperm(len(data.labels_train), generator=torch.Generator().manual_seed(0))
    images, labels = data.select(order[:n])
    missing = n - len(labels)
    if missing > 0:
        move = v2.RandomAffine(degrees=10, translate=(0.07, 0.07), scale=(0.9, 1.1))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            moved = torch.stack([move(image) for image in images[:missing]])
        images, labels = torch.cat([images, moved]), torch.cat([labels, labels[:missing]])
    return images.flatten(1), labels


def clusters(n: int, classes: int) -> tuple[Tensor, Tensor]:
    """Draw overlapping Gaussian clusters, one per class: features ``(n, 64)``, labels ``(n,)``."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(classes, CLUSTER_DIMENSION, generator=generator)
    labels = torch.arange(n) % classes
    noise = CLUSTER_NOISE * torch.randn(n, CLUSTER_DIMENSION, generator=generator)
    return centers[labels] + noise, labels


@contextmanager
def counted_products() -> Iterator[list[int]]:
    """Count the multiply-adds of coefficients with kernel rows, beside evaluating those."""
    counts, plain = [0], KernelRows.product

    def product(rows: KernelRows, vectors: Tensor, *, exact: bool = True) -> Tensor:
        used = int(vectors.ne(0).any(dim=0).sum())
        counts[0] += len(vectors) * used * rows.n
        return plain(rows, vectors, exact=exact)

    KernelRows.product = product
    try:
        yield counts
    finally:
        KernelRows.product = plain


def measure(features: Tensor, labels: Tensor, memory_limit: int) -> dict:
    """Fit once; count, time and weigh it.

    Args:
        features: ``(n, d)``.
        labels: ``(n,)``.
        memory_limit: Bytes for the fit.

    Returns:
        JSON values. Seconds are the processor's; memory is the peak of the whole process.
    """
    few = min(WARM_UP, len(labels))
    RBFSVM(C).fit(features[:few], labels[:few].unique(return_inverse=True)[1])
    with counted_products() as products:
        began, wall = time.process_time(), time.perf_counter()
        svm = RBFSVM(C).fit(features, labels, memory_limit=memory_limit)
        spent, waited = time.process_time() - began, time.perf_counter() - wall
    return {
        "n": len(labels),
        "d": features.shape[1],
        "classes": svm.num_classes,
        "threads": torch.get_num_threads(),
        "processor_seconds": spent,
        "seconds": waited,
        "peak_memory_mib": process_peak_mib(),
        "support_vectors": len(svm.support),
        "kernel_rows": svm.solution.kernel_rows,
        "products": products[0],
        "violation": svm.solution.violation.max().item(),
        "not_converged": int((~svm.solution.converged).sum()),
    }


def main() -> None:
    """Read what to fit from the command line, and write what was measured to standard output."""
    task = json.loads(sys.argv[1])
    torch.set_num_threads(task["threads"])
    if task["kind"] == "samples":
        features, labels = digits(task["n"], load_dataset("mnist", task["data_root"]))
    else:
        features, labels = clusters(task["n"], task["classes"])
    print(json.dumps(measure(features, labels, task["memory_limit"])))


if __name__ == "__main__":
    main()
