"""Train a classifier; a run that was stopped goes on where it was."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from torchdnr.augmentation import shift_and_mirror
from torchdnr.learning_rate import SCHEDULES, relative_learning_rate
from torchdnr.training_checkpoint import describe_run, resume, save_state

# Runs with neighbouring seeds must not share the random numbers of neighbouring epochs.
SEED_STRIDE = 1_000_003

Network = TypeVar("Network", bound=nn.Module)


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
    ``net``), goes on after the last full epoch. Each epoch has random numbers of its own, so the
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
        ValueError: If ``images`` and ``labels`` do not fit together.
    """
    _check_data(images, labels)
    device = next(net.parameters()).device if device is None else torch.device(device)
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
    with tqdm(
        total=settings.epochs * steps, initial=done * steps, disable=not progress, unit="batch"
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
    """Run one epoch; mean loss and accuracy of the batches as they were trained on."""
    device = next(net.parameters()).device
    total_loss = torch.zeros((), device=device)
    correct = torch.zeros((), device=device, dtype=torch.int64)
    batches = torch.randperm(len(images)).split(settings.batch_size)
    for index, chosen in enumerate(batches):
        step = epoch * len(batches) + index + 1
        optimizer.param_groups[0]["lr"] = settings.lr * relative_learning_rate(
            settings.schedule,
            step,
            warmup=settings.warmup_epochs * len(batches),
            total=settings.epochs * len(batches),
        )
        inputs = images[chosen.to(images.device)].to(device)
        if settings.augment:
            inputs = shift_and_mirror(inputs)
        targets = labels[chosen.to(labels.device)].to(device)
        logits = net(inputs)
        loss = nn.functional.cross_entropy(logits, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        # Summed on the device: reading them here would make every step wait.
        total_loss += loss.detach() * len(chosen)
        correct += (logits.argmax(1) == targets).sum()
        bar.update()
    return total_loss.item() / len(images), correct.item() / len(images)


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
        yield
