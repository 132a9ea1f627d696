"""The classifiers of bench_forward.py: networks with random weights, SVMs with made-up vectors."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchdnr import DNR, RBFSVM
from torchdnr.backbones import NETWORK, build_backbone
from torchdnr.kernels import make_rbf_kernel, rbf_gamma, scale_gamma
from torchdnr.models import CIFAR10_LAYERS, MNIST_LAYERS, CIFAR10Net, MNISTNet
from torchdnr.reductions import ReductionLike

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
