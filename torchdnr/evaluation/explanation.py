"""A picture of what decisions rest on: the training images that support and oppose each most."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from torchdnr.decisions import REJECT, predict_labels
from torchdnr.evaluation.figures import plot_explanations

SHOWN = 3
"""Training images to each side of a decision."""


class Ranking(Protocol):
    """Training samples by what they do to the score of each input; see ``svm.Influence``."""

    def strongest(self, row: int, count: int) -> tuple[list[int], list[int]]:
        """Return the samples that support and oppose one score most."""


class Explainable(Protocol):
    """A classifier that says which training images its decisions rest on, as ``DNR`` does."""

    def __call__(self, images: Tensor) -> Tensor:
        """Return scores and threshold."""

    def influence(self, images: Tensor) -> dict[str, Ranking]:
        """Rank the training images, by SVM."""


def explain(
    model: Explainable,
    images: Tensor,
    path: str | Path,
    training: tuple[Tensor, Tensor],
    class_names: Sequence[str] | None = None,
    *,
    shown: int = SHOWN,
) -> None:
    """Draw images with the training images that speak for and against each decision, by SVM.

    Args:
        model: A fitted and calibrated DNR or NR.
        images: ``(n, ...)`` in [0, 1], few.
        path: Image file, of a type that its suffix names; replaced atomically.
        training: Images and labels that the SVMs were fitted on, in that order.
        class_names: Names of the classes; None: their numbers.
        shown: Training images to each side.

    Raises:
        NotFittedError: If the classifier is not fitted.
        ValueError: If it is compressed, or there is no image.
    """
    with torch.no_grad():
        output = model(images)
    best, labels = output[:, :-1].argmax(dim=1).tolist(), predict_labels(output, True).tolist()
    names = [str(k) if class_names is None else class_names[k] for k in best]
    titles = [
        f"rejected\n(best: {name})" if label == REJECT else name
        for name, label in zip(names, labels, strict=True)
    ]
    rows = range(len(images))
    examples = {
        name: [ranking.strongest(row, shown) for row in rows]
        for name, ranking in model.influence(images).items()
    }
    plot_explanations(path, images, titles, examples, *training, class_names)
