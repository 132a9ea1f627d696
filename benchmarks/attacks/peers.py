"""Compare our attacks with those of other libraries, sample by sample, on one model.

`python -m benchmarks.attacks.peers --run runs/mnist-5k --robust mnist_cnn_a_adv.pth` takes DNN, NR
and DNR of a run folder of train.py, and an adversarially trained network with and without DNR. Our
default line-up attacks the first test images. Where it does not evade, the attacks of foolbox,
torchattacks, ART and AutoAttack (extra `peers`) try through our adapters, so that a success is an
accepted and wrong input, within the ball and the box, judged by the model itself. An evaluation is
as strong as they are if no peer succeeds where it fails; the number of samples where one does is
what counts here, per peer and eps.

A sample that a peer evades at one eps is evaded at every larger one and is not attacked again.
Numbers go to benchmarks/results/peers-<device>.json after every attack and eps; a stopped run goes
on where it was. A peer that is not installed is named.
"""

import argparse
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.attacks.robust import robust_classifiers
from benchmarks.common import RESULTS, load_run, stamp
from torchdnr.adapters import attack_per_label
from torchdnr.attacks import evades, project
from torchdnr.attacks.starts import nearest_other_class
from torchdnr.decisions import has_reject_column, is_evasion
from torchdnr.evaluation import predict_labels, security_evaluation
from torchdnr.evaluation.environment import describe_environment
from torchdnr.evaluation.judging import outputs
from torchdnr.files import digest, read_json, write_json

BATCH_SIZE = 256
SEED = 0
TOLERANCE = 1e-5  # by which a norm may exceed eps; a library rounds in float32

