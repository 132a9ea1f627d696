"""The classifiers of a run folder that are trained against attacks: a network, and DNR as a whole.

Both go on from what the folder holds, on the images that trained its network, or, where that came
trained, on those of the SVMs.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from torchdnr.cli.run_folder import Job
from torchdnr.cli.settings import END_TO_END, ROBUST, RunSettings
from torchdnr.dnr import DNR
from torchdnr.files import read_json, write_json
from torchdnr.models.adversarial import WeakAttackWarning
from torchdnr.models.paper import load_network, save_network
from torchdnr.models.training import ADVERSARIAL_TRAINING, TrainingSettings, train_network
from torchdnr.rejection.logits import LogitRejection

_HEADS = {"reject": "logit", "plain": "logit", "class": "class", "confidence": "softmax"}


def load_robust(
    folder: Path, settings: RunSettings, build: Callable[..., nn.Module]
) -> LogitRejection:
    """Load the network that was trained against attacks, with its threshold.

    ``build`` is that of the run's ``Preset``.
    """
    net = load_network(build(**_outputs(settings)), _network_file(folder))
    return LogitRejection.load(folder / f"{ROBUST}.safetensors", net)


def train_robust(job: Job, net: nn.Module, progress: bool) -> LogitRejection:
    """Train a copy of the network against attacks, and save it; return it without a threshold."""
    # In the usual memory format: which is faster must not decide the outcome.
    robust = job.build_network(**_outputs(job.settings)).to(memory_format=torch.contiguous_format)
    _take_weights(robust, net.state_dict())
    train_network(
        robust,
        *_images(job),
        _training(job.settings),
        adversary=job.settings.adversary(),
        seed=job.settings.seed,
        device=job.device,
        checkpoint=job.folder / f"{ROBUST}-training.safetensors",
        progress=progress,
    )
    save_network(robust, _network_file(job.folder))
    return LogitRejection(robust, head=_HEADS[job.settings.adversary().loss])


def train_end_to_end(job: Job, net: nn.Module, progress: bool) -> DNR:
    """Train DNR and a copy of its network together against attacks, without a threshold."""
    usual = deepcopy(net).to(memory_format=torch.contiguous_format)  # as in ``train_robust``
    model = DNR.load(job.folder / "dnr.safetensors", usual)
    return model.fit_end_to_end(
        *_images(job),
        job.settings.adversary("reject"),
        _training(job.settings),
        seed=job.settings.seed,
        checkpoint=job.folder / f"{END_TO_END.lower()}-training.safetensors",
        progress=progress,
    )


@contextmanager
def warnings_kept(folder: Path, name: str) -> Iterator[None]:
    """Write down that the attack of a training is too weak, for the report; warn as usual too."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", WeakAttackWarning)
        try:
            yield
        finally:
            weak = [str(one.message) for one in told if one.category is WeakAttackWarning]
            if weak:  # those of the part before a stop too
                all_warnings = training_warnings(folder, name) + weak
                write_json(_warnings_file(folder, name), {"warnings": all_warnings})
    for one in told:
        warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


def training_warnings(folder: Path, name: str) -> list[str]:
    """Read what was warned of as a classifier was trained."""
    path = _warnings_file(folder, name)
    return read_json(path)["warnings"] if path.exists() else []


def _warnings_file(folder: Path, name: str) -> Path:
    return folder / f"{name.lower()}-warnings.json"


def _network_file(folder: Path) -> Path:
    return folder / f"{ROBUST}-network.safetensors"


def _outputs(settings: RunSettings) -> dict[str, int]:
    """Ask for one more output where there is a class that rejects."""
    return {"num_classes": len(settings.classes) + 1} if settings.loss == "class" else {}


def _take_weights(net: nn.Module, state: dict[str, Tensor]) -> None:
    """Load the weights of a network that may have fewer outputs; further ones keep their own."""
    wider = net.state_dict()
    for name, value in state.items():
        if wider[name].shape != value.shape:
            value = torch.cat([value, wider[name][len(value) :].to(value)])
        wider[name] = value
    net.load_state_dict(wider)


def _images(job: Job) -> tuple[Tensor, Tensor]:
    return job.images("network" if len(job.splits.network) else "svm")


def _training(settings: RunSettings) -> TrainingSettings:
    epochs = settings.adversarial_epochs or ADVERSARIAL_TRAINING.epochs
    return replace(ADVERSARIAL_TRAINING, epochs=epochs, batch_size=settings.batch_size)
