"""The fitted state of an `RBFSVM`: in buffers of any size, in a state dict, in a file."""

from abc import abstractmethod
from pathlib import Path
from typing import Any, Self

import torch
from gpytorch.kernels import Kernel
from torch import Tensor, nn

from torchdnr.files import CheckpointError, load_tensors, save_tensors
from torchdnr.kernels.any_kernel import kernel_matrix

_KIND = "RBFSVM"
_PROBE = "kernel_probe"


class NotFittedError(RuntimeError):
    """A module was used before it was fitted, or before its threshold was set."""


class FittedState(nn.Module):
    """What fitting an ``RBFSVM`` leaves, and how it is saved and loaded.

    ``state_dict``, ``to`` and ``deepcopy`` work for any number of support vectors, also when loaded
    into an unfitted module. The subclass sets ``kernel`` and ``solution``.
    """

    _FITTED = ("support_vectors", "support", "dual_coef", "intercept", "center")

    def __init__(self) -> None:
        super().__init__()
        for name, shape in zip(self._FITTED, [(0, 0), (0,), (0, 0), (0,), (0,)], strict=True):
            dtype = torch.int64 if name == "support" else None
            self.register_buffer(name, torch.zeros(shape, dtype=dtype))

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return what the constructor needs, as JSON values."""

    @property
    def is_fitted(self) -> bool:
        """Whether there is anything to score with."""
        return self.intercept.numel() > 0

    def _require_fit(self) -> None:
        if not self.is_fitted:
            raise NotFittedError("this RBFSVM is not fitted: call fit(features, labels) or load()")

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: object, **kwargs: object
    ) -> None:
        """Make room for fitted buffers of any size before torch copies into them.

        An unfitted module takes the stored dtype, its kernel too; a fitted one keeps its own.
        """
        was_fitted = self.is_fitted
        if prefix + "support" not in state_dict and prefix + "dual_coef" in state_dict:
            rows = len(state_dict[prefix + "dual_coef"])  # of version 0.1, which kept no indices
            state_dict[prefix + "support"] = torch.full((rows,), -1)
        for name in self._FITTED:
            stored, current = state_dict.get(prefix + name), getattr(self, name)
            if stored is not None and stored.shape != current.shape:
                dtype = current.dtype if was_fitted else stored.dtype
                setattr(self, name, torch.empty_like(stored, dtype=dtype, device=current.device))
        if not was_fitted and self.kernel is not None:
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
        self._require_fit()
        tensors = {**self.state_dict(), _PROBE: self._probe()}
        save_tensors(path, tensors, self.settings(), kind=_KIND)

    @torch.no_grad()
    def _probe(self) -> Tensor:
        """Evaluate the kernel on a few support vectors: it tells kernels of one type apart."""
        few = self.support_vectors[:8]
        if self.kernel is None:
            return few.new_zeros(0)
        return kernel_matrix(self.kernel, few, few, self.center)

    @classmethod
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
