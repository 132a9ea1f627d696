"""Train networks and DNR to reject, and attack what comes out: `python -m benchmarks.training`.

For each seed the classifiers of ``variants`` are made and evaluated one after the other by the
whole line-up and Square, on the same test images. Each leaves a file in the run folder: a run that
was stopped goes on, and `--merge` writes what there is to benchmarks/results/training-cpu.json,
with the evasions that the points of one classifier make of another. `--examine` makes the checks
of the evaluation, the stratified curve and a trial on corrupted digits, of the main classifiers.
"""

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import RESULTS, stamp
from benchmarks.ood.images import CORRUPTIONS, corrupt
from benchmarks.training.report import SHOWN, plot
from benchmarks.training.variants import NETWORKS, PLAIN, SVM_SAMPLES, VARIANTS, Study
from torchdnr.data import load_dataset
from torchdnr.decisions import has_reject_column, predict_labels, succeeds
from torchdnr.evaluation import (
    Attack,
    SecurityCurve,
    build_line_up,
    security_evaluation,
    stratified_curve,
)
from torchdnr.evaluation.checks import run_checks
from torchdnr.evaluation.environment import describe_environment
from torchdnr.evaluation.judging import outputs
from torchdnr.evaluation.metrics import accuracy_under_attack, rejection_rate
from torchdnr.files import load_tensors, read_json, save_tensors, write_json

EPS: dict[str, dict[float, tuple[float, ...]]] = {
    "mnist": {
        2.0: (0.0, 1, 1.5, 2, 2.5, 3, 4, 5, 7),
        math.inf: (0.0, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.6),
    },
    "cifar10": {
        2.0: (0.0, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 3),
        math.inf: (0.0, 1 / 255, 2 / 255, 4 / 255, 8 / 255, 16 / 255, 32 / 255),
    },
}
STRATIFIED_EPS = {"mnist": {2.0: 2, math.inf: 0.2}, "cifar10": {2.0: 0.5, math.inf: 4 / 255}}
CORRUPTED_SAMPLES = 1_000
KIND = "nearest points"


def make_study(options: argparse.Namespace, seed: int) -> tuple[Study, Tensor, Tensor]:
    """Split the data by a seed; return the study, and test images with their labels."""
    usual = "cifar10" if options.network == "cifar" else "mnist"
    data = load_dataset(options.dataset or usual, options.data_root)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.labels_train), generator=generator)
    train, rest = order[: options.images], order[options.images :]
    svm, threshold = rest[:SVM_SAMPLES], rest[SVM_SAMPLES : 2 * SVM_SAMPLES]
    budget = f"{options.images}x{options.epochs}"
    name = f"{options.network}-{options.norm:g}-eps{options.eps:g}-{budget}-seed{seed}"
    folder = options.run / name
    folder.mkdir(parents=True, exist_ok=True)
    study = Study(
        options.network,
        options.norm,
        options.eps,
        seed,
        *data.select(train),
        data.select(svm),
        data.select(threshold),
        options.epochs,
        folder,
    )
    test = torch.randperm(len(data.labels_test), generator=generator)
    return study, *data.select(test, test=True)


def calibrated(study: Study, name: str) -> nn.Module:
    """Make a classifier; one that rejects rejects a tenth of clean images, or as many as another.

    Where theta is matched with another classifier's, as many clean images are accepted and right.
    """
    variant = VARIANTS[name]
    model, (images, labels) = variant.make(study), study.threshold
    if variant.matched is not None:
        other = predict_labels(outputs(calibrated(study, variant.matched), images, 500), True)
        kept = int((other == labels).sum())
        best, predicted = outputs(model.scores, images, 500).max(dim=1)
        right = best[predicted == labels].sort(descending=True).values
        model.set_threshold(right[kept] if kept < len(right) else best.min() - 1)
    elif hasattr(model, "calibrate"):
        model.calibrate(images, rejection_rate=0.1)
    return model


def attack(
    study: Study, name: str, model: nn.Module, images: Tensor, labels: Tensor
) -> tuple[SecurityCurve, dict[str, Attack]]:
    """Attack images by the whole line-up and Square; finished shares are not repeated."""
    pool = study.svm[0]
    attacks = build_line_up(["default", "square"], pool, norm=study.norm)
    path = study.folder / f"attack {name}.safetensors"
    options: Any = {"norm": study.norm, "attacks": attacks, "init_inputs": pool, "progress": True}
    sizes = EPS[study.dataset][study.norm]
    curve = security_evaluation(model, images, labels, sizes, checkpoint=path, **options)
    return curve, attacks


def evaluate(study: Study, name: str, images: Tensor, labels: Tensor, samples: int) -> None:
    """Make a classifier, evaluate it clean and under attack, and keep the result in its folder."""
    path = study.folder / f"{name}.json"
    if path.exists() and read_json(path)["samples"] >= samples:
        return
    model = calibrated(study, name)
    reject = has_reject_column(model, None)
    clean = predict_labels(outputs(model, images, 500), reject)
    began = time.process_time()
    curve, _ = attack(study, name, model, images[:samples], labels[:samples])
    if curve.nearest is not None:
        save_tensors(points_path(study, name), {"points": curve.nearest}, {}, kind=KIND)
    write_json(
        path,
        {
            "samples": samples,
            "right": accuracy_under_attack(clean, labels, eps=0),
            "rejected": rejection_rate(clean),
            "eps": list(curve.eps),
            "kept": list(curve.accuracy),
            "rejected_under_attack": list(curve.rejection_rate),
            "norms": curve.evasion_norm.tolist(),
            "median": curve.median_evasion_norm,
            "training_seconds": study.seconds(VARIANTS[name].training or PLAIN),
            "attack_seconds": time.process_time() - began,
        },
    )
    print(f"seed {study.seed}, {name}: median norm {curve.median_evasion_norm:.2f}", flush=True)


