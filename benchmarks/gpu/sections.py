"""What is measured on an accelerator, a function per section: setup to numbers as JSON values."""

import math
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import squeezenet1_1

from benchmarks.attacks.__main__ import overhead_of
from benchmarks.common import ROOT, timed
from benchmarks.svm.problems import noisy_clusters
from torchdnr import DNR, NR, Adversary
from torchdnr.attacks import pgd
from torchdnr.data import load_dataset, split
from torchdnr.decisions import predict_labels
from torchdnr.evaluation import build_line_up, security_evaluation
from torchdnr.evaluation.judging import outputs
from torchdnr.evaluation.metrics import rejection_rate
from torchdnr.kernels.any_kernel import kernel_matrix, make_rbf_kernel
from torchdnr.kernels.rbf import full_precision, rbf_scores
from torchdnr.models import ADVERSARIAL_TRAINING, MNIST_LAYERS, MNISTNet, train_network
from torchdnr.resources import take_peak_memory_mib
from torchdnr.svm import RBFSVM, grid_search

DIMENSIONS = 64, 784, 3072
TEST_SHARE = 0.35  # of the time that is left, for the tests
LINE_UP_SHARE = 0.6  # likewise, for the line-up
EPS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
PAIRS = {name: (10.0, 0.02) for name in (*MNIST_LAYERS, "combiner")}  # for the trial alone


@dataclass(frozen=True)
class Setup:
    """What the sections share; digits and classifiers are made when one asks for them.

    Attributes:
        device: Measured.
        small: Whether it is a trial.
        data_root: Folder of MNIST.
        deadline: Of all sections, on the clock of ``time.monotonic``.
    """

    device: torch.device
    small: bool
    data_root: Path
    deadline: float

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.deadline - time.monotonic()

    def size(self, usual: int, small: int) -> int:
        """Choose a number of samples or repeats."""
        return small if self.small else usual

    @cached_property
    def images(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Digits and labels on the device: of the network, the SVMs, theta and the test."""
        whole = (self.data_root / "MNIST").is_dir()
        data = load_dataset("mnist" if whole else "mnist-5k", self.data_root)
        sizes = {"network": 2_700, "svm": 1_000, "threshold": 300, "test": 1_000}
        if whole:
            sizes = {"network": 49_000, "svm": 10_000, "threshold": 1_000, "test": 10_000}
        if self.small:
            sizes = {"network": 300, "svm": 200, "threshold": 100, "test": 6}
        parts = split(data, **sizes, seed=0)
        chosen = {
            name: data.select(getattr(parts, name), test=name == "test" and whole) for name in sizes
        }
        return {name: (x.to(self.device), y.to(self.device)) for name, (x, y) in chosen.items()}

    @cached_property
    def classifiers(self) -> dict[str, nn.Module]:
        """DNN, NR and DNR, trained and fitted on the device."""
        torch.manual_seed(0)
        net = MNISTNet().to(self.device)
        train_network(
            *(net, *self.images["network"], replace(ADVERSARIAL_TRAINING, epochs=3)),
            device=self.device,
            progress=False,
        )
        net.eval()
        given: dict[str, Any] = {"hyperparameters": PAIRS} if self.small else {}
        dnr = DNR(net, list(MNIST_LAYERS), **given)
        if self.small:
            given = {"hyperparameters": {MNIST_LAYERS[-1]: PAIRS["combiner"]}}
        nr = NR(net, MNIST_LAYERS[-1], **given)
        for model in (nr, dnr):
            model.fit(*self.images["svm"]).calibrate(
                self.images["threshold"][0], rejection_rate=0.1
            )
        return {"DNN": net, "NR": nr, "DNR": dnr}


def run_tests(setup: Setup) -> dict[str, Any]:
    """Run the tests with a variant on the device, in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-m", "", "-k", setup.device.type]
    command += ["-p", "no:cacheprovider", "--tb=line"]
    command += ["tests/test_rejection.py"] if setup.small else []
    limit = TEST_SHARE * setup.left()
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False
        )
        text, code = done.stdout, done.returncode
    except subprocess.TimeoutExpired as expired:
        text, code = (expired.stdout or b"").decode(errors="replace"), None
    counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", text)}
    failures = re.findall(r"^(?:FAILED|ERROR) (.+)$", text, re.MULTILINE)
    ended = {"exit_code": code, "stopped_after": limit if code is None else None}
    return {"counts": counts, "failures": failures, **ended}


