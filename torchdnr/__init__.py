"""Deep Neural Rejection in pure PyTorch, and its honest evaluation."""

import os
import warnings
from importlib.metadata import version

# Before PyTorch is loaded, as OpenMP reads it then: threads that wait sleep. By default they spin,
# and two processes on the same cores slow each other down several times.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
with warnings.catch_warnings():
    # Importing gpytorch makes torch announce the end of torch.jit.script: no news for our users.
    warnings.filterwarnings("ignore", r"`torch\.jit\.script` is deprecated", FutureWarning)
    from torchdnr.decisions import REJECT
    from torchdnr.dnr import DNR, NR
    from torchdnr.export import export_onnx, export_program
    from torchdnr.features.choice import default_layers, layer_table
    from torchdnr.models.adversarial import Adversary
    from torchdnr.rejection import LogitRejection, WithReject
    from torchdnr.svm.rbf_svm import RBFSVM
    from torchdnr.svm.solver import solve_dual

__version__ = version("torchdnr")
__all__ = [
    "DNR",
    "NR",
    "RBFSVM",
    "REJECT",
    "Adversary",
    "LogitRejection",
    "WithReject",
    "__version__",
    "default_layers",
    "export_onnx",
    "export_program",
    "layer_table",
    "solve_dual",
]
