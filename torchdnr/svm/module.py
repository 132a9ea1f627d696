"""`RBFSVM`: a one-vs-rest kernel SVM as a torch module."""

from pathlib import Path
from typing import Any

import torch
from gpytorch.kernels import Kernel, RBFKernel
from torch import Tensor, nn

from torchdnr.files import CheckpointError, load_tensors, save_tensors
from torchdnr.kernels import (
    kernel_matrix,
    kernel_scores,
    make_rbf_kernel,
    scale_gamma,
    squared_distances,
)
from torchdnr.svm.checks import check_features, check_labels
from torchdnr.svm.dual import DualSolution
from torchdnr.svm.solver import solve_dual

_PROBE = "kernel_probe"


class NotFittedError(RuntimeError):
    """A module was used before it was fitted, or before its threshold was set."""


class RBFSVM(nn.Module):
    """One-vs-rest C-SVC with intercept whose decision values are differentiable in torch.

    The support vectors are the union over the classes, so that the kernel is computed once for
    all of them. Fitted state lives in buffers: ``state_dict``, ``to`` and ``deepcopy`` work for any
    number of support vectors, also when loaded into an unfitted module.

    Args:
        C: Upper bound of the dual variables, > 0.
        gamma: Kernel width > 0, or ``"scale"`` = 1 / (d * variance), as in scikit-learn.
        kernel: A gpytorch kernel to use instead of the RBF of width ``gamma``; it keeps its own
            hyper-parameters, ``gamma`` is ignored, and it is evaluated by gpytorch.
        tol: Largest KKT violation accepted, in score units.
        max_steps: Two-variable updates per class before fitting gives up with a warning.

    Attributes:
        support_vectors: ``(m, d)``.
        dual_coef: alpha * y, ``(m, c)``.
        intercept: ``(c,)``.
        center: Mean of the training features, ``(d,)``; distances are measured from it.
        kernel: The gpytorch kernel in use.
        solution: Certificate of the last fit, one entry per class; None before it and after
            loading.
    """

    _FITTED = ("support_vectors", "dual_coef", "intercept", "center")

    def __init__(
        self,
        C: float = 10.0,
        gamma: float | str = "scale",
        *,
        kernel: Kernel | None = None,
        tol: float = 1e-3,
        max_steps: int = 1_000_000,
    ) -> None:
        super().__init__()
        if not C > 0.0:
            raise ValueError(f"C must be > 0, got {C}")
        if gamma != "scale" and (isinstance(gamma, str) or not gamma > 0.0):
            raise ValueError(f'gamma must be a number > 0 or "scale", got {gamma!r}')
        self.C, self.gamma = float(C), gamma if gamma == "scale" else float(gamma)
        self.tol, self.max_steps = tol, max_steps
        self.has_own_kernel = kernel is not None
        self.kernel = kernel if kernel is not None else RBFKernel().requires_grad_(False)
        for name, shape in zip(self._FITTED, [(0, 0), (0, 0), (0,), (0,)], strict=True):
            self.register_buffer(name, torch.zeros(shape))
        self.solution: DualSolution | None = None

    @property
    def is_fitted(self) -> bool:
        """Whether there is anything to score with."""
        return self.intercept.numel() > 0

    @property
    def num_classes(self) -> int:
        """Number of classes c; 0 before fitting."""
        return self.intercept.numel()

    def fit(
        self,
        features: Tensor,
        labels: Tensor,
        *,
        num_classes: int | None = None,
        distances: Tensor | None = None,
    ) -> "RBFSVM":
        """Solve one dual problem per class and keep the support vectors.

        Args:
            features: Training features, ``(n, d)``, float32 or float64: the module takes their
                dtype and device.
            labels: Labels 0..c-1, ``(n,)`` int64, every class present.
            num_classes: c; default: largest label + 1.
            distances: Squared distances between all features, ``(n, n)``, if they are at hand.

        Returns:
            The module itself.

        Raises:
            ValueError: If features or labels are not as said above.

        Warns:
            ConvergenceWarning: Naming the classes that missed ``tol``.
        """
        check_features(features)
        c = check_labels(labels, len(features), num_classes)
        features = features.detach()
        center = features.mean(dim=0)
        self._prepare_kernel(features)
        gram = self._gram(features, center, distances)
        solution = solve_dual(
            gram, one_vs_rest(labels, c), self.C, tol=self.tol, max_steps=self.max_steps
        )
        support = solution.dual_coef.ne(0).any(dim=1)
        self.support_vectors = features[support].clone()
        self.dual_coef = solution.dual_coef[support].to(features)
        self.intercept = solution.intercept.to(features)
        self.center = center
        self.solution = solution
        return self

    def forward(self, features: Tensor) -> Tensor:
        """Compute decision values.

        Args:
            features: ``(n, d)``; brought to the dtype of the support vectors.

        Returns:
            Scores, ``(n, c)``: larger is more that class; the intercept far from all data.

        Raises:
            NotFittedError: If the module is not fitted.
            ValueError: If the number of features is not that of the support vectors.
        """
        if not self.is_fitted:
            raise NotFittedError("this RBFSVM is not fitted: call fit(features, labels) or load()")
        if features.ndim != 2 or features.shape[1] != self.support_vectors.shape[1]:
            raise ValueError(
                f"features must be (n, {self.support_vectors.shape[1]}) as in fit, "
                f"got {tuple(features.shape)}"
            )
        sums = kernel_scores(
            self.kernel,
            features.to(self.support_vectors.dtype),
            self.support_vectors,
            self.dual_coef,
            self.center,
        )
        return sums + self.intercept

    def _prepare_kernel(self, features: Tensor) -> None:
        if self.has_own_kernel:
            self.kernel = self.kernel.to(features)
            return
        gamma = scale_gamma(features) if self.gamma == "scale" else float(self.gamma)
        self.kernel = make_rbf_kernel(gamma, like=features)

    def _gram(self, features: Tensor, center: Tensor, distances: Tensor | None) -> Tensor:
        """Evaluate the Gram matrix with the very kernel that will score."""
        with torch.no_grad():
            if self.has_own_kernel:
                return kernel_matrix(self.kernel, features, features, center)
            if distances is None:
                distances = squared_distances(features, features, center)
            return (distances * (-0.5 / self.kernel.lengthscale.square().reshape(()))).exp()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: object, **kwargs: object
    ) -> None:
        """Make room for fitted buffers of any size before torch copies into them.

        An unfitted module takes the stored dtype, its kernel too; a fitted one keeps its own.
        """
        was_fitted = self.is_fitted
        for name in self._FITTED:
            stored, current = state_dict.get(prefix + name), getattr(self, name)
            if stored is not None and stored.shape != current.shape:
                dtype = current.dtype if was_fitted else stored.dtype
                setattr(self, name, torch.empty_like(stored, dtype=dtype, device=current.device))
        if not was_fitted:
            self.kernel.to(self.support_vectors.dtype)
        self.solution = None  # it certified what was there before
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def save(self, path: str | Path) -> None:
        """Save the fitted module to one safetensors file, whole or not at all.

        Args:
            path: File to write.

        Raises:
            NotFittedError: If there is nothing to save.
            OSError: If the file cannot be written; an earlier one stays as it was.
        """
        if not self.is_fitted:
            raise NotFittedError("this RBFSVM is not fitted: call fit(features, labels) first")
        tensors = {**self.state_dict(), _PROBE: self._probe()}
        save_tensors(path, tensors, self.settings(), kind="RBFSVM")

    @torch.no_grad()
    def _probe(self) -> Tensor:
        """Evaluate the kernel on a few support vectors: it tells kernels of one type apart."""
        few = self.support_vectors[:8]
        return kernel_matrix(self.kernel, few, few, self.center)

    def settings(self) -> dict[str, Any]:
        """Return what the constructor needs, as JSON values."""
        kernel = type(self.kernel).__name__ if self.has_own_kernel else None
        return {
            "C": self.C,
            "gamma": self.gamma,
            "tol": self.tol,
            "max_steps": self.max_steps,
            "kernel": kernel,
        }

    @classmethod
    def load(cls, path: str | Path, *, kernel: Kernel | None = None) -> "RBFSVM":
        """Load a module that ``save`` wrote.

        Args:
            path: File to read.
            kernel: A kernel of the type that was fitted, where it was not the default RBF.

        Returns:
            The fitted module, on the CPU.

        Raises:
            CheckpointError: If the file is damaged, foreign, or was fitted with another kernel.
        """
        tensors, settings = load_tensors(path, kind="RBFSVM")
        given = type(kernel).__name__ if kernel is not None else None
        fitted = settings.pop("kernel")
        if fitted != given:
            raise CheckpointError(
                f"{path}: expected kernel={fitted}, as it was fitted, got {given}; pass a kernel "
                "of that type (None for the default RBF)"
            )
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


def one_vs_rest(labels: Tensor, num_classes: int) -> Tensor:
    """Turn labels into one column of -1 and +1 per class.

    Args:
        labels: ``(n,)`` in 0..c-1.
        num_classes: c.

    Returns:
        Targets, float64 ``(n, c)``.
    """
    classes = torch.arange(num_classes, device=labels.device)
    return torch.where(labels.unsqueeze(1) == classes, 1.0, -1.0).double()