def measure_fits(setup: Setup) -> dict[str, Any]:
    """Fit and search 10,000 samples, and compare kernels with the peak of a matrix product."""
    n, device = setup.size(10_000, 300), setup.device
    peak = _peak(setup)
    measured: dict[str, Any] = {"peak_flops": peak, "samples": n, "dimensions": {}}
    for d in DIMENSIONS[:1] if setup.small else DIMENSIONS:
        problem = noisy_clusters(n, d=d, noise=0.02)
        z, y = problem.x_train.to(device), problem.y_train.to(device)
        timed(lambda z=z, y=y: RBFSVM().fit(z[:200], y[:200]), device)  # libraries are loaded
        seconds, svm = timed(lambda z=z, y=y: RBFSVM().fit(z, y), device)
        entry: dict[str, Any] = {"fit": seconds, "support_vectors": len(svm.support)}
        solution = svm.solution
        entry["certificate"] = {
            name: getattr(solution, name).max().item() for name in ("violation", "duality_gap")
        }
        entry["kernels"] = _kernel_rates(svm, z, peak, setup)
        measured["dimensions"][str(d)] = entry
        if setup.left() < 4 * seconds:
            return {**measured, "grid": "no time was left"}
        grid = {"C_grid": (1.0, 10.0), "gamma_grid": (0.25, 1.0)} if setup.small else {}
        seconds, search = timed(lambda z=z, y=y, grid=grid: grid_search(z, y, **grid), device)
        entry["grid"] = {"seconds": seconds, "not_converged": search.not_converged}
    return measured


def _peak(setup: Setup) -> float:
    """Measure the rate of a large float32 product, in operations per second."""
    k = setup.size(8_192, 512)
    a = torch.randn(k, k, device=setup.device)
    with full_precision(setup.device):
        a @ a
        seconds = min(timed(lambda: a @ a, setup.device)[0] for _ in range(5))
    return 2 * k**3 / seconds


def _kernel_rates(svm: RBFSVM, z: Tensor, peak: float, setup: Setup) -> dict[str, float]:
    """Time the Gram matrix and scores; return the share of the peak that their products reach."""
    kernel = make_rbf_kernel(0.01, like=z)
    center, width = z.mean(dim=0), torch.tensor(0.01).to(z)
    x, vectors, b = z - center, svm.support_vectors - center, svm.dual_coef

    def gram() -> None:
        kernel_matrix(kernel, z, z, center)

    def scores() -> None:
        rbf_scores(x, vectors, b, width)

    n, d = z.shape
    work = {gram: 2 * n * n * d, scores: 2 * n * len(vectors) * (d + b.shape[1])}
    shares = {}
    for call, operations in work.items():
        call()
        seconds = min(timed(call, setup.device)[0] for _ in range(3))
        shares[call.__name__] = operations / seconds / peak
    return shares


