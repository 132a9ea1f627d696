"""Fit DNR and secml's DNR on the same network, images and hyper-parameters, and time both."""

import json
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from secml_task import run_secml

from torchdnr import DNR
from torchdnr.costs import record_costs, stage


def measure_fit(
    setup: SimpleNamespace, model: DNR, python: str, repeats: int, limit: int = 1000
) -> dict[str, Any]:
    """Time both fits, features and stacking included, thresholds not.

    Args:
        setup: Images of a run: those of the SVMs, and inputs to compare decisions on.
        model: Fitted DNR, whose network and hyper-parameters both take.
        python: Interpreter that can import secml.
        repeats: Of our fit.
        limit: Images to fit on, the first of the run's.

    Returns:
        Seconds and peak memory of either, their ratio, and the share of inputs that both assign to
        the same class.
    """
    images, labels = setup.pool[:limit], setup.pool_labels[:limit]
    arrays = {"inputs": images, "labels": labels, "queries": setup.inputs}
    result = run_secml(python, model, arrays, {"fit": True})
    names = [*model.layers, "combiner"]
    chosen = {name: (model.selection[name]["C"], model.selection[name]["gamma"]) for name in names}
    ours = []
    for _ in range(repeats):
        fitted = DNR(model.net, model.layers, hyperparameters=chosen).to(setup.device)
        with record_costs(setup.device) as costs, stage("whole"):
            fitted.fit(images, labels)
        ours.append(costs["whole"])
    with torch.no_grad():
        scores = torch.cat([fitted.scores(part) for part in setup.inputs.split(256)])
    theirs = torch.from_numpy(result["scores"]).argmax(dim=1)
    seconds = median(cost.seconds for cost in ours)
    return {
        "versions": json.loads(str(result["versions"])),
        "samples": len(images),
        "hyperparameters": chosen,
        "secml": {
            "seconds": float(result["seconds"]),
            "peak_memory_mib": float(result["peak_memory_mib"]),
        },
        "ours": {
            "seconds": [cost.seconds for cost in ours],
            "peak_memory_mib": ours[-1].peak_memory_mib,
        },
        "ratio": float(result["seconds"]) / seconds,
        "same_class": float((scores.argmax(dim=1).cpu() == theirs).double().mean()),
        "queries": len(setup.inputs),
    }
