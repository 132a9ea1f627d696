"""`RBFSVM`: a kernel SVM for many classes as a torch module."""

from collections.abc import Callable
from copy import copy, deepcopy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from gpytorch.kernels import Kernel, RBFKernel
from torch import Tensor, nn

from torchdnr.arrays import ArrayLike, as_features, as_labels
from torchdnr.decisions import NotFittedError
from torchdnr.distributed.sharing import ShardedFeatures
from torchdnr.files import CheckpointError, load_tensors, save_tensors
from torchdnr.kernels.any_kernel import kernel_matrix, kernel_scores, make_rbf_kernel, rbf_gamma
from torchdnr.kernels.rbf import full_precision, is_transformed, rbf_scores, squared_norms
from torchdnr.svm.checks import check_labels, checked_features
from torchdnr.svm.dual import Certificate
from torchdnr.svm.implicit import implicit_solution
from torchdnr.svm.multiclass import (
    ONE_VS_ONE,
    ONE_VS_REST,
    STRATEGIES,
    ClassWeight,
    PerClass,
    binary_targets,
    checked_C,
    checked_class_weight,
    classes_of_pairs,
    upper_bounds,
    votes_and_confidence,
)
from torchdnr.svm.solver import solve_dual
from torchdnr.svm.training_data import TrainingData, checked_gamma, select_training_data

if TYPE_CHECKING:
    from sklearn.base import ClassifierMixin

_KIND = "RBFSVM"
_PROBE = "kernel_probe"
_FITTED = {"support_vectors": 2, "support": 1, "dual_coef": 2, "intercept": 1, "center": 1}
"""Buffers that fitting fills, and their numbers of dimensions."""


