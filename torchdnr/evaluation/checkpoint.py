"""Finished steps of the attacks on disk, and how a later run recognises them."""

import json
import os
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchdnr.evaluation.judging import Task, outputs
from torchdnr.files import CheckpointError, digest, load_tensors, save_tensors

KIND = "torchdnr security evaluation"
CLEAN_OUTPUT = "clean output"  # no step has this name


class Step(NamedTuple):
    """What an attack, at one eps if it runs at every eps, has found, and what that cost.

    The cost are seconds, forwards, backwards, violations, and of an attack below the norms found
    how many samples it ``tried``, and on how many it came ``nearer``.
    """

    points: Tensor  # on the CPU, (n, ...)
    cost: dict[str, float]


class Checkpoint:
    """Steps of the attacks that are finished, in memory and, given a path, in a file.

    Opening it reads the steps of an earlier run with the same ``fingerprint`` (JSON values) and the
    same model, which is recognised by its output, up to rounding. Any other file there is moved
    aside with a warning, and the attacks start again. A file that cannot be written is an OSError
    at once, not after the first step. What else a step depends on is part of its name.
    """

    def __init__(
        self, path: str | Path | None, fingerprint: Mapping[str, Any], output: Tensor
    ) -> None:
        self.path = None if path is None else Path(path)
        self.fingerprint = json.dumps(fingerprint, sort_keys=True, default=str)
        self.output = output.cpu()
        self.steps: dict[str, Step] = {}
        if self.path is not None:
            problem = self._read(self.path) if self.path.exists() else None
            if problem:
                aside = self.path.with_name(self.path.name + ".unused")
                os.replace(self.path, aside)
                warnings.warn(
                    f"{self.path} does not belong to this evaluation ({problem}): "
                    f"moved to {aside.name}, starting again",
                    stacklevel=6,
                )
            self._write()

    def add(self, name: str, step: Step) -> None:
        """Keep a finished step, and write the file."""
        self.steps[name] = step
        self._write()

    def _write(self) -> None:
        if self.path is None:
            return
        points = {name: step.points for name, step in self.steps.items()}
        costs = {name: step.cost for name, step in self.steps.items()}
        metadata = {"fingerprint": self.fingerprint, "costs": costs}
        save_tensors(self.path, {CLEAN_OUTPUT: self.output, **points}, metadata, KIND)

    def _read(self, path: Path) -> str | None:
        """Read the file, or return why it cannot be used."""
        try:
            tensors, metadata = load_tensors(path, KIND)
            output = tensors.pop(CLEAN_OUTPUT)
            costs = metadata["costs"]
            if metadata["fingerprint"] != self.fingerprint:
                return "other inputs or settings"
            steps = {name: Step(tensors.pop(name), cost) for name, cost in costs.items()}
            if tensors:
                return "its steps and costs disagree"
        except (CheckpointError, OSError, KeyError, TypeError, AttributeError) as error:
            return f"unreadable: {error}"
        # a tolerance, as another thread count or batch size rounds differently
        tolerance = 1e-5 * self.output.abs().max().item()
        if output.shape != self.output.shape or not torch.allclose(
            output.double(), self.output.double(), rtol=0, atol=tolerance
        ):
            return "another model"
        self.steps = steps
        return None


def share_path(path: str | Path | None, number: int, count: int) -> Path | None:
    """Name the checkpoint of one share: ``dnr.safetensors`` becomes ``dnr-2-of-4.safetensors``.

    A file each: several processes write at the same time.
    """
    if path is None:
        return None
    path = Path(path)
    return path.with_name(f"{path.stem}-{number + 1}-of-{count}{path.suffix}")


def fingerprint(task: Task, model: object) -> dict[str, Any]:
    """Collect what the points of every attack depend on, as JSON values.

    ``model`` is what identifies the model, as far as can be said.
    """
    given = task.given(torch.arange(len(task.inputs), device=task.inputs.device))
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    return {
        **{name: value for name, value in given.items() if name not in tensors},
        "tensors": digest({"inputs": task.inputs, "labels": task.labels, **tensors}),
        "norm": task.norm,
        "bounds": task.bounds,
        "reject": task.reject,
        "torchdnr": version("torchdnr"),
        "model": model,
    }


def identity(model: Callable[[Tensor], Tensor]) -> list[str] | None:
    """Return the class of a module and a digest of its weights; None for any other function."""
    if not isinstance(model, nn.Module):
        return None
    return [type(model).__qualname__, digest(model.state_dict())]


def behaviour(task: Task) -> Tensor:
    """Run the model on the inputs and on noise around them, to recognise it.

    The noise tells apart models that agree on clean images only, such as one that quantises.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(task.inputs.shape, generator=generator).to(task.inputs)
    noisy = (task.inputs + 0.1 * (task.bounds[1] - task.bounds[0]) * noise).clamp(*task.bounds)
    return outputs(task.model, torch.cat([task.inputs, noisy]), task.batch_size)
