"""Measure what DNR costs beside its bare network: forward, and with the gradient by the images.

`python -m benchmarks.cost forward` builds, for each network (random weights), a DNR with 5,000
support vectors in every SVM and measures for batches of 1 and 32:

- the bare network and the whole DNR, in the usual memory format, in channels_last, and compiled
  by torch.compile in the usual format
- the kernels (SVMs of the layers) and the head (combiner) alone, on features at hand
- the bound: the matrix products alone that exact scores and gradients need

Processor time on one thread, all of them in turn, medians over the repeats. Scores and
gradients are compared with a plain formula in float64, and compiled ones with those. Numbers go to
benchmarks/results/forward-cpu.json after every case; some fifteen minutes of the processor, most of
them the compiler's.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import RESULTS, busy_cores, commit
from torchdnr import DNR, RBFSVM
from torchdnr.evaluation.environment import describe_environment
from torchdnr.features.reductions import ReductionLike
from torchdnr.files import atomic_write_bytes
from torchdnr.kernels import make_rbf_kernel, rbf_gamma, scale_gamma
from torchdnr.models import CIFAR10_LAYERS, MNIST_LAYERS, CIFAR10Net, MNISTNet
from torchdnr.models.backbones import NETWORK, build_backbone

VECTORS = 5_000
BATCHES = (1, 32)
TARGET = {"network": "squeezenet1_1", "overhead": 0.15}
MODES = ("forward", "gradient")

Call = Callable[[], object]
Differentiable = Callable[[Tensor], Tensor]
Forms = dict[str, tuple[Differentiable, Differentiable]]
COMPILED = "DNR, compiled"


SEED_IMAGES = 32
SUPPORT_VECTORS = (
    f"resampled from the features of {SEED_IMAGES} random images, with Gaussian noise of a tenth "
    "of the standard deviation; the combiner's from the scores of these; dual coefficients uniform "
    "with the signs of random labels; nothing is fitted, as values do not change the times"
)

_TORCHVISION: dict[str, dict[str, ReductionLike]] = {
    "squeezenet1_1": {"features.10": "avg", "features.12": ("grid", 2), "classifier.3": "avg"},
    "mobilenet_v3_small": {"features.11": ("grid", 2), "features.12": "avg", "classifier": "avg"},
    "resnet18": {"layer3": ("grid", 2), "layer4": "avg", "fc": "flatten"},
}


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        network: ``MNISTNet``, ``CIFAR10Net`` or a torchvision classifier.
        classes: Of the network and the SVMs.
        size: Side of the images.
    """

    network: str
    classes: int = 10
    size: int = 224


CASES = (
    Case("squeezenet1_1"),
    Case("squeezenet1_1", 1_000),
    Case("mobilenet_v3_small"),
    Case("MNISTNet", size=28),
    Case("CIFAR10Net", size=32),
    Case("resnet18"),
)


def build_model(case: Case, vectors: int) -> tuple[DNR, tuple[int, ...]]:
    """Make a DNR that computes as a fitted one does.

    Args:
        case: The network and its classes.
        vectors: Support vectors m of every SVM.

    Returns:
        The classifier, and the shape of an image.
    """
    torch.manual_seed(0)
    net, layers, channels = _network(case)
    model, shape = DNR(net, layers), (channels, case.size, case.size)
    with torch.no_grad():
        seen = model.features(torch.rand(SEED_IMAGES, *shape))
        for svm, features in zip(model.base_svms, seen.values(), strict=True):
            set_state(svm, features, case.classes, vectors)
        scores = [svm(z) for svm, z in zip(model.base_svms, seen.values(), strict=True)]
        set_state(model.combiner, torch.cat(scores, dim=1), case.classes, vectors)
        model.set_threshold(model.scores(torch.rand(8, *shape)).amax(dim=1).median())
    return model.eval(), shape


