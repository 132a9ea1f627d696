"""Attack the classifiers of a run folder, and write the report into it."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchdnr import __version__
from torchdnr.attacks import line_search_pgd
from torchdnr.attacks.target import has_reject_column
from torchdnr.cli import Console, peak_memory_mib
from torchdnr.cli_settings import Job
from torchdnr.evaluation import (
    SecurityCurve,
    format_table,
    load_results,
    plot_curves,
    plot_examples,
    predict_labels,
    save_results,
    security_evaluation,
)
from torchdnr.evaluation.environment import describe_environment
from torchdnr.evaluation.judging import outputs
from torchdnr.pipeline import Summary

DEFAULT_SAMPLES = 50
FILES = "results.json", "curve.png", "examples.png"


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What to attack, and how.

    Attributes:
        job: The run folder and its settings.
        settings: Of the attacks; JSON values.
    """

    job: Job
    settings: dict[str, Any]

    @property
    def results(self) -> Path:
        """File of the results, written last: it tells that all is done."""
        return self.job.folder / "results.json"

    def earlier_table(self, clean: Summary) -> str | None:
        """Format the results that the folder holds, if they are those of this evaluation."""
        try:
            curves, settings = load_results(self.results)
        except (OSError, ValueError):
            return None  # none yet, or damaged: written again
        if not all((self.job.folder / name).exists() for name in settings.get("figures", ["?"])):
            return None
        known = json.loads(json.dumps(self._identity(clean)))  # tuples as lists, as in the file
        return format_table(curves) if {key: settings.get(key) for key in known} == known else None

    def run(self, classifiers: dict[str, nn.Module], clean: Summary, console: Console) -> str:
        """Attack, draw the figures and write the results.

        Args:
            classifiers: From ``make_classifiers``.
            clean: How they do on clean images.
            console: For messages and progress bars.

        Returns:
            The table of the results.

        Raises:
            OSError: If a file cannot be written; an earlier one then stays as it was.
        """
        with console.stage("attacks", self._describe()):
            curves = {
                name: self._attack(name, model, console) for name, model in classifiers.items()
            }
        with console.stage("report", f"figures and results.json in {self.job.folder}"):
            figures = ["curve.png"]
            plot_curves(curves, self.job.folder / "curve.png")
            if self._draw_examples(classifiers, console):
                figures.append("examples.png")
            cost = {
                "stage_seconds": console.seconds,
                "seconds": console.total_seconds,
                "peak_memory_mib": peak_memory_mib(),
            }
            environment = describe_environment(self.job.device)
            found = {"environment": environment, "cost": cost, "figures": figures}
            save_results(self.results, curves, self._identity(clean) | found)
        return format_table(curves)

    def _describe(self) -> str:
        sizes = " ".join(f"{eps:g}" for eps in self.settings["eps"])
        return f"DNN, NR and DNR, {self.settings['samples']} test images, eps {sizes}"

    def _identity(self, clean: Summary) -> dict[str, Any]:
        """Collect all that the numbers depend on, and what is known before the attacks."""
        return {
            "torchdnr": __version__,
            "run": self.job.settings,
            "attack": self.settings,
            "device": str(self.job.device),
            "classifiers": clean.classifiers,
        }

    def _attack(self, name: str, model: nn.Module, console: Console) -> SecurityCurve:
        images, labels = self.job.images("test")
        count = self.settings["samples"]  # any beginning of a split is a stratified sample of it
        return security_evaluation(
            model,
            images[:count],
            labels[:count],
            self.settings["eps"],
            norm=self.settings["norm"],
            init_inputs=self.job.images("svm")[0],
            batch_size=self.settings["batch_size"],
            name=name,
            settings={"seed": self.job.settings["seed"], "dataset": self.job.settings["dataset"]},
            checkpoint=self.job.folder / f"attack-{name.lower()}.safetensors",
            progress=console.progress,
        )

    def _draw_examples(self, classifiers: dict[str, nn.Module], console: Console) -> bool:
        """Draw attacked images that all classifiers get right when they are clean, if any."""
        path = self.job.folder / "examples.png"
        images, labels = self.job.images("test")
        images, labels = images[: self.settings["samples"]], labels[: self.settings["samples"]]
        right = torch.ones_like(labels, dtype=torch.bool)
        for model in classifiers.values():
            right &= self._predict(model, images) == labels
        chosen = right.nonzero()[: self.settings["examples"], 0]
        if len(chosen) == 0:
            if self.settings["examples"]:
                console.say("no examples.png: no attacked image is right for all classifiers")
            path.unlink(missing_ok=True)  # it would show other results than these
            return False
        images, labels = images[chosen], labels[chosen]
        pool = self.job.images("svm")[0]
        adversarials = {
            name: line_search_pgd(
                model,
                images,
                labels,
                self.settings["example_eps"],
                norm=self.settings["norm"],
                init_inputs=pool,
                batch_size=self.settings["batch_size"],
                progress=console.progress,
            )
            for name, model in classifiers.items()
        }
        plot_examples(
            path,
            images,
            labels,
            adversarials,
            {name: self._predict(classifiers[name], new) for name, new in adversarials.items()},
            self.settings["example_eps"],
            self.job.dataset.classes,
            norm=self.settings["norm"],
        )
        return True

    def _predict(self, model: nn.Module, images: torch.Tensor) -> torch.Tensor:
        output = outputs(model, images, self.settings["batch_size"])
        return predict_labels(output, has_reject_column(model, None))


def plan(options: argparse.Namespace, job: Job) -> Evaluation:
    """Settle the settings of the attacks, before any costly work.

    Args:
        options: Parsed options of ``attack.py``.
        job: The run folder and its settings.

    Returns:
        The evaluation, not yet begun.

    Raises:
        ValueError: If there are fewer test images than asked for.
    """
    available = len(job.splits.test)
    samples = min(DEFAULT_SAMPLES, available) if options.samples is None else options.samples
    if samples > available:
        raise ValueError(
            f"--samples must be at most the {available} test images, got {samples}; ask for fewer"
        )
    settings = {
        "eps": sorted(set(options.eps)),
        "norm": 2,
        "samples": samples,
        "examples": options.examples,
        "example_eps": options.example_eps,
        "batch_size": options.attack_batch_size,
    }
    return Evaluation(job, settings)