Run = Callable[[nn.Module, Tensor, Tensor, float, Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """An attack of another library on models that may reject, through an adapter of torchdnr.

    Attributes:
        packages: What must be installed.
        run: The attack, ``run(view, inputs, labels, eps, starts) -> points`` for inputs of one
            class: ``view`` is what ``torchdnr.adapters.for_label`` shows of the model, ``starts``
            are accepted inputs of other classes, one per input. It imports its library itself.
        minimum_norm: Whether one run, whatever its eps, serves every eps.
        settings: Its options, as recorded.
    """

    packages: tuple[str, ...]
    run: Run
    minimum_norm: bool
    settings: dict[str, Any]

    def versions(self) -> dict[str, str] | None:
        """Look up the versions of its packages, None if one is not installed."""
        try:
            return {name: version(name) for name in self.packages}
        except PackageNotFoundError:
            return None


def _foolbox(attack: str, minimum_norm: bool, far: bool, **options: Any) -> Run:  # noqa: ANN401
    def run(view: nn.Module, inputs: Tensor, labels: Tensor, eps: float, starts: Tensor) -> Tensor:
        import foolbox

        torch.manual_seed(SEED)
        shown = foolbox.PyTorchModel(view, bounds=(0, 1), device=inputs.device)
        method = getattr(foolbox.attacks, attack)(**options)
        extra = {"starting_points": starts} if far else {}
        epsilons = None if minimum_norm else eps
        return method(shown, inputs, labels, epsilons=epsilons, **extra)[1]

    return run


def _torchattacks(steps: int) -> Run:
    def run(view: nn.Module, inputs: Tensor, labels: Tensor, eps: float, starts: Tensor) -> Tensor:
        import torchattacks

        torch.manual_seed(SEED)
        method = torchattacks.PGDL2(view, eps=eps, alpha=2.5 * eps / steps, steps=steps)
        return method(inputs, labels)

    return run


def _art(steps: int) -> Run:
    def run(view: nn.Module, inputs: Tensor, labels: Tensor, eps: float, starts: Tensor) -> Tensor:
        from art.attacks.evasion import ProjectedGradientDescent
        from art.estimators.classification import PyTorchClassifier

        with torch.no_grad():
            classes = view(inputs[:1]).shape[1]
        shown = PyTorchClassifier(
            view,
            nn.CrossEntropyLoss(),
            tuple(inputs.shape[1:]),
            classes,
            clip_values=(0.0, 1.0),
            device_type="gpu" if inputs.is_cuda else "cpu",
        )
        options = {"norm": 2, "eps": eps, "eps_step": 2.5 * eps / steps, "max_iter": steps}
        method = ProjectedGradientDescent(shown, **options, batch_size=len(inputs), verbose=False)
        return torch.from_numpy(method.generate(inputs.cpu().numpy(), labels.cpu().numpy()))

    return run


def _autoattack(attack: str, queries: int | None = None) -> Run:
    def run(view: nn.Module, inputs: Tensor, labels: Tensor, eps: float, starts: Tensor) -> Tensor:
        from pyautoattack import AutoAttack

        logging.getLogger("auto-attack").setLevel(logging.ERROR)
        method = AutoAttack(
            view,
            attacks=[attack],
            version="custom",
            norm="L2",
            eps=eps,
            seed=SEED,
            device=inputs.device,
        )
        method.apgd.n_restarts = method.fab.n_restarts = 1  # as in its version "standard"
        if queries is not None:
            method.square.n_queries = queries
        return method.run_standard_evaluation(inputs, labels, batch_size=len(inputs))[0]

    return run


def peer_attacks(steps: int, queries: int) -> dict[str, Peer]:
    """Collect the attacks.

    Args:
        steps: Of every iterative attack but those of AutoAttack, which has its own, 100.
        queries: Of the square attack.

    Returns:
        Attacks by name.
    """
    attacks = {}
    for name, attack, minimum_norm, far, options in (
        ("foolbox L2PGD", "L2PGD", False, False, {"steps": steps, "rel_stepsize": 2.5 / steps}),
        ("foolbox FMN", "L2FMNAttack", True, False, {"steps": steps}),
        ("foolbox FMN, far starts", "L2FMNAttack", True, True, {"steps": steps}),
        ("foolbox Brendel-Bethge", "L2BrendelBethgeAttack", True, True, {"steps": steps}),
    ):
        needed = ("foolbox", "numba") if "Brendel" in name else ("foolbox",)
        run = _foolbox(attack, minimum_norm, far, **options)
        attacks[name] = Peer(needed, run, minimum_norm, options)
    counted = {"steps": steps}
    art = "adversarial-robustness-toolbox"
    attacks["torchattacks PGDL2"] = Peer(("torchattacks",), _torchattacks(steps), False, counted)
    attacks["ART PGD l2"] = Peer((art,), _art(steps), False, counted)
    for attack in ("apgd-ce", "apgd-t", "fab"):
        name = f"AutoAttack {attack}"
        attacks[name] = Peer(("pyautoattack",), _autoattack(attack), False, {"steps": 100})
    square = _autoattack("square", queries)
    attacks["AutoAttack square"] = Peer(("pyautoattack",), square, False, {"queries": queries})
    return attacks


@dataclass(frozen=True)
class Problem:
    """What is attacked, and what our attacks reached.

    Attributes:
        model: The classifier.
        reject: Whether the last column of its output is the threshold.
        inputs: Clean images, ``(n, ...)``.
        labels: True classes, ``(n,)``.
        starts: The nearest image that the model accepts as another class, ``(n, ...)``.
        ours: Whether our line-up evades, by eps, bool ``(n,)``.
    """

    model: nn.Module
    reject: bool
    inputs: Tensor
    labels: Tensor
    starts: Tensor
    ours: dict[float, Tensor]


def make_problem(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    pool: Tensor,
    ours: dict[float, Tensor],
) -> Problem:
    """Find where the attacks that need a start begin: at the nearest image of another class."""
    reject = has_reject_column(model, None)
    classes = predict_labels(outputs(model, pool, BATCH_SIZE), reject)
    nearest, usable = nearest_other_class(inputs, labels, pool, classes, 1)
    if not usable.all():
        raise ValueError("the model accepts no image of another class to start some attacks from")
    return Problem(model, reject, inputs, labels, pool[nearest[:, 0]], ours)


def evaluate(
    model: nn.Module, inputs: Tensor, labels: Tensor, pool: Tensor, eps: Sequence[float]
) -> dict[str, list[bool]]:
    """Attack by our default line-up in l2, and tell by eps which samples it evades."""
    curve = security_evaluation(model, inputs, labels, eps, init_inputs=pool, progress=False)
    pairs = zip(curve.eps, curve.predictions, strict=True)
    return {f"{size:g}": is_evasion(row, curve.labels).tolist() for size, row in pairs}


def run_peer(problem: Problem, peer: Peer, eps: float, rows: Tensor) -> dict[str, Any]:
    """Attack some samples, and judge what the attack returns.

    Args:
        problem: What is attacked.
        peer: The attack.
        eps: Radius of the ball; an attack that minimises the norm ignores it.
        rows: Samples to attack.

    Returns:
        ``rows``; ``evading`` and ``norm`` of each point, clipped to the box and, but for minimum
        norms, projected on the ball; how many lay ``outside``; ``seconds``.
    """
    if not len(rows):
        return {"rows": [], "evading": [], "norm": [], "outside": 0, "seconds": 0.0}
    inputs, labels, starts = (t[rows] for t in (problem.inputs, problem.labels, problem.starts))

    def attack(view: nn.Module, some: Tensor, classes: Tensor) -> Tensor:
        return peer.run(view, some, classes, eps, starts[labels == classes[0]])

    began = time.perf_counter()
    points = attack_per_label(attack, problem.model, inputs, labels, reject=problem.reject)
    seconds = time.perf_counter() - began
    points = points.nan_to_num().clamp(0, 1)
    far = torch.zeros_like(labels, dtype=torch.bool)
    if not peer.minimum_norm:
        far = _norm(points - inputs) > eps * (1 + TOLERANCE)
        inside = project(points, inputs, eps, 2, (0.0, 1.0))
        points = torch.where(far.view(-1, *[1] * (points.ndim - 1)), inside, points)
    output = outputs(problem.model, points, BATCH_SIZE)
    return {
        "rows": rows.tolist(),
        "evading": evades(output, labels, problem.reject).tolist(),
        "norm": _norm(points - inputs).tolist(),
        "outside": int(far.sum()),
        "seconds": seconds,
    }


def _norm(shift: Tensor) -> Tensor:
    return shift.double().flatten(1).norm(dim=1)


def reached(peer: Peer, runs: dict[str, dict[str, Any]], eps: float, samples: int) -> Tensor:
    """Tell which samples a peer evades within ``eps``, by any of its runs, bool ``(n,)``."""
    found = torch.zeros(samples, dtype=torch.bool)
    for size, run in runs.items():
        if peer.minimum_norm or float(size) <= eps:
            near = torch.tensor(run["norm"]) <= eps * (1 + TOLERANCE)
            evading = torch.tensor(run["evading"], dtype=torch.bool) & near
            found[torch.tensor(run["rows"], dtype=torch.int64)] |= evading
    return found


def compare(problem: Problem, peer: Peer, runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Count, by eps, the samples that a peer evades, and those that ours does not.

    Args:
        problem: What is attacked, with our results.
        peer: The attack.
        runs: What ``run_peer`` returned, by eps.

    Returns:
        By eps: ``peer`` and ``ours``, how many samples each evades; ``peer_only``, those that the
        peer evades and ours does not.
    """
    table = {}
    for eps, ours in problem.ours.items():
        theirs = reached(peer, runs, eps, len(ours))
        table[f"{eps:g}"] = {
            "peer": int(theirs.sum()),
            "ours": int(ours.sum()),
            "peer_only": (theirs & ~ours).nonzero()[:, 0].tolist(),
        }
    return table


def measure(
    problem: Problem,
    chosen: dict[str, Peer],
    record: dict[str, Any],
    keep: Callable[[], None],
    run: Callable[[Problem, Peer, float, Tensor], dict[str, Any]] = run_peer,
) -> None:
    """Run every peer at every eps that the record lacks, where ours failed; keep it after each."""
    samples = len(problem.labels)
    for name, peer in chosen.items():
        entry = record["peers"].setdefault(name, {"versions": peer.versions(), "runs": {}})
        if entry["versions"] is None:
            print(f"{name}: needs {', '.join(peer.packages)}: pip install -e '.[peers]'")
            del record["peers"][name]
            continue
        entry |= {"settings": peer.settings, "minimum_norm": peer.minimum_norm}
        sizes = sorted(problem.ours)
        for eps in sizes[-1:] if peer.minimum_norm else sizes:
            if f"{eps:g}" not in entry["runs"]:
                left = ~reached(peer, entry["runs"], eps, samples)
                left &= ~problem.ours[sizes[0] if peer.minimum_norm else eps]
                rows = left.nonzero()[:, 0].to(problem.labels.device)
                print(f"{name}, eps {eps:g}: {len(rows)} samples", file=sys.stderr, flush=True)
                entry["runs"][f"{eps:g}"] = run(problem, peer, eps, rows)
            entry["table"] = compare(problem, peer, entry["runs"])
            keep()


def summary(record: dict[str, Any]) -> str:
    """Format the record: per peer and eps, samples evaded by it, by ours, by it alone."""
    lines = [f"{'attack':<26} {'eps':>5} {'peer':>5} {'ours':>5} {'peer only':>10} {'s':>6}"]
    for name, entry in record["peers"].items():
        for eps, row in entry["table"].items():
            seconds = entry["runs"].get(eps, {}).get("seconds")
            spent = "" if seconds is None else f"{seconds:.0f}"
            lines.append(
                f"{name:<26} {eps:>5} {row['peer']:>5} {row['ours']:>5} "
                f"{len(row['peer_only']):>10} {spent:>6}"
            )
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    option = parser.add_argument
    option("--run", type=Path, default=Path("runs/mnist-5k"), help="run folder of train.py")
    option("--robust", type=Path, help="weights of an adversarially trained network")
    option("--only", nargs="+", help="names of classifiers (default: all)")
    option("--samples", type=int, default=50, help="test images, from the first (default: 50)")
    option("--eps", type=float, nargs="+", default=[1, 1.5, 2, 2.5], help="l2 (1 1.5 2 2.5)")
    option("--peers", nargs="+", metavar="WORD", help="only attacks whose name has one of these")
    option("--steps", type=int, default=100, help="of iterative attacks (default: 100)")
    option("--queries", type=int, default=1000, help="of the square attack (default: 1000)")
    option("--output", type=Path, help="default: benchmarks/results/peers-<device>.json")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark, print the tables, and return 1 if some peer beats ours on a sample."""
    options = _parser().parse_args(argv)
    job, classifiers = load_run(options.run)
    if options.robust:
        classifiers |= robust_classifiers(job, options.robust)
    inputs, labels = (part[: options.samples] for part in job.images("test"))
    pool, eps = job.images("svm")[0], sorted(set(options.eps))
    identity = {
        **{"samples": len(labels), "eps": eps, "steps": options.steps, "queries": options.queries},
        "digest": digest({"inputs": inputs, "pool": pool}),
    }
    output = options.output or RESULTS / f"peers-{labels.device.type}.json"
    result = {"run": identity, "classifiers": {}}
    if output.exists():
        earlier = read_json(output)
        if earlier.get("run") == identity:
            result = earlier
        else:
            print(f"{output} is of another comparison: starting afresh", file=sys.stderr)
    result |= {**stamp(), "environment": describe_environment(labels.device)}
    chosen = {
        name: peer
        for name, peer in peer_attacks(options.steps, options.queries).items()
        if options.peers is None or any(word.lower() in name.lower() for word in options.peers)
    }
    beaten = False
    for name in options.only or classifiers:
        model = classifiers[name].eval()
        weights = digest(model.state_dict())
        record = result["classifiers"].get(name, {})
        if record.get("digest") != weights:
            print(f"{name}: our line-up", file=sys.stderr, flush=True)
            ours = evaluate(model, inputs, labels, pool, eps)
            record = result["classifiers"][name] = {"digest": weights, "ours": ours, "peers": {}}
            write_json(output, result)
        ours = {float(size): torch.tensor(hits) for size, hits in record["ours"].items()}
        problem = make_problem(model, inputs, labels, pool, ours)
        measure(problem, chosen, record, lambda: write_json(output, result))
        print(f"{name}\n{summary(record)}")
        tables = (entry["table"].values() for entry in record["peers"].values())
        beaten |= any(row["peer_only"] for rows in tables for row in rows)
    return int(beaten)


if __name__ == "__main__":
    sys.exit(main())
