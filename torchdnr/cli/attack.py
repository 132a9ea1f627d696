"""Attack the classifiers of a run folder, and check the attacks; what is done is not done again."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from torchdnr.attacks.line_search import line_search_pgd
from torchdnr.cli.console import Console
from torchdnr.cli.options import EPS, EXAMPLE_EPS
from torchdnr.cli.run_folder import Job
from torchdnr.decisions import has_reject_column, predict_labels
from torchdnr.distributed.processes import Processes
from torchdnr.evaluation.checks.result import broken_off
from torchdnr.evaluation.checks.run import run_checks
from torchdnr.evaluation.curve import SecurityCurve
from torchdnr.evaluation.detection import Measures, measure
from torchdnr.evaluation.judging import outputs
from torchdnr.evaluation.line_up import ATTACKS, Attack, build_line_up, choose_attacks
from torchdnr.evaluation.security import security_evaluations
from torchdnr.files import digest, plain_json, read_json, write_json

DEFAULT_SAMPLES = 50


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What to attack, and how.

    Attributes:
        job: The run folder and its settings.
        settings: Of the attacks; JSON values.
        classifiers: From ``make_classifiers``.
        clean: How they do on clean images, from ``summarise``.
        processes: Those that share the work.
        console: For messages and progress bars.
    """

    job: Job
    settings: dict[str, Any]
    classifiers: dict[str, nn.Module]
    clean: dict[str, dict[str, Any]]
    processes: Processes
    console: Console

    @property
    def norm(self) -> float:
        """Norm of the perturbations."""
        return float(self.settings["norm"])  # "inf" in JSON

    @property
    def identity(self) -> dict[str, Any]:
        """All that the numbers depend on, and what is known before the attacks; JSON values."""
        found = {
            "torchdnr": version("torchdnr"),
            "run": self.job.settings,
            "attack": self.settings,
            "device": self.job.device.type,
            "classifiers": self.clean,
        }
        return json.loads(json.dumps(plain_json(found)))  # tuples as lists, as in a file

    def images(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Select the images to attack, and their labels."""
        images, labels = self.job.images("test")
        count = self.settings["samples"]  # any beginning of a split is a stratified sample of it
        return images[:count], labels[:count]

    def line_up(self, progress: bool) -> dict[str, Attack]:
        """Build the attacks, with progress bars of their own or without."""
        names = "objective", "steps", "restarts"
        options = {name: self.settings[name] for name in names if self.settings[name] is not None}
        return build_line_up(
            self.settings["attacks"],
            self.job.images("svm")[0],
            norm=self.norm,
            batch_size=self.settings["batch_size"],
            progress=progress,
            surrogate=self.classifiers["DNN"],
            options={"seed": self.job.settings["seed"], **options},
        )

    def attack(self) -> dict[str, SecurityCurve]:
        """Attack all classifiers, in all processes together."""
        return security_evaluations(
            self.classifiers,
            *self.images(),
            self.settings["eps"],
            norm=self.norm,
            attacks=self.line_up(self.console.progress),
            init_inputs=self.job.images("svm")[0],
            batch_size=self.settings["batch_size"],
            settings={"seed": self.job.settings["seed"], "dataset": self.job.settings["dataset"]},
            checkpoints={
                name: self.job.folder / f"attack-{name.lower()}.safetensors"
                for name in self.classifiers
            },
            processes=self.processes,
            progress=self.console.progress,
        )

    def check(self, curves: Mapping[str, SecurityCurve]) -> dict[str, dict[str, Any]]:
        """Check the evaluations, each by one process; what a file of the folder holds is kept.

        Returns:
            ``CheckReport.to_dict()`` by classifier.
        """
        done: dict[str, dict[str, Any]] = {}
        for number, name in enumerate(self.classifiers):
            if self.processes.mine(number):
                done[name] = self._check(name, curves[name])
        self.processes.wait()
        return {
            name: json.loads(
                self.processes.broadcast_text(
                    json.dumps(done.get(name)), self.processes.owner(number)
                )
            )
            for number, name in enumerate(self.classifiers)
        }

    def _check(self, name: str, curve: SecurityCurve) -> dict[str, Any]:
        path = self.job.folder / f"checks-{name.lower()}.json"
        points = {"predictions": curve.predictions, "adversarial": curve.adversarial}
        known = {**self.identity, "points": digest(points)}
        try:
            earlier = read_json(path)
            if earlier["of"] == known:
                return earlier["checks"]
        except (OSError, ValueError, KeyError, TypeError):
            pass  # none yet, or damaged: made again
        report = run_checks(
            self.classifiers[name],
            *self.images(),
            curve,
            attacks=self.line_up(progress=False),
            init_inputs=self.job.images("svm")[0],
            surrogate=self.classifiers["DNN"] if curve.rejects else None,
            batch_size=self.settings["batch_size"],
            samples=self.settings["check_samples"],
            recorded=max(1, self.settings["check_samples"] // 4),  # one by one, hence few
            seed=self.job.settings["seed"],
            progress=self.console.progress,
        )
        checks = plain_json(report.to_dict())
        if not broken_off(checks["checks"]):  # those may go well the next time
            write_json(path, {"of": known, "checks": checks})
        return checks

    def measure(self, curves: Mapping[str, SecurityCurve]) -> dict[str, Measures]:
        """Measure how well rejection does its work."""
        return {
            name: measure(
                model,
                self.images()[0],
                curves[name],
                calibration=self.job.images("threshold"),
                batch_size=self.settings["batch_size"],
            )
            for name, model in self.classifiers.items()
        }

    def examples(self) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]] | None:
        """Attack a few images that all classifiers get right when they are clean, if any.

        Returns:
            Images, labels, and adversarial images by classifier.
        """
        images, labels = self.images()
        right = torch.ones_like(labels, dtype=torch.bool)
        for name in self.classifiers:
            right &= self.predict(name, images) == labels
        chosen = right.nonzero()[: self.settings["examples"], 0]
        if len(chosen) == 0:
            return None
        images, labels = images[chosen], labels[chosen]
        adversarials = {
            name: line_search_pgd(
                model,
                images,
                labels,
                self.settings["example_eps"],
                norm=self.norm,
                init_inputs=self.job.images("svm")[0],
                batch_size=self.settings["batch_size"],
                progress=self.console.progress,
            )
            for name, model in self.classifiers.items()
        }
        return images, labels, adversarials

    def predict(self, name: str, images: torch.Tensor) -> torch.Tensor:
        """Predict labels, or ``REJECT``, by one of the classifiers."""
        model = self.classifiers[name]
        output = outputs(model, images, self.settings["batch_size"])
        return predict_labels(output, has_reject_column(model, None))


def plan(options: argparse.Namespace, job: Job) -> dict[str, Any]:
    """Settle the settings of the attacks, before any costly work.

    Args:
        options: Parsed options of ``attack.py``.
        job: The run folder and its settings.

    Returns:
        Settings, as JSON values.

    Raises:
        ValueError: If there are fewer test images than asked for, or an attack does not know the
            norm.
    """
    available = len(job.splits.test)
    samples = min(DEFAULT_SAMPLES, available) if options.samples is None else options.samples
    if samples > available:
        raise ValueError(
            f"--samples must be at most the {available} test images, got {samples}; ask for fewer"
        )
    norm, size = options.norm, options.example_eps
    chosen = choose_attacks(options.attack, norm)
    if all(ATTACKS[name].needs for name in chosen):
        raise ValueError(
            f"--attack {' '.join(chosen)} cannot attack the network, which has no kernels to "
            "widen; name another attack beside it"
        )
    return plain_json(
        {
            "attacks": chosen,
            "norm": norm,
            "eps": sorted(set(EPS[norm] if options.eps is None else options.eps)),
            "objective": options.objective,
            "steps": options.steps,
            "restarts": options.restarts,
            "samples": samples,
            "checks": options.checks,
            "check_samples": options.check_samples,
            "examples": options.examples,
            "example_eps": EXAMPLE_EPS[norm] if size is None else size,
            "batch_size": options.attack_batch_size,
        }
    )
