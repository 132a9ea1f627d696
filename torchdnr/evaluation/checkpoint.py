"""Finished steps of one attack on disk, and how a later run recognises them."""

import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchdnr.distributed.processes import Processes
from torchdnr.evaluation.judging import Task, outputs
from torchdnr.files import CheckpointError, digest, load_tensors, save_tensors

KIND = "torchdnr security evaluation"
CLEAN_OUTPUT = "clean output"  # no step has this name


class Checkpoint:
    """Points and costs of the finished steps of an attack, in memory and, given a path, in a file.

    Opening it reads the steps of an earlier run with the same settings (``fingerprint``, JSON
    values) and the same model, which is recognised by its output, up to rounding. Any other file
    there is moved aside with a warning, and the attack starts again. A file that cannot be written
    is an OSError at once, not after the first step.
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
            problem = self._read(self.path) if self.path.exists() else None
            if problem:
                aside = self.path.with_name(self.path.name + ".unused")
                os.replace(self.path, aside)
                warnings.warn(
                    f"{self.path} does not belong to this evaluation ({problem}): "
                    f"moved to {aside.name}, starting again",
                    stacklevel=4,
                )
            self._write()

    def add(self, step: str, points: Tensor, cost: dict[str, float]) -> None:
        """Keep the points and the cost of a finished step, and write the file."""
        self.points[step] = points.cpu()
        self.costs[step] = cost
        self._write()

    def share(self, processes: Processes, owner: int, steps: Iterable[str], like: Tensor) -> None:
        """Give all processes, which call this together, the steps that their owner has finished.

        The points have the shape, dtype and device of ``like``.
        """
        here = processes.rank == owner
        for step in steps:
            points = self.points[step].to(like.device) if here else torch.empty_like(like)
            self.points[step] = processes.broadcast(points, owner).cpu()
            cost = processes.broadcast_text(json.dumps(self.costs.get(step)), owner)
            self.costs[step] = json.loads(cost)

    def _write(self) -> None:
        if self.path is None:
            return
        metadata = {"fingerprint": self.fingerprint, "costs": self.costs}
        save_tensors(self.path, {CLEAN_OUTPUT: self.output, **self.points}, metadata, KIND)

    def _read(self, path: Path) -> str | None:
        """Read the file, or return why it cannot be used."""
        try:
            tensors, metadata = load_tensors(path, KIND)
            output = tensors.pop(CLEAN_OUTPUT)
            costs = metadata["costs"]
            if metadata["fingerprint"] != self.fingerprint:
                return "other inputs, eps or settings"
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


def attack_paths(path: str | Path | None, attacks: Iterable[str]) -> dict[str, Path | None]:
    """Name a checkpoint for each attack: ``dnr.safetensors`` becomes ``dnr-boundary-walk...``.

    A file each: attacks can be added to the line-up, and run in different processes, without any of
    them touching what another has finished.
    """
    names = list(attacks)
    if path is None:
        return dict.fromkeys(names)
    path = Path(path)
    slugs = [re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") for name in names]
    if len(set(slugs)) < len(slugs):
        raise ValueError(f"attacks must differ in letters or digits of their names, got {names}")
    return {
        name: path.with_name(f"{path.stem}-{slug}{path.suffix}")
        for name, slug in zip(names, slugs, strict=True)
    }


def fingerprint(
    task: Task, model: Callable[[Tensor], Tensor], init_inputs: Tensor | None
) -> dict[str, Any]:
    """Collect what the points of every attack depend on, as JSON values."""
    tensors = {"inputs": task.inputs, "labels": task.labels}
    if init_inputs is not None:
        tensors["init_inputs"] = init_inputs
    given = {name: value for name, value in task.given(torch.arange(len(task.inputs))).items()}
    tensors |= {name: value for name, value in given.items() if isinstance(value, Tensor)}
    return {
        **{name: value for name, value in given.items() if not isinstance(value, Tensor)},
        "tensors": digest(tensors),
        "norm": task.norm,
        "bounds": task.bounds,
        "reject": task.reject,
        "torchdnr": version("torchdnr"),
        "model": [type(model).__qualname__, digest(model.state_dict())]
        if isinstance(model, nn.Module)
        else None,
    }


def behaviour(task: Task) -> Tensor:
    """Run the model on the inputs and on noise around them, to recognise it.

    The noise tells apart models that agree on clean images only, such as one that quantises.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(task.inputs.shape, generator=generator).to(task.inputs)
    noisy = (task.inputs + 0.1 * (task.bounds[1] - task.bounds[0]) * noise).clamp(*task.bounds)
    return outputs(task.model, torch.cat([task.inputs, noisy]), task.batch_size)
