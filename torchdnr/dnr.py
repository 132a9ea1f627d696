"""Deep Neural Rejection (DNR) and Neural Rejection (NR)."""

from abc import abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from torchdnr.costs import stage
from torchdnr.decisions import NotFittedError
from torchdnr.distributed import current
from torchdnr.distributed.sharing import ShardedFeatures, checked_batches
from torchdnr.features.choice import default_layers
from torchdnr.features.extraction import distortions, extract, prepare_features, training_features
from torchdnr.features.layers import LayerFeatures
from torchdnr.features.reductions import ReductionLike, reduction_metadata, reductions_of_file
from torchdnr.files import CheckpointError, digest, load_tensors, save_tensors
from torchdnr.kernels.rbf import full_precision
from torchdnr.rejection import RejectingClassifier
from torchdnr.svm.compression import SMOOTHNESS, STEPS
from torchdnr.svm.model_selection import C_GRID, GAMMA_GRID
from torchdnr.svm.rbf_svm import RBFSVM
from torchdnr.svm.stack import (
    SVMOptions,
    chosen_sizes,
    compress_stack,
    stack_losses,
    warn_of_losses,
)

Classifier = TypeVar("Classifier", bound="LayerSVMs")


def save_classifier(model: "LayerSVMs", path: str | Path) -> None:
    """Save what ``LayerSVMs.save`` describes."""
    tensors = {k: v for k, v in model.state_dict().items() if not k.startswith("features.net.")}
    metadata = {**model.settings(), "network_digest": digest(model.net.state_dict())}
    save_tensors(path, tensors, metadata, kind=type(model).__name__)


def load_classifier(
    kind: type[Classifier],
    path: str | Path,
    net: nn.Module,
    *,
    strict: bool,
    layers: Mapping[str, nn.Module],
) -> Classifier:
    """Load what ``LayerSVMs.load`` describes; the arguments are its own."""
    tensors, metadata = load_tensors(path, kind=kind.__name__)
    if strict and metadata["network_digest"] != digest(net.state_dict()):
        raise CheckpointError(
            f"{path}: expected the network it was fitted on, got one with other weights; load "
            "those weights first, or pass strict=False"
        )
    try:
        reductions = reductions_of_file(path, metadata, layers)
        model = kind._on_layers(net, reductions, metadata["options"])
        model.features.sizes = metadata.get("sizes", {})
        model.selection = metadata["selection"]
        for name, svm in model._svms().items():
            svm.C, svm.gamma = model.selection[name]["C"], model.selection[name]["gamma"]
        # The network has its weights, and some networks change themselves when they load.
        model.features.net = None
        model.load_state_dict(tensors)
        model.features.net = net
    except (KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: expected the contents of a {kind.__name__} of this version, got others "
            f"({error}); fit it again, or use the torchdnr version that wrote it"
        ) from error
    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    return model.to(device)


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


