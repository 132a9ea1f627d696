"""Attack the classifiers of a run folder and examine the result; finished work is not repeated."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchdnr.attacks.line_search import line_search_pgd
from torchdnr.cli.classifiers import Summary
from torchdnr.cli.console import Console
from torchdnr.cli.declaration import in_words
from torchdnr.cli.run_folder import Job
from torchdnr.cli.settings import AGAINST_ATTACKS, AttackSettings
from torchdnr.decisions import has_reject_column, predict_labels
from torchdnr.distributed.processes import Processes
from torchdnr.evaluation.checks.result import broken_off
from torchdnr.evaluation.checks.run import run_checks
from torchdnr.evaluation.curve import SecurityCurve
from torchdnr.evaluation.detection import Measures, measure
from torchdnr.evaluation.judging import outputs
from torchdnr.evaluation.line_up import Attack, build_line_up
from torchdnr.evaluation.security import security_evaluations
from torchdnr.evaluation.stratified import stratified_curve
from torchdnr.evaluation.threshold_sweep import threshold_sweep, thresholds_at_rates
from torchdnr.files import digest, plain_json, read_json, write_json

SWEEP_RATES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4)
"""Shares of clean calibration images that the thresholds of a sweep reject."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What to attack, and how."""

    job: Job
    settings: AttackSettings
    classifiers: dict[str, nn.Module]  # those to attack
    surrogate: nn.Module  # the network, for attacks that transfer from it
    clean: Summary  # how they do on clean images
    processes: Processes
    console: Console

    def identity(self, settings: AttackSettings) -> dict[str, Any]:
        """List all that the numbers depend on, and what is known before the attacks, as JSON."""
        identity = {
            "torchdnr": version("torchdnr"),
            "run": self.job.settings.to_json(),
            "attack": settings.to_json(),
            "device": self.job.device.type,
            "classifiers": self.clean.classifiers,
        }
        return json.loads(json.dumps(plain_json(identity)))  # tuples as lists, as in a file

    def images(self) -> tuple[Tensor, Tensor]:
        """Select the images to attack, and their labels."""
        images, labels = self.job.images("test")
        count = self.settings.samples  # any beginning of a split is a stratified sample of it
        return images[:count], labels[:count]

    @cached_property
    def task(self) -> dict[str, Any]:
        """What the attacks may change, want and keep to: ``mask``, ``targets`` and ``levels``."""
        settings = self.settings
        mask = settings.read_mask(self.images()[0])
        return {"mask": mask, "targets": settings.targets, "levels": settings.levels}

    def line_up(self) -> dict[str, Attack]:
        """Build the attacks."""
        return build_line_up(
            self.settings.attacks,
            self.job.images("svm")[0],
            norm=self.settings.norm,
            batch_size=self.settings.batch_size,
            surrogate=self.surrogate,
            options=self._options("objective", "steps", "restarts"),
        )

    def attack(self) -> dict[str, SecurityCurve]:
        """Attack all classifiers, in all processes together."""
        run = self.job.settings
        return security_evaluations(
            self.classifiers,
            *self.images(),
            self.settings.eps,
            norm=self.settings.norm,
            attacks=self.line_up(),
            every_eps=self.settings.every_eps,
            init_inputs=self.job.images("svm")[0],
            **self.task,
            batch_size=self.settings.batch_size,
            settings={"seed": run.seed, "dataset": run.dataset},
            checkpoints={
                name: self.job.folder / f"attack-{name.lower()}.safetensors"
                for name in self.classifiers
            },
            processes=self.processes,
            progress=self.console.progress,
            say=lambda text: self.console.say(f"    {text}"),
        )

    def examine(self, curves: Mapping[str, SecurityCurve]) -> dict[str, dict[str, Any]]:
        """Check the attacks, and measure what was asked for beside the security curves.

        "checks", and on request "stratified" and "sweeps", lead to the ``to_dict()`` of a
        ``CheckReport``, ``StratifiedCurve`` or ``ThresholdSweep`` by classifier.
        """
        results: dict[str, dict[str, Any]] = {"checks": {}}
        if self.settings.checks:
            with self.console.stage("checks", "were the attacks as strong as they should be?"):
                results["checks"] = self._each("checks", curves, self._check)
        eps = self.example_eps()
        if self.settings.stratified and eps is not None:
            with self.console.stage("stratified", f"rejecting early is an error, eps {eps:g}"):
                results["stratified"] = self._each(
                    "stratified", curves, lambda name, curve: self._stratify(name, curve, eps)
                )
        if self.settings.sweep and eps is not None:
            rejecting = {name: curve for name, curve in curves.items() if curve.rejects}
            with self.console.stage("sweep", f"false rejection rates {in_words(SWEEP_RATES)}"):
                results["sweeps"] = self._each("sweeps", rejecting, self._sweep)
        return results

    def measure(self, curves: Mapping[str, SecurityCurve]) -> dict[str, Measures]:
        """Measure how well rejection does its work."""
        return {
            name: measure(
                model,
                self.images()[0],
                curves[name],
                calibration=self.job.images("threshold"),
                batch_size=self.settings.batch_size,
            )
            for name, model in self.classifiers.items()
        }

    def example_eps(self) -> float | None:
        """Choose the attacked eps > 0 that is nearest to the one of the examples, if any."""
        positive = [eps for eps in self.settings.eps if eps > 0]
        return min(positive, key=lambda eps: abs(eps - self.settings.example_eps), default=None)

    def examples(
        self, curves: Mapping[str, SecurityCurve], eps: float
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]] | None:
        """Select a few images that all classifiers get right when they are clean, if any.

        The last of what is returned are the worst-case points at an eps by classifier.
        """
        images, labels = self.images()
        right = torch.ones_like(labels, dtype=torch.bool)
        for name in self.classifiers:
            right &= self.predict(name, images) == labels
        rows = right.nonzero()[: self.settings.examples, 0]
        if len(rows) == 0:
            return None
        points = {name: _points(curve)[curve.eps.index(eps)] for name, curve in curves.items()}
        adversarials = {name: some[rows.cpu()].to(images) for name, some in points.items()}
        return images[rows], labels[rows], adversarials

    def predict(self, name: str, images: Tensor) -> Tensor:
        """Predict labels, or ``REJECT``, by one of the classifiers."""
        model = self.classifiers[name]
        output = outputs(model, images, self.settings.batch_size)
        return predict_labels(output, has_reject_column(model, None))

    def _options(self, *names: str) -> dict[str, Any]:
        """Return the seed, and those of the named options of attacks that were given."""
        given = {name: getattr(self.settings, name) for name in names}
        given = {name: value for name, value in given.items() if value is not None}
        return {"seed": self.job.settings.seed, **given}

    def _each(
        self,
        kind: str,
        curves: Mapping[str, SecurityCurve],
        make: Callable[[str, SecurityCurve], dict[str, Any]],
    ) -> dict[str, dict[str, Any]]:
        """Make a result of each curve, each in one process, unless a file of the folder holds it.

        ``kind`` is the beginning of the files' names.
        """
        results: dict[str, dict[str, Any]] = {}
        for number, (name, curve) in enumerate(curves.items()):
            if self.processes.mine(number):
                path = self.job.folder / f"{kind}-{name.lower()}.json"
                points = {"predictions": curve.predictions, "adversarial": _points(curve)}
                known = {**self._identity_of(name), "points": digest(points)}
                result = _kept(path, kind, known)
                if result is None:
                    result = plain_json(make(name, curve))
                    if not broken_off(result.get("checks", [])):  # those may end well next time
                        write_json(path, {"of": known, kind: result})
                results[name] = result
        self.processes.wait()
        return {
            name: json.loads(
                self.processes.broadcast_text(
                    json.dumps(results.get(name)), self.processes.owner(number)
                )
            )
            for number, name in enumerate(curves)
        }

    def _identity_of(self, name: str) -> dict[str, Any]:
        """List what the results of one classifier depend on, whatever else the folder holds."""
        alone = replace(
            self.settings, classifiers=None, stratified=False, sweep=False, save_images=False
        )
        identity = self.identity(alone)
        run = {k: v for k, v in identity["run"].items() if k not in AGAINST_ATTACKS}
        return {**identity, "run": run, "classifiers": identity["classifiers"][name]}

    def _check(self, name: str, curve: SecurityCurve) -> dict[str, Any]:
        return run_checks(
            self.classifiers[name],
            *self.images(),
            curve,
            attacks=self.line_up(),
            init_inputs=self.job.images("svm")[0],
            mask=self.task["mask"],
            levels=self.task["levels"],
            surrogate=self.surrogate if curve.rejects else None,
            batch_size=self.settings.batch_size,
            only=self.settings.only_checks,
            samples=self.settings.check_samples,
            seed=self.job.settings.seed,
            progress=self.console.progress,
        ).to_dict()

    def _stratify(self, name: str, curve: SecurityCurve, eps: float) -> dict[str, Any]:
        return stratified_curve(
            self.classifiers[name],
            *self.images(),
            _points(curve)[curve.eps.index(eps)],
            eps,
            norm=self.settings.norm,
            reject_options=self._options("steps"),
            **self.task,
            batch_size=self.settings.batch_size,
            name=name,
            progress=self.console.progress,
        ).to_dict()

    def _sweep(self, name: str, curve: SecurityCurve) -> dict[str, Any]:
        model, size = self.classifiers[name], self.settings.batch_size
        pool = self.job.images("svm")[0]
        options: dict[str, Any] = {"norm": curve.norm, "init_inputs": pool, "batch_size": size}
        options |= {"objective": "decision", **self._options("objective", "steps", "restarts")}

        calibration = outputs(model, self.job.images("threshold")[0], size)
        return threshold_sweep(
            model,
            *self.images(),
            {eps: points for eps, points in zip(curve.eps, _points(curve), strict=True) if eps > 0},
            thresholds_at_rates(calibration[:, :-1], SWEEP_RATES),
            attack=partial(line_search_pgd, **options),
            norm=curve.norm,
            **self.task,
            batch_size=size,
            name=name,
            progress=self.console.progress,
        ).to_dict()


def _points(curve: SecurityCurve) -> Tensor:
    if curve.adversarial is None:  # only of a curve that was loaded
        raise ValueError("the curve holds no adversarial points; expected one just measured")
    return curve.adversarial


def _kept(path: Path, kind: str, known: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read a result that a file holds, if it is of what is known; else None."""
    try:
        content = read_json(path)
        return content[kind] if content["of"] == known else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # none yet, or damaged: made again
