"""Measure how well rejection finds images that the classifier does not know.

`python -m benchmarks.ood --run runs/mnist-5k` takes network, DNR and NR of a run folder (made
by train.py from digits) and scores clean test digits, noise, other data sets and corrupted digits,
beside four detectors of pytorch-ood (extra `peers`; with scikit-learn, extra `sklearn`): maximum
softmax and energy on the logits of the same network, Mahalanobis and kNN on the layers that DNR
reads, fitted on the images that DNR was fitted on. Nothing is tuned on unknown images.

Positive is the unknown image, and a higher score means unknown. Per set and detector: AUROC, FPR
at 95 % TPR, DNR's AUROC less that of the detector, all with 95 % intervals. The first half of the
test digits is what the corrupted second half is told from, so that no digit is in both groups.

Numbers go to benchmarks/results/ood-<device>.json, and a figure beside it. Other data sets are
downloaded to --data-root; one that is not to be had is named and left out. A few minutes on one
core.
"""

import argparse
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.common import RESULTS, load_run, stamp
from benchmarks.ood.images import (
    CORRUPTED,
    Unknown,
    corrupted_sets,
    loaders,
    noise_images,
    other_sets,
)
from benchmarks.ood.report import plot_severities
from torchdnr.evaluation import Estimate, auroc, auroc_difference, fpr_at_tpr, share
from torchdnr.evaluation.environment import describe_environment
from torchdnr.files import write_json

DIGITS = "mnist-5k", "mnist"
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


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    option = parser.add_argument
    option("--run", default="runs/mnist-5k", help="run folder (default: %(default)s)")
    option("--data-root", type=Path, default=Path("data"), help="default: %(default)s")
    option("--cifar10", default="cifar10", help="or npz:FILE (default: %(default)s)")
    option("--neighbours", type=int, help="k of kNN (default: 1 in 1,000 fitted images)")
    option("--output", type=Path, help="JSON (default: benchmarks/results/ood-<device>.json)")
    option("--note", help="a sentence on the data, for the results")
    option("--device")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write the JSON, and draw the figure."""
    options = parse(argv)
    # Late: what stands above needs no pytorch-ood.
    from benchmarks.ood.detectors import NEIGHBOURS_PER_IMAGE, fit_detectors

    job, classifiers = load_run(options.run, options.device, options.data_root)
    if job.settings.dataset not in DIGITS:
        raise SystemExit(
            f"{options.run} is of {job.settings.dataset}: what is unknown here is unknown to a "
            f"classifier of digits; give a run of {' or '.join(DIGITS)}"
        )
    fit_images, fit_labels = job.images("svm")
    neighbours = options.neighbours or max(1, round(NEIGHBOURS_PER_IMAGE * len(fit_images)))
    net, nr, dnr = (classifiers[name].eval() for name in ("DNN", "NR", "DNR"))
    detectors = fit_detectors(net, dnr, nr, fit_images, fit_labels, neighbours)
    images, labels = job.images("test")
    half, seed = len(images) // 2, job.settings.seed
    others, missing = other_sets(images, loaders(options.data_root, options.cifar10), seed)
    for name, reason in missing.items():
        print(f"left out: {name} ({reason})")
    sets = [
        *noise_images(images, seed),
        *others,
        *corrupted_sets(images[half:].cpu(), labels[half:], seed),
    ]
    record = {
        "environment": describe_environment(job.device),
        "versions": {name: version(name) for name in ("pytorch-ood", "scikit-learn")},
        **stamp(),
        "run": job.settings.to_json(),
        "settings": {
            "seed": seed,
            "fit_images": len(fit_images),
            "neighbours": neighbours,
            "layers": list(dnr.layers),
            "nr_layer": nr.layers[0],
            "tpr": TPR,
            "confidence": 0.95,
        },
        "note": options.note,
        "missing": missing,
        "sets": measure_all(detectors.scores, images, labels, sets),
    }
    path = options.output or RESULTS / f"ood-{job.device.type}.json"
    write_json(path, record)
    plot_severities(record["sets"], path.with_name(f"{path.stem}-severity.png"))


if __name__ == "__main__":
    main()
