"""Rejecting classifiers, and RBF-SVMs on features, as detectors of pytorch-ood."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn

from torchdnr.adapters.suspicion import suspicion
from torchdnr.adapters.views import require
from torchdnr.svm.rbf_svm import RBFSVM

api: Any = require("pytorch_ood.api", "pytorch-ood")


class RejectionDetector(api.Detector):
    """A rejecting classifier as a detector: ``theta - max_k s_k``, higher for an outlier.

    Args:
        model: Returns ``(n, c + 1)`` with the threshold in the last column, such as ``DNR``.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model  # with methods ``fit`` and ``scores``

    def fit(self, data_loader: Iterable[Any]) -> Self:
        """Fit the model anew on the inputs of known class; its threshold is dropped.

        Args:
            data_loader: Yields ``(inputs, labels)``; rows with a label below 0, which mark
                outliers, are left out.

        Returns:
            The detector itself.
        """
        self.model.fit(_known(data_loader))
        return self

    def predict(self, x: Tensor) -> Tensor:
        """Score inputs.

        Args:
            x: Images in [0, 1], ``(n, ...)``.

        Returns:
            ``theta - max_k s_k``, ``(n,)``, differentiable. While no theta is set, as after
            ``fit``, ``-max_k s_k``: the ranking is the same.
        """
        if self.device is not None:
            x = x.to(self.device)
        threshold = getattr(self.model, "threshold", None)
        if isinstance(threshold, Tensor) and threshold.isnan():
            return -self.model.scores(x).amax(dim=1)
        return suspicion(self.model, x)


class SVMDetector(api.FeaturesDetector):
    """Rejection by an RBF-SVM on features that any encoder yields: ``-max_k s_k``.

    Args:
        encoder: Maps inputs to features ``(n, d)``; None if only features are given.
        **options: Of ``RBFSVM``: C, gamma, ...
    """

    requires_fit = True

    def __init__(
        self,
        encoder: Callable[[Tensor], Tensor] | None = None,
        **options: Any,  # noqa: ANN401 - documented above
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.svm = RBFSVM(**options)

    @torch.no_grad()
    def fit(self, data_loader: Iterable[Any]) -> Self:
        """Encode the inputs of known class, and fit the SVM on their features.

        Args:
            data_loader: Yields ``(inputs, labels)``; rows with a label below 0 are left out.

        Returns:
            The detector itself.

        Raises:
            ModelNotSetException: If there is no encoder.
        """
        batches = [(self._encode(inputs), labels) for inputs, labels in _known(data_loader)]
        features, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        return self.fit_features(features, labels.to(features.device))

    def predict(self, x: Tensor) -> Tensor:
        """Encode and score inputs.

        Args:
            x: Inputs of the encoder, ``(n, ...)``.

        Returns:
            ``-max_k s_k``, ``(n,)``, differentiable if the encoder is.

        Raises:
            ModelNotSetException: If there is no encoder.
            RequiresFittingException: If ``fit`` or ``fit_features`` has not run.
        """
        return self.predict_features(self._encode(x))

    def _encode(self, x: Tensor) -> Tensor:
        if self.encoder is None:
            raise api.ModelNotSetException("SVMDetector has no encoder: pass one, or give features")
        return self.encoder(x if self.device is None else x.to(self.device))

    def fit_features(self, x: Tensor, y: Tensor) -> Self:
        """Fit the SVM on the features of known class.

        Args:
            x: Features, ``(n, d)``.
            y: Labels ``(n,)``; rows below 0 are left out.

        Returns:
            The detector itself.
        """
        known = y >= 0
        self.svm.fit(x[known], y[known])
        return self

    def predict_features(self, x: Tensor) -> Tensor:
        """Score features.

        Args:
            x: Features, ``(n, d)``.

        Returns:
            ``-max_k s_k``, ``(n,)``, differentiable; higher for an outlier.

        Raises:
            RequiresFittingException: If ``fit`` or ``fit_features`` has not run.
        """
        if not self.svm.is_fitted:
            raise api.RequiresFittingException()
        return -self.svm(x).amax(dim=1)


def _known(loader: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the rows of each batch whose label is a class."""
    for inputs, labels in loader:
        known = labels >= 0
        if known.any():
            yield inputs[known], labels[known]
