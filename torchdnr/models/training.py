"""Train a classifier; a run that was stopped goes on where it was."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
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
    plain_json,
    save_tensors,
)
from torchdnr.models.adversarial import AdversarialLoss, Adversary
from torchdnr.models.paper import Network
from torchdnr.resources import progress_bar

SCHEDULES = "constant", "one-cycle", "linear"
OPTIMIZERS = "sgd", "adamw"
RISE = {"one-cycle": 0.3, "linear": 0.1}  # share of the steps over which the learning rate rises
SHIFT = 4  # pixels
# Runs with neighbouring seeds must not share the random numbers of neighbouring epochs.
SEED_STRIDE = 1_000_003
KIND = "training checkpoint"
OPTIMIZER_STATE = "momentum_buffer", "step", "exp_avg", "exp_avg_sq"


@dataclass(frozen=True)
class TrainingSettings:
    """How to train: the optimizer, and how long and how fast it goes.

    Attributes:
        epochs: Passes over the data, >= 1.
        lr: Learning rate, > 0.
        momentum: Momentum of the gradient, in [0, 1); the first of the two betas of AdamW.
        batch_size: Images per step, >= 1.
        weight_decay: Factor of the squared norm of the weights, >= 0.
        warmup_epochs: Epochs, >= 0, over which the learning rate rises linearly from 0 to ``lr``.
            Not in the paper: with Table III's lr = 0.1 from the first step, one start in four was
            still at 34 % accuracy after three epochs on 2,400 digits; after one epoch of warm-up
            all were above 91 %.
        schedule: "constant", after the warm-up, or "one-cycle": the learning rate rises linearly
            over the first 30 % of all steps, whatever ``warmup_epochs``, then falls to 0 along a
            cosine. Not in the paper: far fewer epochs reach the same accuracy. Or "linear": it
            rises over the first 10 %, then falls to 0 along a line.
        augment: Whether images are shifted by up to 4 pixels (zeros come in) and mirrored at
            random, as the authors' later code does for CIFAR-10. Not in the paper.
        optimizer: "sgd", stochastic gradient descent with momentum, or "adamw".
        max_gradient_norm: Longer gradients of the whole network are shortened to this l2 norm, > 0;
            None: they are not.
        autocast: Whether the passes of training run in bfloat16 where PyTorch deems that safe.
            Faster on hardware that has it, several times slower on a CPU that does not.
    """

    epochs: int
    lr: float
    momentum: float
    batch_size: int
    weight_decay: float = 0.0
    warmup_epochs: int = 1
    schedule: str = "constant"
    augment: bool = False
    optimizer: str = "sgd"
    max_gradient_norm: float | None = None
    autocast: bool = False

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
            f"optimizer in {OPTIMIZERS}": self.optimizer in OPTIMIZERS,
            "max_gradient_norm > 0 or None": self.max_gradient_norm is None
            or self.max_gradient_norm > 0,
        }
        for rule, holds in ranges.items():
            if not holds:
                raise ValueError(f"expected {rule}, got {self}; change that setting")


# Table III of the paper. Its dropout rates are part of the networks.
MNIST_TRAINING = TrainingSettings(epochs=50, lr=0.1, momentum=0.9, batch_size=128)
CIFAR10_TRAINING = TrainingSettings(epochs=75, lr=0.01, momentum=0.9, batch_size=100)
ADVERSARIAL_TRAINING = TrainingSettings(
    epochs=4,
    lr=2e-3,
    momentum=0.9,
    batch_size=128,
    schedule="linear",
    optimizer="adamw",
    max_gradient_norm=5.0,
)
"""How to train against an ``Adversary``: from a trained network, 4 epochs of 50,000 digits."""

BatchLoss = Callable[[Tensor, Tensor, float], tuple[Tensor, dict[str, Tensor]]]
"""Makes the loss to descend, and means of the batch to show by name, of images, labels and the
share of the training that is done."""
# Measurements of an adversary's attack in a training, and images trained on per measurement at the
# least: one takes as long as training on some 2,000.
MEASUREMENTS, IMAGES_PER_MEASUREMENT = 4, 15_000


def train_network(
    net: Network,
    images: Tensor,
    labels: Tensor,
    settings: TrainingSettings,
    *,
    adversary: Adversary | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> Network:
    """Train a network in place, on the images or against attacks on them.

    With ``checkpoint`` the state is saved after every epoch. A run that was stopped at any moment,
    started again with the same arguments and the same starting weights (seed before building
    ``net``), goes on after the last full epoch. Each epoch seeds its random numbers anew, so the
    final weights are those of a run that was never stopped: bit for bit on a CPU with the same
    number of threads, on a GPU as far as its convolutions are deterministic. A damaged checkpoint
    is moved aside with a warning and training starts again; one of another run is never touched.

    Args:
        net: The network: images to logits ``(n, c)``; ``(n, c + 1)``, with the class that rejects
            last, for the loss "class" of an adversary. Against an adversary start from weights that
            were trained without.
        images: Training images ``(n, ...)``, float, on any device; in [0, 1] for an adversary.
        labels: Their classes ``(n,)``, int64, 0..c-1.
        settings: Epochs, learning rate and so on; ``ADVERSARIAL_TRAINING`` with an adversary.
        adversary: What to train against; None: nothing, on the cross-entropy. Of 320 images or more
            32 are then held out: on them its attack is measured, see ``Adversary``.
        seed: Fixes the order of the images, the dropout, and the starts of the adversary.
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

    Warns:
        WeakAttackWarning: If the adversary misses much of what a stronger attack finds.
    """
    check_data(images, labels)
    net.to(next(net.parameters()).device if device is None else torch.device(device))
    groups = [{"params": list(net.parameters())}]
    options: Any = {"seed": seed, "checkpoint": checkpoint, "progress": progress}
    if adversary is None:
        train(net, groups, CrossEntropy(net), images, labels, settings, **options)
    else:
        train_against(net, groups, adversary, images, labels, settings, **options)
    return net.eval()


class CrossEntropy:
    """The cross-entropy of a network's logits on the images themselves."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def __call__(
        self, inputs: Tensor, targets: Tensor, share: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss, and the accuracy."""
        logits = class_scores(self.net(inputs))
        loss = nn.functional.cross_entropy(logits, targets)
        return loss, {"accuracy": (logits.argmax(1) == targets).float().mean()}


def train_against(
    net: nn.Module,
    groups: list[dict[str, Any]],
    adversary: Adversary,
    images: Tensor,
    labels: Tensor,
    settings: TrainingSettings,
    **options: Any,  # noqa: ANN401 - seed, checkpoint, progress and against of ``train``
) -> None:
    """Train against an adversary in place, on all images but those held out; see ``train``."""
    loss = AdversarialLoss(net, adversary, images, labels)
    against = {"adversary": asdict(adversary), **options.pop("against", {})}
    options |= {"measure": loss.measure, "against": against}
    train(net, groups, loss, images, labels, settings, rows=loss.rows, **options)


def train(
    net: nn.Module,
    groups: list[dict[str, Any]],
    batch_loss: BatchLoss,
    images: Tensor,
    labels: Tensor,
    settings: TrainingSettings,
    *,
    seed: int,
    checkpoint: str | Path | None,
    progress: bool,
    rows: Tensor | None = None,
    measure: Callable[[], dict[str, float]] | None = None,
    against: Mapping[str, Any] | None = None,
) -> None:
    """Descend a loss in place; see ``train_network``, whose loop this is, for the arguments.

    ``net`` is left in training mode. ``groups`` are those of its parameters, as the optimizer takes
    them: "params", and "lr", relative to that of the settings, where it is not 1. ``rows`` are
    indices of the images to train on; None: all. ``measure`` is called up to four times, the last
    time at the end. ``against`` is what else decides the outcome, as JSON values.
    """
    device = next(net.parameters()).device
    run: dict[str, Any] = {}
    if checkpoint:
        check_tensors(net.state_dict(), "the network")
        run = describe_run(net, images, labels, asdict(settings), seed)
        run |= plain_json(against or {})
    optimizer, rates = _optimizer(groups, settings)
    done = resume(net, optimizer, Path(checkpoint), run) if checkpoint else 0
    rows = torch.arange(len(images)) if rows is None else rows
    steps = math.ceil(len(rows) / settings.batch_size)
    total = settings.epochs * steps
    measurements = min(MEASUREMENTS, settings.epochs * len(rows) // IMAGES_PER_MEASUREMENT)
    every = math.ceil(settings.epochs / max(1, measurements))
    net.train()
    with progress_bar(progress, total=total, initial=done * steps, unit="batch") as bar:
        for epoch in range(done, settings.epochs):
            bar.set_description(f"epoch {epoch + 1}/{settings.epochs}")
            with _random_numbers(seed * SEED_STRIDE + epoch, device):
                shown = _train_epoch(
                    net, optimizer, rates, batch_loss, images, labels, rows, settings, epoch, bar
                )
                if measure and (settings.epochs - epoch - 1) % every == 0:
                    shown |= measure()
            if not math.isfinite(shown["loss"]):
                raise FloatingPointError(
                    f"the loss must stay finite, got {shown['loss']} in epoch {epoch + 1}; "
                    f"lower the learning rate (lr = {settings.lr:g})"
                )
            bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()})
            if checkpoint:
                save_state(net, optimizer, Path(checkpoint), run, epoch + 1)


def _optimizer(
    groups: list[dict[str, Any]], settings: TrainingSettings
) -> tuple[torch.optim.Optimizer, list[float]]:
    """Build the optimizer; return its groups' learning rates relative to the settings too."""
    rates = [group.get("lr", 1.0) for group in groups]
    groups = [
        {**group, "lr": rate * settings.lr} for group, rate in zip(groups, rates, strict=True)
    ]
    decay = settings.weight_decay
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=settings.momentum, weight_decay=decay), rates
    return torch.optim.AdamW(groups, betas=(settings.momentum, 0.999), weight_decay=decay), rates


