"""RBF support vector machines: the dual problem, its solver, the module, model selection."""

from torchdnr.decisions import NotFittedError
from torchdnr.svm.dual import Certificate, ConvergenceWarning, DualSolution
from torchdnr.svm.implicit import ImplicitSolution, implicit_solution, svm_scores
from torchdnr.svm.influence import Influence, influence
from torchdnr.svm.model_selection import (
    GridSearch,
    SelectionWarning,
    grid_search,
    out_of_fold_scores,
)
from torchdnr.svm.rbf_svm import RBFSVM
from torchdnr.svm.solver import solve_dual

__all__ = [
    "RBFSVM",
    "Certificate",
    "ConvergenceWarning",
    "DualSolution",
    "GridSearch",
    "ImplicitSolution",
    "Influence",
    "NotFittedError",
    "SelectionWarning",
    "grid_search",
    "implicit_solution",
    "influence",
    "out_of_fold_scores",
    "solve_dual",
    "svm_scores",
]


def __getattr__(name: str) -> type:
    """Import ``RBFSVC`` when it is asked for: it needs scikit-learn, which the rest does not."""
    if name != "RBFSVC":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from torchdnr.svm.sklearn.estimator import RBFSVC

    return RBFSVC
