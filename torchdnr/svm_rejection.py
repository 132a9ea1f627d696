"""How DNR and NR are fitted, and made smaller: the SVMs of a network's layers."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from torchdnr.compression import compress_classifier
from torchdnr.costs import stage
from torchdnr.default_layers import default_layers
from torchdnr.features import LayerFeatures
from torchdnr.kernels import full_precision
from torchdnr.layer_svms import LayerSVMs
from torchdnr.preparation import distortions, prepare_features
from torchdnr.processes import Processes, default_processes
from torchdnr.shared_features import SharedFeatures
from torchdnr.svm import RBFSVM
from torchdnr.svm.compression import SMOOTHNESS, STEPS
from torchdnr.training_features import training_features


class SVMRejection(LayerSVMs):
    """A rejecting classifier whose SVMs are fitted on layers of a network that stays as it is.

    Subclasses say how the SVMs are fitted on the features, and how they score. The options are
    described in ``DNR``.
    """

    @abstractmethod
    def _fit_features(
        self, features: dict[str, SharedFeatures], labels: Tensor, progress: bool
    ) -> None:
        """Fit all SVMs on the features of the layers; may empty the mapping as it goes."""

    def fit(
        self,
        inputs: Tensor | Iterable[Any],
        labels: Tensor | None = None,
        *,
        progress: bool = False,
        features_folder: str | Path | None = None,
        processes: Processes | None = None,
    ) -> Self:
        """Fit the SVMs on clean images; the network itself is not trained.

        Features of all layers that together take more than ``memory_limit`` bytes (4 GiB if it was
        not set; on a GPU only if it was) go to files and are fitted on from there, on the CPU.

        Several processes share the work where ``torch.distributed`` is set up: all call this with
        the same network and the same data. Each extracts the features of its share, keeps those
        rows and evaluates the kernels with them, and solves its share of the dual problems; all get
        the same classifier. It is that of one process as nearly as ``tol`` decides a classifier:
        scores agree to a few ``tol``, dual coefficients may differ by more.

        Args:
            inputs: Images ``(n, ...)`` in [0, 1], or a loader that yields ``(images, labels)``.
            labels: ``(n,)`` int64 in 0..c-1 where ``inputs`` is a tensor.
            progress: Whether to show progress bars.
            features_folder: Where features go in any case, and are kept: a call that was stopped
                goes on from there when it is repeated, with a loader that does not shuffle.
                Default: a temporary folder, if any. As many processes find theirs again.
            processes: Those that share the work; default: torch.distributed's default group, if
                there is one. ``processes.ALONE``: this one fits by itself.

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
        processes = default_processes() if processes is None else processes
        progress = progress and processes.first
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
                processes=processes,
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
        self, name: str, features: SharedFeatures, labels: Tensor, stack: bool, progress: bool
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
