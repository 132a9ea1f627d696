"""Settle what a run folder is made with: given options, what the folder remembers, defaults."""

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchdnr.cli.console import Console
from torchdnr.cli.network import Preset, choose_network, layers_for, parse_layers, split_sizes
from torchdnr.cli.options import BACKBONE_IMAGE_SIZE, DEFAULT_DATASET, FOLDER_IMAGE_SIZE
from torchdnr.data.sources import Dataset, Splits, load_dataset, split
from torchdnr.distributed.processes import ALONE, Processes, local_device
from torchdnr.dnr import DNR
from torchdnr.features.reductions import ReductionLike
from torchdnr.files import digest, read_json, write_json
from torchdnr.models.training import TrainingSettings

SAMPLE_OPTIONS = "network_samples", "svm_samples", "threshold_samples"

_SETTING_TYPES = {
    "dataset": str,
    "seed": int,
    **dict.fromkeys(SAMPLE_OPTIONS, int),
    "epochs": int,
    "batch_size": int,
    "layers": list,
    "rejection_rate": float,
}


def read_settings(folder: Path) -> dict[str, Any]:
    """Read what a finished run folder was made with.

    Args:
        folder: The run folder.

    Returns:
        What its ``settings.json`` holds.

    Raises:
        FileNotFoundError: If it is no run folder.
        ValueError: If its settings are damaged, or lack what came later.
    """
    settings = remembered_settings(folder)
    if not settings:
        raise FileNotFoundError(
            f"{folder} holds no classifiers; expected a run folder: python train.py --run {folder}"
        )
    if missing := [name for name in ("classes", "image_shape") if name not in settings]:
        raise ValueError(
            f"{folder} is of an older version: its settings.json lacks {' and '.join(missing)}; "
            f"python train.py --run {folder} adds them, where the data set is at hand"
        )
    return settings


def remembered_settings(folder: Path) -> dict[str, Any]:
    """Read what the folder was made with; a folder in which nothing was made yet binds nobody."""
    path, made = folder / "settings.json", any(folder.glob("[!.]*.safetensors"))
    if made and not path.exists():
        raise ValueError(
            f"{folder} holds classifiers but no settings.json, so what they were made with is "
            "unknown; choose another --run, or delete the folder"
        )
    if not made:
        return {}
    settings = read_json(path)
    if (
        not isinstance(settings, dict)
        or not _SETTING_TYPES.items()
        <= {name: type(value) for name, value in settings.items()}.items()
    ):
        raise ValueError(f"{path} does not hold the settings of a run; choose another --run")
    return settings


