"""Attack with secml: run by secml.py in an interpreter that has secml, torch and numpy.

`python secml_worker.py TASK.npz RESULT.npz` builds secml's `CClassifierDNR` from the parameters in
the task, and attacks its inputs one by one, as the library does, with secml's own attacks. A task
with "fit" has it fit SVMs with the same hyper-parameters to its inputs instead.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import secml
import torch
from secml.adv.attacks.evasion import CAttackEvasionPGDExp, CAttackEvasionPGDLS
from secml.array import CArray
from secml.data import CDataset
from secml.ml.classifiers import CClassifierPyTorch, CClassifierSVM
from secml.ml.classifiers.reject import CClassifierDNR
from secml.ml.kernels import CKernelRBF
from torch import nn

ATTACKS = {"PGDExp": CAttackEvasionPGDExp, "PGDLS": CAttackEvasionPGDLS}
BATCH_SIZE = 256  # secml's default of 1 would only slow down the scoring of the training samples


class Task:
    """The arrays and settings of a task.

    Attributes:
        arrays: By name.
        settings: JSON values.
    """

    def __init__(self, path: str) -> None:
        with np.load(path) as file:  # without pickle
            self.arrays = {name: file[name] for name in file.files}
        self.settings: dict[str, Any] = json.loads(str(self.arrays.pop("settings")))

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        """Return the arrays whose names start with ``prefix/``, without it."""
        start = prefix + "/"
        return {k[len(start) :]: v for k, v in self.arrays.items() if k.startswith(start)}


def build_network(task: Task) -> nn.Sequential:
    """Rebuild the network, layer by layer, with its weights."""
    net = nn.Sequential()
    for name, kind, arguments in task.settings["network"]:
        net.add_module(name, getattr(nn, kind)(**arguments))
    net.load_state_dict({k: torch.from_numpy(v) for k, v in task.group("network").items()})
    return net.eval()


def new_svm(task: Task, name: str) -> CClassifierSVM:
    """Build secml's SVM with the hyper-parameters of ours, not fitted."""
    gamma = float(task.group(f"svm/{name}")["gamma"])
    return CClassifierSVM(C=task.settings["C"][name], kernel=CKernelRBF(gamma=gamma))


def build_svm(task: Task, name: str) -> CClassifierSVM:
    """Put trained parameters into secml's SVM, in the form that its own fit leaves them."""
    given, svm = task.group(f"svm/{name}"), new_svm(task, name)
    svm._classes = CArray.arange(len(given["intercept"]))
    svm._n_features = given["vectors"].shape[1]
    svm.kernel.rv = CArray(given["vectors"].astype(float))
    svm._alpha = CArray(given["dual_coef"].astype(float).T.copy()).tosparse()
    svm._b = CArray(given["intercept"].astype(float))
    return svm


def build_classifier(
    task: Task, net: nn.Sequential, make_svm: Callable[[Task, str], CClassifierSVM] = build_svm
) -> CClassifierDNR:
    """Build secml's DNR of the same network, SVMs and threshold."""
    classes = len(task.group("svm/combiner")["intercept"])
    dnn = CClassifierPyTorch(
        model=net,
        input_shape=tuple(task.arrays["inputs"].shape[1:]),
        pretrained=True,
        pretrained_classes=CArray.arange(classes),
        batch_size=BATCH_SIZE,
    )
    layers = task.settings["layers"]
    dnr = CClassifierDNR(
        make_svm(task, "combiner"),
        {name: make_svm(task, name) for name in layers},
        dnn,
        layers,
        float(task.arrays["threshold"]),
    )
    if make_svm is not build_svm:
        return dnr
    dnr._n_features = task.arrays["inputs"][0].size
    for name in layers:  # an SVM with a network in front of it takes images
        getattr(dnr, name)._n_features = dnr._n_features
    return dnr


def flat(images: np.ndarray) -> CArray:
    """Turn images ``(n, ...)`` into the rows that secml takes."""
    return CArray(images.reshape(len(images), -1).astype(float))


def attack_all(
    task: Task, dnr: CClassifierDNR, pool: CDataset, name: str, eps: float, rows: list[int]
) -> dict[str, np.ndarray]:
    """Attack every input; time each one after the training samples have been scored.

    ``rows`` counts the images that the network has seen.
    """
    attack = ATTACKS[name](
        classifier=dnr,
        double_init_ds=pool,
        distance="l2",
        dmax=eps,
        lb=0,
        ub=1,
        solver_params=task.settings["solver_params"],
    )
    images, labels = flat(task.arrays["inputs"]), CArray(task.arrays["labels"])
    attack._set_alternative_init()  # once for all inputs: not a cost of any one of them
    points, found = [], []
    for i in range(images.shape[0]):
        before = np.array([time.perf_counter(), time.process_time(), rows[0]])
        adversarial = attack.run(images[i, :], labels[i])[2]
        spent = np.array([time.perf_counter(), time.process_time(), rows[0]]) - before
        found.append([*spent, attack.f_eval, attack.grad_eval])
        points.append(adversarial.X.tondarray().reshape(task.arrays["inputs"][i].shape))
        print(f"secml {name} eps {eps:g}: {i + 1} of {images.shape[0]}", file=sys.stderr)
    columns = ("seconds", "cpu_seconds", "network_forwards", "evaluations", "gradients")
    return {"points": np.stack(points), **dict(zip(columns, np.array(found).T, strict=True))}


def fit(task: Task) -> dict[str, np.ndarray]:
    """Fit new SVMs to the inputs, and score the queries; seconds and peak memory of the fit."""
    dnr = build_classifier(task, build_network(task), new_svm)
    data = CDataset(flat(task.arrays["inputs"]), CArray(task.arrays["labels"]))
    began = time.perf_counter()
    dnr.fit(data.X, data.Y)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    scores = dnr.decision_function(flat(task.arrays["queries"])).tondarray()
    return {
        "seconds": np.array(seconds),
        "peak_memory_mib": np.array(peak),
        "scores": scores[:, : scores.shape[1] - 1],
    }


def versions() -> np.ndarray:
    """Tell the versions of what runs here."""
    found = {"secml": secml.__version__, "numpy": np.__version__, "torch": torch.__version__}
    return np.array(json.dumps(found))


def main() -> None:
    """Read the task, do it, write the result."""
    task = Task(sys.argv[1])
    torch.set_num_threads(task.settings["threads"])
    work = fit if task.settings.get("fit") else attack
    np.savez(sys.argv[2], versions=versions(), **work(task))


def attack(task: Task) -> dict[str, np.ndarray]:
    """Attack the inputs with every attack and eps."""
    net, rows = build_network(task), [0]

    def count(_: nn.Module, inputs: tuple[torch.Tensor, ...], __: torch.Tensor) -> None:
        rows[0] += len(inputs[0])

    net.register_forward_hook(count)
    dnr = build_classifier(task, net)
    # secml asks for labels, but chooses a start by the scores alone.
    pool = CDataset(flat(task.arrays["pool"]), CArray.zeros(len(task.arrays["pool"])))
    images = np.concatenate([task.arrays["inputs"], task.arrays["pool"]])
    result = {
        "scores": dnr.decision_function(flat(images)).tondarray(),
    }
    for name in task.settings["attacks"]:
        for eps in task.settings["eps"]:
            found = attack_all(task, dnr, pool, name, eps, rows)
            result |= {f"{name}/{eps:g}/{key}": value for key, value in found.items()}
    return result


if __name__ == "__main__":
    main()
