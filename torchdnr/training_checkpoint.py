"""The file from which a training that was stopped goes on: weights, momentum, epochs done."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchdnr.files import CheckpointError, DamagedFileError, digest, load_tensors, save_tensors

KIND = "training checkpoint"


def describe_run(
    net: nn.Module, images: Tensor, labels: Tensor, settings: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    """Describe all that decides the final weights; a checkpoint serves exactly this run."""
    return {
        "settings": dict(settings),
        "seed": seed,
        "data": digest({"images": images, "labels": labels}),
        "starting weights": digest(net.state_dict()),
    }


def save_state(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    checkpoint: Path,
    run: dict[str, Any],
    epochs_done: int,
) -> None:
    """Save weights and momentum after an epoch, with the run that they belong to."""
    tensors = {f"net.{name}": tensor for name, tensor in net.state_dict().items()}
    for name, parameter in net.named_parameters():
        momentum = optimizer.state.get(parameter, {}).get("momentum_buffer")
        if momentum is not None:  # none with momentum 0, nor for a frozen parameter
            tensors[f"momentum.{name}"] = momentum
    save_tensors(checkpoint, tensors, {"run": run, "epochs_done": epochs_done}, kind=KIND)


def resume(
    net: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Path, run: dict[str, Any]
) -> int:
    """Load weights and momentum in place; the epochs that they have behind them, 0 if none."""
    try:
        tensors, metadata = load_tensors(checkpoint, kind=KIND)
    except FileNotFoundError:
        return 0
    except DamagedFileError as error:
        aside = checkpoint.with_name(f"{checkpoint.name}.damaged")
        checkpoint.replace(aside)
        warnings.warn(f"training starts again; moved to {aside}: {error}", stacklevel=3)
        return 0
    differ = [name for name, value in run.items() if metadata["run"].get(name) != value]
    if differ:
        raise CheckpointError(
            f"{checkpoint}: expected a checkpoint of this run, got one with other "
            f"{', '.join(differ)}; repeat that run (seed before building the network), choose "
            "another path, or delete the file"
        )
    net.load_state_dict(
        {
            name.removeprefix("net."): tensor
            for name, tensor in tensors.items()
            if name.startswith("net.")
        }
    )
    for name, parameter in net.named_parameters():
        if f"momentum.{name}" in tensors:
            momentum = tensors[f"momentum.{name}"].to(parameter.device)
            optimizer.state[parameter]["momentum_buffer"] = momentum
    return metadata["epochs_done"]