def _network(case: Case) -> tuple[nn.Module, dict[str, ReductionLike], int]:
    if case.network == "MNISTNet":
        return MNISTNet(case.classes).eval(), dict.fromkeys(MNIST_LAYERS, "flatten"), 1
    if case.network == "CIFAR10Net":
        return CIFAR10Net(case.classes).eval(), dict.fromkeys(CIFAR10_LAYERS, "flatten"), 3
    layers = {f"{NETWORK}.{name}": how for name, how in _TORCHVISION[case.network].items()}
    return build_backbone(case.network, case.classes).eval(), layers, 3


def set_state(svm: RBFSVM, rows: Tensor, classes: int, vectors: int) -> None:
    """Give an SVM the state of one that was fitted, with vectors like some rows.

    Args:
        svm: Not fitted.
        rows: Features, ``(n, d)``.
        classes: c.
        vectors: m.
    """
    spread = rows.std(dim=0, keepdim=True) + 1e-6
    chosen = rows[torch.randint(len(rows), (vectors,))]
    chosen = chosen + 0.1 * spread * torch.randn(vectors, rows.shape[1])
    signs = torch.where(torch.randint(classes, (vectors, 1)) == torch.arange(classes), 1.0, -1.0)
    kernel = make_rbf_kernel(scale_gamma(chosen), like=chosen).state_dict()
    svm.load_state_dict(
        {
            "support_vectors": chosen,
            "support": torch.arange(vectors),
            "dual_coef": signs * torch.rand(vectors, classes),
            "intercept": torch.randn(classes),
            "center": chosen.mean(dim=0),
            **{f"kernel.{name}": value for name, value in kernel.items()},
        }
    )


def plain_scores(svm: RBFSVM, features: Tensor) -> Tensor:
    """Apply the formula in float64, from the differences themselves.

    Args:
        svm: Fitted.
        features: ``(n, d)``.

    Returns:
        Scores, ``(n, c)``.
    """
    tensors = (features, svm.support_vectors, svm.dual_coef, svm.intercept)
    z, vectors, coefficients, intercept = (tensor.double() for tensor in tensors)
    distances = torch.stack([(row - vectors).square().sum(dim=1) for row in z])
    return torch.exp(-rbf_gamma(svm.kernel).double() * distances) @ coefficients + intercept


def largest_errors(model: DNR, images: Tensor) -> dict[str, Any]:
    """Compare scores, and their gradients by the features, with the float64 formula.

    Args:
        model: Fitted.
        images: A few.

    Returns:
        ``scores`` and ``gradient``: the largest error over the largest value, the worst SVM;
        ``rows``: how many images.
    """
    with torch.no_grad():
        features = [*model.features(images).values()]
        stacked = torch.cat([svm(z) for svm, z in zip(model.base_svms, features, strict=True)], 1)
    errors = {"scores": 0.0, "gradient": 0.0}
    pairs = zip([*model.base_svms, model.combiner], [*features, stacked], strict=True)
    for svm, z in pairs:
        found = []
        for scores in (svm, lambda leaf, svm=svm: plain_scores(svm, leaf)):
            leaf = z.clone().requires_grad_()
            values = scores(leaf)
            weight = torch.linspace(-1, 1, values.shape[1]).to(values)
            found.append((values.detach(), torch.autograd.grad((values * weight).sum(), leaf)[0]))
        for name, got, exact in zip(errors, *found, strict=True):
            error = (got.double() - exact.double()).abs().max() / exact.abs().max()
            errors[name] = max(errors[name], error.item())
    return {**errors, "rows": len(images)}


