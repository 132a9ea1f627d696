"""Hand a DNR and images to secml_worker.py, which runs where secml does, and take its answer."""

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchdnr import DNR
from torchdnr.kernels import rbf_gamma

WORKER = Path(__file__).with_name("secml_worker.py")


def describe_network(net: nn.Module) -> list[tuple[str, str, dict[str, Any]]]:
    """Describe a sequential network so that plain torch can build it again."""
    sizes = ("kernel_size", "stride", "padding")
    arguments = {
        "Conv2d": ("in_channels", "out_channels", *sizes),
        "MaxPool2d": sizes,
        "Linear": ("in_features", "out_features"),
    }
    layers = [(name, type(layer).__name__, layer) for name, layer in net.named_children()]
    return [
        (name, kind, {key: getattr(layer, key) for key in arguments.get(kind, ())})
        for name, kind, layer in layers
    ]


def run_secml(
    python: str, model: DNR, images: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Run the worker in the other interpreter.

    Args:
        python: The interpreter.
        model: Fitted; its network, SVMs and threshold go along.
        images: Arrays by name: "inputs", "labels", and what the task wants beside them.
        settings: What the task is; JSON values.

    Returns:
        The worker's arrays.
    """
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        task, result = Path(folder) / "task.npz", Path(folder) / "result.npz"
        _write_task(task, model, images, {**settings, "threads": threads})
        variables = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        environment = os.environ | {name: str(threads) for name in variables}
        environment |= {"SECML_HOME_DIR": folder}  # or it makes a folder in the user's home
        subprocess.run([python, str(WORKER), str(task), str(result)], check=True, env=environment)
        with np.load(result) as file:
            return {name: file[name] for name in file.files}


def _write_task(
    path: Path, model: DNR, images: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> None:
    """Write what secml_worker.py needs: the classifier, the images, the settings."""
    svms = dict(zip((*model.layers, "combiner"), (*model.base_svms, model.combiner), strict=True))
    tensors = {**images, "threshold": model.threshold}
    tensors |= {f"network/{k}": v for k, v in model.net.state_dict().items()}
    for name, svm in svms.items():
        tensors |= {
            f"svm/{name}/vectors": svm.support_vectors,
            f"svm/{name}/dual_coef": svm.dual_coef,
            f"svm/{name}/intercept": svm.intercept,
            f"svm/{name}/gamma": rbf_gamma(svm.kernel),
        }
    known = {
        "network": describe_network(model.net),
        "layers": list(model.layers),
        "C": {name: svm.C for name, svm in svms.items()},
    }
    arrays = {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}
    np.savez(path, settings=np.array(json.dumps({**known, **settings})), **arrays)
