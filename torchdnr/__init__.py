"""Deep Neural Rejection in pure PyTorch, and its honest evaluation."""

from torchdnr.detectors import WithReject
from torchdnr.dnr import DNR, NR
from torchdnr.rejection import REJECT
from torchdnr.svm import RBFSVM, solve_dual

__version__ = "0.1.0"
__all__ = ["DNR", "NR", "RBFSVM", "REJECT", "WithReject", "__version__", "solve_dual"]
