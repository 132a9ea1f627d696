"""Fit DNR and secml's DNR on the same network, images and hyper-parameters, and time both."""

import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch

from benchmarks.attacks.__main__ import load
from benchmarks.attacks.secml_task import run_secml
from torchdnr import DNR
from torchdnr.costs import record_costs, stage

LIMIT = 1000  # images


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
    setup = load(run, samples, device)
    arrays = {
        "inputs": setup.pool[:LIMIT],
        "labels": setup.pool_labels[:LIMIT],
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
    setup = load(run, samples, device)
    model, spent = setup.classifiers["DNR"], []
    for _ in range(repeats):
        fitted = DNR(model.net, model.layers, hyperparameters=hyperparameters(model))
        with record_costs(setup.device) as costs, stage("whole"):
            fitted.to(setup.device).fit(setup.pool[:LIMIT], setup.pool_labels[:LIMIT])
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
