"""What bench_ood.py measures: detectors on clean and unknown images, set by set."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from benchmarks.ood.images import CORRUPTED, Unknown
from torchdnr.evaluation import Estimate, auroc, auroc_difference, fpr_at_tpr, share

TPR = 0.95
REFERENCE = "DNR"
REJECTING = "DNR", "NR"

Score = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]


def measure_set(
    clean: dict[str, Tensor], unknown: dict[str, Tensor]
) -> dict[str, dict[str, list[float]]]:
    """Measure every detector on one set of unknown images.

    Args:
        clean: Scores of clean images by detector, ``(m,)``.
        unknown: Scores of unknown images by detector, ``(n,)``; higher means unknown.

    Returns:
        By detector: ``auroc``, ``fpr``, of DNR and NR ``rejected`` (share of the unknown images at
        theta), of the others and NR ``dnr_ahead`` (by how much DNR's AUROC is higher), each as
        value and ends of its 95 % interval.
    """
    found = {}
    for name, positives in unknown.items():
        negatives = clean[name]
        found[name] = {
            "auroc": ends(auroc(negatives, positives)),
            "fpr": ends(fpr_at_tpr(negatives, positives, TPR)),
        }
        if name in REJECTING:
            found[name]["rejected"] = ends(share(positives >= 0))
        if name != REFERENCE:
            reference = clean[REFERENCE], unknown[REFERENCE]
            found[name]["dnr_ahead"] = ends(auroc_difference(reference, (negatives, positives)))
    return found


def ends(estimate: Estimate) -> list[float]:
    """Shorten an estimate to value, low and high."""
    return [round(value, 5) for value in (estimate.value, estimate.low, estimate.high)]


def measure_all(
    score: Score, images: Tensor, labels: Tensor, sets: Iterable[Unknown]
) -> list[dict[str, Any]]:
    """Measure every detector on every set.

    Args:
        score: Maps images to scores by detector, ``(n,)``, and to the network's labels, ``(n,)``.
        images: Clean test images, ``(n, ...)``; a CORRUPTED set is of the second half of them.
        labels: Their classes, ``(n,)``.
        sets: What to tell from them.

    Returns:
        An entry per set: what it is, how many images, accuracy of the network, and what
        ``measure_set`` returns. The first is of the clean images: accuracy and rejected share.
    """
    clean, predicted = score(images)
    half = len(images) // 2
    rejected = {name: {"rejected": ends(share(clean[name] >= 0))} for name in REJECTING}
    accuracy = ends(share(predicted == labels.to(predicted.device)))
    entries = [
        {"name": "clean", "images": len(images), "accuracy": accuracy, "detectors": rejected}
    ]
    for unknown in sets:
        count = half if unknown.kind == CORRUPTED else len(images)
        scores, predicted = score(unknown.images.to(images.device))
        known = None if unknown.labels is None else unknown.labels.to(predicted.device)
        entries.append(
            {
                "name": unknown.name,
                "kind": unknown.kind,
                "strength": unknown.strength,
                "images": len(unknown.images),
                "clean_images": count,
                "accuracy": None if known is None else ends(share(predicted == known)),
                "detectors": measure_set({k: v[:count] for k, v in clean.items()}, scores),
            }
        )
        print(unknown.name, unknown.strength or "", entries[-1]["detectors"][REFERENCE], flush=True)
    return entries
