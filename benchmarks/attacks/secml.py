"""Measure `line_search_pgd` beside the attack of the authors' library, secml, on the same DNR.

secml 0.15.6 wants old versions of other packages, so it runs in an environment of its own:

    python3.11 -m venv secml-venv
    secml-venv/bin/pip install numpy==1.23.5 scipy==1.10.1 scikit-learn==1.2.2 'setuptools<70'
    secml-venv/bin/pip install 'matplotlib<3.8' joblib python-dateutil requests torch torchvision
    secml-venv/bin/pip install --no-deps --ignore-requires-python secml==0.15.6
    python -m benchmarks.attacks.secml --secml-python secml-venv/bin/python

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
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.common import RESULTS, busy_cores, load_samples, stamp, timed
from torchdnr import DNR
from torchdnr.attacks import OBJECTIVES, evades, line_search_pgd, split_scores
from torchdnr.evaluation.environment import describe_environment
from torchdnr.evaluation.judging import CountedModel
from torchdnr.files import atomic_write_bytes
from torchdnr.kernels import rbf_gamma
from torchdnr.resources import record_costs, stage

WORKER = Path(__file__).with_name("secml_worker.py")
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
FIT_LIMIT = 1000  # images


def describe_network(net: nn.Module) -> list[tuple[str, str, dict[str, Any]]]:
    """Describe a sequential network so that plain torch can build it again."""
    sizes = ("kernel_size", "stride", "padding")
    arguments = {
        "Conv2d": ("in_channels", "out_channels", *sizes),
        "MaxPool2d": sizes,
        "Linear": ("in_features", "out_features"),
    }
    layers = [(name, type(layer).__name__, layer) for name, layer in net.named_children()]
    return [
        (name, kind, {key: getattr(layer, key) for key in arguments.get(kind, ())})
        for name, kind, layer in layers
    ]


def run_secml(
    python: str, model: DNR, images: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Hand a DNR and images to secml_worker.py, which runs where secml does; take its answer.

    Args:
        python: The interpreter.
        model: Fitted; its network, SVMs and threshold go along.
        images: Arrays by name: "inputs", "labels", and what the task wants beside them.
        settings: What the task is; JSON values.

    Returns:
        The worker's arrays.
    """
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        task, result = Path(folder) / "task.npz", Path(folder) / "result.npz"
        _write_task(task, model, images, {**settings, "threads": threads})
        variables = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        environment = os.environ | {name: str(threads) for name in variables}
        environment |= {"SECML_HOME_DIR": folder}  # or it makes a folder in the user's home
        # From a folder without this file, which would hide the library of the same name.
        worker = shutil.copy(WORKER, folder)
        subprocess.run([python, worker, str(task), str(result)], check=True, env=environment)
        with np.load(result) as file:
            return {name: file[name] for name in file.files}


def _write_task(
    path: Path, model: DNR, images: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> None:
    """Write what secml_worker.py needs: the classifier, the images, the settings."""
    svms = dict(zip((*model.layers, "combiner"), (*model.base_svms, model.combiner), strict=True))
    tensors = {**images, "threshold": model.threshold}
    tensors |= {f"network/{k}": v for k, v in model.net.state_dict().items()}
    for name, svm in svms.items():
        tensors |= {
            f"svm/{name}/vectors": svm.support_vectors,
            f"svm/{name}/dual_coef": svm.dual_coef,
            f"svm/{name}/intercept": svm.intercept,
            f"svm/{name}/gamma": rbf_gamma(svm.kernel),
        }
    known = {
        "network": describe_network(model.net),
        "layers": list(model.layers),
        "C": {name: svm.C for name, svm in svms.items()},
    }
    arrays = {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}
    np.savez(path, settings=np.array(json.dumps({**known, **settings})), **arrays)


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


def measure_fit(run: str, samples: int, device: str | None, python: str) -> dict[str, Any]:
    """Time both fits, features and stacking included, thresholds not, each first in its process.

    Args:
        run: Folder of a run of train.py, whose network, hyper-parameters and images both take.
        samples: Inputs to compare decisions on.
        device: Where ours runs.
        python: Interpreter that can import secml.

    Returns:
        Seconds and peak memory of either (of the process, with all that it has loaded), the ratio
        of the seconds, and the share of inputs that both assign to the same class.
    """
    setup = load_samples(run, samples, device)
    arrays = {
        "inputs": setup.pool[:FIT_LIMIT],
        "labels": setup.pool_labels[:FIT_LIMIT],
        "queries": setup.inputs,
    }
    model = setup.classifiers["DNR"]
    result = run_secml(python, model, arrays, {"fit": True})
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        threads = torch.get_num_threads()
        found, costs = pool.submit(fit_ours, run, samples, device, threads).result()
    theirs = torch.from_numpy(result["scores"]).argmax(dim=1)
    seconds = float(result["seconds"])
    return {
        "versions": json.loads(str(result["versions"])),
        "samples": len(arrays["inputs"]),
        "hyperparameters": hyperparameters(model),
        "secml": {"seconds": seconds, "peak_memory_mib": float(result["peak_memory_mib"])},
        "ours": costs,
        "ratio": seconds / costs["seconds"][0],
        "same_class": float((torch.tensor(found) == theirs).double().mean()),
        "queries": len(setup.inputs),
    }


def fit_ours(
    run: str, samples: int, device: str | None, threads: int, repeats: int = 3
) -> tuple[list[int], dict[str, Any]]:
    """Fit DNR a few times; the classes of the inputs, seconds, and the peak memory of the first."""
    torch.set_num_threads(threads)
    setup = load_samples(run, samples, device)
    model, spent = setup.classifiers["DNR"], []
    for _ in range(repeats):
        fitted = DNR(model.net, model.layers, hyperparameters=hyperparameters(model))
        with record_costs(setup.device) as costs, stage("whole"):
            fitted.to(setup.device).fit(setup.pool[:FIT_LIMIT], setup.pool_labels[:FIT_LIMIT])
        spent.append(costs["whole"])
    with torch.no_grad():
        scores = torch.cat([fitted.scores(part) for part in setup.inputs.split(256)])
    return scores.argmax(dim=1).tolist(), {
        "seconds": [cost.seconds for cost in spent],
        "peak_memory_mib": spent[0].peak_memory_mib,
    }


def hyperparameters(model: DNR) -> dict[str, tuple[float, float]]:
    """Look up (C, gamma) of every SVM of a DNR."""
    names = [*model.layers, "combiner"]
    return {name: (model.selection[name]["C"], model.selection[name]["gamma"]) for name in names}


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
    setup = load_samples(options.run, options.samples, options.device)
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
        record[name] = {**stamp(), "found": sections[name]()}
        atomic_write_bytes(path, (json.dumps(record, indent=1) + "\n").encode())
        print(name, json.dumps(record[name]["found"], indent=1), flush=True)


if __name__ == "__main__":
    main()
