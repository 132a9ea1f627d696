"""The paper's protocol, run by run: samples, networks, classifiers, attacks, thresholds.

Everything is kept in the folder as soon as it is made, and is not made again.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import torchdnr
from benchmarks.paper.settings import Protocol, Variant
from torchdnr import DNR, NR, __version__
from torchdnr.attacks import line_search_pgd
from torchdnr.data import Dataset, Splits, split
from torchdnr.decisions import has_reject_column
from torchdnr.evaluation import SecurityCurve, build_line_up, predict_labels
from torchdnr.evaluation.judging import outputs, worst_predictions
from torchdnr.evaluation.line_up import ATTACKS
from torchdnr.evaluation.metrics import accuracy_under_attack, decision_rates, rejection_rate
from torchdnr.evaluation.report.table import load_results, save_results
from torchdnr.evaluation.security import security_evaluations
from torchdnr.evaluation.threshold_sweep import threshold_sweep, thresholds_at_rates
from torchdnr.files import digest, plain_json, read_json, save_tensors, write_json
from torchdnr.models import load_network, save_network
from torchdnr.models.training import train_network
from torchdnr.resources import Cost, record_costs, stage

BATCH_SIZE = 256
REJECTION_RATE = 0.10
SWEEP_RATES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4)
EXAMPLES, EXAMPLES_FILE = 5, "examples.safetensors"
# Of the protocol, what only concerns attacks and figures: classifiers do not depend on it.
ATTACK_KEYS = {"runs", "attacked", "eps", "sweep_eps", "attacks"}
REPORT_KEYS = {"example_eps", "nr_rejects_more_at", "note"}
CODE_FILE = "code.json"
SEED = 0  # of the networks and of the images that train them


@cache
def code_digest() -> str:
    """Compute a fingerprint of the library's code as it was when first asked: twelve hex digits."""
    state, package = hashlib.sha256(), Path(torchdnr.__file__).parent
    for file in sorted(package.rglob("*.py")):
        state.update(f"{file.relative_to(package).as_posix()}\n".encode() + file.read_bytes())
    return state.hexdigest()[:12]


