"""Settle what a run folder is made with: given options, those of an earlier call, defaults."""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchdnr.cli.console import Console
from torchdnr.cli.declaration import flag_of, in_words, option_fields
from torchdnr.cli.network import Preset, choose_network, layers_for, parse_layers, split_sizes
from torchdnr.cli.settings import (
    AGAINST_ATTACKS,
    BACKBONE_IMAGE_SIZE,
    EPOCHS,
    FEWEST_ADVERSARIAL,
    FOLDER_IMAGE_SIZE,
    RunSettings,
)
from torchdnr.data.sources import Dataset, Splits, load_dataset, split
from torchdnr.distributed.processes import ALONE, Processes, local_device
from torchdnr.dnr import DNR
from torchdnr.features.reductions import ReductionLike
from torchdnr.files import digest, read_json, write_json
from torchdnr.rejection.risk import fewest_accepted
from torchdnr.resources import default_device

# In settings.json, beside the settings: the memory format, and whether no thresholds could be set.
_FORMAT, _WITHOUT_THETA = "channels_last", "without_thresholds"
_FOR_THETA = "max_error", "confidence"
_REMEMBERED = {entry.name for entry in fields(RunSettings)}


@dataclass(frozen=True, eq=False)
class Job:
    """A run folder and all that decides what is in it."""

    folder: Path
    settings: RunSettings
    dataset: Dataset
    splits: Splits
    preset: Preset
    device: torch.device
    channels_last: bool | None  # as asked for, or remembered; None: to be chosen
    without_theta: bool = False  # whether the thresholds of all classifiers are yet to be set

    def build_network(self, **options: int) -> nn.Module:
        """Build the network, with the starting weights of the seed; see ``Preset``."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.settings.seed)
            net = self.preset.build(**options)
        return net.to(memory_format=torch.channels_last) if self.channels_last else net

    def remember_format(self, channels_last: bool | None) -> None:
        """Write the settings, with the memory format: results depend on it by rounding alone."""
        form = {} if channels_last is None else {_FORMAT: channels_last}
        unset = {_WITHOUT_THETA: True} if self.without_theta else {}
        write_json(self.folder / "settings.json", self.settings.to_json() | form | unset)

    def remember_theta(self, unset: bool) -> None:
        """Write whether the thresholds are yet to be set: until then others may be asked for."""
        replace(self, without_theta=unset).remember_format(remembered_format(self.folder))

    def layers(self, net: nn.Module) -> dict[str, ReductionLike]:
        """Name the layers of a network that DNR reads, with their reductions."""
        return parse_layers(self.settings.layers, net)

    def images(self, part: str) -> tuple[Tensor, Tensor]:
        """Select images and labels of a split, on the device: network, svm, threshold or test."""
        indices = getattr(self.splits, part)
        images, labels = self.dataset.select(indices, test=part == "test")
        return images.to(self.device), labels.to(self.device)


def prepare(options: argparse.Namespace, console: Console, processes: Processes = ALONE) -> Job:
    """Settle the settings, check them against the data before any costly work, and write them.

    Options of the run folder are None where not given. The first of the processes writes.
    """
    device = find_device(options.device)
    choices = {entry.name: entry.metadata["default"] for entry in option_fields(RunSettings)}
    folder = Path(options.run or _default_folder(options.dataset or choices["dataset"]))
    earlier = remembered_settings(folder)
    unset = earlier is not None and read_json(folder / "settings.json").get(_WITHOUT_THETA, False)
    given = {name: getattr(options, name) for name in choices if getattr(options, name) is not None}
    if earlier is not None:
        check_agreement(folder, earlier, given, free=_FOR_THETA if unset else ())
        choices |= {name: getattr(earlier, name) for name in choices}
    choices |= given
    size = FOLDER_IMAGE_SIZE if choices["backbone"] is None else BACKBONE_IMAGE_SIZE
    image_size = choices["image_size"] or size
    dataset = load_dataset(
        choices["dataset"], options.data_root, image_size=image_size, progress=console.progress
    )
    shape = tuple(dataset.images_train.shape[1:])
    network = {name: choices[name] for name in ("backbone", "weights", "outputs")}
    preset = choose_network(dataset.name, shape, len(dataset.classes), **network)
    settings = _settle(choices, dataset, preset, earlier)
    if earlier is not None and earlier.data_digest not in ("", settings.data_digest):
        raise ValueError(
            f"{folder} was made with other contents of {settings.dataset}; choose another --run"
        )
    sizes = {part.name: getattr(settings, f"{part.name}_samples") for part in fields(Splits)}
    splits = split(dataset, **sizes, seed=settings.seed)
    channels_last: bool | None = options.channels_last
    if channels_last is None and earlier is not None:
        channels_last = remembered_format(folder)
    job = Job(folder, settings, dataset, splits, preset, device, channels_last, unset)
    model = _check_network(job)
    _check_samples(job, model.svm_options.folds)
    if processes.first:
        job.remember_format(channels_last)  # fails now if it must
    parts = ", ".join(f"{len(index):,} {part}" for part, index in vars(splits).items())
    images = f"{settings.dataset}: {' x '.join(map(str, shape))} images, {parts}"
    console.say(f"run folder {folder}, on {device}\n{images}")
    return job


def svm_images(folder: Path, data_root: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Load the images that the SVMs of a run folder were fitted on, and their labels."""
    settings = read_settings(folder)
    size = settings.image_shape[-1]
    dataset = load_dataset(settings.dataset, data_root, image_size=size, progress=False)
    if _digest(dataset) != settings.data_digest:
        raise ValueError(f"{folder} was made with other contents of {settings.dataset}")
    sizes = {part.name: getattr(settings, f"{part.name}_samples") for part in fields(Splits)}
    images, labels = dataset.select(split(dataset, **sizes, seed=settings.seed).svm)
    return images.to(device), labels.to(device)