def measure_pgd(setup: Setup) -> dict[str, Any]:
    """Compare the loop of PGD with its bare passes, and count the waits of the host."""
    n = setup.size(256, 4)
    x, y = (part[:n] for part in setup.images["test"])
    samples = SimpleNamespace(inputs=x, labels=y, device=setup.device)
    measured: dict[str, Any] = {}
    for name, model in setup.classifiers.items():
        entry: dict[str, Any] = {"waits_per_step": _waits_per_step(model, x, y)}
        for way, change in WAYS.items():
            if setup.small and way != "eager":  # the compiler takes longer than all the rest
                continue
            try:
                changed = change(model)
                overhead = overhead_of(changed, samples, setup.size(3, 1))
                bare = sorted(overhead["seconds"]["bare"])
                entry[way] = {"ratio": overhead["ratio"], "bare": bare[len(bare) // 2]}
            except Exception as error:  # a way that does not fit this classifier or device
                entry[way] = {"error": f"{type(error).__name__}: {error}"[:300]}
            if setup.left() < 0:
                break
        measured[name] = entry
    return measured


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "eager": lambda model: model,
    "compiled": torch.compile,
    "CUDA graphs": lambda model: torch.compile(model, mode="reduce-overhead"),
}
"""Ways to run a classifier."""


def _waits_per_step(model: nn.Module, x: Tensor, y: Tensor) -> float | None:
    """Count how often a further step of PGD makes the host wait; None off CUDA."""
    if x.device.type != "cuda":
        return None
    counts = []
    for steps in (10, 30):
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                pgd(model, x, y, 1.0, steps=steps)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchroniz" in str(warning.message) for warning in caught))
    return (counts[1] - counts[0]) / 20


def measure_line_up(setup: Setup) -> dict[str, Any]:
    """Attack as many digits as there is time for by the default line-up."""
    pool = setup.images["svm"][0]
    x, y = setup.images["test"]
    attacks = build_line_up(["default"], pool)
    measured: dict[str, Any] = {}
    end = time.monotonic() + LINE_UP_SHARE * setup.left()
    for place, (name, model) in enumerate(setup.classifiers.items()):
        now = time.monotonic()
        until, n = now + (end - now) / (len(setup.classifiers) - place), min(200, len(x))
        while True:
            began = time.monotonic()
            curve = security_evaluation(
                model, x[:n], y[:n], EPS, attacks=attacks, init_inputs=pool, progress=False
            )
            seconds = time.monotonic() - began
            left = until - time.monotonic()
            if n == len(x) or left < 1.5 * seconds:
                break
            n = min(len(x), math.floor(0.8 * n * left / seconds))  # as many as should fit
        predicted = predict_labels(outputs(model, x, 1_000), name != "DNN")
        measured[name] = {
            "samples": n,
            "seconds": seconds,
            "median_norm": curve.median_evasion_norm,
            "right": (predicted == y).double().mean().item(),
            "rejected": rejection_rate(predicted),
            "peak_memory_mib": take_peak_memory_mib(setup.device),
        }
    return measured


def measure_training(setup: Setup) -> dict[str, Any]:
    """Train one epoch against attacks, to reject."""
    x, y = setup.images["network"]
    torch.manual_seed(0)
    net = MNISTNet().to(setup.device)
    net.load_state_dict(setup.classifiers["DNN"].state_dict())
    settings = replace(ADVERSARIAL_TRAINING, epochs=1)
    adversary = Adversary(eps=3.5)
    seconds, _ = timed(
        lambda: train_network(
            net, x, y, settings, adversary=adversary, device=setup.device, progress=False
        ),
        setup.device,
    )
    return {"images": len(x), "seconds": seconds, "images_per_second": len(x) / seconds}


def measure_photographs(setup: Setup) -> dict[str, Any]:
    """Time squeezenet at 224 x 224 with a DNR on it: weights and images are random."""
    torch.manual_seed(0)
    net = squeezenet1_1(weights=None).to(setup.device).eval()
    n = setup.size(1_000, 40)
    images = torch.rand(n, 3, setup.size(224, 64), setup.size(224, 64), device=setup.device)
    labels = torch.arange(n, device=setup.device) % 10
    layers = ["features.7", "features.12", "classifier"]
    pairs = {name: (10.0, 1e-3) for name in (*layers, "combiner")}
    model = DNR(net, layers, hyperparameters=pairs)
    take_peak_memory_mib(setup.device)
    fit, _ = timed(lambda: model.fit(images, labels), setup.device)
    model.calibrate(images[: n // 2], rejection_rate=0.1)
    measured: dict[str, Any] = {"images": n, "fit": fit, "batches": {}}
    for batch in 1, setup.size(32, 4), setup.size(256, 8):
        x = images[:batch].clone().requires_grad_()
        entry = {}
        for name, classifier in (("network", net), ("DNR", model)):

            def step(classifier: nn.Module = classifier, x: Tensor = x) -> None:
                torch.autograd.grad(classifier(x).sum(), x)

            step()
            entry[name] = min(timed(step, setup.device)[0] for _ in range(setup.size(5, 1)))
        measured["batches"][str(batch)] = entry
    attacked, steps = setup.size(64, 4), setup.size(40, 5)
    seconds, _ = timed(
        lambda: pgd(model, images[:attacked], labels[:attacked], 1.0, steps=steps), setup.device
    )
    measured["pgd"] = {"images": attacked, "steps": steps, "seconds": seconds}
    return {**measured, "peak_memory_mib": take_peak_memory_mib(setup.device)}


SECTIONS: dict[str, Callable[[Setup], dict[str, Any]]] = {
    "tests": run_tests,
    "fits": measure_fits,
    "pgd": measure_pgd,
    "line-up": measure_line_up,
    "training": measure_training,
    "photographs": measure_photographs,
}
