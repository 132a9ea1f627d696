"""Fewer support vectors in DNR and NR: what is asked for, stage after stage, and what is lost."""

import warnings
from collections.abc import Iterable, Mapping
from copy import deepcopy
from numbers import Real
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from torchdnr.costs import stage
from torchdnr.features.extraction import extract
from torchdnr.rejection import checked_batches
from torchdnr.svm.compression import compress_svm, score_bound
from torchdnr.svm.rbf_svm import RBFSVM
from torchdnr.svm.stack import stack_scores, tune_together

if TYPE_CHECKING:
    from torchdnr.svm_rejection import SVMRejection

Classifier = TypeVar("Classifier", bound="SVMRejection")

WARN_BELOW = 0.99
"""Least R^2 of the final scores, and least share of labels kept, without a warning."""


class CompressionWarning(UserWarning):
    """A compressed classifier scores visibly unlike the one it stands for."""


def compress_classifier(
    model: "Classifier",
    inputs: Tensor | Iterable[Any],
    prototypes: int | Mapping[str, int] | None,
    factor: float | None,
    *,
    steps: int,
    joint_steps: int,
    smoothness: float,
    progress: bool,
) -> "Classifier":
    """Build the classifier that ``SVMRejection.compress`` returns; the arguments are its own."""
    model._require_fit()
    if joint_steps < 0:
        raise ValueError(f"joint_steps must be >= 0, got {joint_steps}")
    svms = model._svms()
    sizes = chosen_sizes(svms, prototypes, factor)
    with stage("features"):
        features = layer_features(model, inputs, progress)
    with stage("compression"):
        fewer = compress_stack(
            svms, features, sizes, steps=steps, joint_steps=joint_steps, smoothness=smoothness
        )
        losses = stack_losses(svms, fewer, features)
    new = model._on_layers(model.net, dict(model.features.given), model.settings()["options"])
    new.features = model.features  # with the reductions as they were drawn
    new._set_svms(fewer)
    new.selection = {n: {**model.selection.get(n, {}), "compression": losses[n]} for n in svms}
    new.threshold, new.training = new.threshold.to(model.threshold), model.training
    warn_of_losses(losses)
    return new


def chosen_sizes(
    svms: Mapping[str, RBFSVM],
    prototypes: int | Mapping[str, int] | None,
    factor: float | None,
) -> dict[str, int]:
    """Settle how many prototypes each SVM gets.

    Args:
        svms: The fitted SVMs by name.
        prototypes: A number for each SVM, or numbers by name; SVMs without one stay as they are.
        factor: How many times fewer vectors each SVM gets, >= 1, in the place of ``prototypes``.

    Returns:
        Prototypes by name.

    Raises:
        ValueError: If not exactly one of the two is given, or it is not as said above.
    """
    if (prototypes is None) == (factor is None):
        raise ValueError(
            "compress takes either prototypes, a number or numbers by SVM, or factor, how many "
            f"times fewer; got prototypes={prototypes!r} and factor={factor!r}"
        )
    counts = {name: len(svm.support_vectors) for name, svm in svms.items()}
    if factor is not None:
        if not isinstance(factor, Real) or not 1.0 <= factor < float("inf"):
            raise ValueError(f"factor must be a number >= 1, got {factor!r}")
        return {name: max(1, round(m / factor)) for name, m in counts.items()}
    sizes = dict(prototypes) if isinstance(prototypes, Mapping) else dict.fromkeys(svms, prototypes)
    unknown = sorted(set(sizes) - set(svms))
    if unknown or not sizes:
        raise ValueError(f"prototypes must be named after {list(svms)}, got {unknown or 'none'}")
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= counts[name]:
            raise ValueError(
                f"prototypes of {name!r} must be an integer in 1..{counts[name]}, its number of "
                f"support vectors, got {size!r}; numbers by SVM, or factor, suit several sizes"
            )
    return sizes


@torch.no_grad()
def compress_stack(
    svms: Mapping[str, RBFSVM],
    features: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    *,
    steps: int,
    joint_steps: int,
    smoothness: float,
) -> dict[str, RBFSVM]:
    """Compress the SVMs of a stack one after the other, then fine-tune them on the final scores.

    The combiner learns to give the original scores on what the compressed SVMs return.

    Args:
        svms: By layer, and the combiner if there is one.
        features: By layer, ``(n, d)``.
        sizes: Prototypes by SVM; an SVM without stays as it is.
        steps: Iterations of L-BFGS for each SVM.
        joint_steps: Iterations of L-BFGS for all of them together.
        smoothness: Weight of the difference in the space of the kernel.

    Returns:
        SVMs by the same names.
    """
    wanted = stack_scores(svms, features)
    compressed: dict[str, RBFSVM] = {}
    options = {"steps": steps, "smoothness": smoothness}
    for name, svm in svms.items():
        inputs = features.get(name)
        if inputs is None:
            inputs = torch.cat([compressed[layer](z) for layer, z in features.items()], dim=1)
        compressed[name] = svm if name in sizes else deepcopy(svm)
        if name in sizes:
            compressed[name] = compress_svm(
                svm, inputs, sizes[name], targets=wanted[name], **options
            )
    if len(svms) == len(features):
        return compressed
    parts = (svms, compressed, features, wanted, list(sizes))
    return tune_together(*parts, steps=joint_steps, smoothness=smoothness)