class SVMRejection(LayerSVMs):
    """A rejecting classifier whose SVMs are fitted on layers of a network that stays as it is.

    Subclasses say how the SVMs are fitted on the features, and how they score. The options are
    described in ``DNR``.
    """

    @abstractmethod
    def _fit_features(
        self, features: dict[str, ShardedFeatures], labels: Tensor, progress: bool
    ) -> None:
        """Fit all SVMs on the features of the layers; may empty the mapping as it goes."""

    def fit(
        self,
        inputs: Tensor | Iterable[Any],
        labels: Tensor | None = None,
        *,
        progress: bool = False,
        features_folder: str | Path | None = None,
    ) -> Self:
        """Fit the SVMs on clean images; the network itself is not trained.

        Features of all layers that together take more than ``memory_limit`` bytes (4 GiB if it was
        not set; on a GPU only if it was) go to files and are fitted on from there, on the CPU.

        Several processes share the work where ``torch.distributed`` is set up, unless this is
        called ``with torchdnr.distributed.alone():``. All call it with the same network and the
        same data. Each extracts the features of its share, keeps those rows and evaluates the
        kernels with them, and solves its share of the dual problems; all get the same classifier.
        It is that of one process as nearly as ``tol`` decides a classifier: scores agree to a few
        ``tol``, dual coefficients may differ by more.

        Args:
            inputs: Images ``(n, ...)`` in [0, 1], or a loader that yields ``(images, labels)``.
            labels: ``(n,)`` int64 in 0..c-1 where ``inputs`` is a tensor.
            progress: Whether to show progress bars.
            features_folder: Where features go in any case, and are kept: a call that was stopped
                goes on from there when it is repeated, with a loader that does not shuffle.
                Default: a temporary folder, if any. As many processes find theirs again.

        Returns:
            The classifier itself. A threshold that was set is dropped: it belonged to other scores.

        Raises:
            ValueError: If images or labels are not as said above, or a class has too few samples.
            CheckpointError: If the folder holds the features of other images or another network.
            OSError: If the disk is full, or the folder cannot be written to.
            PeerError: If another of the processes has ended.

        Warns:
            ConvergenceWarning: If a dual problem missed its tolerance.
            ProjectionWarning: If a random projection changes distances by much.
            UserWarning: If features go to a temporary folder, or were damaged on disk.
        """
        progress = progress and current().first
        with stage("features"):
            ready, features, labels = training_features(
                inputs,
                labels,
                self._ready_features,
                device=self.device,
                batch_size=self.batch_size,
                memory_limit=self.svm_options.memory_limit,
                folder=features_folder,
                progress=progress,
            )
        self.features = ready  # only now: a fit that fails before leaves the earlier one to use
        self._start_afresh()
        with full_precision(labels.device):  # autocast and TF32 are for the network alone
            self._fit_features(features, labels, progress)
        for svm in self._svms().values():
            svm.to(self.device)  # from the CPU, where features that are mapped from files live
        for name, distortion in distortions(self.features).items():
            self.selection[name]["distortion"] = distortion
        return self

    def _ready_features(self, sample: list[Tensor]) -> LayerFeatures:
        """Choose layers where none are named, and make the reductions for images like these."""
        features = self.features
        if not features.layers:
            layers = default_layers(self.net, sample[0])
            features = LayerFeatures(self.net, layers, seed=self.svm_options.seed)
            self.svm_options.checked([*features.layers, *self._svms()])
        return prepare_features(features, sample)

    def _fit_svm(
        self, name: str, features: ShardedFeatures, labels: Tensor, stack: bool, progress: bool
    ) -> tuple[RBFSVM, Tensor | None]:
        """Fit one SVM, remember its selection, and return it with what a combiner needs."""
        found = self.svm_options.fit(name, features, labels, stack=stack, progress=progress)
        self.selection[name] = found.selection
        return found.svm, found.held_out

    def compress(
        self,
        inputs: Tensor | Iterable[Any],
        prototypes: int | Mapping[str, int] | None = None,
        *,
        factor: float | None = None,
        steps: int = STEPS,
        joint_steps: int = STEPS,
        smoothness: float = SMOOTHNESS,
        progress: bool = False,
    ) -> Self:
        """Return a classifier of the same scores, nearly, on fewer support vectors.

        Each SVM gets prototypes in the place of its support vectors (``svm.compression``), layers
        first, then the combiner on what they return; then all move together on the final scores.
        What was lost on the images is kept in ``selection[name]["compression"]``, and
        ``compression.compression_report`` shows it. It says nothing of attacks: attack it again.

        Args:
            inputs: Images to compare the scores on, such as those of ``fit``: ``(n, ...)`` in
                [0, 1], or a loader (labels are ignored).
            prototypes: A number for each SVM, or numbers by name, as in ``hyperparameters``: an SVM
                without one keeps its support vectors.
            factor: Instead, how many times fewer vectors each SVM is to have, >= 1.
            steps: Iterations of L-BFGS for each SVM.
            joint_steps: Iterations for all of them together.
            smoothness: Weight of the difference in the space of the kernel, > 0: more holds the
                scores away from the images.
            progress: Whether to show progress bars.

        Returns:
            The new classifier, on the same network. Its threshold is not set: the old one belonged
            to other scores. This classifier stays as it is.

        Raises:
            NotFittedError: If the classifier is not fitted.
            ValueError: If an argument is not as said above.

        Warns:
            CompressionWarning: If the final scores lost more than a little.
        """
        return compress_classifier(
            self,
            inputs,
            prototypes,
            factor,
            steps=steps,
            joint_steps=joint_steps,
            smoothness=smoothness,
            progress=progress,
        )


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
        self, features: dict[str, ShardedFeatures], labels: Tensor, progress: bool
    ) -> None:
        """Fit the base SVMs, then the combiner on their out-of-fold scores."""
        held_out, partition = [], next(iter(features.values())).partition
        for index, name in enumerate(self.layers):
            fitted = self._fit_svm(name, features.pop(name), labels, True, progress)
            self.base_svms[index] = fitted[0]
            held_out.append(fitted[1])
        stacked = ShardedFeatures(torch.cat(held_out, dim=1)[partition.local], partition)
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
        self, features: dict[str, ShardedFeatures], labels: Tensor, progress: bool
    ) -> None:
        layer = self.layers[0]
        self.base_svms[0], _ = self._fit_svm(layer, features[layer], labels, False, progress)

    @classmethod
    def _on_layers(
        cls, net: nn.Module, layers: dict[str, ReductionLike], options: dict[str, Any]
    ) -> Self:
        ((layer, reduction),) = layers.items()
        return cls(net, layer, reduction=reduction, **options)


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