def _train_epoch(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    rates: list[float],
    batch_loss: BatchLoss,
    images: Tensor,
    labels: Tensor,
    rows: Tensor,
    settings: TrainingSettings,
    epoch: int,
    bar: tqdm,
) -> dict[str, float]:
    """Run one epoch; return the means over its batches, each while it was trained on."""
    device = next(net.parameters()).device
    sums: dict[str, Tensor] = {}
    order = rows[torch.randperm(len(rows))]
    # Sent once to where the data are: to send the indices of a batch would make every step wait.
    of_images, of_labels = (
        order.to(data.device).split(settings.batch_size) for data in (images, labels)
    )
    total = settings.epochs * len(of_images)
    for index in range(len(of_images)):
        step = epoch * len(of_images) + index
        relative = relative_learning_rate(
            settings.schedule,
            step + 1,
            warmup=settings.warmup_epochs * len(of_images),
            total=total,
        )
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = settings.lr * rate * relative
        inputs = images[of_images[index]].to(device)
        if settings.augment:
            inputs = shift_and_mirror(inputs)
        targets = labels[of_labels[index]].to(device)
        with torch.autocast(device.type, torch.bfloat16) if settings.autocast else nullcontext():
            loss, shown = batch_loss(inputs, targets, step / total)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if settings.max_gradient_norm is not None:
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(trained, settings.max_gradient_norm)
        optimizer.step()
        # Summed on the device: reading them here would make every step wait.
        for name, value in {"loss": loss.detach(), **shown}.items():
            sums[name] = sums.get(name, 0) + value * len(inputs)
        bar.update()
    return {name: value.item() / len(rows) for name, value in sums.items()}


