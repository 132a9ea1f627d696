"""Measure the SVMs of torchdnr beside other implementations, on one machine, in one run.

`python -m benchmarks.svm --data DIR` measures, each contender in a fresh process and the
repeats of all contenders interleaved:

- fit: all one-vs-rest problems of a data set; pixels of MNIST and CIFAR10, three layers of the
  paper's MNIST network, diamonds by their cut, cities by their country, Gaussian clusters with
  wrong labels; at an ordinary and at hard (C, gamma)
- grid: a search over (C, gamma) by 5-fold cross-validation
- decision: decision values, also as a share of the rate of a plain matrix product
- gradient: scores and their input gradient, against gpytorch and torch.cdist

Every solution is certified afresh in float64 from its coefficients, ours like the others'. A peer
over its `--budget` runs in part and the record says so; one that is not installed is counted.
Numbers go to benchmarks/results/svm-<device>.json after every case; a stopped run goes on where it
was. Memory is the peak of a process above what it held once it had loaded its data and was warm.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, load_results, stamp
from benchmarks.svm.contenders import MODULES, OURS, peer_status, versions
from benchmarks.svm.gradient import ROUTES
from benchmarks.svm.problems import DATASETS, Settings, gaussian, load_problem
from benchmarks.svm.report import failures, summary, targets, text_table
from benchmarks.svm.sections import measure_decisions, measure_fit, measure_gradients, measure_grid
from benchmarks.svm.worker import Say
from torchdnr.evaluation.environment import describe_environment
from torchdnr.files import atomic_write_bytes

SAMPLES = 10_000
ORDINARY = (10.0, 1.0)
HARD = ((100.0, 0.25), (1.0, 1.0))
HARD_DATASETS = ("raw", "noise")
SMALL_DATASETS = ("raw", "relu_fc1")
GRID_DATASETS = ("relu_fc1", "raw")
DIMENSIONS = (200, 512, 3072)
SUPPORT_VECTORS = 0.374
"""Share of the training digits that one-vs-one models keep at the ordinary point."""
GRADIENT_DIMENSIONS = (512, 30)
SECTIONS = ("fit", "grid", "decision", "gradient")
PEERS = (OURS, *MODULES)
SVC_PEERS = tuple(peer for peer in PEERS if not peer.startswith("torchkm"))

Measure = Callable[[list[str], Say], dict[str, Any]]
Case = tuple[str, str, tuple[str, ...], Measure]


def fit_cases(settings: Settings) -> Iterator[Case]:
    """Yield the cases of the section fit: section, name, contenders, what to call."""
    points = [(name, *ORDINARY, settings.samples) for name in DATASETS]
    points += [(name, *point, settings.samples) for name in HARD_DATASETS for point in HARD]
    points += [(name, *ORDINARY, settings.small_samples) for name in SMALL_DATASETS]
    for name, C, multiple, n in sorted(points, key=lambda point: DATASETS.index(point[0])):
        small = n < settings.samples
        headline = (C, multiple) == ORDINARY and not small

        def measure(
            peers: list[str],
            say: Say,
            *,
            name: str = name,
            C: float = C,
            multiple: float = multiple,
            n: int = n,
            headline: bool = headline,
        ) -> dict[str, Any]:
            problem = load_problem(name, settings).head(n)
            found = measure_fit(problem, C, multiple, peers, settings, say)
            return {"dataset": name, "headline": headline, **found}

        label = f"{name}, C={C:g}, gamma={multiple:g} x scale, n={n}"
        yield "fit", label, PEERS if small else SVC_PEERS, measure


def grid_cases(settings: Settings) -> Iterator[Case]:
    """Yield the cases of the section grid."""
    for name in GRID_DATASETS:

        def measure(peers: list[str], say: Say, name: str = name) -> dict[str, Any]:
            return measure_grid(load_problem(name, settings), peers, settings, say)

        yield "grid", name, (OURS, "sklearn", "sklearnex"), measure


def score_cases(settings: Settings) -> Iterator[Case]:
    """Yield the cases of the sections decision and gradient."""
    m, queries = round(SUPPORT_VECTORS * settings.samples), settings.samples // 5

    def mnist(peers: list[str], say: Say) -> dict[str, Any]:
        problem = load_problem("raw", settings)
        return measure_decisions(problem.head(m), problem, peers, settings, say)

    yield "decision", "mnist", SVC_PEERS, mnist
    for d in DIMENSIONS:

        def measure(peers: list[str], say: Say, d: int = d) -> dict[str, Any]:
            return measure_decisions(gaussian(m, queries, d), None, peers, settings, say)

        yield "decision", f"d={d}", SVC_PEERS, measure
    for d in GRADIENT_DIMENSIONS:

        def measure(_peers: list[str], say: Say, d: int = d) -> dict[str, Any]:
            vectors = settings.samples // 2
            return measure_gradients(d, 256, vectors, settings, say)

        yield "gradient", f"d={d}", ROUTES, measure


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Measure the SVMs of torchdnr beside other implementations."
    )
    add = parser.add_argument
    add("--data", type=Path, default=Path("data"), help="folder of MNIST and cifar10.npz")
    add("--cache", type=Path, default=Path("scores/bench_svm"), help="keeps the trained network")
    add("--samples", type=int, default=SAMPLES, help="training samples; other sizes follow")
    add("--torchkm-samples", type=int, default=2000, help="training samples beside torchkm")
    add("--repeats", type=int, default=3)
    add("--budget", type=float, default=600.0, help="seconds per contender and case")
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add(
        "--only",
        nargs="+",
        default=[],
        choices=[*SECTIONS, *DATASETS, *PEERS],
        metavar="NAME",
        help="what to measure: sections, data sets (of fit and grid) and contenders, of: "
        + ", ".join([*SECTIONS, *DATASETS, *PEERS]),
    )
    add("--output", type=Path, help="JSON; default: benchmarks/results, or the cache when small")
    add("--fresh", action="store_true", help="measure again what the output already holds")
    arguments = parser.parse_args(argv)
    if arguments.samples < 100 or arguments.repeats < 1 or arguments.budget <= 0:
        parser.error("expected --samples >= 100, --repeats >= 1 and --budget > 0")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; use --device cpu")
    return arguments


def output_path(arguments: argparse.Namespace) -> Path:
    """Choose the file: a smoke test must not replace the recorded run."""
    if arguments.output:
        return arguments.output
    if arguments.samples == SAMPLES:
        return RESULTS / f"svm-{arguments.device}.json"
    return arguments.cache / f"svm-{arguments.device}-{arguments.samples}.json"


def wanted(only: list[str], section: str, name: str, peers: Sequence[str]) -> list[str]:
    """Choose the contenders of a case; none where the case is not wanted.

    Args:
        only: Names given on the command line.
        section: Of the case.
        name: Of the case; begins with the data set in the sections fit and grid.
        peers: Contenders that take part here.

    Returns:
        Those to measure.
    """
    sections, datasets = set(only) & set(SECTIONS), set(only) & set(DATASETS)
    chosen = set(only) & set(PEERS)
    if sections and section not in sections:
        return []
    if section in ("fit", "grid") and datasets and name.split(",")[0] not in datasets:
        return []
    if section not in (*sections, "fit", "grid") and datasets:
        return []
    if section == "gradient":  # has contenders of its own
        return list(peers) if section in sections or not chosen else []
    return [p for p in peers if not chosen or p in chosen]


def all_cases(settings: Settings) -> Iterator[Case]:
    """Yield the cases of all sections."""
    yield from fit_cases(settings)
    yield from grid_cases(settings)
    yield from score_cases(settings)


def run(
    arguments: argparse.Namespace, cases: Callable[[Settings], Iterable[Case]]
) -> dict[str, Any]:
    """Measure what is missing, and write the JSON after every case.

    Args:
        arguments: Of the command line.
        cases: What there is to measure.

    Returns:
        All results, old and new.
    """
    device, samples = arguments.device, arguments.samples
    sizes = {
        "samples": samples,
        # Beside torchkm the problem is smaller even in a smoke test, so that it has its own name.
        "small_samples": min(arguments.torchkm_samples, samples // 2),
        "repeats": arguments.repeats,
        "budget": arguments.budget,
    }
    environment, status = describe_environment(device), peer_status(device)
    folders = {"data": arguments.data, "cache": arguments.cache}
    settings = Settings(**sizes, **folders, device=device, threads=torch.get_num_threads())
    header = {"environment": environment, "versions": versions(), "settings": sizes}
    header["peer_status"] = status
    path = output_path(arguments)
    results = load_results(path, header, arguments.fresh)
    for peer, state in status.items():
        print(f"{peer}: {state}")
    present = {OURS, *(p for p, state in status.items() if state == "installed")}
    present |= set(ROUTES)
    for section, name, contenders, measure in cases(settings):
        peers = [p for p in wanted(arguments.only, section, name, contenders) if p in present]
        known = results["sections"].setdefault(section, {}).get(name, {"peers": {}})
        done = {p for p, answer in known["peers"].items() if "error" not in answer}
        if not peers or (not arguments.fresh and set(peers) <= done):
            continue
        print(f"\n{section}: {name}: {', '.join(peers)}", flush=True)
        stamped = stamp()
        record = measure(peers, lambda line: print(f"  {line}", flush=True))
        stamped["date"] = datetime.now(UTC).isoformat(timespec="seconds")
        for answer in record["peers"].values():
            answer |= stamped
        record["peers"] = {**known["peers"], **record["peers"]}
        results["sections"][section][name] = record
        results["targets"] = targets(results["sections"])
        atomic_write_bytes(path, f"{json.dumps(results, indent=1)}\n".encode())
        print(text_table(section, name, record), flush=True)
    results["targets"] = targets(results["sections"])
    print(f"\n{path}")
    return results


def main(
    argv: Sequence[str] | None = None,
    cases: Callable[[Settings], Iterable[Case]] = all_cases,
) -> int:
    """Run the benchmark.

    Args:
        argv: Command line; default: that of the process.
        cases: What there is to measure.

    Returns:
        0, or 1 if a measurement failed, a package that holds data is not installed, or the output
        belongs to another run.
    """
    arguments = parse(argv)
    try:
        results = run(arguments, cases)
    except (ValueError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(summary(results))
    return 1 if failures(results["sections"]) else 0


if __name__ == "__main__":
    sys.exit(main())