def read_settings(folder: Path) -> RunSettings:
    """Read what a finished run folder was made with, for use without its data set."""
    settings = remembered_settings(folder)
    if settings is None:
        raise FileNotFoundError(
            f"{folder} holds no classifiers; expected a run folder: python train.py --run {folder}"
        )
    if missing := [name for name in ("classes", "image_shape") if not getattr(settings, name)]:
        raise ValueError(
            f"{folder} is of an older version: its settings.json lacks {' and '.join(missing)}; "
            f"python train.py --run {folder} adds them, where the data set is at hand"
        )
    return settings


def remembered_settings(folder: Path) -> RunSettings | None:
    """Read what a folder was made with; None as long as it holds no classifier."""
    path = folder / "settings.json"
    if not any(folder.glob("[!.]*.safetensors")):
        return None
    if not path.exists():
        raise ValueError(
            f"{folder} holds classifiers but no settings.json, so what they were made with is "
            "unknown; choose another --run, or delete the folder"
        )
    content = read_json(path)
    try:
        return RunSettings.from_json(content)
    except ValueError as error:
        raise ValueError(
            f"{path} does not hold the settings of a run ({error}); choose another --run"
        ) from error


def remembered_format(folder: Path) -> bool | None:
    """Read whether the network of a folder is in channels_last; None if that is not chosen yet."""
    return read_json(folder / "settings.json").get(_FORMAT)


def check_agreement(
    folder: Path, earlier: RunSettings, given: Mapping[str, Any], free: Sequence[str] = ()
) -> None:
    """Refuse options that disagree with what a run folder was made with: all, with both values.

    Those that are ``free`` may.
    """
    differ: dict[str, str] = {}
    for entry in option_fields(RunSettings):
        made, flag = getattr(earlier, entry.name), flag_of(entry)
        added = entry.name in free or (entry.name in AGAINST_ATTACKS and not made)
        if not added and given.get(entry.name, made) != made:
            differ[flag] = f"{flag} {in_words(made)} (given: {in_words(given[entry.name])})"
    if differ:
        raise ValueError(
            f"{folder} was made with {', '.join(differ.values())}; choose another --run, delete "
            f"the folder, or drop {' and '.join(differ)}"
        )


def find_device(name: str | None) -> torch.device:
    """Find the device of this name; without a name a GPU if there is any, else the CPU.

    Without a name it is the accelerator that PyTorch finds, if that computes in float64.
    """
    try:
        device = local_device(torch.device(name) if name else default_device())
        torch.ones(1, device=device).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"no device {name!r} here ({reason}); try --device cpu") from error
    return device


def _default_folder(source: str) -> str:
    kind, _, path = source.partition(":")
    return f"runs/{Path(path).stem if path else kind}"


def _digest(dataset: Dataset) -> str:
    return digest({k: v for k, v in vars(dataset).items() if torch.is_tensor(v)})


def _settle(
    choices: Mapping[str, Any], dataset: Dataset, preset: Preset, earlier: RunSettings | None
) -> RunSettings:
    """Fill in what is still None by the defaults of the data set and the network."""
    source = choices["dataset"]
    sizes = split_sizes(source, dataset, trained=choices["weights"] is not None)
    usual = {**sizes, **asdict(preset.training), "layers": preset.layers}
    usual["epochs"] = EPOCHS.get(source, preset.training.epochs)
    settled: dict[str, Any] = {
        name: usual.get(name) if value is None else value for name, value in choices.items()
    }
    settled |= _settle_against_attacks(settled)
    settled["layers"] = list(settled["layers"] or layers_for(preset.build(), dataset))
    training = replace(
        preset.training,
        **{name: settled[name] for name in ("epochs", "lr", "momentum", "batch_size")},
    )
    return RunSettings(
        **settled | {k: v for k, v in asdict(training).items() if k in _REMEMBERED},
        test_samples=_test_size(dataset, {name: settled[name] for name in sizes}),
        network=preset.name,
        data_digest=_digest(dataset),
        classes=list(dataset.classes),
        image_shape=list(dataset.images_train.shape[1:]),
        torchdnr=(earlier and earlier.torchdnr) or version("torchdnr"),
    )


