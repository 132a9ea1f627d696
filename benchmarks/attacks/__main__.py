"""Measure the attacks: what a loop costs beyond the model, against foolbox, and how strong each is.

`python -m benchmarks.attacks --run runs/mnist-5k` takes the classifiers of a run folder (made
by train.py) and measures, contenders interleaved, medians over the repeats:

- overhead: seconds of `pgd` over those of the bare forward and backward passes it makes
- curve: one batched `pgd` run over eight eps, in which rows that evade are done or go on, against
  eight runs of foolbox's L2PGD on the same model with the same steps (extra `peers`)
- strength: median norm, evasions and cost of every attack of the line-up on the same samples

`benchmarks.attacks.secml` compares the line search with that of the authors' library,
`benchmarks.attacks.peers` the whole line-up with attacks of other libraries. Numbers go to
benchmarks/results/attack-<device>.json after every section.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import RESULTS, interleaved, load_samples, stamp
from torchdnr.attacks import apgd, boundary_walk, ddn, evades, fmn, line_search_pgd, pgd
from torchdnr.evaluation.environment import describe_environment
from torchdnr.evaluation.judging import CountedModel
from torchdnr.files import atomic_write_bytes

EPS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
STEPS = 40
FIXED_EPS = (1.0, 1.5, 2.0)
MINIMUM_NORM = {
    "boundary walk": boundary_walk,
    "boundary walk, 300 steps": partial(boundary_walk, steps=300),
    "FMN": fmn,
    "FMN from the input alone": lambda model, x, y, pool: fmn(model, x, y),
    "DDN": ddn,
}
WITH_EPS = {
    "line-search PGD": line_search_pgd,
    "line-search PGD, decision": partial(line_search_pgd, objective="decision"),
    "PGD": pgd,
    "APGD": apgd,
    "APGD, Eq. 2": partial(apgd, objective="paper"),
    "APGD, log-sum-exp": partial(apgd, objective="log-sum-exp"),
}


class Recorded(nn.Module):
    """A model that keeps what it is evaluated on, and whether a gradient was wanted."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.calls: list[tuple[Tensor, bool]] = []

    @property
    def reject_index(self) -> int | None:
        """Column of the rejection threshold, that of the model."""
        return getattr(self.model, "reject_index", None)

    def forward(self, inputs: Tensor) -> Tensor:
        """Evaluate the model, and keep the inputs."""
        self.calls.append((inputs.detach().clone(), inputs.requires_grad))
        return self.model(inputs)


def measure_overhead(setup: SimpleNamespace, repeats: int) -> dict[str, Any]:
    """Compare the PGD loop with its own forward and backward passes alone, per classifier.

    On a CPU with all threads and with one: between the passes of the network come many small
    operations, each of which wakes the other threads.
    """
    threads = torch.get_num_threads()
    found: dict[str, Any] = {}
    try:
        for count in dict.fromkeys([threads] if setup.device.type != "cpu" else [threads, 1]):
            torch.set_num_threads(count)
            found[f"{count} threads"] = {
                name: overhead_of(model, setup, repeats)
                for name, model in setup.classifiers.items()
            }
    finally:
        torch.set_num_threads(threads)
    return found


def overhead_of(model: nn.Module, setup: SimpleNamespace, repeats: int) -> dict[str, Any]:
    """Time the PGD loop and its passes alone, on the same points."""
    recorded = Recorded(model)
    pgd(recorded, setup.inputs, setup.labels, 1.0, steps=STEPS)

    def bare() -> None:
        for inputs, wanted in recorded.calls:
            points = inputs.requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                output = model(points)
            if wanted:
                torch.autograd.grad(output.sum(), points)

    def whole() -> Tensor:
        return pgd(model, setup.inputs, setup.labels, 1.0, steps=STEPS)

    # The two differ by less than such a machine does from second to second: many repeats.
    seconds = interleaved({"bare": bare, "pgd": whole}, 3 * repeats, setup.device)
    ratios = sorted(
        ours / alone for ours, alone in zip(seconds["pgd"], seconds["bare"], strict=True)
    )
    return {
        "rows": len(setup.inputs),
        "forwards": sum(len(inputs) for inputs, _ in recorded.calls),
        "backwards": sum(len(inputs) for inputs, wanted in recorded.calls if wanted),
        "seconds": seconds,
        "ratio": statistics.median(ratios),
        "quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
    }


