"""Where the paper's experiments live, which images they use, and what their stages cost."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import torchdnr
from benchmarks.paper.settings import Protocol
from torchdnr import __version__
from torchdnr.costs import Cost, record_costs
from torchdnr.data import Dataset, Splits, split
from torchdnr.evaluation.curve import plain_json, read_json, write_json
from torchdnr.evaluation.known_attacks import ATTACKS
from torchdnr.files import digest

# Of the protocol, what only concerns attacks and figures: classifiers do not depend on it.
ATTACK_KEYS = {"runs", "attacked", "eps", "sweep_eps", "attacks"}
REPORT_KEYS = {"example_eps", "nr_rejects_more_at", "note"}
CODE_FILE = "code.json"
SEED = 0  # of the networks and of the images that train them


@dataclass(frozen=True, eq=False)
class Study:
    """Where the experiments of one data set live, and what they run on.

    Attributes:
        protocol: What is done.
        data: The images.
        folder: Everything that is made.
        device: Where it runs.
        progress: Whether to show progress bars.
    """

    protocol: Protocol
    data: Dataset
    folder: Path
    device: torch.device
    progress: bool = True

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
        """Tell which test images a run draws, ``(test_samples,)``."""
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
def costed(path: Path, device: torch.device) -> Iterator[None]:
    """Record what the stages inside cost, stopped or not; add it to what ``path`` holds.

    The code that they ran goes to ``code.json`` beside it.
    """
    made_by = code_versions(path.parent)
    if (own := code_digest()) not in made_by:
        write_json(path.parent / CODE_FILE, [*made_by, own])
    with record_costs(device) as costs:
        try:
            yield
        finally:
            found = read_json(path) if path.exists() else {}
            for name, cost in costs.items():
                total = Cost(**found[name]).plus(cost) if name in found else cost
                found[name] = total.to_dict()
            if costs:
                write_json(path, found)


@cache
def code_digest() -> str:
    """Compute a fingerprint of the library's code as it was when first asked: twelve hex digits."""
    state, package = hashlib.sha256(), Path(torchdnr.__file__).parent
    for file in sorted(package.rglob("*.py")):
        state.update(f"{file.relative_to(package).as_posix()}\n".encode() + file.read_bytes())
    return state.hexdigest()[:12]


def code_versions(folder: Path) -> list[str]:
    """List the versions of the code that made what a folder holds, by their fingerprints."""
    path = folder / CODE_FILE
    return read_json(path) if path.exists() else []


def run_folder(study: Study, variant: str, run: int) -> Path:
    """Name the folder of a run."""
    return study.folder / variant / f"run-{run}"


def _as_json(value: object) -> Any:  # noqa: ANN401 - whatever a file would hold
    return json.loads(json.dumps(plain_json(value)))
