"""Learn features for few samples of new classes, through the fit: `python -m benchmarks.few_shot`.

A small network is trained on episodes of five classes with five samples each, so that a head which
is fitted on these scores other samples right; each head trains a network of its own, all from one
start and on the same episodes. Training classes are the digits 0 to 4, turned by multiples of 90
degrees; the test is on digits 5 to 9 of the test set, none of which the network has seen. Writes
benchmarks/results/few-shot-cpu.json. qpth takes part if it is installed, or on PYTHONPATH.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.common import RESULTS, interleaved, stamp
from benchmarks.few_shot.heads import HEADS, C, Head, qpth_version
from torchdnr.data import load_dataset
from torchdnr.evaluation.environment import describe_environment
from torchdnr.files import write_json
from torchdnr.svm import RBFSVM, svm_scores
from torchdnr.svm.implicit import TOL

WAYS, SHOTS, QUERIES = 5, 5, 10
BATCH = 4
"""Episodes of one step, and of one call whose time is taken."""
LEARNING_RATE = 2e-3
FIT_SIZE, FIT_REPEATS = (2_000, 200, 10), 7
"""Samples, features and classes of the fit whose time is taken, and how often."""
TURNED = [(digit, turns) for digit in range(5) for turns in range(4) if digit > 1 or turns < 2]
"""Training classes: digit and quarters of a turn; 0 and 1 look alike after two of these."""


class Learner(nn.Module):
    """A network of three convolutions, the width of the kernel, and a factor of the scores."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        sizes = zip((1, 32, 32), (32, 32, 32), strict=True)
        blocks = [nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.ReLU()) for a, b in sizes]
        self.net = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(32 * 16, 64))
        self.log_gamma = nn.Parameter(torch.zeros(()))
        self.log_factor = nn.Parameter(torch.tensor(1.0))

    def features(self, images: Tensor) -> Tensor:
        """Map images ``(e, n, 1, 28, 28)`` to features of mean square distance near 1."""
        return nn.functional.normalize(self.net(images.flatten(0, 1)), dim=1).unflatten(
            0, images.shape[:2]
        )

    def forward(self, head: Head, episode: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Score the queries of episodes, ``(e, m, c)``."""
        samples, labels, queries = episode
        both = self.features(torch.cat([samples, queries], dim=1))
        split = labels.shape[1]
        scores = head(both[:, :split], labels, both[:, split:], self.log_gamma.exp())
        return self.log_factor.exp() * scores


def episodes(
    classes: list[Tensor], count: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Draw batches of episodes: samples, their labels, and queries, sorted by class like these."""
    labels = torch.arange(WAYS).repeat_interleave(SHOTS).expand(BATCH, -1)
    for _ in range(count):
        samples, queries = [], []
        for _ in range(BATCH):
            chosen = torch.randperm(len(classes), generator=generator)[:WAYS].tolist()
            for images in (classes[k] for k in chosen):
                drawn = torch.randperm(len(images), generator=generator)[: SHOTS + QUERIES]
                samples.append(images[drawn[:SHOTS]])
                queries.append(images[drawn[SHOTS:]])
        shape = 0, (BATCH, WAYS * SHOTS)
        yield (
            torch.cat(samples).unflatten(*shape),
            labels,
            torch.cat(queries).unflatten(0, (BATCH, WAYS * QUERIES)),
        )


TRUE = torch.arange(WAYS).repeat_interleave(QUERIES).expand(BATCH, -1)


def train(learner: Learner, head: Head, classes: list[Tensor], steps: int) -> float:
    """Train a learner through a head; return the seconds of a processor that it took."""
    optimizer = torch.optim.Adam(learner.parameters(), LEARNING_RATE)
    began = time.process_time()
    for episode in episodes(classes, steps, torch.Generator().manual_seed(1)):
        optimizer.zero_grad()
        cross_entropy(learner(head, episode).flatten(0, 1), TRUE.flatten()).backward()
        optimizer.step()
    return time.process_time() - began


@torch.no_grad()
def accuracy(
    learner: Learner, head: Head, classes: list[Tensor], batches: int
) -> dict[str, float | int]:
    """Average the accuracy over test episodes, with half the width of its 95 % interval."""
    drawn = episodes(classes, batches, torch.Generator().manual_seed(2))
    right = [(learner(head, e).argmax(dim=2) == TRUE).double().mean(dim=1) for e in drawn]
    each = torch.cat(right)
    half = 1.96 * each.std().item() / math.sqrt(len(each))
    return {"episodes": len(each), "accuracy": each.mean().item(), "half_width": half}


def cost(
    learner: Learner, heads: dict[str, Head], classes: list[Tensor], repeats: int
) -> dict[str, float]:
    """Take the seconds per episode of each head alone, on features of one network."""
    ((samples, labels, queries),) = episodes(classes, 1, torch.Generator().manual_seed(3))
    with torch.no_grad():
        both = learner.features(torch.cat([samples, queries], dim=1))
    fixed, gamma = (
        both.split([WAYS * SHOTS, WAYS * QUERIES], dim=1),
        learner.log_gamma.detach().exp(),
    )

    def forward(head: Head) -> Tensor:
        with torch.no_grad():
            return head(fixed[0], labels, fixed[1], gamma)

    def backward(head: Head) -> None:
        leaves = [part.clone().requires_grad_() for part in fixed]
        head(leaves[0], labels, leaves[1], gamma).square().sum().backward()

    kinds = {"forward": forward, "both": backward}
    calls = {
        f"{name} {kind}": partial(call, head)
        for name, head in heads.items()
        for kind, call in kinds.items()
    }
    spent = interleaved(calls, repeats, torch.device("cpu"), time.process_time)
    return {key: sorted(times)[len(times) // 2] / BATCH for key, times in spent.items()}


def fit_cost(repeats: int) -> dict[str, dict[str, float]]:
    """Take the seconds of a fit, and of one with derivatives and its backward pass, by C.

    Returns:
        By C: ``fit``, of the same accuracy and in float64; ``quick fit``, float32 and to the
        default tolerance; ``both``, the layer on 100 inputs, forward and backward.
    """
    n, d, classes = FIT_SIZE
    generator = torch.Generator().manual_seed(0)
    labels, centers = torch.arange(n) % classes, torch.randn(classes, d, generator=generator) / 4
    features = centers[labels] + torch.randn(n, d, generator=generator) / 2
    inputs = centers.repeat(10, 1) + torch.randn(10 * classes, d, generator=generator) / 2
    gamma = 1.0 / (d * features.var().item())

    def both(bound: float) -> None:
        leaf = features.clone().requires_grad_()
        svm_scores(leaf, labels, inputs, C=bound, gamma=gamma).square().sum().backward()

    costs = {}
    for bound in (1.0, 10.0):
        calls = {
            "fit": partial(RBFSVM(bound, gamma, tol=TOL).fit, features.double(), labels),
            "quick fit": partial(RBFSVM(bound, gamma).fit, features, labels),
            "both": partial(both, bound),
        }
        spent = interleaved(calls, repeats, torch.device("cpu"), time.process_time)
        costs[f"{bound:g}"] = {
            name: sorted(times)[len(times) // 2] for name, times in spent.items()
        }
    return costs


def works(head: Head) -> str | None:
    """Try a head with gradients; return the error with which it fails."""
    features = torch.randn(BATCH, WAYS * SHOTS, 8, requires_grad=True)
    labels = torch.arange(WAYS).repeat_interleave(SHOTS).expand(BATCH, -1)
    try:
        head(features, labels, features, torch.tensor(1.0)).sum().backward()
    except Exception as error:  # whatever another library raises is the result
        return f"{type(error).__name__}: {error}"
    return None


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.few_shot", description=__doc__)
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--test-batches", type=int, default=75)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", type=Path, default=RESULTS / "few-shot-cpu.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    first = stamp()
    data = load_dataset("mnist", options.data_root)
    known, digits = data.select(torch.arange(len(data.labels_train)))
    seen = [known[digits == d].rot90(turns, (2, 3)) for d, turns in TURNED]
    new, digits = data.select(torch.arange(10_000), test=True)
    unseen = [new[digits == d] for d in range(5, 10)]
    failed = {name: works(head) for name, head in HEADS.items()}
    heads = {name: head for name, head in HEADS.items() if failed[name] is None}
    results: dict[str, Any] = {n: {"error": error} for n, error in failed.items() if error}
    untrained = accuracy(Learner(0), HEADS["svm"], unseen, options.test_batches)
    for name, head in heads.items():
        learner = Learner(0)
        seconds = train(learner, head, seen, options.steps)
        results[name] = accuracy(learner, head, unseen, options.test_batches)
        results[name] |= {"training_seconds": seconds, "gamma": learner.log_gamma.exp().item()}
        print(f"{name}: {results[name]}", flush=True)
    for call, seconds in cost(learner, heads, unseen, options.repeats).items():
        name, kind = call.split()
        results[name][f"{kind}_seconds"] = seconds
    settings = {"ways": WAYS, "shots": SHOTS, "queries": QUERIES, "batch": BATCH, "C": C}
    settings |= {"steps": options.steps, "repeats": options.repeats, "classes": len(TURNED)}
    settings |= {"fit_size": FIT_SIZE, "fit_repeats": FIT_REPEATS}
    environment = {**describe_environment("cpu"), "qpth": qpth_version()}
    content = {**first, "environment": environment, "settings": settings}
    content |= {"untrained": untrained, "heads": results, "fits": fit_cost(FIT_REPEATS)}
    write_json(options.output, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
