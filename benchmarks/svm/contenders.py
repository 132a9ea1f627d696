"""Who is compared with torchdnr, in which precision, and who takes part on this machine.

scikit-learn, its Intel extension, cuML and ThunderSVM solve LIBSVM's problem and stop, as we do, at
a KKT violation <= 1e-3. torchkm minimises ``sum(hinge) / n + lambda b'Kb``, the same problem with
``lambda = 1 / (2 n C)``; its estimator converts C itself, and takes ``sigma = gamma / 2``. It is a
primal first-order method: its b is feasible and optimal only as far as it converged, which at its
default tolerance of 1e-5 is not far; ``torchkm-tight`` is the same with 1e-9.
"""

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import numpy as np

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
)
CACHE_MB = 1000
"""Kernel cache of LIBSVM and its relatives: five times their default."""
_FLOAT64 = ("sklearn", "sklearnex-float64", "torchkm", "torchkm-tight")


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
