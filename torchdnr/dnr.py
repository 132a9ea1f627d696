"""Deep Neural Rejection (DNR) and Neural Rejection (NR)."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from tqdm import tqdm

from torchdnr.features import LayerFeatures, extract
from torchdnr.files import CheckpointError, digest, load_tensors, save_tensors
from torchdnr.kernels import squared_distances
from torchdnr.rejection import RejectingClassifier, checked_batches
from torchdnr.svm import RBFSVM, NotFittedError, grid_search, out_of_fold_scores
from torchdnr.svm.checks import check_features, check_labels
from torchdnr.svm.model_selection import C_GRID, GAMMA_GRID

COMBINER = "combiner"
"""Name of the combiner in ``hyperparameters`` and ``selection``."""


class _SVMRejection(RejectingClassifier):
    """What DNR and NR share: layers of a network, an SVM on each, fitting, saving, loading."""

    def __init__(
        self,
        net: nn.Module,
        layers: Sequence[str],
        *,
        hyperparameters: Mapping[str, tuple[float, float]] | None = None,
        C_grid: Sequence[float] = C_GRID,
        gamma_grid: Sequence[float] = GAMMA_GRID,
        folds: int = 5,
        stacking_folds: int = 3,
        tol: float = 1e-3,
        seed: int = 0,
        batch_size: int = 256,
    ) -> None:
        super().__init__(batch_size)
        self.features = LayerFeatures(net, layers)
        self.hyperparameters = {k: tuple(v) for k, v in (hyperparameters or {}).items()}
        unknown = set(self.hyperparameters) - {*self.features.layers, COMBINER}
        if unknown:
            raise ValueError(
                f"hyperparameters must be named after layers {self.features.layers} or "
                f"{COMBINER!r}, got {sorted(unknown)}"
            )
        self.C_grid, self.gamma_grid = tuple(C_grid), tuple(gamma_grid)
        self.folds, self.stacking_folds = folds, stacking_folds
        self.tol, self.seed = tol, seed
        self.base_svms = nn.ModuleList(RBFSVM(tol=tol) for _ in self.features.layers)
        self.selection: dict[str, dict[str, Any]] = {}

    @property
    def net(self) -> nn.Module:
        """The wrapped network, left as it was given."""
        return self.features.net

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers in use."""
        return self.features.layers

    @property
    def num_classes(self) -> int:
        """Number of classes c; 0 before fitting."""
        return self.base_svms[0].num_classes

    def _svms(self) -> list[RBFSVM]:
        return list(self.base_svms)

    def _require_fit(self) -> None:
        if not all(svm.is_fitted for svm in self._svms()):
            raise NotFittedError(
                f"this {type(self).__name__} is not fitted: call fit(images, labels) or load()"
            )

    def _training_features(
        self, data: Tensor | Iterable[Any], labels: Tensor | None, progress: bool
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Extract the features of checked images, and the labels that go with them."""
        batches = checked_batches(data, self.batch_size)
        pairs = (images if given is None else (images, given) for images, given in batches)
        features, found = extract(self.features, pairs, progress=progress)
        if (labels is None) == (found is None):
            raise ValueError(
                "labels must come once: fit(images, labels), or fit(loader) with a loader that "
                f"yields (images, labels); got {'none' if labels is None else 'both'}"
            )
        first = next(iter(features.values()))
        labels = (found if labels is None else labels).to(first.device)
        check_labels(labels, len(first))
        return features, labels.long()

    def _fit_svm(
        self, name: str, svm: RBFSVM, features: Tensor, labels: Tensor, stack: bool, progress: bool
    ) -> Tensor | None:
        """Select (C, gamma), fit one SVM, and score out of fold where a combiner needs it."""
        check_features(features)
        distances = squared_distances(features, features, features.mean(dim=0))
        if name in self.hyperparameters:
            C, gamma = self.hyperparameters[name]
            self.selection[name] = {"C": C, "gamma": gamma}
        else:
            search = grid_search(
                features,
                labels,
                C_grid=self.C_grid,
                gamma_grid=self.gamma_grid,
                folds=self.folds,
                seed=self.seed,
                tol=self.tol,
                distances=distances,
                progress=progress,
                description=f"grid search, {name}",
            )
            C, gamma = search.C, search.gamma
            self.selection[name] = search.to_dict()
        held_out = None
        if stack:
            held_out = out_of_fold_scores(
                features,
                labels,
                C=C,
                gamma=gamma,
                folds=self.stacking_folds,
                seed=self.seed,
                tol=self.tol,
                distances=distances,
            )
        svm.C, svm.gamma = C, gamma
        svm.fit(features, labels, distances=distances)
        return held_out

    def settings(self) -> dict[str, Any]:
        """Return the constructor's options and what fitting chose, as JSON values."""
        return {
            "options": {
                "hyperparameters": {k: list(v) for k, v in self.hyperparameters.items()},
                "C_grid": list(self.C_grid),
                "gamma_grid": list(self.gamma_grid),
                "folds": self.folds,
                "stacking_folds": self.stacking_folds,
                "tol": self.tol,
                "seed": self.seed,
                "batch_size": self.batch_size,
            },
            "layers": list(self.layers),
            "selection": self.selection,
        }

    def save(self, path: str | Path) -> None:
        """Save SVMs, threshold and settings to one safetensors file; the network stays apart.

        Args:
            path: File to write, whole or not at all.

        Raises:
            NotFittedError: If there is nothing to save.
            OSError: If the file cannot be written; an earlier one stays as it was.
        """
        self._require_fit()
        tensors = {k: v for k, v in self.state_dict().items() if not k.startswith("features.net.")}
        metadata = {**self.settings(), "network_digest": digest(self.net.state_dict())}
        save_tensors(path, tensors, metadata, kind=type(self).__name__)

    @classmethod
    def load(cls, path: str | Path, net: nn.Module, *, strict: bool = True) -> Self:
        """Load what ``save`` wrote, onto the network it was fitted with.

        Args:
            path: File to read.
            net: The network, with the weights it had when the classifier was fitted.
            strict: Whether to refuse a network with other weights, whose features the SVMs do
                not know.

        Returns:
            The classifier, on the device of the network.

        Raises:
            CheckpointError: If the file is damaged, foreign, or belongs to another network.
        """
        tensors, metadata = load_tensors(path, kind=cls.__name__)
        if strict and metadata["network_digest"] != digest(net.state_dict()):
            raise CheckpointError(
                f"{path}: expected the network it was fitted on, got one with other weights; load "
                "those weights first, or pass strict=False"
            )
        layers = metadata["layers"]
        model = cls(net, layers if cls is not NR else layers[0], **metadata["options"])
        model.selection = metadata["selection"]
        model.load_state_dict(tensors, strict=False)
        device = next((p.device for p in net.parameters()), torch.device("cpu"))
        return model.to(device)


class DNR(_SVMRejection):
    """Deep Neural Rejection: an RBF-SVM on each layer, and one more that combines their scores.

    Args:
        net: Any module on images in [0, 1], normalisation inside. It is left as found.
        layers: Names from ``net.named_modules()``.
        hyperparameters: (C, gamma) for layers, or for ``"combiner"``, that are not to be searched.
        C_grid: Values of C to search.
        gamma_grid: Multiples of gamma = "scale" to search.
        folds: Stratified folds of the search.
        stacking_folds: Stratified folds of the scores that the combiner learns from.
        tol: Largest KKT violation accepted.
        seed: Of all folds.
        batch_size: Images per forward pass.

    Attributes:
        base_svms: One ``RBFSVM`` per layer, in the order of ``layers``.
        combiner: ``RBFSVM`` on the concatenated scores, ``(n, c * len(layers))``.
        selection: What the search chose and saw, by layer and ``"combiner"``.

    Source: Sotgiu et al., "Deep neural rejection against adversarial examples" (2020), Sec. II.
    """

    def __init__(self, net: nn.Module, layers: Sequence[str], **options: Any) -> None:  # noqa: ANN401 - documented above
        super().__init__(net, layers, **options)
        self.combiner = RBFSVM(tol=self.tol)

    def _svms(self) -> list[RBFSVM]:
        return [*self.base_svms, self.combiner]

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

    def fit(
        self,
        inputs: Tensor | Iterable[Any],
        labels: Tensor | None = None,
        *,
        progress: bool = False,
    ) -> Self:
        """Fit the base SVMs, then the combiner on their out-of-fold scores.

        Args:
            inputs: Images ``(n, ...)`` in [0, 1], or a loader that yields ``(images, labels)``.
            labels: ``(n,)`` int64 in 0..c-1 where ``inputs`` is a tensor.
            progress: Whether to show progress bars.

        Returns:
            The classifier itself. A threshold that was set is dropped: it belonged to other scores.

        Raises:
            ValueError: If images or labels are not as said above, or a class has too few samples.

        Warns:
            ConvergenceWarning: If a dual problem missed its tolerance.
        """
        features, labels = self._training_features(inputs, labels, progress)
        held_out = [
            self._fit_svm(name, svm, features.pop(name), labels, True, progress)
            for name, svm in tqdm(
                list(zip(self.layers, self.base_svms, strict=True)),
                desc="fit layers",
                disable=not progress,
            )
        ]
        stacked = torch.cat(held_out, dim=1)
        self._fit_svm(COMBINER, self.combiner, stacked, labels, False, progress)
        self.reset_threshold()
        return self


class NR(_SVMRejection):
    """Neural Rejection: one RBF-SVM with a threshold, on one layer, usually the last.

    Args:
        net: Any module on images in [0, 1], normalisation inside. It is left as found.
        layer: Name from ``net.named_modules()``.
        **options: As in ``DNR``; there is no combiner and no stacking.

    Source: Melis et al., "Is deep learning safe for robot vision?" (2017); Sotgiu et al., Sec. II.
    """

    def __init__(self, net: nn.Module, layer: str, **options: Any) -> None:  # noqa: ANN401 - documented above
        if not isinstance(layer, str):
            raise ValueError(f"NR takes the name of one layer, got {layer!r}; use DNR for several")
        super().__init__(net, [layer], **options)

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

    def fit(
        self,
        inputs: Tensor | Iterable[Any],
        labels: Tensor | None = None,
        *,
        progress: bool = False,
    ) -> Self:
        """Fit the SVM.

        Args:
            inputs: Images ``(n, ...)`` in [0, 1], or a loader that yields ``(images, labels)``.
            labels: ``(n,)`` int64 in 0..c-1 where ``inputs`` is a tensor.
            progress: Whether to show progress bars.

        Returns:
            The classifier itself. A threshold that was set is dropped: it belonged to other scores.

        Raises:
            ValueError: If images or labels are not as said above, or a class has too few samples.

        Warns:
            ConvergenceWarning: If a dual problem missed its tolerance.
        """
        features, labels = self._training_features(inputs, labels, progress)
        layer = self.layers[0]
        self._fit_svm(layer, self.base_svms[0], features[layer], labels, False, progress)
        self.reset_threshold()
        return self