@dataclass(frozen=True, eq=False)
class Study:
    """Where the experiments of one data set live, and what they run on.

    Attributes:
        protocol: What is done.
        data: The images.
        folder: Everything that is made.
        device: Where it runs.
        progress: Whether to show progress bars.
        make_line_up: Builds the attacks, as ``build_line_up`` does.
        code: Fingerprint of the code that makes the pieces.
    """

    protocol: Protocol
    data: Dataset
    folder: Path
    device: torch.device
    progress: bool = True
    make_line_up: Callable[..., dict[str, Any]] = build_line_up
    code: str = field(default_factory=code_digest)

    def classifier_settings(self) -> dict[str, Any]:
        """Collect what the classifiers depend on; JSON values."""
        protocol = self.protocol.to_dict()
        kept = protocol.keys() - ATTACK_KEYS - REPORT_KEYS
        data = {name: value for name, value in vars(self.data).items() if torch.is_tensor(value)}
        found = {"torchdnr": __version__, "data": digest(data)}
        return _as_json(found | {key: protocol[key] for key in sorted(kept)})

    def attack_settings(self) -> dict[str, Any]:
        """Collect what the attacks depend on beside the classifiers; JSON values."""
        protocol = self.protocol.to_dict()
        found = {key: protocol[key] for key in sorted(ATTACK_KEYS - {"runs"})}
        return _as_json(
            found | {"options": {name: ATTACKS[name].defaults for name in found["attacks"]}}
        )

    def claim_folder(self) -> None:
        """Write down which classifiers the folder is for, or refuse one that is for others.

        Raises:
            ValueError: If the folder holds classifiers of other experiments.
        """
        known, path = self.classifier_settings(), self.folder / "protocol.json"
        if path.exists() and (earlier := read_json(path)) != known:
            differ = [key for key in known | earlier if known.get(key) != earlier.get(key)]
            raise ValueError(
                f"{self.folder} holds classifiers with other {', '.join(differ)}; choose another "
                "--folder"
            )
        write_json(path, known)

    def samples(self, run: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Draw the images of a run, on the device: svm, threshold and test."""
        left, parts = self._draw(run)
        found = {
            "svm": left.select(parts.svm),
            "threshold": left.select(parts.threshold),
            "test": left.select(parts.test, test=True),
        }
        return {name: (x.to(self.device), y.to(self.device)) for name, (x, y) in found.items()}

    def test_rows(self, run: int) -> Tensor:
        """Return which test images a run draws, ``(test_samples,)``."""
        return self._draw(run)[1].test

    def _draw(self, run: int) -> tuple[Dataset, Splits]:
        """Draw a run's images from the data without those that train the networks."""
        protocol, data = self.protocol, self.data
        rest = torch.ones(len(data.labels_train), dtype=torch.bool)
        rest[self.network_rows()] = False
        left = replace(
            data, images_train=data.images_train[rest], labels_train=data.labels_train[rest]
        )
        return left, split(
            left,
            network=0,
            svm=protocol.svm_samples,
            threshold=protocol.threshold_samples,
            test=protocol.test_samples,
            seed=run,
        )

    def network_rows(self) -> Tensor:
        """Choose the images that train the networks, ``(k,)``."""
        parts: Splits = split(
            self.data,
            network=self.protocol.network_samples,
            svm=0,
            threshold=0,
            test=0,
            seed=SEED,
        )
        return parts.network


@contextmanager
def costed(study: Study, path: Path) -> Iterator[None]:
    """Record what the stages inside cost, stopped or not; add it to what ``path`` holds.

    The code that they ran goes to ``code.json`` beside it.
    """
    made_by = code_versions(path.parent)
    if study.code not in made_by:
        write_json(path.parent / CODE_FILE, [*made_by, study.code])
    with record_costs(study.device) as costs:
        try:
            yield
        finally:
            totals = read_json(path) if path.exists() else {}
            for name, cost in costs.items():
                total = Cost(**totals[name]).plus(cost) if name in totals else cost
                totals[name] = total.to_dict()
            if costs:
                write_json(path, totals)


def code_versions(folder: Path) -> list[str]:
    """List the versions of the code that made what a folder holds, by their fingerprints."""
    path = folder / CODE_FILE
    return read_json(path) if path.exists() else []


def run_folder(study: Study, variant: str, run: int) -> Path:
    """Name the folder of a run."""
    return study.folder / variant / f"run-{run}"


def _as_json(value: object) -> Any:  # noqa: ANN401 - whatever a file would hold
    return json.loads(json.dumps(plain_json(value)))


def make_network(study: Study, variant: Variant) -> nn.Module:
    """Load a network, or train it; its accuracy on the whole test set goes beside it."""
    name = variant.network.__name__
    path = study.folder / f"{name}.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)
        channels = study.data.images_train.shape[1]
        net = variant.network(num_classes=len(study.data.classes), channels=channels)
    if path.exists():
        load_network(net, path)
    else:
        with costed(study, study.folder / f"{name}-costs.json"), stage("network"):
            for number, settings in enumerate(variant.trainings):
                train_network(
                    net,
                    *study.data.select(study.network_rows()),
                    settings,
                    seed=SEED + number,
                    device=study.device,
                    checkpoint=study.folder / f"{name}-training-{number}.safetensors",
                    progress=study.progress,
                )
        save_network(net, path)
    return net.to(study.device).eval()


def network_accuracy(study: Study, variant: Variant) -> float:
    """Measure a network on the whole test set; kept in a file."""
    path = study.folder / f"{variant.network.__name__}-accuracy.json"
    if not path.exists():
        net = make_network(study, variant)
        images, labels = study.data.select(torch.arange(len(study.data.labels_test)), test=True)
        found = predict_labels(outputs(net, images.to(study.device), BATCH_SIZE), False)
        write_json(path, {"accuracy": accuracy_under_attack(found.cpu(), labels, eps=0)})
    return read_json(path)["accuracy"]


def make_classifiers(study: Study, variant_name: str, run: int) -> dict[str, nn.Module]:
    """Load or fit DNR and NR of a run, and set their thresholds.

    NR is fitted after DNR with the values that DNR's search found for the same layer, images and
    folds: its own search would find them again.
    """
    variant = study.protocol.variants[variant_name]
    folder = run_folder(study, variant_name, run)
    net = make_network(study, variant)
    samples = study.samples(run)
    options = {"seed": run, "hyperparameters": variant.hyperparameters}

    def made(kind: type, build: Callable[[], DNR | NR]) -> DNR | NR:
        path = folder / f"{kind.__name__.lower()}.safetensors"
        if path.exists():
            return kind.load(path, net)
        model = build().to(study.device)
        with costed(study, folder / f"{kind.__name__.lower()}-costs.json"):
            model.fit(*samples["svm"], progress=study.progress)
            model.calibrate(samples["threshold"][0], REJECTION_RATE)
        model.save(path)
        return model

    dnr = made(DNR, lambda: DNR(net, variant.layers, **options))
    last = variant.layers[-1]
    chosen = {last: tuple(dnr.selection[last][key] for key in ("C", "gamma"))}
    nr = made(NR, lambda: NR(net, last, seed=run, hyperparameters=chosen))
    return {"DNN": net, "NR": nr, "DNR": dnr}


def attack(study: Study, variant: str, run: int) -> dict[str, SecurityCurve]:
    """Attack the classifiers of a run with the line-up; kept step by step."""
    folder = run_folder(study, variant, run)
    classifiers = make_classifiers(study, variant, run)
    samples = study.samples(run)
    inputs, labels = (part[: study.protocol.attacked] for part in samples["test"])
    line_up = study.make_line_up(
        study.protocol.attacks,
        samples["svm"][0],
        batch_size=BATCH_SIZE,
        surrogate=classifiers["DNN"],
        options={"seed": run},
    )
    curves = {}
    for name, model in classifiers.items():
        with costed(study, folder / f"{name.lower()}-costs.json"), stage("attack"):
            curves |= security_evaluations(
                {name: model},
                inputs,
                labels,
                study.protocol.eps,
                attacks=line_up,
                init_inputs=samples["svm"][0],
                batch_size=BATCH_SIZE,
                settings={"seed": run},
                checkpoints={name: folder / f"attack-{name.lower()}.safetensors"},
                progress=study.progress,
            )
    return curves


def finish(study: Study, variant: str, run: int, *, reattack: bool) -> None:
    """Attack, sweep theta, and write the results of a run, unless they are there."""
    folder = run_folder(study, variant, run)
    path = folder / "results.json"
    made_of = {"classifiers": study.classifier_settings(), "attack": study.attack_settings()}
    if path.exists():
        known = load_results(path)[1]
        same = all(known.get(key) == value for key, value in made_of.items())
        if same and (known["reattacked"] or not reattack):
            return
    classifiers = make_classifiers(study, variant, run)
    samples = study.samples(run)
    curves = attack(study, variant, run)
    sweeps = {}
    for name in ("NR", "DNR"):
        with costed(study, folder / f"{name.lower()}-costs.json"), stage("theta sweep"):
            sweeps[name] = _sweep(study, classifiers[name], curves[name], samples, run, reattack)
    inputs, labels = samples["test"]
    _save_examples(study, folder / EXAMPLES_FILE, classifiers, samples)
    settings = {
        **made_of,
        "run": run,
        "variant": variant,
        "reattacked": reattack,
        "network": {
            "digest": digest(classifiers["DNN"].state_dict()),
            "test_accuracy": network_accuracy(study, study.protocol.variants[variant]),
        },
        "clean": {
            name: _clean(model, inputs, labels, samples["threshold"][0])
            for name, model in classifiers.items()
        },
    }
    save_results(path, curves, settings, {"sweeps": plain_json(sweeps)})


def _sweep(
    study: Study,
    model: nn.Module,
    curve: SecurityCurve,
    samples: Mapping[str, tuple[Tensor, Tensor]],
    run: int,
    reattack: bool,
) -> dict[str, Any]:
    """Vary theta on the worst points of the curve, and if wanted attack again at each.

    What a theta costs without attack is measured on all test images of the run.
    """
    images, truth = samples["test"]
    inputs, labels = (part[: study.protocol.attacked] for part in samples["test"])
    sweep = threshold_sweep(
        model,
        inputs,
        labels,
        _points(curve, study.protocol.sweep_eps),
        _thresholds(model, samples["threshold"][0]),
        attack=_again(samples["svm"][0], run) if reattack else None,
        name=curve.name,
        progress=study.progress,
    )
    scores = outputs(model, images, BATCH_SIZE)[None]
    clean = [
        decision_rates(worst_predictions(scores, truth, True, theta), truth, 0.0)
        for theta in sweep.thresholds
    ]
    return replace(
        sweep,
        clean_accuracy=[rates.accuracy for rates in clean],
        false_rejection_rate=[rates.rejection for rates in clean],
    ).to_dict()


def _clean(model: nn.Module, inputs: Tensor, labels: Tensor, calibration: Tensor) -> dict[str, Any]:
    """Describe a classifier, and how it does on all clean test images of the run."""
    reject = has_reject_column(model, None)
    found = predict_labels(outputs(model, inputs, BATCH_SIZE), reject)
    entry = {
        "accuracy": accuracy_under_attack(found, labels, eps=0),
        "samples": len(labels),
        "right": (found == labels).int().tolist(),
    }
    if reject:
        before = predict_labels(outputs(model, calibration, BATCH_SIZE), reject)
        chosen = {
            name: {key: value[key] for key in ("C", "gamma")}
            for name, value in model.selection.items()
        }
        svms = dict(zip(model.layers, model.base_svms, strict=True))
        if model.combiner is not None:
            svms["combiner"] = model.combiner
        entry |= {
            "rejection_rate": rejection_rate(found),
            "calibration_rejection_rate": rejection_rate(before),
            "selection": chosen,
            "support_vectors": {name: len(svm.support_vectors) for name, svm in svms.items()},
        }
    return entry


def _points(curve: SecurityCurve, eps: tuple[float, ...]) -> Mapping[float, Tensor]:
    return {value: curve.adversarial[curve.eps.index(value)] for value in eps}


def _thresholds(model: nn.Module, calibration: Tensor) -> list[float]:
    scores = outputs(model, calibration, BATCH_SIZE)[:, :-1]
    return thresholds_at_rates(scores, SWEEP_RATES)


def _again(pool: Tensor, run: int) -> Callable[..., Tensor]:
    """Build the attack that is repeated at every theta."""

    def attack_once(model: nn.Module, inputs: Tensor, labels: Tensor, eps: float) -> Tensor:
        return line_search_pgd(
            model,
            inputs,
            labels,
            eps,
            objective="decision",
            init_inputs=pool,
            batch_size=BATCH_SIZE,
            seed=run,
        )

    return attack_once


def _save_examples(
    study: Study,
    path: Path,
    classifiers: Mapping[str, nn.Module],
    samples: Mapping[str, tuple[Tensor, Tensor]],
) -> None:
    """Attack a few images that all classifiers get right, for Figs. 5 and 6, and save them."""
    images, labels = samples["test"]

    def predict(model: nn.Module, inputs: Tensor) -> Tensor:
        return predict_labels(outputs(model, inputs, BATCH_SIZE), has_reject_column(model, None))

    right = torch.stack([predict(model, images) == labels for model in classifiers.values()])
    chosen = right.all(dim=0).nonzero()[:EXAMPLES, 0]
    images, labels = images[chosen], labels[chosen]
    found = {"images": images, "labels": labels}
    for name, model in classifiers.items():
        found[f"{name}.points"] = images
        if len(images):
            found[f"{name}.points"] = line_search_pgd(
                model, images, labels, study.protocol.example_eps, init_inputs=samples["svm"][0]
            )
            found[f"{name}.predictions"] = predict(model, found[f"{name}.points"])
    save_tensors(path, found, {}, kind="examples")