def check_agreement(folder: Path, remembered: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse options that disagree with what a run folder was made with.

    Args:
        folder: The run folder.
        remembered: What its ``settings.json`` holds.
        given: Options that were given.

    Raises:
        ValueError: If any differ: all of them are named, with both values.
    """
    differ = [name for name in remembered if name in given and given[name] != remembered[name]]
    if differ:
        both = ", ".join(
            f"{_option(name)} {_words(remembered[name])} (given: {_words(given[name])})"
            for name in differ
        )
        raise ValueError(
            f"{folder} was made with {both}; choose another --run, delete the folder, or "
            f"drop {' and '.join(map(_option, differ))}"
        )


def _option(name: str) -> str:
    if name == "batch_size":
        return "--train-batch-size"  # attack.py has another --batch-size
    return f"--{name.replace('_', '-')}"


def _words(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def check_data(folder: Path, remembered: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuse a data set whose contents are others than those a run folder was made with.

    Args:
        folder: The run folder.
        remembered: What its ``settings.json`` holds.
        settings: What it would hold now.

    Raises:
        ValueError: If the digests of the data differ.
    """
    if remembered.get("data_digest", settings["data_digest"]) != settings["data_digest"]:
        raise ValueError(
            f"{folder} was made with other contents of {settings['dataset']}; choose another --run"
        )


# Images for the network, the SVMs and theta.
SPLIT_SIZES = {
    "mnist-5k": (2_000, 1_200, 500),
    "mnist": (30_000, 10_000, 1_000),
    "cifar10": (40_000, 9_000, 1_000),
}
# Table III's 50 are for 30,000 digits; 2,000 are learned sooner.
EPOCHS = {"mnist-5k": 20}
TRAINING_OPTIONS = "epochs", "lr", "momentum", "batch_size"
NETWORK_OPTIONS = "backbone", "weights", "outputs", "image_size"


@dataclass(frozen=True, eq=False)
class Job:
    """A run folder and all that decides what is in it.

    Attributes:
        folder: The run folder.
        settings: What ``settings.json`` holds; JSON values.
        dataset: Its data set.
        splits: Which images serve for what.
        preset: The network that fits the images.
        training: How it is trained.
        device: Where everything runs.
        channels_last: Whether the network keeps its weights and maps in that memory format.
    """

    folder: Path
    settings: dict[str, Any]
    dataset: Dataset
    splits: Splits
    preset: Preset
    training: TrainingSettings
    device: torch.device
    channels_last: bool

    def build_network(self) -> nn.Module:
        """Build the network with the starting weights of the seed."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.settings["seed"])
            net = self.preset.build()
        return net.to(memory_format=torch.channels_last) if self.channels_last else net

    def layers(self, net: nn.Module) -> dict[str, ReductionLike]:
        """Name the layers of a network that DNR reads, with their reductions."""
        return parse_layers(self.settings["layers"], net)

    def images(self, part: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Select images and labels of a split, on the device: network, svm, threshold or test."""
        indices = getattr(self.splits, part)
        images, labels = self.dataset.select(indices, test=part == "test")
        return images.to(self.device), labels.to(self.device)


def prepare(options: argparse.Namespace, console: Console, processes: Processes = ALONE) -> Job:
    """Settle the settings and check them against the data, before any costly work.

    Args:
        options: Parsed options, None where not given.
        console: For messages.
        processes: All that prepare the job; the first one writes.

    Returns:
        The job. Its folder exists, with ``settings.json`` in it.

    Raises:
        ValueError: If an option disagrees with the folder, or does not fit the data.
        OSError: If the folder cannot be written, or data are missing.
        ImportError: If a package is missing that holds the data.
    """
    device = find_device(options.device)
    folder = Path(options.run or _default_folder(options.dataset or DEFAULT_DATASET))
    remembered = remembered_settings(folder)
    given = {name: value for name, value in vars(options).items() if value is not None}
    check_agreement(folder, remembered, given)
    source = given.get("dataset", remembered.get("dataset", DEFAULT_DATASET))
    chosen = {name: (remembered | given).get(name) for name in NETWORK_OPTIONS}
    size = FOLDER_IMAGE_SIZE if chosen["backbone"] is None else BACKBONE_IMAGE_SIZE
    dataset = load_dataset(source, options.data_root, image_size=chosen["image_size"] or size)
    shape, classes = tuple(dataset.images_train.shape[1:]), dataset.classes
    preset = choose_network(dataset.name, shape, len(classes), chosen)
    defaults = _defaults(source, dataset, preset, chosen)
    settings = {name: (defaults | remembered | given)[name] for name in defaults}
    if not settings["layers"]:
        settings["layers"] = layers_for(preset.build(), dataset)
    training = replace(preset.training, **{name: settings[name] for name in TRAINING_OPTIONS})
    sizes = {name.removesuffix("_samples"): settings[name] for name in SAMPLE_OPTIONS}
    settings |= {
        "test_samples": _test_size(dataset, sizes),
        "network": preset.name,
        **asdict(training),
        "data_digest": _data_digest(dataset),
        # What predicting needs, where the data are not at hand.
        **{"classes": list(classes), "image_shape": list(shape)},
        "torchdnr": remembered.get("torchdnr", version("torchdnr")),
    }
    check_data(folder, remembered, settings)
    splits = split(dataset, **sizes, test=settings["test_samples"], seed=settings["seed"])
    job = Job(folder, settings, dataset, splits, preset, training, device, options.channels_last)
    _check_fit(job)
    if processes.first:
        write_json(folder / "settings.json", settings)  # and so learn at once if it is writable
    size = " x ".join(map(str, shape))
    parts = ", ".join(f"{len(index):,} {part}" for part, index in vars(splits).items())
    console.say(f"run folder {folder}, on {device}\n{source}: {size} images, {parts}")
    return job


def _default_folder(source: str) -> str:
    kind, _, path = source.partition(":")
    return f"runs/{Path(path).stem if path else kind}"


def find_device(name: str | None) -> torch.device:
    """Find the device of this name; without one a GPU if there is any, else the CPU.

    Raises:
        ValueError: If it is not here, or there is none for each of several processes.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = local_device(torch.device(name))
        torch.ones(1, device=device).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"no device {name!r} here ({reason}); try --device cpu") from error
    return device


def _defaults(
    source: str, dataset: Dataset, preset: Preset, chosen: Mapping[str, Any]
) -> dict[str, Any]:
    sizes = split_sizes(source, dataset, SPLIT_SIZES, chosen["weights"] is not None)
    training = asdict(preset.training)
    return {
        "dataset": source,
        "seed": 0,
        **dict(zip(SAMPLE_OPTIONS, sizes, strict=True)),
        **{name: training[name] for name in TRAINING_OPTIONS},
        **({"epochs": EPOCHS[source]} if source in EPOCHS else {}),
        **dict.fromkeys(NETWORK_OPTIONS),
        "layers": list(preset.layers or ()),
        "rejection_rate": 0.1,
    }


def _test_size(dataset: Dataset, sizes: Mapping[str, int]) -> int:
    if dataset.labels_test is not None:
        return len(dataset.labels_test)
    n = len(dataset.labels_train)
    if sum(sizes.values()) >= n:
        raise ValueError(
            f"{' + '.join(f'{size} {part}' for part, size in sizes.items())} samples leave none of "
            f"the {n} of {dataset.name} for the test; ask for fewer"
        )
    return n - sum(sizes.values())


def _data_digest(dataset: Dataset) -> str:
    tensors = {name: value for name, value in vars(dataset).items() if torch.is_tensor(value)}
    return digest(tensors)


def _check_fit(job: Job) -> None:
    """Find out before the training, not after it, that the SVMs cannot be fitted."""
    net = job.build_network()
    model = DNR(net, job.layers(net))  # raises for an unknown layer
    image, _ = job.dataset.select(torch.arange(1))
    try:
        model.features(image)
    except Exception as error:  # whatever a network raises that cannot take such images
        raise ValueError(
            f"{job.preset.name} fails on images {tuple(image.shape[1:])}: {error}; choose other "
            "--layers or another --image-size"
        ) from error
    has_network = job.settings["weights"] or (job.folder / "network.safetensors").exists()
    if job.settings["network_samples"] < 1 and not has_network:
        raise ValueError(
            f"--network-samples must be >= 1 as {job.folder} holds no network, got 0; ask for "
            "more, or give --weights"
        )
    if not 0 <= job.settings["rejection_rate"] < 1:
        raise ValueError(
            f"--rejection-rate must be in [0, 1), got {job.settings['rejection_rate']}"
        )
    labels = job.dataset.labels_train[job.splits.svm]
    counts = torch.bincount(labels, minlength=len(job.dataset.classes))
    if counts.min() < (folds := model.svm_options.folds):
        raise ValueError(
            f"--svm-samples must give every class at least {folds} samples, one per fold of "
            f"the search, got {int(counts.min())} of class {job.dataset.classes[counts.argmin()]} "
            f"among {len(labels)}; ask for more"
        )
