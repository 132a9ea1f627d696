"""Poison the training data of DNN, NR and DNR: `python -m benchmarks.poisoning`.

In each run a network is trained on clean digits of its own; what is fitted on its layers, an NR, a
DNR or its last layer, is fitted on other digits, some of which an attacker adds or labels. Each
share of poison leaves a file in the run folder: a run that was stopped goes on, and `--merge`
writes what there is to benchmarks/results/poisoning-cpu.json, with its figure.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import RESULTS, stamp
from benchmarks.poisoning.last_layer import retrain
from benchmarks.poisoning.report import EVASION, GRADIENT, LABELS, RANDOM, RANDOM_LABELS, plot
from benchmarks.training.variants import NETWORKS
from torchdnr import DNR, NR
from torchdnr.attacks import boundary_walk
from torchdnr.attacks.poisoning import Fit, choose_points, flip_labels, poison_inputs
from torchdnr.data import load_dataset
from torchdnr.decisions import has_reject_column, predict_labels, split_scores, succeeds
from torchdnr.evaluation.environment import describe_environment
from torchdnr.evaluation.metrics import rejection_rate
from torchdnr.files import read_json, write_json
from torchdnr.models import ADVERSARIAL_TRAINING, load_network, save_network, train_network

SHARES = (0.0, 0.01, 0.02, 0.05, 0.1)
EVASION_SHARE = 0.05
TRAINING_IMAGES, EPOCHS = 20_000, 3
POOL, VALIDATION, THRESHOLD = 300, 500, 1_000
ON_THE_WAY = 0.7  # of the way to an evasion of the clean classifier: what shall evade afterwards
ROUNDS = 2  # in which labels and points are chosen
MOVES: dict[str, Any] = {"steps": 15, "step_size": 2.0}
WALK: dict[str, Any] = {"starts": 8, "neighbours": 20}


@dataclass(frozen=True)
class Data:
    """Digits of one run, which share none: each images and labels."""

    fitted: tuple[Tensor, Tensor]
    pool: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    threshold: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    seed: int

    def generator(self, share: float) -> torch.Generator:
        """Make a generator of the run's own for a share of poison."""
        return torch.Generator().manual_seed(1_000 * self.seed + round(1_000 * share))


def make_data(options: argparse.Namespace, seed: int) -> tuple[nn.Sequential, Data]:
    """Split the digits by a seed; load the network trained on some, or train it."""
    data = load_dataset("mnist", options.data_root)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.labels_train), generator=generator)
    sizes = TRAINING_IMAGES, options.samples, POOL, VALIDATION, THRESHOLD
    training, *others = order[: sum(sizes)].split(sizes)
    test = torch.randperm(len(data.labels_test), generator=generator)[: options.test]
    torch.manual_seed(seed)
    net = NETWORKS["small"][0]()
    path = options.run / f"network {seed}.safetensors"
    if path.exists():
        load_network(net, path)
    else:
        options.run.mkdir(parents=True, exist_ok=True)
        settings = replace(ADVERSARIAL_TRAINING, epochs=EPOCHS)
        train_network(net, *data.select(training), settings, seed=seed)
        save_network(net, path)
    parts = [data.select(indices) for indices in others]
    return net.eval(), Data(*parts, data.select(test, test=True), seed)


def make_fit(name: str, net: nn.Sequential, data: Data) -> tuple[Fit, nn.Module]:
    """Return a classifier as a function of what it is fitted on, and the clean one."""
    if name == "DNN":
        fit: Fit = partial(retrain, nn.Sequential(*list(net)[:-1]))
        return fit, fit(*data.fitted, None).requires_grad_(False)
    layers: Any = NETWORKS["small"][1]
    kind, given = (NR, layers[-1]) if name == "NR" else (DNR, layers)
    model = kind(net, given, seed=data.seed).fit(*data.fitted)
    model.calibrate(data.threshold[0], rejection_rate=0.1)
    return model.refitted, model


