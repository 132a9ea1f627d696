"""Measure what compression loses and gains: fidelity, accuracy clean and under attack, speed.

`python -m benchmarks.cost compress --run runs/mnist-5k` takes DNR and NR of a run folder (made by
train.py), compresses each to several sizes on the images of their fit, sets theta again on the same
calibration images, and measures for the original and for every size:

- fidelity of the scores on the images of the fit and on all test images, SVM by SVM, and of the
  final scores without any descent and without the one on the final scores
- accuracy and rejection rate on all test images
- time of the SVMs alone and of the whole model, forward and with the gradient by the images; on a
  CPU processor time on one thread, the models in turn
- accuracy under attack: each model attacked afresh with the whole default line-up, and beside it
  with the points that were found on the original

Numbers go to benchmarks/results/compress-<device>.json; the first samples of a test split are a
stratified sample of it. About ten minutes on one core.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import RESULTS, interleaved, load_run, stamp
from torchdnr import DNR, NR
from torchdnr.cli.run_folder import Job
from torchdnr.decisions import is_evasion
from torchdnr.evaluation import SecurityCurve, security_evaluation
from torchdnr.evaluation.environment import describe_environment
from torchdnr.evaluation.line_up import build_line_up
from torchdnr.evaluation.metrics import accuracy_under_attack, rejection_rate
from torchdnr.features.extraction import extract
from torchdnr.files import write_json
from torchdnr.svm.compression import (
    SMOOTHNESS,
    STEPS,
    CompressionWarning,
    stack_losses,
    stack_scores,
)

EPS = (0.0, 1.0, 1.5, 2.0)
FACTORS = {"DNR": (5, 10, 20, 50, 100), "NR": (10,)}
SPEED_ROWS = 256


def compressed_models(
    originals: dict[str, DNR | NR], job: Job, factors: Mapping[str, Sequence[float]] = FACTORS
) -> tuple[dict[str, DNR | NR], dict[str, dict[str, Any]]]:
    """Compress every classifier to every size; describe what was lost.

    Returns:
        Models by name, the originals first; and their entries in the results.
    """
    images, calibration = job.images("svm")[0], job.images("threshold")[0]
    models: dict[str, DNR | NR] = {}
    found: dict[str, dict[str, Any]] = {}
    for kind, original in originals.items():
        models[kind], found[kind] = original, {"of": kind, "factor": 1}
        for factor in factors[kind]:
            name = f"{kind}, {factor} times fewer"
            began = time.process_time()
            model = original.compress(images, factor=factor)
            spent = time.process_time() - began
            models[name] = model.calibrate(calibration, job.settings.rejection_rate)
            found[name] = {
                "of": kind,
                "factor": factor,
                "compression_processor_seconds": spent,
                "losses": {
                    part: losses_of(original, model, job.images(part)[0])
                    for part in ("svm", "test")
                },
                "test_r2_without": without_descent(original, job, factor),
            }
    for name, model in models.items():
        sizes = {key: len(svm.support_vectors) for key, svm in model.svms.named().items()}
        found[name] |= {"vectors": sizes, "total_vectors": sum(sizes.values())}
        found[name] |= clean(model, job)
    return models, found


def losses_of(original: DNR | NR, compressed: DNR | NR, images: Tensor) -> dict[str, Any]:
    """Measure what a compressed classifier has lost on images."""
    features, _ = extract(original.features, images)
    return stack_losses(original.svms.named(), compressed.svms.named(), features)


def without_descent(original: DNR | NR, job: Job, factor: float) -> dict[str, float]:
    """Measure R^2 of the final scores on test images where parts of the fit are left out."""
    left_out = {"any descent": {"steps": 0, "joint_steps": 0}, "joint descent": {"joint_steps": 0}}
    images, test = job.images("svm")[0], job.images("test")[0]
    found = {}
    for name, options in left_out.items():
        model = original.compress(images, factor=factor, **options)
        found[name] = list(losses_of(original, model, test).values())[-1]["r2"]
    return found


def clean(model: DNR | NR, job: Job) -> dict[str, Any]:
    """Measure accuracy and rejection rate on all test images, and theta's on its own."""
    images, labels = job.images("test")
    predicted = model.predict(images)
    return {
        "threshold": model.threshold.item(),
        "test_samples": len(labels),
        "test_accuracy": accuracy_under_attack(predicted, labels, eps=0),
        "test_rejection_rate": rejection_rate(predicted),
        "test_evasion_rate": is_evasion(predicted, labels).double().mean().item(),
        "calibration_rejection_rate": rejection_rate(model.predict(job.images("threshold")[0])),
    }