def _settle_against_attacks(settled: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the options of training against attacks, all None where none is asked for."""
    asked = ((name, settled[name]) for name in AGAINST_ATTACKS)
    given = {name: value for name, value in asked if value is not None and value is not False}
    if given and "adversarial" not in given:
        flags = [f"--{name.replace('_', '-')}" for name in given]
        raise ValueError(
            f"{' and '.join(flags)} must go with --adversarial EPS, the size of the attacks, > 0; "
            "give it, or drop the option"
        )
    if not given:
        return given
    least, images = FEWEST_ADVERSARIAL
    n = settled["network_samples"] or settled["svm_samples"]
    usual = {"loss": "reject", "adversarial_norm": 2.0}
    return {**usual, "adversarial_epochs": max(least, math.ceil(images / n)), **given}


def _test_size(dataset: Dataset, sizes: Mapping[str, int]) -> int:
    if dataset.labels_test is not None:
        return len(dataset.labels_test)
    n, total = len(dataset.labels_train), sum(sizes.values())
    if total >= n:
        parts = " + ".join(f"{size} {name.split('_')[0]}" for name, size in sizes.items())
        raise ValueError(
            f"{parts} samples leave none of the {n} of {dataset.name} for the test; ask for fewer"
        )
    return n - total


def _check_network(job: Job) -> DNR:
    """Refuse a network that cannot be read or trained before the work; return its unfitted DNR."""
    for name, values in job.settings.grids.items():
        if min(values) <= 0:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} must hold numbers > 0, got {in_words(values)}; leave out 0")
    net = job.build_network()
    model = DNR(net, job.layers(net))  # raises for an unknown layer
    image, _ = job.dataset.select(torch.arange(1))
    try:
        model.features(image)
    except Exception as error:  # whatever a network raises that does not accept such images
        raise ValueError(
            f"{job.preset.name} fails on images {tuple(image.shape[1:])}: {error}; choose other "
            "--layers or another --image-size"
        ) from error
    has_weights = job.settings.weights or (job.folder / "network.safetensors").exists()
    if job.settings.network_samples < 1 and not has_weights:
        raise ValueError(
            f"--network-samples must be >= 1 as {job.folder} holds no network, got 0; ask for "
            "more, or give --weights"
        )
    if job.settings.adversarial is not None:
        adversary = job.settings.adversary()  # raises for an eps that is not > 0
        farthest = image.numel() ** (1 / adversary.norm)
        if adversary.eps > farthest:
            raise ValueError(
                f"--adversarial must be at most {farthest:.4g}, the distance of the farthest two "
                f"images in norm {in_words(adversary.norm)}, got {in_words(adversary.eps)}; pixels "
                "are in [0, 1]: 8 of 255 levels are 0.0314"
            )
        if job.settings.loss == "class" and job.settings.outputs is not None:
            raise ValueError(
                "--loss class adds an output to the network, and --outputs names all "
                "that it has; choose another --loss"
            )
    return model


def _check_samples(job: Job, folds: int) -> None:
    """Refuse samples or a rejection rate on which the SVMs or theta cannot be fitted."""
    if not 0 <= job.settings.rejection_rate < 1:
        raise ValueError(f"--rejection-rate must be in [0, 1), got {job.settings.rejection_rate}")
    max_error, confidence = job.settings.max_error, job.settings.confidence
    if max_error is not None:
        if not 0 < max_error < 1 or not 0 < confidence < 1:
            raise ValueError(
                f"--max-error and --confidence must be in (0, 1), got {max_error} and {confidence}"
            )
        needed, given = fewest_accepted(max_error, 1 - confidence) + 1, len(job.splits.threshold)
        if given < needed:
            raise ValueError(
                f"--max-error {max_error} with --confidence {confidence} takes --threshold-samples "
                f"{needed} at least, even if none of them is wrong, got {given}"
            )
    labels, classes = job.dataset.labels_train[job.splits.svm], job.dataset.classes
    counts = torch.bincount(labels, minlength=len(classes))
    if counts.min() < folds:
        raise ValueError(
            f"--svm-samples must give every class at least {folds} samples, one per fold of "
            f"the search, got {int(counts.min())} of class {classes[int(counts.argmin())]} "
            f"among {len(labels)}; ask for more"
        )