def wrong_labels(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a wrong class for each label."""
    return (labels + torch.randint(1, 10, labels.shape, generator=generator)) % 10


def poisoned(
    kind: str, fit: Fit, clean: nn.Module, data: Data, share: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Poison the training data; return inputs and labels, and the points that were added."""
    (inputs, labels), (pool, pool_labels) = data.fitted, data.pool
    count, generator = round(share * len(labels)), data.generator(share)
    validation = data.validation
    if kind == RANDOM_LABELS:
        rows = torch.randperm(len(labels), generator=generator)[:count]
        changed = labels.clone()
        changed[rows] = wrong_labels(labels[rows], generator)
        return inputs, changed, None
    if kind == LABELS:
        return inputs, flip_labels(fit, inputs, labels, count, *validation, rounds=ROUNDS), None
    if kind == RANDOM:
        points, wrong = pool[:count], wrong_labels(pool_labels[:count], generator)
    else:
        toward: dict[str, Any] = {"objective": "decision" if kind == EVASION else "paper"}
        if kind == EVASION:
            reached = boundary_walk(clean, *validation, inputs, **WALK)
            validation = validation[0].lerp(reached, ON_THE_WAY), validation[1]
        known = fit, inputs, labels
        chosen, wrong = choose_points(
            *known, pool, pool_labels, count, *validation, rounds=ROUNDS, **toward
        )
        points = poison_inputs(*known, pool[chosen], wrong, *validation, **toward, **MOVES).inputs
    return torch.cat([inputs, points]), torch.cat([labels, wrong]), points


@torch.no_grad()
def judged(model: Callable[[Tensor], Tensor], data: Data, attacked: int) -> dict[str, float]:
    """Measure a classifier on clean test digits, at both thresholds, and how near evasions are."""
    inputs, labels = data.test
    reject = has_reject_column(model, None)
    output = model(inputs)
    scores, _ = split_scores(output, reject)
    measured = {"accuracy": (scores.argmax(dim=1) == labels).double().mean().item()}
    if reject:
        best = split_scores(model(data.threshold[0]), True)[0].amax(dim=1)
        again = torch.cat([scores, best.quantile(0.1).expand(len(scores), 1)], dim=1)
        for name, one in (("old theta", output), ("new theta", again)):
            predicted = predict_labels(one, True)
            measured[f"right, {name}"] = (predicted == labels).double().mean().item()
            measured[f"rejected, {name}"] = rejection_rate(predicted)
    x, y = inputs[:attacked], labels[:attacked]
    with torch.enable_grad():
        points = boundary_walk(model, x, y, data.fitted[0], **WALK)
    norms = (points - x).flatten(1).norm(dim=1)
    norms = norms.masked_fill(~succeeds(model(points), y, reject), torch.inf)
    return {**measured, "norm": norms.quantile(0.5, interpolation="lower").item()}


def measure(name: str, net: nn.Sequential, data: Data, options: argparse.Namespace) -> None:
    """Poison one classifier at all shares that have no file yet."""
    paths = {s: options.run / f"{name} {data.seed} {s:g}.json" for s in options.shares}
    if all(path.exists() for path in paths.values()):
        return
    fit, clean = make_fit(name, net, data)
    for share, path in paths.items():
        if path.exists():
            continue
        began, content = time.process_time(), dict[str, Any]()
        kinds = [RANDOM_LABELS, LABELS, RANDOM, GRADIENT]
        kinds += [EVASION] if share == EVASION_SHARE else []
        for kind in kinds if share else [""]:
            inputs, labels, points = data.fitted[0], data.fitted[1], None
            if kind:
                inputs, labels, points = poisoned(kind, fit, clean, data, share)
            with torch.no_grad():
                model = fit(inputs, labels, None)
            content[kind] = judged(model, data, options.attacked)
            if points is not None and has_reject_column(clean, None):
                with torch.no_grad():
                    content[kind]["noticed"] = rejection_rate(predict_labels(clean(points), True))
            print(f"{name}, run {data.seed}, {share:.0%} {kind}: {content[kind]}", flush=True)
        write_json(path, {"kinds": content, "seconds": time.process_time() - began})


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.poisoning", description=__doc__)
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--run", type=Path, default=Path("runs/poisoning"))
    parser.add_argument("--samples", type=int, default=500, help="that are fitted on")
    parser.add_argument("--test", type=int, default=5_000, help="clean digits")
    parser.add_argument("--attacked", type=int, default=100, help="of the clean digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shares", type=float, nargs="+", default=list(SHARES))
    parser.add_argument("--classifiers", nargs="+", default=["DNN", "NR", "DNR"])
    parser.add_argument("--merge", action="store_true")
    options = parser.parse_args()
    if not options.merge:
        for seed in options.seeds:
            net, data = make_data(options, seed)
            for name in options.classifiers:
                measure(name, net, data, options)
        return 0
    runs: dict[str, Any] = {
        name: {
            f"{share:g}": [
                read_json(options.run / f"{name} {seed} {share:g}.json") for seed in options.seeds
            ]
            for share in options.shares
        }
        for name in options.classifiers
    }
    settings = {name: getattr(options, name) for name in ("samples", "test", "attacked", "seeds")}
    settings["validation"] = VALIDATION
    environment = describe_environment("cpu")
    result = {**stamp(), "environment": environment, "settings": settings, "classifiers": runs}
    path = RESULTS / "poisoning-cpu.json"
    write_json(path, result)
    plot(result, path.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
