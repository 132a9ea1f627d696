"""Train a classifier; a run that was stopped goes on where it was."""

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from torchdnr.decisions import class_scores
from torchdnr.files import (
    CheckpointError,
    DamagedFileError,
    check_tensors,
    digest,
    load_tensors,
    save_tensors,
)
from torchdnr.models.paper import Network
from torchdnr.resources import progress_bar

SCHEDULES = "constant", "one-cycle"
RISE = 0.3  # share of the steps over which "one-cycle" rises
SHIFT = 4  # pixels
# Runs with neighbouring seeds must not share the random numbers of neighbouring epochs.
SEED_STRIDE = 1_000_003
KIND = "training checkpoint"


@dataclass(frozen=True)
class TrainingSettings:
    """How to train: stochastic gradient descent with momentum on the cross-entropy.

    Attributes:
        epochs: Passes over the data, >= 1.
        lr: Learning rate, > 0.
        momentum: Momentum of the gradient, in [0, 1).
        batch_size: Images per step, >= 1.
        weight_decay: Factor of the squared norm of the weights, >= 0.
        warmup_epochs: Epochs, >= 0, over which the learning rate rises linearly from 0 to ``lr``.
            Not in the paper: with Table III's lr = 0.1 from the first step, one start in four was
            still at 34 % accuracy after three epochs on 2,400 digits; after one epoch of warm-up
            all were above 91 %.
        schedule: "constant", after the warm-up, or "one-cycle": the learning rate rises linearly
            over the first 30 % of all steps, whatever ``warmup_epochs``, then falls to 0 along a
            cosine. Not in the paper: far fewer epochs reach the same accuracy.
        augment: Whether images are shifted by up to 4 pixels (zeros come in) and mirrored at
            random, as the authors' later code does for CIFAR-10. Not in the paper.
    """

    epochs: int
    lr: float
    momentum: float
    batch_size: int
    weight_decay: float = 0.0
    warmup_epochs: int = 1
    schedule: str = "constant"
    augment: bool = False

    def __post_init__(self) -> None:
        """Check the ranges."""
        ranges = {
            "epochs >= 1": self.epochs >= 1,
            "lr > 0": 0 < self.lr < math.inf,
            "0 <= momentum < 1": 0 <= self.momentum < 1,
            "batch_size >= 1": self.batch_size >= 1,
            "weight_decay >= 0": 0 <= self.weight_decay < math.inf,
            "warmup_epochs >= 0": self.warmup_epochs >= 0,
            f"schedule in {SCHEDULES}": self.schedule in SCHEDULES,
        }
        for rule, holds in ranges.items():
            if not holds:
                raise ValueError(f"expected {rule}, got {self}; change that setting")


# Table III of the paper. Its dropout rates are part of the networks.
MNIST_TRAINING = TrainingSettings(epochs=50, lr=0.1, momentum=0.9, batch_size=128)
CIFAR10_TRAINING = TrainingSettings(epochs=75, lr=0.01, momentum=0.9, batch_size=100)


def train_network(
    net: Network,
    images: Tensor,
    labels: Tensor,
    settings: TrainingSettings,
    *,
    seed: int = 0,
    device: str | torch.device | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> Network:
    """Train a network in place.

    With ``checkpoint`` the state is saved after every epoch. A run that was stopped at any moment,
    started again with the same arguments and the same starting weights (seed before building
    ``net``), goes on after the last full epoch. Each epoch seeds its random numbers anew, so the
    final weights are those of a run that was never stopped: bit for bit on a CPU with the same
    number of threads, on a GPU as far as its convolutions are deterministic. A damaged checkpoint
    is moved aside with a warning and training starts again; one of another run is never touched.

    Args:
        net: The network: images to logits ``(n, c)``.
        images: Training images ``(n, ...)``, float, on any device.
        labels: Their classes ``(n,)``, int64, 0..c-1.
        settings: Epochs, learning rate and so on.
        seed: Fixes the order of the images and the dropout.
        device: Where to train; default: where ``net`` is.
        checkpoint: The file that makes a stopped run go on; default: none.
        progress: Whether to show a progress bar with epoch, loss and accuracy.

    Returns:
        ``net``, on ``device``, in evaluation mode.

    Raises:
        CheckpointError: If ``checkpoint`` belongs to another run.
        FloatingPointError: If the loss is not finite after an epoch.
        OSError: If the checkpoint cannot be written.
        TypeError: If the network's state dict holds what a checkpoint cannot.
        ValueError: If ``images`` and ``labels`` do not fit together.
    """
    _check_data(images, labels)
    device = next(net.parameters()).device if device is None else torch.device(device)
    if checkpoint:
        check_tensors(net.state_dict(), "the network")
    run = describe_run(net, images, labels, asdict(settings), seed) if checkpoint else {}
    net.to(device)
    optimizer = torch.optim.SGD(
        net.parameters(),
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )
    done = resume(net, optimizer, Path(checkpoint), run) if checkpoint else 0
    steps = math.ceil(len(images) / settings.batch_size)
    net.train()
    with progress_bar(
        progress, total=settings.epochs * steps, initial=done * steps, unit="batch"
    ) as bar:
        for epoch in range(done, settings.epochs):
            bar.set_description(f"epoch {epoch + 1}/{settings.epochs}")
            with _random_numbers(seed * SEED_STRIDE + epoch, device):
                loss, accuracy = _train_epoch(net, optimizer, images, labels, settings, epoch, bar)
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the loss must stay finite, got {loss} in epoch {epoch + 1}; "
                    f"lower the learning rate (lr = {settings.lr:g})"
                )
            bar.set_postfix(loss=f"{loss:.4f}", accuracy=f"{accuracy:.2%}")
            if checkpoint:
                save_state(net, optimizer, Path(checkpoint), run, epoch + 1)
    return net.eval()


