"""Decision values of the test samples.

Ours is a model all of whose training samples are support vectors; labels drawn at random see to
that. A peer is one one-vs-one model of ten classes, as its users have it: evaluated one-vs-rest, it
needs ten calls. In the case ``mnist`` the peers are trained on the digits as they are, and have as
many support vectors as ours to a percent. In the other cases they have the random labels too, which
puts nearly every support vector into all of its nine pairs of classes: that is more work than a
trained model for a peer that evaluates pair by pair, as the Intel extension does.
"""

from typing import Any

import numpy as np

from benchmarks.svm.contenders import CACHE_MB, OURS, precision, svc_class
from benchmarks.svm.worker import Run, repeat_short


def prepare(job: dict[str, Any]) -> Run:
    """Fit a contender in its own process.

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
