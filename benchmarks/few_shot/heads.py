"""Heads that learn a new episode's classes from its few samples, differentiable by features."""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from torchdnr.svm import svm_scores

C = 1.0
"""Upper bound of alpha; the ridge is 1 / C."""
QP_RIDGE = 1e-6
"""Added to the diagonal of the QP, which has to be definite."""

Head = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""From samples ``(e, n, d)``, labels ``(e, n)``, inputs ``(e, m, d)`` and gamma to scores."""


def svm(features: Tensor, labels: Tensor, inputs: Tensor, gamma: Tensor) -> Tensor:
    """Score by one-vs-rest SVMs: this package's layer."""
    return svm_scores(features, labels, inputs, C=C, gamma=gamma)


def ridge(features: Tensor, labels: Tensor, inputs: Tensor, gamma: Tensor) -> Tensor:
    """Score by kernel ridge regression on -1 and 1, in closed form (Bertinetto et al., 2019)."""
    kernel = _rbf(features, features, gamma)
    system = kernel + torch.eye(kernel.shape[1]) / C
    return _rbf(inputs, features, gamma) @ torch.linalg.solve(system, _targets(labels))


def qpth(features: Tensor, labels: Tensor, inputs: Tensor, gamma: Tensor) -> Tensor:
    """Score by the same SVMs, without intercepts, of qpth's QP layer (as Lee et al., 2019)."""
    from qpth.qp import QPFunction

    wide, width = features.double(), gamma.double()
    y = _targets(labels).double().transpose(1, 2).flatten(0, 1)  # a problem per episode and class
    e, n, c = len(labels), labels.shape[1], len(y) // len(labels)
    identity = torch.eye(n, dtype=torch.float64)
    kernel = (_rbf(wide, wide, width) + QP_RIDGE * identity).repeat_interleave(c, dim=0)
    bounds, limits = torch.cat([identity, -identity]), torch.cat([C * y[0].abs(), 0 * y[0]])
    none = torch.empty(0, dtype=torch.float64)
    quadratic = y[:, :, None] * kernel * y[:, None]
    alpha = QPFunction(verbose=-1)(quadratic, -y.abs(), bounds, limits, none, none)
    dual_coef = (alpha * y).view(e, c, n).transpose(1, 2)
    return (_rbf(inputs.double(), wide, width) @ dual_coef).to(features)


HEADS: dict[str, Head] = {"svm": svm, "ridge": ridge, "qpth": qpth}


def qpth_version() -> str | None:
    """Return the version of qpth; "unknown" of one that is on the path, and None without it."""
    try:
        return version("qpth")
    except PackageNotFoundError:
        pass
    try:
        import qpth
    except ModuleNotFoundError as error:
        return None if error.name == "qpth" else f"unusable: {error}"
    return getattr(qpth, "__version__", "unknown")


def _rbf(inputs: Tensor, vectors: Tensor, gamma: Tensor) -> Tensor:
    norms = inputs.square().sum(dim=2)[:, :, None] + vectors.square().sum(dim=2)[:, None]
    return (-gamma * (norms - 2 * inputs @ vectors.transpose(1, 2)).clamp_min(0)).exp()


def _targets(labels: Tensor) -> Tensor:
    return 2.0 * one_hot(labels).float() - 1.0