def _train_epoch(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    settings: TrainingSettings,
    epoch: int,
    bar: tqdm,
) -> tuple[float, float]:
    """Run one epoch; return mean loss and accuracy of the batches while they were trained on."""
    device = next(net.parameters()).device
    total_loss = torch.zeros((), device=device)
    correct = torch.zeros((), device=device, dtype=torch.int64)
    batches = torch.randperm(len(images)).split(settings.batch_size)
    for index, rows in enumerate(batches):
        step = epoch * len(batches) + index + 1
        optimizer.param_groups[0]["lr"] = settings.lr * relative_learning_rate(
            settings.schedule,
            step,
            warmup=settings.warmup_epochs * len(batches),
            total=settings.epochs * len(batches),
        )
        inputs = images[rows.to(images.device)].to(device)
        if settings.augment:
            inputs = shift_and_mirror(inputs)
        targets = labels[rows.to(labels.device)].to(device)
        logits = class_scores(net(inputs))
        loss = nn.functional.cross_entropy(logits, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        # Summed on the device: reading them here would make every step wait.
        total_loss += loss.detach() * len(rows)
        correct += (logits.argmax(1) == targets).sum()
        bar.update()
    return total_loss.item() / len(images), correct.item() / len(images)


def relative_learning_rate(schedule: str, step: int, *, warmup: int, total: int) -> float:
    """Compute the learning rate of a step >= 1, relative to the largest; see ``TrainingSettings``.

    Source: Smith, Topin, "Super-convergence: very fast training of neural networks using large
    learning rates", 2018, for the cycle; its fall is a cosine here.
    """
    if schedule == "constant":
        return min(1.0, step / max(1, warmup))
    rise = max(1, round(RISE * total))
    if step <= rise:
        return step / rise
    return (1 + math.cos(math.pi * (step - rise) / max(1, total - rise))) / 2


def shift_and_mirror(images: Tensor) -> Tensor:
    """Shift images ``(n, channels, height, width)`` by up to 4 pixels, and mirror at random.

    Zeros come in at the borders. The random numbers are those of the CPU's global generator.

    Source: the usual augmentation of CIFAR-10, as in He et al., "Deep residual learning for image
    recognition", 2016, Sec. 4.2.
    """
    n, channels, height, width = images.shape
    shifts = torch.randint(0, 2 * SHIFT + 1, (2, n, 1))
    rows = torch.arange(height) + shifts[0]
    columns = torch.arange(width) + shifts[1]
    mirrored = torch.rand(n, 1) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    rows, columns = rows.to(images.device), columns.to(images.device)
    padded = nn.functional.pad(images, (SHIFT,) * 4)
    each = torch.arange(n, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[None, :, None, None]
    return padded[each, channel, rows[:, None, :, None], columns[:, None, None, :]]


def _check_data(images: Tensor, labels: Tensor) -> None:
    if labels.dim() != 1 or labels.dtype != torch.int64 or len(labels) != len(images):
        raise ValueError(
            f"labels must be int64 ({len(images)},), one per image, got {labels.dtype} "
            f"{tuple(labels.shape)}; pass the class number of each image"
        )
    if len(images) == 0 or not images.is_floating_point():
        raise ValueError(
            f"images must be float (n, ...) with n >= 1, got {images.dtype} {tuple(images.shape)}; "
            "scale uint8 images to [0, 1] by dividing by 255"
        )


@contextmanager
def _random_numbers(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global generators that shuffling and dropout draw from; restore them afterwards."""
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        torch.default_generator.manual_seed(seed)
        if on_gpu:  # this GPU only: torch.manual_seed would reseed the others for good
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        with _other_random_numbers(seed, device):
            yield


@contextmanager
def _other_random_numbers(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the generator of a device that is neither a CPU nor a GPU of CUDA, if it has one."""
    module = torch.get_device_module(device)
    if device.type in ("cpu", "cuda") or not hasattr(module, "get_rng_state"):
        yield
        return
    state = module.get_rng_state()
    module.manual_seed(seed)
    try:
        yield
    finally:
        module.set_rng_state(state)


def describe_run(
    net: nn.Module, images: Tensor, labels: Tensor, settings: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    """Describe all that decides the final weights: a checkpoint is of use to no other run."""
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
    """Load weights and momentum in place; return the number of epochs that are done."""
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
