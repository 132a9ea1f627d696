"""Deep Neural Rejection (DNR) and Neural Rejection (NR)."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Self, overload

import torch
from torch import Tensor, nn

from torchdnr.arrays import ArrayLike, as_data, as_images
from torchdnr.decisions import NotFittedError
from torchdnr.distributed import current
from torchdnr.distributed.sharing import checked_batches
from torchdnr.features.choice import default_layers
from torchdnr.features.extraction import distortions, extract, prepare_features, training_features
from torchdnr.features.layers import LayerFeatures
from torchdnr.features.network import (
    copy_with_state,
    has_digest,
    network_digest,
    warn_unless_savable,
    with_names_of,
)
from torchdnr.features.reductions import ReductionLike, reduction_metadata, reductions_of_file
from torchdnr.files import CheckpointError, load_tensors, plain_json, save_tensors
from torchdnr.kernels.any_kernel import rbf_gamma
from torchdnr.kernels.rbf import full_precision
from torchdnr.models.adversarial import Adversary
from torchdnr.models.training import TrainingSettings
from torchdnr.rejection.end_to_end import (
    END_TO_END_TRAINING,
    images_and_labels,
    train_end_to_end,
)
from torchdnr.rejection.threshold import (
    Threshold,
    best_and_wrong,
    calibrated_threshold,
    predict_in_batches,
)
from torchdnr.resources import check_batch_size, stage
from torchdnr.svm.compression import SMOOTHNESS, STEPS
from torchdnr.svm.influence import Influence, influence
from torchdnr.svm.model_selection import C_GRID, GAMMA_GRID
from torchdnr.svm.multiclass import ClassWeight, PerClass, checked_C, checked_class_weight
from torchdnr.svm.rbf_svm import RBFSVM
from torchdnr.svm.refinement import Refine
from torchdnr.svm.stack import SVMOptions, SVMStack, chosen_sizes, svm_names

NETWORK = "features.net."
"""How the names of the network's tensors begin in a state dict."""