def examine(study: Study, name: str, images: Tensor, labels: Tensor) -> None:
    """Check the attacks on a classifier, count early rejections, and try corrupted digits.

    "robustness" is by alpha the share neither evaded nor, within alpha eps, rejected; "corrupted"
    are right, rejected and wrong of each kind, at the middle one of five strengths.
    """
    path, evaluated = examined_path(study, name), study.folder / f"{name}.json"
    if path.exists() or not evaluated.exists():
        return
    n, model = read_json(evaluated)["samples"], calibrated(study, name)
    reject = has_reject_column(model, None)
    curve, attacks = attack(study, name, model, images[:n], labels[:n])
    report = run_checks(
        *(model, images[:n], labels[:n], curve), attacks=attacks, init_inputs=study.svm[0]
    )
    content: dict[str, Any] = {
        "checks": {status: report.names(status) for status in ("pass", "warn", "fail")},
        "corrupted": {},
    }
    if reject and curve.adversarial is not None:
        eps = STRATIFIED_EPS[study.dataset][study.norm]
        points = curve.adversarial[curve.eps.index(eps)]
        known = {"norm": study.norm}
        stratified = stratified_curve(model, images[:n], labels[:n], points, eps, **known)
        content["eps"], content["alphas"] = eps, stratified.alphas
        content["robustness"] = [estimate.value for estimate in stratified.robustness]
    some, classes = images[:CORRUPTED_SAMPLES], labels[:CORRUPTED_SAMPLES]
    for kind, strengths in CORRUPTIONS.items():
        changed = corrupt(some, kind, strengths[2], study.seed)
        predicted = predict_labels(outputs(model, changed, 500), reject)
        right, rejected = (predicted == classes).double().mean(), rejection_rate(predicted)
        content["corrupted"][f"{kind} {strengths[2]}"] = [right.item(), rejected]
    write_json(path, content)
    print(f"seed {study.seed}, {name}: checks {report.status}", flush=True)


def points_path(study: Study, name: str) -> Path:
    """Name the file of a classifier's nearest evading points."""
    return study.folder / f"points {name}.safetensors"


def examined_path(study: Study, name: str) -> Path:
    """Name the file of what `--examine` has seen of a classifier."""
    return study.folder / f"{name} examined.json"


def transferred(study: Study, images: Tensor, labels: Tensor) -> dict[str, dict[str, Any]]:
    """Try the nearest points of every classifier on every other one; return the results with that.

    ``transfer`` counts samples that another's point evades with a smaller perturbation; ``median``
    and ``kept`` count them as evaded then. What has been examined is there, too.
    """
    results: dict[str, dict[str, Any]] = {}
    points: dict[str, Tensor] = {}
    for name in VARIANTS:
        if (path := study.folder / f"{name}.json").exists():
            results[name] = read_json(path)
            if examined_path(study, name).exists():
                results[name]["examined"] = read_json(examined_path(study, name))
            points[name] = load_tensors(points_path(study, name), kind=KIND)[0]["points"]
    for name, result in results.items():
        model = calibrated(study, name)
        norms = torch.tensor([float(norm) for norm in result["norms"]], dtype=torch.float64)
        n, before = len(norms), norms.clone()
        for other, some in points.items():
            if other != name and len(some) == n:
                norms = torch.minimum(
                    norms, _norms(model, some, images[:n], labels[:n], study.norm)
                )
        result |= {
            "transfer": int((norms < before - 1e-6).sum()),
            "norms": norms.tolist(),
            "median": norms.quantile(0.5, interpolation="lower").item(),
            "kept": [
                result["kept"][0],
                *((norms > eps).double().mean().item() for eps in result["eps"][1:]),
            ],
        }
    return results


def _norms(model: nn.Module, points: Tensor, images: Tensor, labels: Tensor, norm: float) -> Tensor:
    """Return the norm of each perturbation that evades, infinite elsewhere, ``(n,)``."""
    evading = succeeds(outputs(model, points, 256), labels, has_reject_column(model, None))
    norms = torch.linalg.vector_norm((points.double() - images.double()).flatten(1), norm, dim=1)
    return norms.masked_fill(~evading, math.inf)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--dataset", help="default: cifar10 for the network cifar, else mnist")
    parser.add_argument("--run", type=Path, default=Path("runs/training"))
    parser.add_argument("--network", choices=list(NETWORKS), default="small")
    parser.add_argument("--norm", type=float, choices=list(EPS["mnist"]), default=2.0)
    parser.add_argument("--eps", type=float, default=3.5)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--examine", action="store_true")
    parser.add_argument("--merge", action="store_true")
    options = parser.parse_args()
    merged: dict[str, Any] = {}
    for seed in options.seeds:
        study, images, labels = make_study(options, seed)
        if options.merge:
            merged[str(seed)] = transferred(study, images, labels)
            continue
        for name in options.variants:
            evaluate(study, name, images, labels, options.samples)
        for name in SHOWN if options.examine else ():
            examine(study, name, images, labels)
    if options.merge:
        path = RESULTS / "training-cpu.json"
        known = read_json(path)["studies"] if path.exists() else {}
        key = f"{options.network}, norm {options.norm:g}"
        settings = {"eps": options.eps, "images": options.images, "epochs": options.epochs}
        settings |= {**stamp(), "environment": describe_environment("cpu")}
        known[key] = {**settings, "seeds": merged}
        result = {"studies": known}
        write_json(path, result)
        plot(result, path.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
