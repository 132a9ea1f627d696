"""From a run folder to its classifiers: network (DNN), NR, DNR and others, made where missing."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchdnr.cli.adversarial import (
    load_robust,
    train_end_to_end,
    train_robust,
    training_warnings,
    warnings_kept,
)
from torchdnr.cli.console import Console
from torchdnr.cli.declaration import in_words
from torchdnr.cli.run_folder import Job, remembered_format
from torchdnr.cli.settings import END_TO_END, ROBUST
from torchdnr.decisions import has_reject_column, predict_labels
from torchdnr.distributed.processes import ALONE, Processes, alone
from torchdnr.dnr import DNR, NR
from torchdnr.evaluation.judging import outputs
from torchdnr.evaluation.metrics import accuracy_under_attack, rejection_rate, wilson_interval
from torchdnr.evaluation.risk_coverage import RiskCoverage, risk_coverage
from torchdnr.files import CheckpointError
from torchdnr.models.backbones import load_weights
from torchdnr.models.paper import load_network, save_network
from torchdnr.models.training import train_network
from torchdnr.rejection.logits import LogitRejection
from torchdnr.resources import default_batch_size, synchronize

_TIMED_VALUES = 1 << 19  # of the images that the memory formats are timed on


@dataclass(frozen=True)
class Summary:
    """How the classifiers do on clean images, in words and as JSON values by classifier.

    These are its test accuracy and AURC, and if it rejects theta, the rates that theta reaches and
    what the search chose; each rate with its 95 % interval; and what its training warned of.
    ``risks`` are the curves of the AURC.
    """

    text: str
    classifiers: dict[str, dict[str, Any]]
    risks: dict[str, RiskCoverage]


def make_classifiers(
    job: Job, console: Console, processes: Processes = ALONE
) -> dict[str, nn.Module]:
    """Load the classifiers of a run folder, and make those that it lacks.

    All processes call this. They fit DNR and NR together; the first one trains networks and writes
    the files, which all can read.
    """
    with processes.first_alone():  # it trains the network, which the others then load
        net = _network(job, console)
    layers = job.layers(net)
    svm_options: dict[str, Any] = {
        "seed": job.settings.seed,
        "class_weight": job.settings.class_weight,
    }
    search: dict[str, Any] = {"refine": job.settings.refine, **job.settings.grids}
    build_dnr = partial(DNR, net, layers, **svm_options, **search)
    dnr = _rejecting(job, console, processes, net, DNR, build_dnr)

    def build_nr() -> NR:
        # NR is the same SVM as DNR's on that layer, on the same images and folds: its search
        # would choose the same (C, gamma) once more.
        last, reduction = list(layers.items())[-1]
        chosen = dnr.selection[last]
        known = {last: (chosen["C"], chosen["gamma"])}
        return NR(net, last, reduction=reduction, hyperparameters=known, **svm_options)

    nr = _rejecting(job, console, processes, net, NR, build_nr)
    classifiers = {"DNN": net, "NR": nr, "DNR": dnr}
    for name in job.settings.classifiers:
        if name not in classifiers:
            with processes.first_alone(), alone():  # it trains, and the others then load
                classifiers[name] = _against_attacks(job, console, net, name, processes.first)
    if job.without_theta and processes.first:
        job.remember_theta(unset=False)
    return classifiers


def _network(job: Job, console: Console) -> nn.Module:
    path = job.folder / "network.safetensors"
    net = job.build_network()
    name, count = job.preset.name, len(job.splits.network)
    if path.exists():
        with _loading(console, "network", path):
            load_network(net, path)
        return _in_faster_format(net.to(job.device).eval(), job, console)
    settings = job.settings
    parts = [name]
    if settings.weights:
        parts.append(f"weights {settings.weights}")
    if count:
        parts.append(f"{count:,} images, {settings.epochs} epochs")
    with console.stage("network", ", ".join(parts)):
        if settings.weights and settings.backbone:
            load_weights(net, settings.backbone, settings.weights)
        if count:
            train_network(
                net,
                *job.images("network"),
                settings.training,
                seed=settings.seed,
                device=job.device,
                checkpoint=job.folder / "training.safetensors",
                progress=console.progress,
            )
        save_network(net, path)
    return _in_faster_format(net.to(job.device).eval(), job, console)


def _against_attacks(
    job: Job, console: Console, net: nn.Module, name: str, first: bool
) -> nn.Module:
    """Load the robust network or DNR end to end, or train it against attacks."""
    path = job.folder / f"{name.lower()}.safetensors"
    model: DNR | LogitRejection
    if path.exists():
        with _loading(console, name, path):
            if name == END_TO_END:
                model = DNR.load(path, net)
            else:
                robust = load_robust(job.folder, job.settings, job.preset.build)
                model = robust.to(job.device).eval()
        if job.without_theta and first:
            _calibrate(model, job, path, first)
    else:
        adversary, epochs = job.settings.adversary(), job.settings.adversarial_epochs
        loss = "" if name == END_TO_END else f'loss "{adversary.loss}", '
        attacks = f"attacks of eps {adversary.eps:g}, norm {in_words(adversary.norm)}"
        with console.stage(name, f"{attacks}, {loss}{epochs} epochs"):
            train = train_robust if name == ROBUST else train_end_to_end
            with warnings_kept(job.folder, name):
                model = train(job, net, console.progress)
            _calibrate(model, job, path, first)
    _in_faster_format(model.net, job, console)
    return model


def _in_faster_format(net: nn.Module, job: Job, console: Console) -> nn.Module:
    """Keep the network in channels_last if asked to, or if passes are more than 5 % faster then.

    Chosen once per run folder; not before the training, whose outcome must not depend on clocks.
    """
    chosen = job.channels_last
    if chosen is None:
        chosen = remembered_format(job.folder)  # another process may just have measured
    if chosen is None:
        usual, last = _milliseconds_by_format(net, job.images("svm")[0])
        chosen = last < 0.95 * usual
        console.say(
            f"    {'channels_last' if chosen else 'the usual memory format'}: a forward and a "
            f"gradient take {last:.2g} ms per image in channels_last, {usual:.2g} ms in the usual "
            "format"
        )
        job.remember_format(chosen)
    return net.to(memory_format=torch.channels_last if chosen else torch.contiguous_format)


def _milliseconds_by_format(net: nn.Module, images: Tensor) -> list[float]:
    """Time a forward and a gradient in the usual memory format and in channels_last, per image."""
    images = images[: max(1, min(32, _TIMED_VALUES // images[0].numel()))]
    best = dict.fromkeys((torch.contiguous_format, torch.channels_last), math.inf)
    for turn in range(4):  # the first warms up
        for memory_format, least in best.items():
            net.to(memory_format=memory_format)
            leaf = images.clone().requires_grad_()
            synchronize(images.device)
            began = time.perf_counter()
            with torch.no_grad():
                net(images)
            torch.autograd.grad(net(leaf).sum(), leaf)
            synchronize(images.device)
            seconds = time.perf_counter() - began
            best[memory_format] = min(least, seconds) if turn else least
    return [1e3 * seconds / len(images) for seconds in best.values()]


def _rejecting(
    job: Job,
    console: Console,
    processes: Processes,
    net: nn.Module,
    kind: type[DNR] | type[NR],
    build: Callable[[], DNR | NR],
) -> DNR | NR:
    name = kind.__name__
    path = job.folder / f"{name.lower()}.safetensors"
    if processes.broadcast_text(str(path.exists())) == "True":  # all load it, or none does
        with _loading(console, name, path):
            model = kind.load(path, net)
        if not job.without_theta and model.threshold.isfinite():
            return model
    else:
        model = build().to(job.device)
        layers = ", ".join(model.layers)
        sizes = f"{len(job.splits.svm):,} images, theta on {len(job.splits.threshold):,} others"
        with console.stage(name, f"SVMs on {layers}, {sizes}"):
            model.fit(*job.images("svm"), progress=console.progress)
            for svm, chosen in model.selection.items():
                if "reason" in chosen:
                    console.say(f"    {svm}: {chosen['reason']}")
    _calibrate(model, job, path, processes.first)
    return model


def _calibrate(model: DNR | NR | LogitRejection, job: Job, path: Path, first: bool) -> None:
    """Set theta, and save the classifier: without theta where it cannot be set as asked."""
    (images, labels), settings = job.images("threshold"), job.settings
    try:
        if settings.max_error is None:
            model.calibrate(images, settings.rejection_rate)
        else:
            goal = {"max_error": settings.max_error, "confidence": settings.confidence}
            model.calibrate(images, labels, **goal)
    except ValueError as error:
        if settings.max_error is None:
            raise
        if first:
            model.save(path)
            job.remember_theta(unset=True)
        raise ValueError(
            f"{type(model).__name__}: {error}. What is trained and fitted is kept in {job.folder}: "
            "the same command with another --max-error or --confidence goes on"
        ) from error
    if first:
        model.save(path)


@contextmanager
def _loading(console: Console, name: str, path: Path) -> Iterator[None]:
    """Announce that a classifier is loaded, and say what to do if its file is of no use."""
    with console.stage(name, f"from {path}"):
        try:
            yield
        except CheckpointError as error:
            raise CheckpointError(
                f"cannot use {path}; delete it, and the same command makes it again. Cause: {error}"
            ) from error


def summarise(job: Job, classifiers: dict[str, nn.Module]) -> Summary:
    """Evaluate the classifiers on the whole test split, where a reject is an error."""
    test, labels = job.images("test")
    calibration, size = job.images("threshold")[0], default_batch_size(test)
    entries: dict[str, dict[str, Any]] = {}
    risks: dict[str, RiskCoverage] = {}
    for name, model in classifiers.items():
        reject = has_reject_column(model, None)
        output = outputs(model, test, size)
        predicted, risks[name] = (
            predict_labels(output, reject),
            risk_coverage(output, labels, reject),
        )
        rates = {"test_accuracy": (accuracy_under_attack(predicted, labels, eps=0), len(labels))}
        entries[name] = {"aurc": risks[name].aurc}
        if told := training_warnings(job.folder, name):
            entries[name]["warnings"] = told
        if reject:
            before = predict_labels(outputs(model, calibration, size), reject)
            rates["calibration_rejection_rate"] = rejection_rate(before), len(before)
            rates["test_rejection_rate"] = rejection_rate(predicted), len(labels)
            entries[name]["threshold"] = output[0, -1].item()
            if (selection := getattr(model, "selection", None)) is not None:
                entries[name]["selection"] = selection
            error = risks[name].error
            if error is not None and error.n:
                rates["test_error_if_accepted"] = error.value, error.n
        for rate, (value, count) in rates.items():
            entries[name] |= {rate: value, f"{rate}_interval": list(wilson_interval(value, count))}
    accuracy = ", ".join(f"{name} {entry['test_accuracy']:.1%}" for name, entry in entries.items())
    rejected = ", ".join(
        f"{name} {entry['calibration_rejection_rate']:.1%} and {entry['test_rejection_rate']:.1%}"
        for name, entry in entries.items()
        if "threshold" in entry
    )
    wrong = ", ".join(
        f"{name} {entry['test_error_if_accepted']:.1%}"
        for name, entry in entries.items()
        if "test_error_if_accepted" in entry
    )
    text = (
        f"clean accuracy on {len(labels):,} test images (a reject is an error): {accuracy}; "
        f"rejected of calibration and test: {rejected}; wrong of the accepted: {wrong or '-'}"
    )
    return Summary(text, entries, risks)