class DNR(nn.Module):
    """Deep Neural Rejection: an RBF-SVM on each layer, and one more that combines their scores.

    ``torch.compile(model)``, or ``model.compile()`` in place, makes one graph of network and SVMs,
    with gradients of first order. Autocast, compiled or not, lowers the network alone: the SVMs
    compute in float32. Fit, calibrate and predict under the same autocast, since the threshold
    belongs to the scores that it was set on. `export_program` and `export_onnx` make a program of
    the classifier that runs without this package.

    Several threads may call one classifier: each gets what it would get alone. Where TF32 is on,
    the network of one may for a moment compute in full precision while the SVMs of another do; and
    a compiled classifier that shares threads with others wants its network in evaluation mode.

    Args:
        net: Any module on images in [0, 1], normalisation inside. It is not changed.
        layers: Names from ``net.named_modules()``; or a mapping from name to reduction, which makes
            layers of any size usable: ``"flatten"`` (all values, as for plain names), ``"avg"``
            (mean over positions), ``("grid", k)`` (means over k x k parts), ``("project", d)``
            (random projection to d features), or a module; see ``build_reduction``. None: ``fit``
            chooses, by ``default_layers`` on its first images; see ``layers`` and
            ``features.describe()`` then.
        hyperparameters: (C, gamma) for layers, or for ``"combiner"``, that are not to be searched;
            C is a number, or one per class. Where a layer has that name the combiner is called
            ``".combiner"``, here and everywhere.
        C_grid: Values of C to search.
        gamma_grid: Multiples of gamma = "scale" to search.
        folds: Stratified folds of the search.
        stacking_folds: Stratified folds of the scores that the combiner learns from.
        tol: Largest KKT violation accepted.
        seed: Of all folds.
        batch_size: Images per forward pass; None: as many as suits their size.
        memory_limit: Bytes that one fit may take beyond the features, and that the features of all
            layers may take before they go to files, see ``fit``; default 4 GiB.
        refine: Whether to improve what each search chose: C by class, and gamma, along the gradient
            of a smooth out-of-fold loss; see ``grid_search``. It takes several times as long as the
            search, and is for coarse grids: near a good point it gains no more than chance does.
            ``"ard"``: also a width for each feature of the layers, by factors that ``features``
            applies.
        class_weight: Factors of C by class in all SVMs, as in ``RBFSVM``: one per class, a dict, or
            ``"balanced"``, which balances every fold by itself too.
        combine: Whether a combiner scores, on what the SVMs of the layers return; see ``NR``.

    Attributes:
        features: ``LayerFeatures``: images to features ``(n, d)``, by layer.
        svms: ``SVMStack``: features to class scores ``(n, c)``.
        rejection: ``Threshold``: theta, and whether it is set.
        owns_network: Whether the network was trained with the SVMs, or got other weights with them
            by ``load_state_dict``, and is saved with them.

    Raises:
        ValueError: If an option is not as said above.

    Source: Sotgiu et al., "Deep neural rejection against adversarial examples" (2020), Sec. II.
    """

    def __init__(
        self,
        net: nn.Module,
        layers: Sequence[str] | Mapping[str, ReductionLike] | None = None,
        *,
        hyperparameters: Mapping[str, tuple[PerClass, float]] | None = None,
        C_grid: Sequence[float] = C_GRID,
        gamma_grid: Sequence[float] = GAMMA_GRID,
        folds: int = 5,
        stacking_folds: int = 3,
        tol: float = 1e-3,
        seed: int = 0,
        batch_size: int | None = None,
        memory_limit: int | None = None,
        refine: Refine = False,
        class_weight: ClassWeight | None = None,
        combine: bool = True,
    ) -> None:
        super().__init__()
        check_batch_size(batch_size)
        options = SVMOptions(
            hyperparameters=hyperparameters or {},
            C_grid=tuple(C_grid),
            gamma_grid=tuple(gamma_grid),
            folds=folds,
            stacking_folds=stacking_folds,
            tol=tol,
            seed=seed,
            memory_limit=memory_limit,
            class_weight=checked_class_weight(class_weight),
            refine=refine,
        )
        self.batch_size = batch_size
        self.features = LayerFeatures(net, layers, seed=seed)
        self.svms = SVMStack(options, self.layers, combine=combine)
        self.rejection = Threshold()
        self.owns_network = False

    @property
    def net(self) -> nn.Module:
        """The wrapped network, left as it was given; a copy once it is trained end to end."""
        return self.features.net

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers in use; none before ``fit`` has chosen them."""
        return self.features.layers

    @property
    def base_svms(self) -> nn.ModuleList:
        """One ``RBFSVM`` per layer, in the order of ``layers``."""
        return self.svms.base_svms

    @property
    def combiner(self) -> RBFSVM | None:
        """``RBFSVM`` on the concatenated scores, ``(n, c * len(layers))``; None in ``NR``."""
        return self.svms.combiner

    @property
    def selection(self) -> dict[str, dict[str, Any]]:
        """What the search chose and saw, by SVM, named as in ``hyperparameters``.

        Of a projected layer also ``distortion``, see ``projection_distortion``.
        """
        return self.svms.selection

    @property
    def svm_options(self) -> SVMOptions:
        """The options that all SVMs share."""
        return self.svms.options

    @property
    def threshold(self) -> Tensor:
        """The rejection threshold theta, a scalar; NaN until it is set."""
        return self.rejection.theta

    @property
    def num_classes(self) -> int:
        """Number of classes c; 0 before fitting."""
        return next((svm.num_classes for svm in self.svms.named().values()), 0)

    @property
    def reject_index(self) -> int:
        """Column of the threshold in the output; attacks read from it that there is one."""
        return self.num_classes

    @property
    def device(self) -> torch.device:
        """Where the scores are computed: the device of the network."""
        return next((p.device for p in self.parameters()), self.threshold.device)

    @torch.inference_mode(False)  # tensors made there stay without gradients for good
    @torch.no_grad()
    def fit(
        self,
        inputs: Tensor | Iterable[Any],
        labels: Tensor | None = None,
        *,
        sample_weight: ArrayLike | None = None,
        progress: bool = False,
        features_folder: str | Path | None = None,
    ) -> Self:
        """Fit the SVMs on clean images; the network itself is not trained.

        Features of all layers that together take more than ``memory_limit`` bytes (4 GiB if it was
        not set; on a GPU only if it was) go to files and are fitted on from there, on the CPU. It
        fits there too where the device of the network has no float64, as Apple's (MPS).

        Several processes share the work where ``torch.distributed`` is set up, unless this is
        called ``with torchdnr.distributed.alone():``. All call it with the same network and the
        same data. Each extracts the features of its share, keeps those rows and evaluates the
        kernels with them, and solves its share of the dual problems; all get the same classifier.
        It is that of one process as nearly as ``tol`` decides a classifier: scores agree to a few
        ``tol``, dual coefficients may differ by more.

        Args:
            inputs: Images ``(n, ...)`` in [0, 1], or a loader that yields ``(images, labels)``.
            labels: ``(n,)`` int64 in 0..c-1 where ``inputs`` is a tensor.
            sample_weight: Factor >= 0 of C per image in all SVMs, in the folds too, ``(n,)``; with
                a loader in its order, so that it must not shuffle. An image of weight 0 is as good
                as removed; in a search accuracy is weighted too.
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
            UserWarning: If features go to a temporary folder, or were damaged on disk; or if
                ``save`` will not be able to write the classifier.
        """
        warn_unless_savable(type(self).__name__, self._own_state(), self.net)
        progress = progress and current().first
        inputs = as_data(inputs, self.net)
        with stage("features"):
            features, by_layer, labels, weight = training_features(
                inputs,
                labels,
                self._prepare_features,
                device=self.device,
                batch_size=self.batch_size,
                memory_limit=self.svm_options.memory_limit,
                folder=features_folder,
                progress=progress,
                sample_weight=sample_weight,
            )
        # Only now: a fit that fails before leaves the earlier one to use, and one that fails from
        # here on no mixture of old and new.
        combine = self.combiner is not None
        self.features = features
        self.svms = SVMStack(self.svm_options, features.layers, combine=combine)
        self.rejection.reset()
        with full_precision(labels.device):  # autocast and TF32 are for the network alone
            self.svms.fit(by_layer, labels, sample_weight=weight, progress=progress)
        self.svms.to(self.device)  # from the CPU, where features that are mapped from files live
        features.set_scales(self.svms.scales)
        for name, distortion in distortions(features).items():
            self.selection[name]["distortion"] = distortion
        return self

    def _prepare_features(self, sample: list[Tensor]) -> LayerFeatures:
        """Choose layers where none are named, and make the reductions for images like these."""
        features = self.features
        if not features.layers:
            layers = default_layers(self.net, sample[0])
            features = LayerFeatures(self.net, layers, seed=self.svm_options.seed)
            self.svm_options.checked(svm_names(list(layers), self.combiner is not None))
        return prepare_features(features, sample)

    @torch.inference_mode(False)
    @torch.no_grad()
    def calibrate(
        self,
        inputs: Tensor | Iterable[Any],
        labels: Tensor | float | None = None,
        *,
        rejection_rate: float | None = None,
        max_error: float | None = None,
        confidence: float = 0.95,
    ) -> Self:
        """Set the threshold: so that a share of clean images is rejected, or to bound the error.

        ``calibrate(images, 0.05)`` rejects 5 % of them. ``calibrate(images, labels,
        max_error=0.01)`` rejects as few as it takes for a promise: with probability ``confidence``
        over the draw of these images, at most 1 % of all images like them that are accepted are
        wrong; see ``rejection.risk``. It does not hold for images from elsewhere, nor under attack.

        Several processes share the work where ``torch.distributed`` is set up, unless this is
        called ``with torchdnr.distributed.alone():``. All call it with the same images, each scores
        some batches, and all get the same threshold.

        Args:
            inputs: Images ``(n, ...)`` in [0, 1], or a loader of batches, used for nothing else:
                neither fitted on nor tested on.
            labels: ``(n,)``, for ``max_error``, unless the loader yields them. A number is taken
                for ``rejection_rate``.
            rejection_rate: Share to reject, in [0, 1); default 0.1.
            max_error: Instead, the bound of the error among accepted images, in (0, 1).
            confidence: Probability that this bound holds, in (0, 1).

        Returns:
            The classifier itself.

        Raises:
            ValueError: If an argument is not as said above, or no threshold promises ``max_error``.
            NotFittedError: If the classifier is not fitted.
            PeerError: If another of the processes has ended.

        Warns:
            CalibrationWarning: If equal scores make it reject more than ``rejection_rate``.

        Source: Geifman and El-Yaniv, "Selective classification for deep neural networks" (2017).
        """

        def judge(images: Tensor, of_batch: Tensor | None) -> Tensor:
            return best_and_wrong(self.scores(images.to(self.device)), of_batch)

        goal = {"rejection_rate": rejection_rate, "max_error": max_error, "confidence": confidence}
        options: dict[str, Any] = {"batch_size": self.batch_size, **goal}
        with stage("threshold"):
            self.rejection.set(calibrated_threshold(self, judge, inputs, labels, **options))
        return self

    def set_threshold(self, threshold: float | Tensor) -> None:
        """Set theta by hand.

        Args:
            threshold: A finite number.

        Raises:
            ValueError: If it is not finite.
        """
        self.rejection.set(torch.as_tensor(threshold, device=self.device))

    def reset_threshold(self) -> None:
        """Forget theta, as after a new fit."""
        self.rejection.reset()

    def scores(self, inputs: Tensor) -> Tensor:
        """Compute class scores.

        Args:
            inputs: Images in [0, 1], ``(n, ...)``.

        Returns:
            Decision values of the combiner, or of the one SVM without it, ``(n, c)``.

        Raises:
            NotFittedError: If ``fit`` has not run.
        """
        self._require_fit()
        return self.svms(self.features(as_images("inputs", inputs, self.net)))

    def forward(self, inputs: Tensor) -> Tensor:
        """Compute class scores and threshold.

        Values of the inputs are not checked here, since that would stall a GPU in every step of
        an attack; ``predict``, ``fit`` and ``calibrate`` check them.

        Args:
            inputs: Images in [0, 1], ``(n, ...)``.

        Returns:
            ``(n, c + 1)``: scores s_1..s_c, then theta; an input is accepted if and only if its
            best score is greater than theta. A fresh tensor.

        Raises:
            NotFittedError: If the classifier is not fitted or its threshold is not set.
        """
        return self.rejection.append(self.scores(inputs))

    @overload
    def predict(
        self, inputs: Tensor | Iterable[Any], *, return_scores: Literal[False] = False
    ) -> Tensor: ...

    @overload
    def predict(
        self, inputs: Tensor | Iterable[Any], *, return_scores: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...

    def predict(
        self, inputs: Tensor | Iterable[Any], *, return_scores: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Predict labels or reject, batch by batch.

        Args:
            inputs: Images in [0, 1], ``(n, ...)``, or a loader of batches (labels are ignored).
            return_scores: Whether to return ``scores(inputs)``, ``(n, c)``, too.

        Returns:
            0..c-1, or ``REJECT`` = -1, int64 ``(n,)``; with ``return_scores`` also the scores.

        Raises:
            ValueError: If the images are empty, not floating point, outside [0, 1] or NaN.
            NotFittedError: If the classifier is not fitted or its threshold is not set.
        """
        return predict_in_batches(self, inputs, self.batch_size, self.device, return_scores)

    def _require_fit(self) -> None:
        if not (self.layers and self.svms.is_fitted):
            raise NotFittedError(
                f"this {type(self).__name__} is not fitted: call fit(images, labels) or load()"
            )

    def refitted(self, images: Tensor, labels: Tensor, sample_weight: Tensor | None = None) -> Self:
        """Return a view whose SVMs are fitted on other images, as a function of these.

        What the view computes has exact gradients by the images and weights that it was fitted on:
        ``refitted(images, labels).scores(others)`` tells how each training image moves the scores
        of others. Hyper-parameters, threshold and network are those of the classifier.

        Args:
            images: ``(n, ...)`` in [0, 1]; all pass the network at once.
            labels: ``(n,)`` int64 in 0..c-1.
            sample_weight: Factor >= 0 of C per image, ``(n,)``.

        Returns:
            The view, to be called as the classifier is. Do not move or copy it.

        Raises:
            NotFittedError: If the classifier is not fitted.
            ValueError: If images, labels or weights do not fit.
        """
        self._require_fit()
        return self._view(self.svms.refitted(self.features(images), labels, sample_weight))

    @torch.no_grad()
    def influence(self, images: Tensor) -> dict[str, Influence]:
        """Tell which training images each decision rests on, layer by layer.

        Args:
            images: ``(n, ...)`` in [0, 1].

        Returns:
            By SVM, named as in ``hyperparameters``: what each training image does to the score of
            the class that has the best final score, accepted or not; see ``svm.influence``.

        Raises:
            NotFittedError: If the classifier is not fitted.
            ValueError: If it is compressed, or the images are not as said above.
        """
        self._require_fit()
        features = self.features(as_images("images", images, self.net))
        best, effects = self.svms(features).argmax(dim=1), {}
        held: list[Tensor] = []
        for name, svm in self.svms.named().items():
            inputs = features[name] if name in self.layers else torch.cat(held, dim=1)
            held.append(svm(inputs))
            effects[name] = influence(svm, inputs, best)
        return effects

    def _view(self, svms: SVMStack) -> Self:
        """Return a classifier of the same network and threshold with other SVMs."""
        view, rejection = copy(self), copy(self.rejection)
        rejection._buffers = dict(self.rejection._buffers)  # a new theta here changes no view
        view._modules = {**self._modules, "svms": svms, "rejection": rejection}
        return view

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
        return self._view(self.svms.smoothed(factor, svms))

    @torch.inference_mode(False)
    @torch.no_grad()
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
        self._require_fit()
        if joint_steps < 0:
            raise ValueError(f"joint_steps must be >= 0, got {joint_steps}")
        sizes = chosen_sizes(self.svms.named(), prototypes, factor)
        with stage("features"):
            features = self._extract(inputs, progress)
        model = self._build(
            self.net, self.features.given, self.settings()["options"], self.combiner is not None
        )
        model.features = self.features  # with the reductions as they were drawn
        with stage("compression"):
            options: Any = {"steps": steps, "joint_steps": joint_steps, "smoothness": smoothness}
            model.svms = self.svms.compressed(features, sizes, **options)
        model.rejection.to(self.threshold)
        model.training, model.owns_network = self.training, self.owns_network
        return model

    @torch.inference_mode(False)
    @torch.enable_grad()
    def fit_end_to_end(
        self,
        inputs: Tensor | Iterable[Any],
        labels: Tensor | None = None,
        adversary: Adversary | None = None,
        settings: TrainingSettings = END_TO_END_TRAINING,
        *,
        freeze_network: bool = False,
        copy_network: bool = True,
        seed: int = 0,
        checkpoint: str | Path | None = None,
        progress: bool = False,
    ) -> Self:
        """Train network and SVMs together, from what ``fit`` found, against attacks on the whole.

        Support vectors, dual coefficients, intercepts and kernels are trained with the network, on
        how far the scores are above theta (0 where it is not set), so that an attacked image is
        right or rejected. What comes out has the form that ``fit`` made, and as many support
        vectors: a classifier that was compressed first trains faster. Calibrate it then. Where
        there are several processes, each does all of the work.

        Args:
            inputs: Clean images ``(n, ...)`` in [0, 1], or a loader that yields ``(images,
                labels)``, which is read into memory.
            labels: ``(n,)`` int64 in 0..c-1 where ``inputs`` is a tensor.
            adversary: What to train against; its loss is "reject" or "plain".
            settings: Epochs, learning rates and so on; those of the network are a quarter of those
                of the SVMs.
            freeze_network: Whether the SVMs alone are trained.
            copy_network: Whether to train a copy of the network, and leave the given one as it is.
                Otherwise a training that is broken off leaves it half trained.
            seed: Fixes the order of the images and the starts of the adversary.
            checkpoint: The file that makes a stopped run go on, as in ``train_network``.
            progress: Whether to show a progress bar.

        Returns:
            The classifier itself. A threshold that was set is dropped: it belonged to other scores.

        Raises:
            NotFittedError: If the classifier is not fitted.
            ValueError: If an argument is not as said above, or no parameter of the network requires
                a gradient.
            CheckpointError: If ``checkpoint`` belongs to another run.
            FloatingPointError: If the loss is not finite after an epoch.

        Warns:
            WeakAttackWarning: If the adversary misses much of what a stronger attack finds.

        Source: Sotgiu et al. (2020), Sec. V, name it as future work.
        """
        self._require_fit()
        images, labels = images_and_labels(as_data(inputs, self.net), labels)
        if adversary is None or adversary.loss not in ("reject", "plain"):
            raise ValueError(
                'expected an Adversary(eps=...) whose loss is "reject" or "plain", got '
                f"{adversary}: the scores of SVMs have no class that rejects"
            )
        # A copy is trained: a training that fails leaves the classifier as it was.
        net = deepcopy(self.net) if copy_network and not freeze_network else self.net
        trained, features = copy(self), copy(self.features)
        features._modules = {**features._modules, "net": net}
        trained._modules = {**self._modules, "features": features, "svms": deepcopy(self.svms)}
        theta = self.threshold.item()
        train_end_to_end(
            trained,
            None if freeze_network else net,
            images,
            labels,
            adversary,
            settings,
            theta=theta if math.isfinite(theta) else 0.0,
            seed=seed,
            checkpoint=checkpoint,
            progress=progress,
        )
        self.features, self.svms = features, trained.svms
        self.owns_network = self.owns_network or not freeze_network
        self.rejection.reset()
        for name, svm in self.svms.named().items():
            if svm.kernel is not None and (gamma := rbf_gamma(svm.kernel)) is not None:
                svm.gamma = gamma.item()
            known = {"gamma": svm.gamma, "end_to_end": plain_json(asdict(adversary))}
            self.selection[name] = self.selection.get(name, {}) | known
        return self

    def _extract(self, inputs: Tensor | Iterable[Any], progress: bool = False) -> dict[str, Tensor]:
        """Extract the features of checked images, by layer."""
        inputs = as_data(inputs, self.net)
        images = (batch for batch, _ in checked_batches(inputs, self.batch_size, self.device))
        return extract(self.features, images, progress=progress)[0]

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

        One that was trained with the SVMs, by ``fit_end_to_end``, is saved with them.

        Args:
            path: File to write, whole or not at all.

        Raises:
            NotFittedError: If there is nothing to save.
            OSError: If the file cannot be written; an earlier one stays as it was.
            TypeError: If a reduction has state that is no tensor, or a network state that has no
                fingerprint.
        """
        self._require_fit()
        metadata = {**self.settings(), "network_digest": network_digest(self.net)}
        if self.owns_network:
            metadata["owns_network"] = True
        save_tensors(path, self._own_state(), metadata, kind=type(self).__name__)

    def _own_state(self) -> dict[str, Any]:
        """Return the state dict, without the network unless it was trained with the SVMs."""
        state = self.state_dict()
        if self.owns_network:
            return state
        return {k: v for k, v in state.items() if not k.startswith(NETWORK)}

    @classmethod
    @torch.inference_mode(False)
    @torch.no_grad()
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
            net: The network, with the weights it had when the classifier was fitted; in a wrapper
                (``nn.DataParallel``, ``DistributedDataParallel``, ``torch.compile``) or not. For a
                classifier that was trained end to end any network of that architecture: a copy of
                it gets the weights of the file.
            strict: Whether to refuse a network with other weights, whose features the SVMs do
                not know.
            layers: Name -> reduction, for the layers whose reduction was a module of yours; what
                it learned is in the file. Built-in reductions need none.

        Returns:
            The classifier, on the device of the network.

        Raises:
            CheckpointError: If the file is damaged, foreign, or belongs to another network or to
                other reductions.
        """
        tensors, metadata = load_tensors(path, kind=cls.__name__)
        if owns_network := metadata.get("owns_network", False):
            weights = [name for name in tensors if name.startswith(NETWORK)]
            state = {name.removeprefix(NETWORK): tensors.pop(name) for name in weights}
            net = copy_with_state(net, state, path)
        if strict and not has_digest(net, metadata["network_digest"]):
            raise CheckpointError(
                f"{path}: expected the network it was fitted on, got one with other weights; load "
                "those weights first, or pass strict=False"
            )
        try:
            metadata = with_names_of(net, metadata)
            reductions = reductions_of_file(path, metadata, layers or {})
            combine = any(name.startswith(("svms.combiner.", "combiner.")) for name in tensors)
            model = cls._build(net, reductions, metadata["options"], combine)
            model.features.sizes = metadata.get("sizes", {})
            model.svms.selection = metadata["selection"]
            for name, svm in model.svms.named().items():
                chosen = model.selection.get(name, {})  # none where its state dict was loaded
                svm.C = checked_C(chosen.get("C", svm.C))
                svm.gamma = chosen.get("gamma", svm.gamma)
            # The network has its weights, and some networks change themselves when they load.
            model.features.register_module("net", None)
            model.load_state_dict(tensors)
            model.features.net, model.owns_network = net, owns_network
        except (KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(
                f"{path}: expected the contents of a {cls.__name__} of this version, got others "
                f"({error}); fit it again, or use the torchdnr version that wrote it"
            ) from error
        return model.to(model.device)

    @classmethod
    def _build(
        cls,
        net: nn.Module,
        layers: Mapping[str, ReductionLike],
        options: Mapping[str, Any],
        combine: bool,
    ) -> Self:
        """Build an unfitted classifier by the constructor of ``DNR``, also an ``NR``."""
        model = cls.__new__(cls)
        DNR.__init__(model, net, layers, **options, combine=combine)
        return model

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: object, **kwargs: object
    ) -> None:
        """Give the tensors of version 0.1 the names that they have now; look at the network's."""
        if prefix + "threshold" in state_dict:
            state_dict[prefix + "rejection.theta"] = state_dict.pop(prefix + "threshold")
        for name in list(state_dict):
            if name.startswith((prefix + "base_svms.", prefix + "combiner.")):
                state_dict[f"{prefix}svms.{name[len(prefix) :]}"] = state_dict.pop(name)
        held = {} if self.net is None else self.net.state_dict(prefix=prefix + NETWORK)
        self.owns_network |= any(
            isinstance(value, Tensor)
            and (value.shape != held[name].shape or not torch.equal(value.cpu(), held[name].cpu()))
            for name, value in state_dict.items()
            if name in held
        )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class NR(DNR):
    """Neural Rejection: one RBF-SVM with a threshold, on one layer, usually the last.

    Args:
        net: Any module on images in [0, 1], normalisation inside. It is not changed.
        layer: Name from ``net.named_modules()``.
        reduction: What makes features of its output; as in ``DNR``.
        **options: As in ``DNR``; there is no combiner and no stacking.

    Raises:
        ValueError: If ``layer`` is not one name, or an option is not as said in ``DNR``.

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
        super().__init__(net, {layer: reduction}, **options, combine=False)
