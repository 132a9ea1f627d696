"""Measure `line_search_pgd` beside the attack of the authors' library, secml, on the same DNR.

secml 0.15.6 wants old versions of other packages, so it runs in an environment of its own:

    python3.11 -m venv secml-venv
    secml-venv/bin/pip install numpy==1.23.5 scipy==1.10.1 scikit-learn==1.2.2 'setuptools<70'
    secml-venv/bin/pip install 'matplotlib<3.8' joblib python-dateutil requests torch torchvision
    secml-venv/bin/pip install --no-deps --ignore-requires-python secml==0.15.6
    python benchmarks/bench_secml.py --secml-python secml-venv/bin/python

The run folder is one made by train.py. Its network, SVMs and threshold are put into secml's
`CClassifierDNR`, whose scores must agree with ours to 1e-4 before anything is measured. Both
attack the same samples: secml with the values of its tutorial on DNR, by `CAttackEvasionPGDExp`,
which it names as the paper's attack, and by `CAttackEvasionPGDLS`; ours with as many steps, for the
objective of the paper and for that of secml. All points are judged by our model. Scoring the
training samples, from which second starts are taken, is left out for secml and for our batches of
one, and is part of the time of our large batch. On a busy machine compare processor seconds.

- compare: seconds per sample, objective reached, evasions, passes through the network
- fit: seconds and memory to fit DNR on the same images and hyper-parameters, and how often the two
  then decide alike
- options: what other options of `line_search_pgd` cost and bring, on Eq. 2 and the same samples

Numbers go to benchmarks/results/secml-<device>.json.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.attacks.__main__ import RESULTS, load, timed
from benchmarks.attacks.secml_fit import measure_fit
from benchmarks.attacks.secml_task import run_secml
from benchmarks.common import busy_cores, commit
from torchdnr import DNR
from torchdnr.attacks import OBJECTIVES, evades, line_search_pgd, split_scores
from torchdnr.evaluation.environment import describe_environment
from torchdnr.evaluation.judging import CountedModel
from torchdnr.files import atomic_write_bytes

EPS = (1.0, 3.0)
STEPS = 30
SOLVER = {"eta": 0.1, "eta_min": 0.1, "max_iter": STEPS, "eps": 1e-8}
ATTACKS = ("PGDExp", "PGDLS")  # of secml
OURS = ("paper", "secml")  # objectives
TOLERANCE = 1e-4  # largest difference of scores
CLOSE = 1e-3  # difference of objectives that is called a tie
RULES = product((20, 30, 50), (5, 10), (1e-3, 1e-4, 0.0))
OPTIONS = [
    *({"steps": steps, "halvings": halvings, "tol": tol} for steps, halvings, tol in RULES),
    *({"steps": STEPS, "doublings": doublings} for doublings in (4, 5, 6, 8)),
    *(
        {"steps": steps, "doublings": doublings}
        for steps, doublings in product((3, 5, 10), (4, 10))
    ),
]


def judge(model: DNR, points: Tensor, inputs: Tensor, labels: Tensor) -> dict[str, Any]:
    """Say what points are worth: both objectives, evasions, norms; by our model."""
    with torch.no_grad():
        output = model(points)
    values = {k: OBJECTIVES[k](*split_scores(output, True), labels) for k in OURS}
    return {
        "mean_objective": {name: value.mean().item() for name, value in values.items()},
        "objective": {name: value.tolist() for name, value in values.items()},
        "evasions": int(evades(output, labels, True).sum()),
        "largest_norm": (points - inputs).flatten(1).norm(dim=1).max().item(),
        "inside_box": bool(((points >= 0) & (points <= 1)).all()),
    }


def judge_secml(
    result: dict[str, np.ndarray], key: str, model: DNR, inputs: Tensor, labels: Tensor
) -> dict[str, Any]:
    """Summarise one attack of secml at one eps."""
    points = torch.from_numpy(result[f"{key}/points"]).to(inputs)
    counted = ("seconds", "cpu_seconds", "evaluations", "gradients", "network_forwards")
    return {
        **{f"{k}_per_sample": result[f"{key}/{k}"].mean().item() for k in counted},
        **judge(model, points, inputs, labels),
    }


def clock(
    call: Callable[[], Tensor], rows: int, repeats: int, device: torch.device
) -> dict[str, float]:
    """Return the medians of wall and processor seconds per row; the latter bear a busy machine."""
    spent = []
    for _ in range(repeats):
        began = time.process_time()
        seconds, _ = timed(call, device)
        spent.append((seconds / rows, (time.process_time() - began) / rows))
    wall, processor = map(median, zip(*spent, strict=True))
    return {"seconds_per_sample": wall, "cpu_seconds_per_sample": processor}


def measure_ours(
    setup: SimpleNamespace, model: DNR, samples: int, eps: float, objective: str, repeats: int
) -> dict[str, Any]:
    """Time our attack one by one and in a large batch; judge the points of secml's samples."""
    classes, n = model.predict(setup.pool), len(setup.inputs)

    def attack(rows: slice, known: bool, target: nn.Module = model) -> Tensor:
        pool = {"init_inputs": setup.pool, "init_labels": classes if known else None}
        sample = (setup.inputs[rows], setup.labels[rows])
        return line_search_pgd(target, *sample, eps, objective=objective, steps=STEPS, **pool)

    def one_by_one() -> None:
        for i in range(samples):
            attack(slice(i, i + 1), True)

    counted, first = CountedModel(model), slice(0, samples)
    points = attack(first, True, counted)  # warms up as well
    return {
        "batch of 1": clock(one_by_one, samples, 1, setup.device),
        f"batch of {n}": clock(lambda: attack(slice(0, n), False), n, repeats, setup.device),
        "forwards_per_sample": counted.forwards / samples,
        "backwards_per_sample": counted.backwards / samples,
        **judge(model, points, setup.inputs[first], setup.labels[first]),
    }


