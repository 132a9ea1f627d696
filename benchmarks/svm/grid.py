"""Grid search: 5 folds, 5 C x 4 gamma.

We make one call of `grid_search` (one-vs-rest). A peer is scikit-learn's GridSearchCV over its own
SVC (one-vs-one, as its users have it): in as many processes as we have threads for scikit-learn,
whose SVC has one thread, and in one process for those that bring their own threads. The folds are
stratified for all, but not the same: accuracies agree up to that.
"""

import time
from typing import Any

import numpy as np

from benchmarks.svm.contenders import CACHE_MB, OURS, precision, svc_class
from benchmarks.svm.worker import Run

C_GRID = (0.01, 0.1, 1.0, 10.0, 100.0)
GAMMA_GRID = (0.0625, 0.25, 1.0, 4.0)
"""Multiples of gamma = "scale"."""
FOLDS = 5


def prepare(job: dict[str, Any]) -> Run:
    """Load the problem and warm the contender up, in its own process.

    Args:
        job: ``peer``, ``problem`` (npz), ``gammas`` (absolute), ``jobs`` (processes of
            GridSearchCV), ``device``.

    Returns:
        Answers ``grid``. A peer's request names ``points`` (indices of C and gamma) and the number
        of ``folds`` to run; it adds ``work_seconds``, the time in all fits and scorings.
    """
    arrays = np.load(job["problem"])
    labels = arrays["y_train"]
    features = arrays["x_train"].astype(precision(job["peer"]), copy=False)
    return (_ours if job["peer"] == OURS else _grid_search_cv)(job, features, labels)


def _grid_search_cv(job: dict[str, Any], features: np.ndarray, labels: np.ndarray) -> Run:
    from sklearn.model_selection import GridSearchCV, StratifiedKFold

    estimator = svc_class(job["peer"])(cache_size=CACHE_MB)
    splits = list(StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(features, labels))

    def search(points: list[list[int]], cv: list[Any]) -> dict[str, Any]:
        grid = [{"C": [C_GRID[i]], "gamma": [job["gammas"][j]]} for i, j in points]
        start = time.perf_counter()
        found = GridSearchCV(estimator, grid, cv=cv, n_jobs=job["jobs"], refit=False)
        results = found.fit(features, labels).cv_results_
        seconds = time.perf_counter() - start
        work = (results["mean_fit_time"] + results["mean_score_time"]).sum() * len(cv)
        accuracy = results["mean_test_score"].tolist()
        return {"seconds": [seconds], "work_seconds": float(work), "accuracy": accuracy}

    few = np.concatenate([np.flatnonzero(labels == k)[:5] for k in np.unique(labels)])
    search([[0, 0], [0, 1]], [(few, few)])  # starts the processes
    return lambda request: search(request["points"], splits[: request["folds"]])


def _ours(job: dict[str, Any], features: np.ndarray, labels: np.ndarray) -> Run:
    import torch

    from torchdnr.svm import grid_search

    device = job["device"]
    x, y = torch.from_numpy(features).to(device), torch.from_numpy(labels).to(device)
    few = torch.cat([(y == k).nonzero().squeeze(1)[:12] for k in y.unique().tolist()])
    grid_search(x[few], y[few], C_grid=(1.0,), gamma_grid=(1.0,), folds=2)

    def run(_request: dict[str, Any]) -> dict[str, Any]:
        start = time.perf_counter()
        found = grid_search(x, y, C_grid=C_GRID, gamma_grid=GAMMA_GRID, folds=FOLDS, seed=0)
        seconds = time.perf_counter() - start  # no sync needed: results were read
        accuracy = found.accuracy.flatten().tolist()
        return {"seconds": [seconds], "accuracy": accuracy, "not_converged": found.not_converged}

    return run
