"""Deep Neural Rejection in pure PyTorch, and its honest evaluation."""

import warnings

with warnings.catch_warnings():
    # Importing gpytorch makes torch announce the end of torch.jit.script: no news for our users.
    warnings.filterwarnings("ignore", r"`torch\.jit\.script` is deprecated", FutureWarning)
    from torchdnr.dnr import DNR, NR
    from torchdnr.export import export_onnx, export_program
    from torchdnr.features.choice import default_layers
    from torchdnr.layer_table import layer_table
    from torchdnr.rejection import REJECT
    from torchdnr.svm.rbf_svm import RBFSVM
    from torchdnr.svm.solver import solve_dual
    from torchdnr.with_reject import WithReject

__version__ = "0.1.0"
__all__ = [
    "DNR",
    "NR",
    "RBFSVM",
    "REJECT",
    "WithReject",
    "__version__",
    "default_layers",
    "export_onnx",
    "export_program",
    "layer_table",
    "solve_dual",
]