def measure_speed(
    models: dict[str, DNR | NR], images: Tensor, repeats: int
) -> dict[str, dict[str, Any]]:
    """Time forward passes and gradients, all models in turn; medians over the repeats."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        calls = {
            (name, what): call
            for name, model in models.items()
            for what, call in speed_calls(model, images).items()
        }
        spent = interleaved(calls, repeats, images.device, time.process_time)
    finally:
        torch.set_num_threads(threads)
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in models}
    for (name, what), values in spent.items():
        seconds[name][what] = values
    return {
        name: {
            "rows": len(images),
            "seconds": {what: statistics.median(values) for what, values in by_call.items()},
            "all_seconds": by_call,
        }
        for name, by_call in seconds.items()
    }


def speed_calls(model: DNR | NR, images: Tensor) -> dict[str, Callable[[], object]]:
    """Prepare what is timed of a model."""
    with torch.no_grad():
        features = model.features(images)
    leaves = {name: values.clone().requires_grad_() for name, values in features.items()}
    pixels = images.clone().requires_grad_()

    def svms(z: dict[str, Tensor]) -> Tensor:
        return list(stack_scores(model.svms.named(), z).values())[-1]

    def svms_forward() -> Tensor:
        with torch.no_grad():
            return svms(features)

    def model_forward() -> Tensor:
        with torch.no_grad():
            return model(images)

    return {
        "SVMs, forward": svms_forward,
        "SVMs, gradient": lambda: torch.autograd.grad(svms(leaves).sum(), list(leaves.values())),
        "model, forward": model_forward,
        "model, gradient": lambda: torch.autograd.grad(model(pixels).sum(), pixels),
    }


def attack(
    model: DNR | NR,
    job: Job,
    net: torch.nn.Module,
    samples: int,
    original: SecurityCurve | None,
    eps: Sequence[float] = EPS,
) -> tuple[SecurityCurve, dict[str, Any]]:
    """Attack one model with the default line-up, and with the points found on the original."""
    images, labels = (part[:samples] for part in job.images("test"))
    pool = job.images("svm")[0]
    line_up = build_line_up(
        ["default"], pool, norm=2, surrogate=net, options={"seed": job.settings.seed}
    )
    began = time.process_time()
    curve = security_evaluation(
        model, images, labels, eps, norm=2, attacks=line_up, init_inputs=pool, progress=False
    )
    found = {
        "eps": curve.eps,
        "norm": 2,
        "attacks": {
            name: entry.settings for name, entry in (curve.attacks | curve.refinements).items()
        },
        **curve.rates(),
        "attack_accuracy": {name: entry.accuracy for name, entry in curve.attacks.items()},
        "median_evasion_norm": curve.median_evasion_norm,
        "predictions": curve.predictions.tolist(),
        "evasion_norm": curve.evasion_norm.tolist(),
        "processor_seconds": time.process_time() - began,
    }
    if original is not None:
        found |= against_original(model, labels, curve, original)
    return curve, found


def against_original(
    model: DNR | NR, labels: Tensor, curve: SecurityCurve, original: SecurityCurve
) -> dict[str, Any]:
    """Count, per eps, whose decisions compression changed under attack, sample by sample."""
    counts: dict[str, list[int]] = {"newly_evaded": [], "no_longer_evaded": [], "transferred": []}
    labels = labels.cpu()
    for index in range(len(curve.eps)):
        own = is_evasion(curve.predictions[index], labels)
        before = is_evasion(original.predictions[index], labels)
        # A model that is only harder to attack, not stronger, still falls to these points.
        moved = is_evasion(model.predict(original.adversarial[index]).cpu(), labels)
        counts["newly_evaded"].append((own & ~before).sum().item())
        counts["no_longer_evaded"].append((before & ~own).sum().item())
        counts["transferred"].append((moved & ~own).sum().item())
    return counts


def main(argv: Sequence[str] | None = None) -> None:
    """Compress, measure, and write the JSON after every model that was attacked."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--run", default="runs/mnist-5k", help="run folder (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=30, help="attacked (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=9, help="of the times")
    parser.add_argument("--device")
    options = parser.parse_args(argv)
    job, classifiers = load_run(options.run, options.device)
    warnings.simplefilter("ignore", CompressionWarning)  # all that it says is in the results
    models, found = compressed_models({kind: classifiers[kind] for kind in FACTORS}, job)
    speed_images = job.images("test")[0][:SPEED_ROWS]
    for name, times in measure_speed(models, speed_images, options.repeats).items():
        found[name]["speed"] = times
    record = {
        "environment": describe_environment(job.device),
        **stamp(),
        "run": job.settings.to_json(),
        "settings": {
            "steps": STEPS,
            "joint_steps": STEPS,
            "smoothness": SMOOTHNESS,
            "samples": options.samples,
            "repeats": options.repeats,
        },
        "models": found,
    }
    path = RESULTS / f"compress-{job.device.type}.json"
    originals: dict[str, SecurityCurve] = {}
    for name, model in models.items():
        kind = found[name]["of"]
        curve, found[name]["attack"] = attack(
            model, job, classifiers["DNN"], options.samples, originals.get(kind)
        )
        originals.setdefault(kind, curve)
        write_json(path, record)
        print(name, found[name]["test_accuracy"], curve.accuracy, flush=True)


if __name__ == "__main__":
    main()