def measure_curve(setup: SimpleNamespace, repeats: int) -> dict[str, Any]:
    """Compare one batched run over eight eps with eight runs of foolbox."""
    try:
        import foolbox
    except ImportError:
        return {"status": "foolbox is not installed: pip install -e '.[peers]'"}

    class Scores(nn.Module):
        """The class scores alone: both attack the same function."""

        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, inputs: Tensor) -> Tensor:
            return self.model.scores(inputs)

    view = Scores(setup.classifiers["DNR"]).eval()
    wrapped = foolbox.PyTorchModel(view, bounds=(0, 1), device=str(setup.device))
    count, eps = len(setup.inputs), torch.tensor(EPS, device=setup.device)
    many = setup.inputs.repeat(len(EPS), *[1] * (setup.inputs.ndim - 1))
    labels = setup.labels.repeat(len(EPS))
    options = {"steps": STEPS, "batch_size": len(many), "objective": "paper"}
    radii = eps.repeat_interleave(count)

    def ours() -> Tensor:
        return pgd(view, many, labels, radii, until_evasion=True, **options)

    def to_the_end() -> Tensor:
        return pgd(view, many, labels, radii, **options)

    def peer() -> None:
        attack = foolbox.attacks.L2PGD(steps=STEPS, random_start=False)
        for one in EPS:
            attack(wrapped, setup.inputs, setup.labels, epsilons=one)

    calls = {"ours": ours, "ours, all steps": to_the_end, "foolbox": peer}
    seconds = interleaved(calls, repeats, setup.device)
    ratio, whole = (
        statistics.median(
            peer / mine for mine, peer in zip(seconds[name], seconds["foolbox"], strict=True)
        )
        for name in list(calls)[:2]
    )
    return {
        "samples": count,
        "eps": EPS,
        "steps": STEPS,
        "foolbox": foolbox.__version__,
        "seconds": seconds,
        "ratio": ratio,
        "ratio, all steps": whole,
    }


def measure_strength(setup: SimpleNamespace) -> dict[str, Any]:
    """Run every attack on DNR: evasions at some eps, norms, time and passes."""
    model = setup.classifiers["DNR"]
    found: dict[str, Any] = {"samples": len(setup.inputs)}
    found |= {name: _minimum_norm(setup, model, call) for name, call in MINIMUM_NORM.items()}
    for name, call in WITH_EPS.items():
        found[name] = {f"{eps:g}": _at(setup, model, call, eps) for eps in FIXED_EPS}
    return found


def _run(setup: SimpleNamespace, model: nn.Module, call: Callable[..., Tensor]) -> dict[str, Any]:
    counted, began = CountedModel(model), time.perf_counter()
    points = call(counted)
    seconds = time.perf_counter() - began
    with torch.no_grad():
        output = model(points)
    evading = evades(output, setup.labels, counted.reject_index is not None)
    n = len(points)
    return {
        "points": points,
        "evading": evading,
        "seconds_per_sample": seconds / n,
        "forwards_per_sample": counted.forwards / n,
        "backwards_per_sample": counted.backwards / n,
    }


def _minimum_norm(
    setup: SimpleNamespace, model: nn.Module, attack: Callable[..., Tensor]
) -> dict[str, Any]:
    run = _run(setup, model, lambda m: attack(m, setup.inputs, setup.labels, setup.pool))
    norms = (run.pop("points") - setup.inputs).flatten(1).norm(dim=1)
    norms = torch.where(run.pop("evading"), norms, math.inf)
    at = {f"{eps:g}": (norms <= eps).double().mean().item() for eps in FIXED_EPS}
    return {
        "mean_norm": norms.mean().item(),
        "median_norm": norms.median().item(),
        "evasion": at,
        **run,
    }


def _at(
    setup: SimpleNamespace, model: nn.Module, attack: Callable[..., Tensor], eps: float
) -> dict[str, Any]:
    run = _run(
        setup,
        model,
        lambda m: attack(m, setup.inputs, setup.labels, eps, init_inputs=setup.pool),
    )
    del run["points"]
    return {"evasion": run.pop("evading").double().mean().item(), **run}


def main() -> None:
    """Measure the sections and write the JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--run", default="runs/mnist-5k", help="run folder (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device")
    names = ["overhead", "curve", "strength"]
    parser.add_argument("--sections", nargs="+", choices=names, default=names)
    parser.add_argument("--output", type=Path, help="JSON; default: in benchmarks/results")
    options = parser.parse_args()
    setup = load_samples(options.run, options.samples, options.device)
    path = options.output or RESULTS / f"attack-{setup.device.type}.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    measured = {"environment": describe_environment(setup.device), "samples": len(setup.inputs)}
    sections = {
        "overhead": lambda: measure_overhead(setup, options.repeats),
        "curve": lambda: measure_curve(setup, options.repeats),
        "strength": lambda: measure_strength(setup),
    }
    for name in options.sections:
        record[name] = {**measured, **stamp(), "found": sections[name]()}
        atomic_write_bytes(path, (json.dumps(record, indent=1) + "\n").encode())
        print(name, json.dumps(record[name]["found"], indent=1), flush=True)


if __name__ == "__main__":
    main()
