"""What DNR and NR are made of: layers of a network, an SVM on each, in memory and in a file."""

from collections.abc import Collection, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any, Self

from torch import nn

from torchdnr.classifier_files import load_classifier, save_classifier
from torchdnr.features.layers import LayerFeatures
from torchdnr.features.reductions import ReductionLike
from torchdnr.reduction_metadata import reduction_metadata
from torchdnr.rejection import RejectingClassifier
from torchdnr.svm.model_selection import C_GRID, GAMMA_GRID
from torchdnr.svm.rbf_svm import RBFSVM
from torchdnr.svm.state import NotFittedError
from torchdnr.svm_options import SVMOptions


class LayerSVMs(RejectingClassifier):
    """A rejecting classifier that reads layers of a network through SVMs.

    Subclasses say which SVMs there are beside those of the layers, and how they score. The options
    are described in ``DNR``.
    """

    def __init__(
        self,
        net: nn.Module,
        layers: Sequence[str] | Mapping[str, ReductionLike] | None = None,
        *,
        hyperparameters: Mapping[str, tuple[float, float]] | None = None,
        C_grid: Sequence[float] = C_GRID,
        gamma_grid: Sequence[float] = GAMMA_GRID,
        folds: int = 5,
        stacking_folds: int = 3,
        tol: float = 1e-3,
        seed: int = 0,
        batch_size: int = 256,
        memory_limit: int | None = None,
    ) -> None:
        super().__init__(batch_size)
        self.features = LayerFeatures(net, layers, seed=seed)
        self.svm_options = SVMOptions(
            hyperparameters=hyperparameters or {},
            C_grid=tuple(C_grid),
            gamma_grid=tuple(gamma_grid),
            folds=folds,
            stacking_folds=stacking_folds,
            tol=tol,
            seed=seed,
            memory_limit=memory_limit,
        )
        self._start_afresh()
        names = list(self._svms()) if self.layers else list(hyperparameters or {})
        self.svm_options = self.svm_options.checked(names)

    @property
    def net(self) -> nn.Module:
        """The wrapped network, left as it was given."""
        return self.features.net

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers in use; none before ``fit`` has chosen them."""
        return self.features.layers

    @property
    def num_classes(self) -> int:
        """Number of classes c; 0 before fitting."""
        return self.base_svms[0].num_classes if self.layers else 0

    def _svms(self) -> dict[str, RBFSVM]:
        return dict(zip(self.layers, self.base_svms, strict=True))

    def _set_svms(self, svms: Mapping[str, RBFSVM]) -> None:
        """Put others in the place of the SVMs, by the names that ``_svms`` gives them."""
        self.base_svms = nn.ModuleList(svms[name] for name in self.layers)

    def _start_afresh(self) -> None:
        """Drop what was fitted: a fit that fails must not leave a mixture of old and new."""
        self.base_svms = nn.ModuleList(RBFSVM(tol=self.svm_options.tol) for _ in self.layers)
        self.selection: dict[str, dict[str, Any]] = {}
        self.reset_threshold()

    def _require_fit(self) -> None:
        if not all(svm.is_fitted for svm in self._svms().values()):
            raise NotFittedError(
                f"this {type(self).__name__} is not fitted: call fit(images, labels) or load()"
            )

    def smoothed(self, factor: float, svms: Collection[str] | None = None) -> Self:
        """Return a view whose kernels have ``factor`` times the gamma; everything else is shared.

        An attacker follows the gradients of such views where those of the classifier vanish. The
        threshold is the same; nothing is copied but the hyper-parameters of the kernels.

        Args:
            factor: > 0; below 1 for smoother scores.
            svms: Which SVMs, named as in ``hyperparameters``; None: all.

        Returns:
            The view, to be called as the classifier is. Do not move it: its network and its tensors
            are those of the classifier.

        Raises:
            NotFittedError: If the classifier is not fitted.
            ValueError: If ``factor`` is not > 0, or there is no SVM of a name.
        """
        self._require_fit()
        own = self._svms()
        if unknown := sorted(set(svms or ()) - set(own)):
            raise ValueError(f"svms must be named after {list(own)}, got {unknown}")
        chosen = own if svms is None else svms
        views = {name: svm.smoothed(factor) if name in chosen else svm for name, svm in own.items()}
        view = copy(self)
        view._buffers, view._modules = dict(self._buffers), dict(self._modules)
        view._set_svms(views)
        return view

    def settings(self) -> dict[str, Any]:
        """Return the constructor's options and what fitting chose, as JSON values."""
        reductions = self.features.reductions
        return {
            "options": {**self.svm_options.to_dict(), "batch_size": self.batch_size},
            "layers": list(self.layers),
            "reductions": dict(zip(self.layers, map(reduction_metadata, reductions), strict=True)),
            "sizes": self.features.sizes,
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
        save_classifier(self, path)

    @classmethod
    def _on_layers(
        cls, net: nn.Module, layers: dict[str, ReductionLike], options: dict[str, Any]
    ) -> Self:
        return cls(net, layers, **options)

    @classmethod
    def load(
        cls,
        path: str | Path,
        net: nn.Module,
        *,
        strict: bool = True,
        layers: Mapping[str, nn.Module] | None = None,
    ) -> Self:
        """Load what ``save`` wrote, onto the network it was fitted with.

        Args:
            path: File to read.
            net: The network, with the weights it had when the classifier was fitted.
            strict: Whether to refuse a network with other weights, whose features the SVMs do
                not know.
            layers: Name -> reduction, for the layers whose reduction was a module of your own; what
                it learned is in the file. Built-in reductions need none.

        Returns:
            The classifier, on the device of the network.

        Raises:
            CheckpointError: If the file is damaged, foreign, or belongs to another network or to
                other reductions.
        """
        return load_classifier(cls, path, net, strict=strict, layers=layers or {})
