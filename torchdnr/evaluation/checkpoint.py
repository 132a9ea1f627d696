"""Finished steps of an evaluation on disk, so that a stopped one goes on where it was."""

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchdnr.files import CheckpointError, load_tensors, save_tensors

KIND = "torchdnr security evaluation"
CLEAN_OUTPUT = "clean output"  # no step has this name


class Checkpoint:
    """Points and costs of the finished steps, in memory and, given a path, in a file.

    Opening it reads the steps of an earlier run with the same settings and the same model. The
    model is recognised by its output, up to rounding. Any other file there is
    moved aside with a warning, and the evaluation starts again.

    Args:
        path: File of the checkpoint, or None to keep the steps in memory only.
        fingerprint: Everything besides the model that the points depend on; JSON values.
        output: Output of the model by which it is known again, ``(m, c)`` or ``(m, c + 1)``.

    Raises:
        OSError: If the file cannot be written: at once, not after the first attack.
    """

    def __init__(
        self, path: str | Path | None, fingerprint: Mapping[str, Any], output: Tensor
    ) -> None:
        self.path = None if path is None else Path(path)
        self.fingerprint = json.dumps(fingerprint, sort_keys=True, default=str)
        self.output = output.cpu()
        self.points: dict[str, Tensor] = {}
        self.costs: dict[str, dict[str, float]] = {}
        if self.path is not None:
            problem = self._read() if self.path.exists() else None
            if problem:
                aside = self.path.with_name(self.path.name + ".unused")
                os.replace(self.path, aside)
                warnings.warn(
                    f"{self.path} does not belong to this evaluation ({problem}): "
                    f"moved to {aside.name}, starting again",
                    stacklevel=3,
                )
            self._write()

    def add(self, step: str, points: Tensor, cost: dict[str, float]) -> None:
        """Keep the points and the cost of a finished step, and write the file."""
        self.points[step] = points.cpu()
        self.costs[step] = cost
        self._write()

    def _write(self) -> None:
        if self.path is None:
            return
        metadata = {"fingerprint": self.fingerprint, "costs": self.costs}
        save_tensors(self.path, {CLEAN_OUTPUT: self.output, **self.points}, metadata, KIND)

    def _read(self) -> str | None:
        """Read the file, or tell why it cannot be used."""
        try:
            tensors, metadata = load_tensors(self.path, KIND)
            output = tensors.pop(CLEAN_OUTPUT)
            costs = metadata["costs"]
            if metadata["fingerprint"] != self.fingerprint:
                return "other inputs, eps, attacks or settings"
            if costs.keys() != tensors.keys():
                return "its steps and costs disagree"
        except (CheckpointError, OSError, KeyError, TypeError, AttributeError) as error:
            return f"unreadable: {error}"
        # a tolerance, as another thread count or batch size rounds differently
        tolerance = 1e-5 * self.output.abs().max().item()
        if output.shape != self.output.shape or not torch.allclose(
            output.double(), self.output.double(), rtol=0, atol=tolerance
        ):
            return "another model"
        self.points, self.costs = dict(tensors), dict(costs)
        return None