def compare(ours: dict[str, Any], theirs: dict[str, Any], objective: str) -> dict[str, Any]:
    """Compare one of our runs with one of secml's, by the objective that ours minimised."""
    excess = np.subtract(ours["objective"][objective], theirs["objective"][objective])
    batches = {k: spent for k, spent in ours.items() if k.startswith("batch")}
    return {
        **{
            f"times faster, {size}": {kind: theirs[kind] / spent[kind] for kind in spent}
            for size, spent in batches.items()
        },
        "mean_excess": float(excess.mean()),
        "samples_higher": int((excess > CLOSE).sum()),
        "samples_lower": int((excess < -CLOSE).sum()),
        "largest_excess": float(excess.max()),
    }


def measure_comparison(
    setup: SimpleNamespace, model: DNR, samples: int, python: str, repeats: int
) -> dict[str, Any]:
    """Run secml and ours on the same samples, and compare them.

    Raises:
        RuntimeError: If the two classifiers are not the same.
    """
    settings = {"attacks": ATTACKS, "eps": EPS, "solver_params": SOLVER}
    arrays = {"inputs": setup.inputs[:samples], "labels": setup.labels[:samples]}
    result = run_secml(python, model, arrays | {"pool": setup.pool}, settings)
    inputs, labels = setup.inputs[:samples], setup.labels[:samples]
    with torch.no_grad():
        scores = torch.cat([model(part) for part in (inputs, *setup.pool.split(256))])
    difference = (scores.double().cpu() - torch.from_numpy(result["scores"])).abs().max().item()
    if not difference <= TOLERANCE:
        raise RuntimeError(
            f"scores must agree to {TOLERANCE:g}, got a difference of {difference:g}: secml's "
            "classifier is not ours, and comparing attacks on them says nothing"
        )
    versions = json.loads(str(result["versions"]))
    found = {
        "versions": versions,
        "samples": samples,
        "largest_score_difference": difference,
        "busy_cores_between": busy_cores(),  # secml has run, ours has not
    }
    for eps in EPS:
        sample = (model, inputs, labels)
        theirs = {name: judge_secml(result, f"{name}/{eps:g}", *sample) for name in ATTACKS}
        ours = {k: measure_ours(setup, model, samples, eps, k, repeats) for k in OURS}
        against = {
            f"{mine} against {name}": compare(ours[mine], theirs[name], mine)
            for mine, name in product(ours, theirs)
        }
        found[f"eps {eps:g}"] = {"secml": theirs, "ours": ours, "comparison": against}
    return found


def measure_options(setup: SimpleNamespace, model: DNR, samples: int) -> list[dict[str, Any]]:
    """Measure our attack on Eq. 2 with other options, in one batch."""
    inputs, labels = setup.inputs[:samples], setup.labels[:samples]
    given, rows = {"init_inputs": setup.pool, "init_labels": model.predict(setup.pool)}, []
    for eps, options in product(EPS, OPTIONS):
        counted, points = CountedModel(model), []
        attack = partial(line_search_pgd, counted, inputs, labels, eps, **given, **options)
        spent = clock(lambda call=attack, to=points: to.append(call()), samples, 1, setup.device)
        judged = judge(model, points[0], inputs, labels)
        row = {"eps": eps, **options, "mean_objective": judged["mean_objective"]["paper"]}
        passes = {"forwards": counted.forwards, "backwards": counted.backwards}
        row |= {f"{name}_per_sample": count / samples for name, count in passes.items()}
        rows.append({**row, "evasions": judged["evasions"], **spent})
        print("options", json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Measure the sections and write the JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--secml-python", required=True, help="interpreter that can import secml")
    parser.add_argument("--run", default="runs/mnist-5k", help="run folder (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=50, help="of our largest batch")
    parser.add_argument("--secml-samples", type=int, default=10, help="the first of them")
    parser.add_argument("--repeats", type=int, default=2, help="of our large batch")
    parser.add_argument("--device")
    parser.add_argument("--sections", nargs="+", default=["compare", "options", "fit"])
    options = parser.parse_args()
    setup = load(options.run, options.samples, options.device)
    model = setup.classifiers["DNR"]
    path = RESULTS / f"secml-{setup.device.type}.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    record |= {"environment": describe_environment(setup.device), "solver_params": SOLVER}
    sections: dict[str, Callable[[], Any]] = {
        "compare": lambda: measure_comparison(
            setup, model, options.secml_samples, options.secml_python, options.repeats
        ),
        "options": lambda: measure_options(setup, model, options.secml_samples),
        "fit": lambda: measure_fit(
            options.run, options.samples, options.device, options.secml_python
        ),
    }
    for name in options.sections:
        stamp = {"commit": commit(), "busy_cores_before": busy_cores()}
        record[name] = {**stamp, "found": sections[name]()}
        atomic_write_bytes(path, (json.dumps(record, indent=1) + "\n").encode())
        print(name, json.dumps(record[name]["found"], indent=1), flush=True)


if __name__ == "__main__":
    main()
