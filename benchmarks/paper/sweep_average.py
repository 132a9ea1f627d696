"""Threshold sweeps of several runs, averaged."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from torchdnr.evaluation.intervals import Estimate
from torchdnr.evaluation.threshold_sweep import ThresholdSweep

_PER_THETA = "clean_accuracy", "false_rejection_rate"
_PER_EPS = "accuracy", "rejection_rate", "reattacked_accuracy", "reattacked_rejection_rate"


def average_sweeps(name: str, sweeps: Sequence[Mapping[str, Any]]) -> ThresholdSweep:
    """Average the sweeps of several runs whose thresholds reject the same shares.

    The thresholds of the runs differ, and so do the rates that they reach on clean inputs; the
    k-th thresholds of all runs are put together. Of several runs the ends of every interval are
    mean minus and plus standard deviation; of one they are its own confidence interval.

    Args:
        name: Name of the classifier.
        sweeps: ``ThresholdSweep.to_dict()`` of each run.

    Returns:
        ``ThresholdSweep`` of means.

    Raises:
        ValueError: If there is none, or they differ in eps or in the number of thresholds.
    """
    shapes = {(tuple(sweep["eps"]), len(sweep["thresholds"]), sweep["norm"]) for sweep in sweeps}
    if len(shapes) != 1:
        raise ValueError(
            "sweeps must be at least one, over the same eps, norm and number of thresholds, got "
            f"{len(shapes)} kinds"
        )
    first = sweeps[0]
    rows: dict[str, Any] = {key: _average([sweep[key] for sweep in sweeps]) for key in _PER_THETA}
    for key in _PER_EPS:
        known = all(sweep[key] is not None for sweep in sweeps)
        rows[key] = None
        if known:
            rows[key] = [
                _average([sweep[key][row] for sweep in sweeps]) for row in range(len(first["eps"]))
            ]
    thetas = torch.tensor([sweep["thresholds"] for sweep in sweeps], dtype=torch.float64)
    return ThresholdSweep(
        name=name,
        norm=first["norm"],
        eps=list(first["eps"]),
        thresholds=thetas.mean(dim=0).tolist(),
        settings={**first["settings"], "runs": len(sweeps)},
        **rows,
    )


def _average(runs: Sequence[Sequence[Mapping[str, Any]]]) -> list[Estimate]:
    """Average estimates over the runs, theta by theta."""
    if len(runs) == 1:
        return [Estimate(**entry) for entry in runs[0]]
    values = torch.tensor([[entry["value"] for entry in run] for run in runs], dtype=torch.float64)
    middle, deviation = values.mean(dim=0), values.std(dim=0)
    low, high = (middle - deviation).clamp(0, 1), (middle + deviation).clamp(0, 1)
    counts = [sum(run[index]["n"] for run in runs) for index in range(len(runs[0]))]
    columns = zip(middle.tolist(), low.tolist(), high.tolist(), counts, strict=True)
    return [Estimate(*column) for column in columns]
