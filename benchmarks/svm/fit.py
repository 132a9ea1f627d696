"""Fit: all one-vs-rest problems of a data set at one (C, gamma).

We make one call of `RBFSVM.fit`. A peer fits one binary problem after the other, in one process; a
user who spreads them over the cores with joblib divides its time by at most their number.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.svm.contenders import CACHE_MB, OURS, precision, svc_class
from benchmarks.svm.worker import Run, synchronize

Fit = Callable[[np.ndarray | slice, float], dict[str, Any]]
"""Rows and a budget in seconds to the answer."""
Binary = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, float]]

MIN_CLASSES = 3
"""Classes that a contender over its budget is timed on before the rest is extrapolated."""
WARM_UP = 12
"""Samples of each class in the fit before the timed ones."""


def prepare(job: dict[str, Any]) -> Run:
    """Load the problem and warm the contender up, in its own process.

    Args:
        job: ``peer``, ``problem`` (npz), ``C``, ``gamma``, ``device``, ``budget`` in seconds.

    Returns:
        Answers ``fit`` with seconds, and ``save`` by writing the coefficients of the last fit.
    """
    arrays = np.load(job["problem"])
    labels = arrays["y_train"]
    features = arrays["x_train"].astype(precision(job["peer"]), copy=False)
    fit = (_ours if job["peer"] == OURS else _one_by_one)(job, features, labels)
    few = np.concatenate([np.flatnonzero(labels == k)[:WARM_UP] for k in np.unique(labels)])
    fit(few, 0.0)  # no budget: one class, for a peer
    state: dict[str, np.ndarray] = {}

    def run(request: dict[str, Any]) -> dict[str, Any]:
        if request["do"] == "save":
            np.savez(request["path"], **state)
            return {}
        fitted = fit(slice(None), job["budget"])
        state.update({name: fitted.pop(name) for name in ("coef", "intercept")})
        return fitted

    return run


def _ours(job: dict[str, Any], features: np.ndarray, labels: np.ndarray) -> Fit:
    import torch

    from torchdnr.svm import RBFSVM

    device = job["device"]
    x, y = torch.from_numpy(features).to(device), torch.from_numpy(labels).to(device)

    def fit(rows: np.ndarray | slice, _budget: float) -> dict[str, Any]:
        part, targets = x[rows], y[rows]
        before = torch.cuda.memory_allocated() if device != "cpu" else 0
        synchronize(device)
        start = time.perf_counter()
        solution = RBFSVM(C=job["C"], gamma=job["gamma"]).fit(part, targets).solution
        synchronize(device)
        answer: dict[str, Any] = {"seconds": [time.perf_counter() - start]}
        if device != "cpu":
            answer["peak_device_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        fields = ("violation", "duality_gap", "steps", "converged")
        answer["reported"] = {name: getattr(solution, name).tolist() for name in fields}
        answer["reported"]["kernel_rows"] = solution.kernel_rows
        answer["coef"] = solution.dual_coef.double().cpu().numpy()
        answer["intercept"] = solution.intercept.double().cpu().numpy()
        return answer

    return fit


def _one_by_one(job: dict[str, Any], features: np.ndarray, labels: np.ndarray) -> Fit:
    """Fit class after class; stop early when all of them would take longer than the budget."""
    make = _torchkm if job["peer"].startswith("torchkm") else _svc
    binary, c = make(job), int(labels.max()) + 1

    def fit(rows: np.ndarray | slice, budget: float) -> dict[str, Any]:
        part, coefs, intercepts, elapsed = features[rows], [], [], 0.0
        for k in range(c):
            targets = np.where(labels[rows] == k, 1.0, -1.0)
            start = time.perf_counter()
            coef, intercept = binary(part, targets)
            elapsed += time.perf_counter() - start
            # Libraries differ in which class they call positive; y'b = sum(alpha) >= 0 tells.
            sign = 1.0 if targets @ coef >= 0 else -1.0
            coefs.append(sign * coef)
            intercepts.append(sign * intercept)
            done = k + 1
            if elapsed * c / done > budget and (done >= MIN_CLASSES or elapsed > budget):
                break
        answer: dict[str, Any] = {"seconds": [elapsed * c / done]}
        if done < c:
            answer["extrapolated_from"] = f"{done} of {c} classes"
        return {**answer, "coef": np.stack(coefs, 1), "intercept": np.array(intercepts)}

    return fit


def _svc(job: dict[str, Any]) -> Binary:
    make, settings = svc_class(job["peer"]), {"C": job["C"], "gamma": job["gamma"]}

    def fit(features: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, float]:
        svc = make(**settings, kernel="rbf", tol=1e-3, cache_size=CACHE_MB).fit(features, targets)
        coef = np.zeros(len(targets))
        coef[_flat(svc.support_).astype(np.int64)] = _flat(svc.dual_coef_)
        return coef, float(_flat(svc.intercept_)[0])

    return fit


def _torchkm(job: dict[str, Any]) -> Binary:
    from torchkm import TorchKMSVC

    settings = {"rbf_sigma": job["gamma"] / 2, "Cs": [job["C"]], "device": job["device"]}
    settings["tol"] = 1e-9 if job["peer"] == "torchkm-tight" else 1e-5

    def fit(features: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, float]:
        # Its cross-validation cannot be switched off: one fold that holds nothing out is cheapest.
        fold = np.zeros(len(targets), dtype=np.int64)
        svc = TorchKMSVC(kernel="rbf", cv=1, foldid=fold, max_iter=100_000, **settings)
        svc.fit(features, targets)
        return svc.alpha_, svc.intercept_

    return fit


def _flat(values: Any) -> np.ndarray:  # noqa: ANN401 - of numpy, scipy.sparse or cupy
    values = values.get() if hasattr(values, "get") else values
    values = values.toarray() if hasattr(values, "toarray") else values
    return np.asarray(values, dtype=np.float64).ravel()