class RBFSVM(nn.Module):
    """C-SVC with intercept for c >= 2 classes whose decision values are differentiable in torch.

    It solves P binary problems, P = c for one-vs-rest and c (c - 1) / 2 for one-vs-one. The support
    vectors are the union over them, so that the kernel is computed once for all. Fitted state lives
    in buffers: ``state_dict``, ``to`` and ``deepcopy`` work for any number of support vectors, also
    when loaded into an unfitted module. Beside them the module holds the support vectors less the
    center, which scoring takes; a change of either, in place or not, has them made again. (A
    compiled program sees a change in place only after a call that is not compiled.)

    Args:
        C: Upper bound of the dual variables, > 0: a number, or one per class. One-vs-rest applies
            that of class k to all samples of problem k, one-vs-one to the samples of class k.
        gamma: Kernel width > 0, or as in scikit-learn ``"scale"`` = 1 / (d * variance of the
            features) or ``"auto"`` = 1 / d.
        kernel: None for the RBF of width ``gamma``; a gpytorch kernel, which keeps its own
            hyper-parameters and is evaluated by gpytorch; or ``"precomputed"``: features are then
            kernel values with all training samples, ``(n, n)`` in ``fit``.
        class_weight: One factor > 0 of C per class, as a sequence or a dict (1 where it says
            nothing), by a sample's own class; or ``"balanced"`` = total / (c * count), by weighted
            counts, where each problem of one-vs-rest is balanced by itself: total / (2 * count).
        strategy: ``"one-vs-rest"``, or ``"one-vs-one"`` as in scikit-learn's SVC.
        tol: Largest KKT violation accepted, in score units.
        max_steps: Newton steps and two-variable updates per problem before fitting gives up with a
            warning.

    Attributes:
        support_vectors: ``(m, d)``; ``(m, 0)`` with a precomputed kernel.
        support: Their indices among the training samples, int64 ``(m,)``, ascending; -1 where a
            file of version 0.1 did not say, and for the prototypes of a compressed SVM.
        dual_coef: alpha * y, ``(m, P)``.
        intercept: ``(P,)``.
        center: Mean of the training features, ``(d,)``; distances are measured from it. Zeros
            ``(n,)`` with a precomputed kernel.
        kernel: The gpytorch kernel in use; None with a precomputed one.
        solution: ``Certificate`` of the last fit, one entry per problem, on the CPU; None before it
            and after loading. ``solve_dual`` returns the whole solution.
        degenerate: Samples by which the derivatives of a differentiable fit are one-sided, bool
            ``(n, P)``; None after any other.
    """

    def __init__(
        self,
        C: PerClass = 10.0,
        gamma: float | str = "scale",
        *,
        kernel: Kernel | str | None = None,
        class_weight: ClassWeight | None = None,
        strategy: str = ONE_VS_REST,
        tol: float = 1e-3,
        max_steps: int = 1_000_000,
    ) -> None:
        super().__init__()
        for name, dimensions in _FITTED.items():
            dtype = torch.int64 if name == "support" else None
            self.register_buffer(name, torch.zeros((0,) * dimensions, dtype=dtype))
        self.register_buffer("_centred_vectors", torch.zeros(0, 0), persistent=False)
        self.register_buffer("_squared_norms", torch.zeros(0), persistent=False)
        self._centred_from: tuple[Tensor, Tensor, int, int] | None = None
        if isinstance(kernel, str) and kernel != "precomputed":
            raise ValueError(f'kernel must be None, a kernel or "precomputed", got {kernel!r}')
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy must be one of {STRATEGIES}, got {strategy!r}")
        if not tol > 0.0:
            raise ValueError(f"tol must be > 0, got {tol}")
        self.C, self.gamma = checked_C(C), checked_gamma(gamma)
        self.class_weight, self.strategy = checked_class_weight(class_weight), strategy
        self.tol, self.max_steps = tol, max_steps
        self.is_precomputed = isinstance(kernel, str)
        self.has_own_kernel = isinstance(kernel, Kernel)
        self.kernel: Kernel | None = kernel if isinstance(kernel, Kernel) else None
        if kernel is None:
            self.kernel = RBFKernel().requires_grad_(False)
        self.solution: Certificate | None = None
        self.degenerate: Tensor | None = None

    @property
    def is_fitted(self) -> bool:
        """Whether there is anything to score with."""
        return self.intercept.numel() > 0

    def _require_fit(self) -> None:
        if not self.is_fitted:
            raise NotFittedError("this RBFSVM is not fitted: call fit(features, labels) or load()")

    @property
    def num_classes(self) -> int:
        """Number of classes c; 0 before fitting."""
        problems = self.intercept.numel()
        return problems if self.strategy == ONE_VS_REST else classes_of_pairs(problems)

    @torch.inference_mode(False)  # tensors made there stay without gradients for good
    @torch.no_grad()
    def fit(
        self,
        features: ArrayLike | ShardedFeatures,
        labels: ArrayLike,
        *,
        sample_weight: ArrayLike | None = None,
        num_classes: int | None = None,
        distances: ArrayLike | None = None,
        initial: ArrayLike | None = None,
        memory_limit: int | None = None,
        differentiable: bool = False,
    ) -> "RBFSVM":
        """Solve the binary problems and keep the support vectors.

        Arrays of numpy and lists of numbers do as well as tensors; integers are features too then.

        Args:
            features: Training features, ``(n, d)``, float32 or float64: the module takes their
                dtype and device. With a precomputed kernel its symmetric matrix, ``(n, n)``. Or
                ``ShardedFeatures``, of which each of several processes has some rows: all call this
                together, with the labels of all rows, and get the same machine.
            labels: Labels 0..c-1, ``(n,)`` int64, every class present.
            sample_weight: Factor >= 0 of C per sample, ``(n,)``. A sample of weight 0 is as good as
                removed, also from ``center``, ``gamma="scale"`` and the classes present; that
                variance heeds no other weight, as in scikit-learn.
            num_classes: c; default: largest label + 1.
            distances: Squared distances between all features, ``(n, n)``, if they are at hand; of
                shared features those to this process's rows, ``(n, k)``.
            initial: b = alpha * y to start from, ``(n, P)``; it need not be feasible.
            memory_limit: Bytes that the fit may take beyond its inputs, in each process; default
                4 GiB. Kernel rows are evaluated on demand; those that do not fit are evaluated
                again.
            differentiable: Whether to keep the graph: scores of any inputs have exact gradients by
                these features and weights then, see ``implicit_solution``, whose tolerance and
                float64 it takes in the place of ``tol``, ``distances``, ``initial`` and
                ``memory_limit``. For those by C and gamma see ``svm_scores``. torch copies no
                module with a graph: fit again without before ``deepcopy``.

        Returns:
            The module itself.

        Raises:
            ValueError: If an argument is not as said above; or if a fit with a graph has sharded
                features or a kernel that is not the RBF of width ``gamma``.
            TypeError: If one holds anything but numbers.

        Warns:
            ConvergenceWarning: Naming the problems that missed ``tol``.
        """
        features = ShardedFeatures.of(checked_features(features))
        labels = as_labels("labels", labels, features.local.device)
        c = check_labels(labels, len(features), num_classes)
        if differentiable:
            return self._fit_with_graph(features, labels.long(), sample_weight, c)
        if distances is not None:
            distances = as_features("distances", distances, features.local)
        features = replace(features, local=features.local.detach())
        data = select_training_data(
            features, labels.long(), c, sample_weight, distances, self.is_precomputed
        )
        kernel, like = self.kernel, features.local  # no kernel where it is precomputed
        if kernel is not None and self.has_own_kernel:
            kernel = kernel.to(like)
        elif kernel is not None:
            kernel = make_rbf_kernel(data.gamma(self.gamma), like=like)
        limits = upper_bounds(data.labels, c, self.strategy, self.C, self.class_weight, data.weight)
        targets = binary_targets(data.labels, c, self.strategy)
        solution = solve_dual(
            data.gram(kernel, targets.shape[1], memory_limit),
            targets,
            limits,
            tol=self.tol,
            max_steps=self.max_steps,
            initial=None if initial is None else as_features("initial", initial)[data.kept],
        )
        self._keep(data, solution.dual_coef, solution.intercept)
        self.kernel, self.degenerate = kernel, None
        self.solution = replace(solution.certificate(), samples=len(features))
        return self

    @torch.enable_grad()
    def _fit_with_graph(
        self, features: ShardedFeatures, labels: Tensor, weight: ArrayLike | None, c: int
    ) -> "RBFSVM":
        """Fit as ``fit`` does, with what is kept as a function of the features and weights."""
        if self.is_precomputed or self.has_own_kernel or features.partition.processes.count > 1:
            raise ValueError(
                "differentiable=True needs the RBF kernel of width gamma, and the features in one "
                "process; fit without it, or call it `with torchdnr.distributed.alone():`"
            )
        data = select_training_data(features, labels, c, weight, None, False)
        gamma = data.differentiable_gamma(self.gamma)
        limits = upper_bounds(data.labels, c, self.strategy, self.C, self.class_weight, data.weight)
        targets = binary_targets(data.labels, c, self.strategy)
        limits = torch.as_tensor(limits, dtype=torch.float64, device=targets.device)
        solution = implicit_solution(data.features.local, targets, limits, gamma)
        self._keep(data, solution.dual_coef, solution.intercept)
        self.kernel = make_rbf_kernel(gamma, like=features.local)
        self.degenerate = targets.new_zeros(len(features), targets.shape[1], dtype=torch.bool)
        self.degenerate[data.kept] = solution.degenerate
        self.solution = replace(solution.certificate, samples=len(features))
        return self

    def _keep(self, data: TrainingData, dual_coef: Tensor, intercept: Tensor) -> None:
        """Keep what scores: samples whose coefficients are not all 0."""
        chosen, like = dual_coef.detach().ne(0).any(dim=1), data.features.local
        self.support_vectors, self.support = data.support_vectors(chosen), data.kept[chosen]
        self.dual_coef, self.intercept = dual_coef[chosen].to(like), intercept.to(like)
        self.center = data.center.detach()

    def forward(self, features: ArrayLike, *, vote: bool = True) -> Tensor:
        """Compute class scores.

        Args:
            features: ``(n, d)``; a tensor is brought to the dtype of the support vectors, an array
                to their device too. With a precomputed kernel its values with all training samples,
                of which those with the support vectors count.
            vote: Whether the pairs of one-vs-one vote, rather than give their decision values.

        Returns:
            Scores, ``(n, c)``: larger is more that class. One-vs-rest: the decision values, which
            tend to the intercept far from all data. One-vs-one: scikit-learn's votes plus squeezed
            confidence (``votes_and_confidence``), where the votes have no gradient; two classes
            have the scores (v, -v) of their one pair.

        Raises:
            NotFittedError: If the module is not fitted.
            ValueError: If the number of features is not that of the training samples.
        """
        self._require_fit()
        features = as_features("features", features, self.dual_coef)
        if features.ndim != 2 or features.shape[1] != self.center.numel():
            raise ValueError(
                f"features must be (n, {self.center.numel()}) as in fit, "
                f"got {tuple(features.shape)}"
            )
        features = features.to(self.dual_coef.dtype)
        if self.kernel is None:
            with full_precision(features.device):
                sums = features[:, self.support] @ self.dual_coef
        elif (gamma := rbf_gamma(self.kernel)) is not None:
            vectors, norms = self._centred()
            inputs = features - self.center
            sums = rbf_scores(inputs, vectors, self.dual_coef, gamma, norms=norms)
        else:
            vectors, coefficients, center = self.support_vectors, self.dual_coef, self.center
            sums = kernel_scores(self.kernel, features, vectors, coefficients, center)
        values = sums + self.intercept
        pairs = vote and self.strategy == ONE_VS_ONE
        return votes_and_confidence(values) if pairs else values

    def pairwise_scores(self, features: Tensor) -> Tensor:
        """Compute the decision values of the pairs of classes, without voting.

        Args:
            features: As in ``forward``.

        Returns:
            Values, ``(n, c (c - 1) / 2)``, in the order 0v1, 0v2, ..., 1v2, ...; > 0 is the first
            class of the pair. (scikit-learn has the other sign where c = 2.)

        Raises:
            ValueError: If the strategy is not ``"one-vs-one"``, or the features do not fit.
        """
        if self.strategy != ONE_VS_ONE:
            raise ValueError(f'pairs need strategy="one-vs-one", this RBFSVM is {self.strategy}')
        return self.forward(features, vote=False)

    def _centred(self) -> tuple[Tensor, Tensor | None]:
        """Return the support vectors less the center and their squared norms, if they are kept."""
        vectors, center = self.support_vectors, self.center
        if vectors.requires_grad or center.requires_grad or torch.compiler.is_exporting():
            return vectors - center, None
        if not torch.compiler.is_compiling():
            if vectors.is_inference() or center.is_inference():  # of which no change can be seen
                return vectors - center, None
            kept = self._centred_from
            if kept is None or kept[0] is not vectors or kept[1] is not center:
                if is_transformed():  # these tensors may end with the transform
                    return vectors - center, None
                self._center_vectors()
            elif kept[2:] != (vectors._version, center._version):
                self._center_vectors()
        return self._centred_vectors, self._squared_norms

    def _center_vectors(self) -> None:
        """Measure the support vectors from the center.

        To do so in each call would take as long as the scores of a few inputs themselves.
        """
        vectors, center = self.support_vectors, self.center
        if vectors.shape[1:] != center.shape:  # a precomputed kernel, or one of the two is to come
            return
        with torch.inference_mode(False), torch.no_grad():
            self._centred_vectors = vectors.detach() - center.detach()
            self._squared_norms = squared_norms(self._centred_vectors)
        if not (vectors.is_inference() or center.is_inference()):
            self._centred_from = vectors, center, vectors._version, center._version

    def __setattr__(self, name: str, value: Any) -> None:  # noqa: ANN401 - any attribute
        """Set an attribute; a compiled program must find the centred vectors as they are now."""
        super().__setattr__(name, value)
        if name in ("support_vectors", "center"):
            self._center_vectors()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert all tensors, as ``to`` does."""
        super()._apply(fn, recurse)
        self._center_vectors()
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: object, **kwargs: object
    ) -> None:
        """Make buffers of the stored sizes before torch copies into them.

        An unfitted module takes the stored dtype, its kernel too; a fitted one keeps its own.
        """
        was_fitted = self.is_fitted
        if prefix + "support" not in state_dict and prefix + "dual_coef" in state_dict:
            rows = len(state_dict[prefix + "dual_coef"])  # of version 0.1, which kept no indices
            state_dict[prefix + "support"] = torch.full((rows,), -1)
        for name in _FITTED:
            stored, current = state_dict.get(prefix + name), getattr(self, name)
            if stored is not None and stored.shape != current.shape:
                dtype = current.dtype if was_fitted else stored.dtype
                device = current.device
                with torch.inference_mode(False):
                    self._buffers[name] = torch.empty_like(stored, dtype=dtype, device=device)
        if not was_fitted and self.kernel is not None:
            self.kernel.to(self.support_vectors.dtype)
        self.solution = None  # it certified what was there before
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._center_vectors()

    @torch.inference_mode(False)
    @torch.no_grad()
    def smoothed(self, factor: float) -> Self:
        """Return a view whose kernel has ``factor`` times the gamma; everything else is shared.

        Far from the support vectors a narrow kernel underflows and its gradient with it; that of a
        wider one shows the way. Nothing is copied but the hyper-parameters of the kernel.

        Args:
            factor: > 0; below 1 for a smoother function.

        Returns:
            The view, to be called as the module is. Do not move it: its tensors are those of the
            module.

        Raises:
            NotFittedError: If the module is not fitted.
            ValueError: If ``factor`` is not > 0, or the kernel has no lengthscale.
        """
        self._require_fit()
        if not 0.0 < factor < torch.inf:
            raise ValueError(f"factor must be > 0 and finite, got {factor}")
        kernel = deepcopy(self.kernel)
        parts = [] if kernel is None else [k for k in kernel.modules() if isinstance(k, Kernel)]
        parts = [part for part in parts if part.has_lengthscale]
        if not parts:
            raise ValueError(
                "smoothed needs a kernel with a lengthscale, got "
                f"{'a precomputed one' if kernel is None else type(kernel).__name__}"
            )
        for part in parts:
            part.lengthscale = part.lengthscale / factor**0.5
        view = copy(self)
        view._buffers = dict(self._buffers)
        view._modules = {**self._modules, "kernel": kernel}
        return view

    def settings(self) -> dict[str, Any]:
        """Return what the constructor needs, as JSON values."""
        lists = {"C": self.C, "class_weight": self.class_weight}
        kernel = type(self.kernel).__name__ if self.has_own_kernel else None
        return {
            **{name: list(v) if isinstance(v, tuple) else v for name, v in lists.items()},
            **{name: getattr(self, name) for name in ("gamma", "strategy", "tol", "max_steps")},
            "kernel": "precomputed" if self.is_precomputed else kernel,
        }

    @classmethod
    def from_sklearn(cls, classifier: "ClassifierMixin") -> "RBFSVM":
        """Convert a fitted classifier of scikit-learn; see ``svm.sklearn.convert``."""
        from torchdnr.svm.sklearn.convert import from_sklearn

        return from_sklearn(cls, classifier)

    def to_sklearn(self) -> "ClassifierMixin":
        """Convert to a fitted classifier of scikit-learn; see ``svm.sklearn.convert``."""
        from torchdnr.svm.sklearn.convert import to_sklearn

        return to_sklearn(self)

    def save(self, path: str | Path) -> None:
        """Save the fitted module to one safetensors file, whole or not at all.

        Args:
            path: File to write.

        Raises:
            NotFittedError: If there is nothing to save.
            OSError: If the file cannot be written; an earlier one stays as it was.
        """
        self._require_fit()
        tensors = {**self.state_dict(), _PROBE: self._probe()}
        save_tensors(path, tensors, self.settings(), kind=_KIND)

    @torch.no_grad()
    def _probe(self) -> Tensor:
        """Evaluate the kernel on a few support vectors: kernels of one type differ in it."""
        few = self.support_vectors[:8]
        if self.kernel is None:
            return few.new_zeros(0)
        return kernel_matrix(self.kernel, few, few, self.center)

    @classmethod
    @torch.inference_mode(False)
    @torch.no_grad()
    def load(cls, path: str | Path, *, kernel: Kernel | None = None) -> Self:
        """Load a module that ``save`` wrote.

        Args:
            path: File to read.
            kernel: A kernel of the type that was fitted, where it was one of gpytorch.

        Returns:
            The fitted module, on the CPU.

        Raises:
            CheckpointError: If the file is damaged, foreign, or was fitted with another kernel.
        """
        tensors, settings = load_tensors(path, kind=_KIND)
        given = type(kernel).__name__ if kernel is not None else None
        fitted = settings.pop("kernel")
        if fitted == "precomputed" and kernel is None:
            kernel = given = fitted
        if fitted != given:
            raise CheckpointError(
                f"{path}: expected kernel={fitted}, as it was fitted, got {given}; pass a kernel "
                "of that type (None for the default RBF and for a precomputed one)"
            )
        if isinstance(weights := settings.get("class_weight"), dict):  # JSON made its keys strings
            settings["class_weight"] = {int(k): weight for k, weight in weights.items()}
        if isinstance(kernel, Kernel):
            kernel = deepcopy(kernel)  # one kernel may be given for several files
        module, probe = cls(**settings, kernel=kernel), tensors.pop(_PROBE, None)
        try:
            module.load_state_dict(tensors)
        except RuntimeError as error:
            raise CheckpointError(
                f"{path}: expected the tensors of an RBFSVM with kernel={fitted}, got others "
                f"({error}); pass a kernel built as the fitted one was"
            ) from error
        if probe is None or not torch.allclose(module._probe(), probe, rtol=1e-4, atol=1e-5):
            raise CheckpointError(
                f"{path}: expected a kernel with the values it was fitted with, got other values; "
                "pass a kernel built as the fitted one was"
            )
        return module
