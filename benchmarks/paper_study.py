"""Where the paper's experiments live, which images they use, and what their stages cost."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from paper_settings import Protocol
from torch import Tensor

from torchdnr import __version__
from torchdnr.costs import record_costs
from torchdnr.data import Dataset, Splits, split
from torchdnr.evaluation.curve import plain_json, read_json, write_json
from torchdnr.files import digest

# Of the protocol, what only concerns attacks and figures: classifiers do not depend on it.
ATTACK_KEYS = {"runs", "attacked", "eps", "sweep_eps", "attacks"}
REPORT_KEYS = {"example_eps", "nr_rejects_more_at", "note"}
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

    def claim_folder(self) -> None:
        """Write down which classifiers the folder is for, or refuse one that is for others.

        Raises:
            ValueError: If the folder holds classifiers of other experiments.
        """
        images = {"train": self.data.images_train, "test": self.data.images_test}
        protocol = self.protocol.to_dict()
        protocol = {key: protocol[key] for key in protocol.keys() - ATTACK_KEYS - REPORT_KEYS}
        known = {"torchdnr": __version__, **protocol, "data": digest(images)}
        known = json.loads(json.dumps(plain_json(known)))
        path = self.folder / "protocol.json"
        if path.exists() and read_json(path) != known:
            raise ValueError(
                f"{self.folder} holds classifiers of another protocol; choose another --folder"
            )
        write_json(path, known)

    @property
    def attack_settings(self) -> dict[str, Any]:
        """What the attacks of a run depend on beside its classifiers; JSON values."""
        protocol = self.protocol.to_dict()
        found = {key: protocol[key] for key in ATTACK_KEYS - {"runs"}}
        return json.loads(json.dumps(plain_json(found)))

    def samples(self, run: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Draw the images of a run, on the device: svm, threshold and test."""
        protocol, data = self.protocol, self.data
        rest = torch.ones(len(data.labels_train), dtype=torch.bool)
        rest[self.network_rows()] = False
        left = replace(
            data, images_train=data.images_train[rest], labels_train=data.labels_train[rest]
        )
        theta, from_test = protocol.threshold_samples, protocol.threshold_from_test
        parts = split(
            left,
            network=0,
            svm=protocol.svm_samples,
            threshold=0 if from_test else theta,
            test=protocol.test_samples + (theta if from_test else 0),
            seed=run,
        )
        test = parts.test[: protocol.test_samples]
        found = {
            "svm": left.select(parts.svm),
            "threshold": left.select(parts.test[len(test) :], test=True)
            if from_test
            else left.select(parts.threshold),
            "test": left.select(test, test=True),
        }
        return {name: (x.to(self.device), y.to(self.device)) for name, (x, y) in found.items()}

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
    """Record what the stages inside cost, beside what is written at ``path`` already."""
    with record_costs(device) as costs:
        yield
    if costs:
        earlier = read_json(path) if path.exists() else {}
        write_json(path, earlier | {name: cost.to_dict() for name, cost in costs.items()})


def run_folder(study: Study, variant: str, run: int) -> Path:
    """Name the folder of a run."""
    return study.folder / variant / f"run-{run}"