def largest_differences(
    model: DNR, other: Callable[[Tensor], Tensor], images: Tensor
) -> dict[str, float]:
    """Compare another form of a classifier with it.

    Args:
        model: Fitted.
        other: The same, compiled for instance.
        images: A few.

    Returns:
        ``scores`` and ``gradient``: the largest difference over the largest value.
    """
    found = []
    for form in (model, other):
        leaf = images.clone().requires_grad_()
        scores = form(leaf)[:, :-1]
        weight = torch.linspace(-1, 1, scores.shape[1])
        found.append((scores.detach(), torch.autograd.grad((scores * weight).sum(), leaf)[0]))
    pairs = zip(("scores", "gradient"), *found, strict=True)
    return {
        name: ((got - expected).abs().max() / expected.abs().max()).item()
        for name, expected, got in pairs
    }


def network_calls(call: Callable[[Tensor], Tensor], inputs: list[Tensor]) -> dict[str, Call]:
    """Make what is timed of something differentiable: forward, and with gradient by the inputs."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]

    def forward() -> None:
        with torch.no_grad():
            call(*inputs)

    return {
        "forward": forward,
        "gradient": lambda: torch.autograd.grad(call(*leaves).sum(), leaves),
    }


def product_calls(model: DNR, features: list[Tensor]) -> dict[str, Call]:
    """Make the matrix products alone that scores and gradients of all SVMs need."""
    parts = []
    for svm, z in zip([*model.base_svms, model.combiner], features, strict=True):
        vectors, coefficients = svm.support_vectors, svm.dual_coef
        kernel, grad = torch.rand(len(z), len(vectors)), torch.rand(len(z), svm.num_classes)
        parts.append((z, vectors, coefficients, kernel, grad))

    def forward() -> None:
        for z, vectors, coefficients, kernel, _ in parts:
            torch.mm(z, vectors.T)
            torch.mm(kernel, coefficients)

    def gradient() -> None:
        forward()
        for _, vectors, coefficients, kernel, grad in reversed(parts):
            torch.mm(grad, coefficients.T)
            torch.mm(kernel, vectors)

    return {"forward": forward, "gradient": gradient}


def all_forms(model: DNR) -> Forms:
    """Make the forms of a classifier whose times are compared.

    Args:
        model: In the usual memory format.

    Returns:
        "DNR" and other names that begin so -> the bare network and the whole, in that form.
    """
    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
    torch.compiler.reset()
    return {
        "DNR": (model.net, model),
        "DNR, channels_last": (twin.net, twin),
        COMPILED: (torch.compile(model.net), torch.compile(model)),
    }


def all_calls(model: DNR, forms: Forms, images: Tensor) -> dict[str, dict[str, Call]]:
    """Make all that is timed in turn.

    Args:
        model: The classifier.
        forms: What ``all_forms`` made of it.
        images: A batch.

    Returns:
        Name -> "forward" and "gradient" -> what to call.
    """
    with torch.no_grad():
        features = [*model.features(images).values()]
        base = [svm(z) for svm, z in zip(model.base_svms, features, strict=True)]
    stacked = torch.cat(base, dim=1)

    def kernels(*leaves: Tensor) -> Tensor:
        svms = zip(model.base_svms, leaves, strict=True)
        return torch.cat([svm(leaf) for svm, leaf in svms], dim=1)

    calls = {}
    for name, (net, whole) in forms.items():
        calls[name.replace("DNR", "network")] = network_calls(net, [images])
        calls[name] = network_calls(whole, [images])
    return {
        **calls,
        "kernels": network_calls(kernels, features),
        "head": network_calls(model.combiner, [stacked]),
        "products": product_calls(model, [*features, stacked]),
    }


def in_turn(calls: dict[str, dict[str, Call]], repeats: int) -> dict[str, dict[str, list[float]]]:
    """Time calls in turn, after one round to warm up: seconds of the processor.

    Forward passes run three times as often: they are shorter, and half of their time is spent on
    fresh pages of memory, which varies.
    """
    seconds: dict[str, dict[str, list[float]]] = {}
    for mode, rounds in zip(MODES, (3 * repeats, repeats), strict=True):
        seconds[mode] = {name: [] for name in calls}
        for number in range(rounds + 1):
            for name, call in calls.items():
                began = time.process_time()
                call[mode]()
                if number:
                    seconds[mode][name].append(time.process_time() - began)
    return seconds


def shares(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Take the whole DNR apart.

    Args:
        seconds: Times by name, of one mode, all in the same rounds.

    Returns:
        ``seconds``, medians; ``share`` of the DNR that is network, kernels, head and the rest
        (hooks, copies, reductions; below 0 where noise is larger), which add up to 1; ``overhead``,
        the DNR over the bare network less 1, median over the rounds, and its quartiles, also of
        other forms; ``bound``, the products over the network; ``excess``, overhead over bound.
    """
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    whole = medians["DNR"]
    share = {name: medians[name] / whole for name in ("network", "kernels", "head")}
    share["rest"] = 1.0 - sum(share.values())
    found: dict[str, Any] = {"seconds": medians, "share": share, "all_seconds": seconds}
    for name in seconds:
        if not name.startswith("DNR"):
            continue
        bare = seconds[name.replace("DNR", "network")]
        pairs = zip(seconds[name], bare, seconds["products"], strict=True)
        rows = sorted((dnr / net - 1, products / net) for dnr, net, products in pairs)
        overheads, bounds = zip(*rows, strict=True)
        overhead, bound = statistics.median(overheads), statistics.median(bounds)
        quartiles = [overheads[len(rows) // 4], overheads[-1 - len(rows) // 4]]
        found[name] = {
            "overhead": overhead,
            "quartiles": quartiles,
            "bound": bound,
            "excess": overhead / bound,
        }
    return found


def measure(
    case: Case, vectors: int, repeats: int, batches: Sequence[int] = BATCHES
) -> dict[str, Any]:
    """Measure one network, at all batch sizes."""
    model, shape = build_model(case, vectors)
    svms = dict(zip([*model.layers, "combiner"], [*model.base_svms, model.combiner], strict=True))
    found: dict[str, Any] = {
        **asdict(case),
        "features": {name: svm.center.numel() for name, svm in svms.items()},
        "reductions": model.features.describe().splitlines(),
        "errors": largest_errors(model, torch.rand(4, *shape)),
        "batches": {},
    }
    for n in batches:
        images = torch.rand(n, *shape)
        entry: dict[str, Any] = {"busy_cores_before": busy_cores()}
        forms = all_forms(model)
        entry["compiled_difference"] = largest_differences(model, forms[COMPILED][1], images)
        calls = all_calls(model, forms, images)
        seconds = in_turn(calls, repeats if n > 1 else 3 * repeats)
        entry |= {mode: shares(seconds[mode]) for mode in MODES}
        found["batches"][str(n)] = entry
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the cases and write the JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--repeats", type=int, default=2, help="gradients of a batch of 32; of 1: 3 times"
    )
    parser.add_argument("--vectors", type=int, default=VECTORS)
    names = sorted({case.network for case in CASES})
    parser.add_argument("--networks", nargs="+", choices=names, default=names)
    parser.add_argument("--output", type=Path, default=RESULTS / "forward-cpu.json")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    record: dict[str, Any] = {
        "environment": describe_environment("cpu"),
        "commit": commit(),
        "settings": {
            "vectors": options.vectors,
            "support_vectors": SUPPORT_VECTORS,
            "repeats": options.repeats,
            "times": "seconds of the processor, one thread",
            "target": TARGET,
        },
        "cases": [],
    }
    for case in CASES:
        if case.network not in options.networks:
            continue
        found = measure(case, options.vectors, options.repeats)
        record["cases"].append(found)
        atomic_write_bytes(options.output, (json.dumps(record, indent=1) + "\n").encode())
        for n, entry in found["batches"].items():
            for mode in MODES:
                told = {name: entry[mode][name] for name in entry[mode] if name.startswith("DNR")}
                print(case.network, case.classes, n, mode, json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