def relative_learning_rate(schedule: str, step: int, *, warmup: int, total: int) -> float:
    """Compute the learning rate of a step >= 1, relative to the largest; see ``TrainingSettings``.

    Source: Smith, Topin, "Super-convergence: very fast training of neural networks using large
    learning rates", 2018, for the cycle; its fall is a cosine here.
    """
    if schedule == "constant":
        return min(1.0, step / max(1, warmup))
    rise = max(1, round(RISE[schedule] * total))
    if step <= rise:
        return step / rise
    if schedule == "linear":
        return (total + 1 - step) / max(1, total - rise)
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


def check_data(images: Tensor, labels: Tensor) -> None:
    """Refuse images and labels that do not fit together: ValueError."""
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
    """Save weights and the optimizer's state after an epoch, with the run they belong to."""
    tensors = {f"net.{name}": tensor for name, tensor in net.state_dict().items()}
    for name, parameter in net.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is not None:  # as is that of SGD with momentum 0
                tensors[f"optimizer.{key}.{name}"] = value
    save_tensors(checkpoint, tensors, {"run": run, "epochs_done": epochs_done}, kind=KIND)


def resume(
    net: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Path, run: dict[str, Any]
) -> int:
    """Load weights and the optimizer's state in place; return how many epochs are done."""
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
        for key in OPTIMIZER_STATE:
            if (value := tensors.get(f"optimizer.{key}.{name}")) is not None:
                # The number of steps stays where the optimizer looks at it, on the CPU.
                optimizer.state[parameter][key] = (
                    value if key == "step" else value.to(parameter.device)
                )
    return metadata["epochs_done"]
