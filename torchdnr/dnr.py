"""Deep Neural Rejection (DNR) and Neural Rejection (NR)."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from torchdnr.distributed.sharing import SharedFeatures
from torchdnr.features.reductions import ReductionLike
from torchdnr.svm.rbf_svm import RBFSVM
from torchdnr.svm_rejection import SVMRejection

COMBINER = "combiner"
"""Name of the combiner in ``hyperparameters`` and ``selection``."""


class DNR(SVMRejection):
    """Deep Neural Rejection: an RBF-SVM on each layer, and one more that combines their scores.

    ``torch.compile(model)``, or ``model.compile()`` in place, makes one graph of network and SVMs,
    with gradients of first order. Autocast, compiled or not, lowers the network alone: the SVMs
    compute in float32. Fit, calibrate and predict under the same autocast, since the threshold
    belongs to the scores that it was set on. `export_program` and `export_onnx` make a program of
    the classifier that runs without this package.

    Args:
        net: Any module on images in [0, 1], normalisation inside. It is left as found.
        layers: Names from ``net.named_modules()``; or a mapping from name to reduction, which makes
            layers of any size usable: ``"flatten"`` (all values, as for plain names), ``"avg"``
            (mean over positions), ``("grid", k)`` (means over k x k parts), ``("project", d)``
            (random projection to d features), or a module; see ``build_reduction``. None: ``fit``
            chooses, by ``default_layers`` on its first images; see ``layers`` and
            ``features.describe()`` then.
        hyperparameters: (C, gamma) for layers, or for ``"combiner"``, that are not to be searched.
        C_grid: Values of C to search.
        gamma_grid: Multiples of gamma = "scale" to search.
        folds: Stratified folds of the search.
        stacking_folds: Stratified folds of the scores that the combiner learns from.
        tol: Largest KKT violation accepted.
        seed: Of all folds.
        batch_size: Images per forward pass.
        memory_limit: Bytes that one fit may take beyond the features, and that the features of all
            layers may take before they go to files, see ``fit``; default 4 GiB.

    Attributes:
        base_svms: One ``RBFSVM`` per layer, in the order of ``layers``.
        combiner: ``RBFSVM`` on the concatenated scores, ``(n, c * len(layers))``.
        selection: What the search chose and saw, by layer and ``"combiner"``; of a projected
            layer also ``distortion``, see ``projection_distortion``.

    Source: Sotgiu et al., "Deep neural rejection against adversarial examples" (2020), Sec. II.
    """

    def _svms(self) -> dict[str, RBFSVM]:
        return {**super()._svms(), COMBINER: self.combiner}

    def _set_svms(self, svms: Mapping[str, RBFSVM]) -> None:
        super()._set_svms(svms)
        self.combiner = svms[COMBINER]

    def _start_afresh(self) -> None:
        super()._start_afresh()
        self.combiner = RBFSVM(tol=self.svm_options.tol)

    def scores(self, inputs: Tensor) -> Tensor:
        """Compute class scores.

        Args:
            inputs: Images in [0, 1], ``(n, ...)``.

        Returns:
            Decision values of the combiner, ``(n, c)``.

        Raises:
            NotFittedError: If ``fit`` has not run.
        """
        self._require_fit()
        features = self.features(inputs)
        base = [svm(features[name]) for svm, name in zip(self.base_svms, self.layers, strict=True)]
        return self.combiner(torch.cat(base, dim=1))

    def _fit_features(
        self, features: dict[str, SharedFeatures], labels: Tensor, progress: bool
    ) -> None:
        """Fit the base SVMs, then the combiner on their out-of-fold scores."""
        held_out, shares = [], next(iter(features.values())).shares
        for index, name in enumerate(self.layers):
            fitted = self._fit_svm(name, features.pop(name), labels, True, progress)
            self.base_svms[index] = fitted[0]
            held_out.append(fitted[1])
        stacked = SharedFeatures(torch.cat(held_out, dim=1)[shares.own], shares)
        self.combiner, _ = self._fit_svm(COMBINER, stacked, labels, False, progress)


class NR(SVMRejection):
    """Neural Rejection: one RBF-SVM with a threshold, on one layer, usually the last.

    Args:
        net: Any module on images in [0, 1], normalisation inside. It is left as found.
        layer: Name from ``net.named_modules()``.
        reduction: What makes features of its output; as in ``DNR``.
        **options: As in ``DNR``; there is no combiner and no stacking.

    Source: Melis et al., "Is deep learning safe for robot vision?" (2017); Sotgiu et al., Sec. II.
    """

    def __init__(
        self,
        net: nn.Module,
        layer: str,
        *,
        reduction: ReductionLike = "flatten",
        **options: Any,  # noqa: ANN401 - documented above
    ) -> None:
        if not isinstance(layer, str):
            raise ValueError(f"NR takes the name of one layer, got {layer!r}; use DNR for several")
        super().__init__(net, {layer: reduction}, **options)

    def scores(self, inputs: Tensor) -> Tensor:
        """Compute class scores.

        Args:
            inputs: Images in [0, 1], ``(n, ...)``.

        Returns:
            Decision values of the SVM, ``(n, c)``.

        Raises:
            NotFittedError: If ``fit`` has not run.
        """
        self._require_fit()
        return self.base_svms[0](self.features(inputs)[self.layers[0]])

    def _fit_features(
        self, features: dict[str, SharedFeatures], labels: Tensor, progress: bool
    ) -> None:
        layer = self.layers[0]
        self.base_svms[0], _ = self._fit_svm(layer, features[layer], labels, False, progress)

    @classmethod
    def _on_layers(
        cls, net: nn.Module, layers: dict[str, ReductionLike], options: dict[str, Any]
    ) -> Self:
        ((layer, reduction),) = layers.items()
        return cls(net, layer, reduction=reduction, **options)
