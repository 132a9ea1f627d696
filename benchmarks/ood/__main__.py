"""Measure how well rejection finds images that the classifier does not know.

`python benchmarks/bench_ood.py --run runs/mnist-5k` takes network, DNR and NR of a run folder (made
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
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from benchmarks.common import busy_cores, commit
from benchmarks.ood.detectors import NEIGHBOURS_PER_IMAGE, fit_detectors
from benchmarks.ood.figure import plot_severities
from benchmarks.ood.images import corrupted_sets, noise_images, other_sets
from benchmarks.ood.measures import TPR, measure_all
from torchdnr.cli import Console
from torchdnr.cli_options import attack_parser
from torchdnr.cli_settings import prepare
from torchdnr.evaluation.curve import plain_json
from torchdnr.evaluation.environment import describe_environment
from torchdnr.files import atomic_write_bytes
from torchdnr.pipeline import make_classifiers

RESULTS = Path(__file__).parents[1] / "results"
DIGITS = "mnist-5k", "mnist"


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
    arguments = ["--run", options.run, "--quiet", "--data-root", str(options.data_root)]
    arguments += ["--device", options.device] if options.device else []
    job = prepare(attack_parser().parse_args(arguments), Console(quiet=True))
    if job.settings["dataset"] not in DIGITS:
        raise SystemExit(
            f"{options.run} is of {job.settings['dataset']}: what is unknown here is unknown to a "
            f"classifier of digits; give a run of {' or '.join(DIGITS)}"
        )
    classifiers = make_classifiers(job, Console(quiet=True))
    fit_images, fit_labels = job.images("svm")
    neighbours = options.neighbours or max(1, round(NEIGHBOURS_PER_IMAGE * len(fit_images)))
    net, nr, dnr = (classifiers[name].eval() for name in ("DNN", "NR", "DNR"))
    detectors = fit_detectors(net, dnr, nr, fit_images, fit_labels, neighbours)
    images, labels = job.images("test")
    half, seed = len(images) // 2, job.settings["seed"]
    others, missing = other_sets(images, options.data_root, options.cifar10, seed)
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
        "commit": commit(),
        "busy_cores_before": busy_cores(),
        "run": job.settings,
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
    text = json.dumps(plain_json(record), indent=1, allow_nan=False) + "\n"
    atomic_write_bytes(path, text.encode())
    plot_severities(record["sets"], path.with_name(f"{path.stem}-severity.png"))


if __name__ == "__main__":
    main()
