"""Measure what the default line-up costs and how far its norms are from the best that are known.

`python -m benchmarks.attacks.strength --run runs/mnist-5k --robust mnist_cnn_a_adv.pth` evaluates
DNN, NR and DNR of a run folder, and an adversarially trained network with and without DNR, on the
first digits, with which the attacks were tuned, and on others. Then much longer runs of all attacks
look for nearer points: the best known norm of a sample is the least of all. After each step the
numbers go to benchmarks/results/strength-cpu.json; the same command goes on from there.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.attacks.robust import robust_classifiers
from benchmarks.common import RESULTS, load_results, load_run, stamp
from torchdnr.attacks import apgd, boundary_walk, fmn, line_search_pgd, multi_target, primal_dual
from torchdnr.decisions import has_reject_column, predict_labels
from torchdnr.evaluation import security_evaluation
from torchdnr.evaluation.environment import describe_environment
from torchdnr.evaluation.judging import CountedModel, outputs
from torchdnr.files import write_json

EPS = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0)
BELOW = 0.99  # eps of an attack at a given eps, relative to the least norm known
NEAREST: dict[str, Callable[..., Tensor]] = {
    "boundary walk": lambda *given, **known: boundary_walk(
        *given, steps=140, starts=40, neighbours=80, restarts=7, seed=1, **known
    ),
    "primal-dual": lambda *given, **known: primal_dual(*given, starts=8, **known),
    "FMN": lambda *given, **known: fmn(*given, steps=200, starts=8, **known),
}
WITHIN: dict[str, Callable[..., Tensor]] = {
    "multi-target APGD": partial(multi_target, attack=apgd),
    "APGD": lambda *given, **known: apgd(*given, restarts=3, **known),
    "line-search PGD": lambda *given, **known: line_search_pgd(
        *given, objective="decision", restarts=1, **known
    ),
}


def norms_of(model: nn.Module, points: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
    """Return the l2 norm of each perturbation that evades, infinite elsewhere, ``(n,)``."""
    predicted = predict_labels(outputs(model, points, 256), has_reject_column(model, None))
    norms = (points.double() - inputs.double()).flatten(1).norm(dim=1)
    return norms.masked_fill((predicted == labels) | (predicted < 0), math.inf)


def measure(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    pool: Tensor,
    steps: dict[str, Any],
    keep: Callable[[], None],
) -> None:
    """Run what ``steps`` lacks: the default line-up first, then each longer attack."""
    if "default" not in steps:
        began = time.perf_counter()
        curve = security_evaluation(model, inputs, labels, EPS, init_inputs=pool, progress=False)
        parts = {**curve.attacks, **curve.refinements}
        steps["default"] = {
            "norms": curve.evasion_norm.tolist(),
            "seconds": time.perf_counter() - began,
            "passes": {
                name: [total(part.forwards), total(part.backwards)] for name, part in parts.items()
            },
        }
        keep()
    classes = predict_labels(outputs(model, pool, 256), has_reject_column(model, None))
    known: dict[str, Any] = {"init_inputs": pool, "init_labels": classes}
    norms_found = [list(map(float, step["norms"])) for step in steps.values()]  # "inf" from a file
    best = torch.tensor(norms_found).amin(dim=0)
    for name, attack in {**NEAREST, **WITHIN}.items():
        if name in steps:
            continue
        counted = CountedModel(model)
        if name in NEAREST:
            points = attack(counted, inputs, labels, **known)
        else:
            eps = (BELOW * best).to(inputs).clamp_max(2 * max(EPS))
            points = attack(counted, inputs, labels, eps, **known)
        norms = norms_of(model, points, inputs, labels)
        best = best.minimum(norms.to(best))
        passes = {name: [counted.forwards, counted.backwards]}
        steps[name] = {"norms": norms.tolist(), "passes": passes}
        keep()


def total(counts: Any) -> int:  # noqa: ANN401 - a number, or one per eps
    """Add up the counts of all eps."""
    return int(sum(counts)) if isinstance(counts, list) else int(counts)


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    option = parser.add_argument
    option("--run", default="runs/mnist-5k", help="run folder of train.py")
    option("--robust", type=Path, help="weights of an adversarially trained network")
    option("--digits", type=int, default=20, help="of each of the two sets")
    option("--output", type=Path, default=RESULTS / "strength-cpu.json")
    option("--only", nargs="+", help="names of classifiers")
    option("--fresh", action="store_true", help="replace results of other settings")
    options = parser.parse_args()
    job, classifiers = load_run(options.run)
    images, labels = job.images("test")
    settings = {"digits": options.digits, "eps": EPS, "below": BELOW}
    header = {"environment": describe_environment(job.device), "settings": settings, "versions": {}}
    result = load_results(options.output, header, options.fresh)
    result["stamp"] = stamp()
    if options.robust:
        classifiers |= robust_classifiers(job, options.robust)
    rows = torch.arange(len(labels))
    chosen = {"tuned on": rows[: options.digits], "others": rows[-options.digits :]}
    for name, model in classifiers.items():
        if options.only and name not in options.only:
            continue
        for digits, some in chosen.items():
            steps = result["sections"].setdefault(name, {}).setdefault(digits, {})
            print(name, digits, file=sys.stderr, flush=True)
            measure(
                model.eval(),
                images[some],
                labels[some],
                job.images("svm")[0],
                steps,
                lambda: write_json(options.output, result),
            )


if __name__ == "__main__":
    main()
