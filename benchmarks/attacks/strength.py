"""How strong each attack is, and what it costs: section "strength" of bench_attack.py."""

import math
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from torchdnr.attacks import (
    apgd,
    boundary_walk,
    ddn,
    evades,
    fmn,
    line_search_pgd,
    pgd,
)
from torchdnr.evaluation.judging import CountedModel

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
