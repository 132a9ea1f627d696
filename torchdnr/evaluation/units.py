"""The units of work of an evaluation, each one attack on one classifier, dealt to processes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from torchdnr import __version__
from torchdnr.distributed.processes import Processes
from torchdnr.evaluation.checkpoint import Checkpoint
from torchdnr.evaluation.judging import Judged, Task, outputs
from torchdnr.evaluation.known_attacks import Attack
from torchdnr.evaluation.running import AttackRun, run_attack, step_names
from torchdnr.files import digest


@dataclass(frozen=True, eq=False)
class Unit:
    """One attack on one classifier.

    Attributes:
        number: Its place among all units, by which they are dealt to the processes.
        classifier: Name of the classifier.
        name: Name of the attack.
        attack: What is run.
        task: What is attacked.
        clean: The inputs themselves, judged.
        steps: What is done already.
    """

    number: int
    classifier: str
    name: str
    attack: Attack
    task: Task
    clean: Judged
    steps: Checkpoint

    def run(self, eps: list[float], bar: tqdm) -> AttackRun:
        """Run the attack at every eps, or judge what it has found already."""
        bar.set_description(self.classifier)
        return run_attack(self.task, self.name, self.attack, eps, self.clean, self.steps, bar)


def run_units(
    units: Sequence[Unit], eps: list[float], processes: Processes, progress: bool
) -> dict[str, dict[str, AttackRun]]:
    """Run the units of this process, and judge what the others have found.

    Args:
        units: All units, in the same order in every process.
        eps: Perturbation sizes.
        processes: Those that share the work.
        progress: Whether to show a progress bar.

    Returns:
        Runs by classifier and attack.
    """
    own = [unit for unit in units if processes.mine(unit.number)]
    found: dict[int, AttackRun] = {}
    with tqdm(total=len(eps) * len(own), unit="step", disable=not progress) as bar:
        for unit in own:
            found[unit.number] = unit.run(eps, bar)
    processes.wait()
    silent = tqdm(disable=True)
    for unit in units:
        names = step_names(unit.attack, eps)
        unit.steps.share(processes, processes.owner(unit.number), names, unit.task.inputs)
        if unit.number not in found:
            found[unit.number] = unit.run(eps, silent)
    runs: dict[str, dict[str, AttackRun]] = {}
    for unit in units:
        runs.setdefault(unit.classifier, {})[unit.name] = found[unit.number]
    return runs


def fingerprint(
    task: Task, model: Callable[[Tensor], Tensor], init_inputs: Tensor | None
) -> dict[str, Any]:
    """Collect what the points of every attack depend on, as JSON values."""
    tensors = {"inputs": task.inputs, "labels": task.labels}
    if init_inputs is not None:
        tensors["init_inputs"] = init_inputs
    return {
        "tensors": digest(tensors),
        "norm": task.norm,
        "bounds": task.bounds,
        "reject": task.reject,
        "torchdnr": __version__,
        "model": [type(model).__qualname__, digest(model.state_dict())]
        if isinstance(model, nn.Module)
        else None,
    }


def behaviour(task: Task) -> Tensor:
    """Run the model on the inputs and on noise around them, to know it again.

    The noise tells apart models that agree on clean images only, such as one that quantises.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(task.inputs.shape, generator=generator).to(task.inputs)
    noisy = (task.inputs + 0.1 * (task.bounds[1] - task.bounds[0]) * noise).clamp(*task.bounds)
    return outputs(task.model, torch.cat([task.inputs, noisy]), task.batch_size)