@torch.no_grad()
def stack_losses(
    svms: Mapping[str, RBFSVM],
    compressed: Mapping[str, RBFSVM],
    features: Mapping[str, Tensor],
) -> dict[str, dict[str, Any]]:
    """Measure what a compressed stack has lost, SVM by SVM.

    Each SVM is measured in its stack: the combiner on what the SVMs before it return, so that the
    last entry is about the final scores.

    Args:
        svms: The original ones.
        compressed: Those in their place.
        features: By layer, ``(n, d)``.

    Returns:
        By SVM, as JSON values: ``support_vectors`` and ``prototypes`` in their place; ``r2`` of the
        scores and their ``largest_difference``; ``label_agreement``, the share of inputs whose
        largest score is that of the same class; ``score_bound``: no features whatever, given to
        both of this SVM alone, let their scores differ more.
    """
    before, after = stack_scores(svms, features), stack_scores(compressed, features)
    found = {}
    for name, scores in before.items():
        wanted, given = scores.double(), after[name].double()
        spread = (wanted - wanted.mean(dim=0)).square().sum().clamp_min(1e-300)
        found[name] = {
            "support_vectors": len(svms[name].support_vectors),
            "prototypes": len(compressed[name].support_vectors),
            "r2": (1 - (given - wanted).square().sum() / spread).item(),
            "largest_difference": (given - wanted).abs().max().item(),
            "label_agreement": (wanted.argmax(1) == given.argmax(1)).double().mean().item(),
            "score_bound": score_bound(svms[name], compressed[name]).max().item(),
        }
    return found


def compression_losses(
    original: "SVMRejection", compressed: "SVMRejection", inputs: Tensor | Iterable[Any]
) -> dict[str, dict[str, Any]]:
    """Measure what a compressed classifier has lost, on images of one's own.

    Args:
        original: The classifier that was compressed.
        compressed: What ``compress`` returned.
        inputs: Images ``(n, ...)`` in [0, 1], or a loader (labels are ignored).

    Returns:
        As ``stack_losses``.
    """
    return stack_losses(original._svms(), compressed._svms(), layer_features(original, inputs))


def layer_features(
    model: "SVMRejection", inputs: Tensor | Iterable[Any], progress: bool = False
) -> dict[str, Tensor]:
    """Extract the features of checked images, by layer."""
    images = (batch for batch, _ in checked_batches(inputs, model.batch_size))
    return extract(model.features, images, progress=progress)[0]


def warn_of_losses(losses: Mapping[str, Mapping[str, Any]]) -> None:
    """Warn if the final scores lost more than a little.

    Args:
        losses: From ``stack_losses``.
    """
    name, final = list(losses.items())[-1]
    if min(final["r2"], final["label_agreement"]) < WARN_BELOW:
        warnings.warn(
            f"the compressed scores of {name!r} keep {final['label_agreement']:.1%} of the labels "
            f"and R^2 {final['r2']:.3f}: use more prototypes, or attack it before you trust it",
            CompressionWarning,
            stacklevel=4,
        )


def compression_report(model: "SVMRejection") -> str:
    """Format what a compressed classifier has lost on the images it was compressed with.

    Args:
        model: What ``compress`` returned, also after ``load``.

    Returns:
        A table with a row per SVM, each measured in its stack; the last row is the final scores.

    Raises:
        ValueError: If the classifier is not a compressed one.
    """
    entries = {name: chosen.get("compression") for name, chosen in model.selection.items()}
    if not entries or None in entries.values():
        raise ValueError("this classifier is not compressed: call compress(images, ...) first")
    lines = [
        f"{'SVM':<16} {'vectors':>15} {'R^2':>8} {'largest difference':>19} "
        f"{'anywhere at most':>17} {'same label':>11}"
    ]
    for name, entry in entries.items():
        vectors = f"{entry['support_vectors']} -> {entry['prototypes']}"
        lines.append(
            f"{name:<16} {vectors:>15} {entry['r2']:>8.4f} {entry['largest_difference']:>19.3g} "
            f"{entry['score_bound']:>17.3g} {entry['label_agreement']:>11.1%}"
        )
    return "\n".join(lines)
