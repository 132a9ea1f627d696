"""What all benchmarks share: where results live, what a record is stamped with, how to time."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from torchdnr.cli.classifiers import make_classifiers
from torchdnr.cli.console import Console
from torchdnr.cli.options import attack_parser
from torchdnr.cli.run_folder import Job, prepare

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"


class Page(NamedTuple):
    """How the results of one benchmark are read: the page NAME.md beside NAME.json.

    Attributes:
        title: What was measured.
        markdown: Formats the contents of the JSON: the page but for its title.
        headline: Formats its most important numbers, in one line.
    """

    title: str
    markdown: Callable[[Any], str]
    headline: Callable[[Any], str]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Format a table: lines of Markdown."""
    rule = f"|{'---|' * len(header)}"
    return [f"| {' | '.join(header)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)]


def machine(environment: Mapping[str, Any]) -> str:
    """Name processor, threads and version of torch of a record."""
    threads = environment["threads"]
    return (
        f"{threads} thread{'s' * (threads > 1)} of an {environment['processor']}, torch "
        f"{environment['torch']}"
    )


def load_run(
    folder: str | Path, device: str | None = None, data_root: Path | None = None
) -> tuple[Job, dict[str, torch.nn.Module]]:
    """Load a run folder of train.py or attack.py, and make the classifiers that it lacks.

    Args:
        folder: The run folder.
        device: "cpu", "cuda" or "cuda:N"; default: that of the scripts.
        data_root: Folder of the data sets; default: that of the scripts.

    Returns:
        The settings and images of the run; and DNN, NR and DNR.
    """
    arguments = ["--run", str(folder), "--quiet"]
    arguments += ["--device", device] if device else []
    arguments += ["--data-root", str(data_root)] if data_root else []
    console = Console(quiet=True)
    job = prepare(attack_parser().parse_args(arguments), console)
    return job, make_classifiers(job, console)


def load_samples(run: str, samples: int, device: str | None) -> SimpleNamespace:
    """Load the classifiers of a run folder, its first test images, and the images of its fit."""
    job, classifiers = load_run(run, device)
    images, labels = job.images("test")
    pool, pool_labels = job.images("svm")
    return SimpleNamespace(
        classifiers=classifiers,
        inputs=images[:samples],
        labels=labels[:samples],
        pool=pool,
        pool_labels=pool_labels,
        device=job.device,
    )


def timed(
    call: Callable[[], Any], device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, Any]:
    """Return the seconds that a call takes, and its result.

    Args:
        call: What is timed.
        device: Synchronised on both sides if it is a GPU.
        clock: On a CPU that other programs use as well, ``time.process_time``.

    Returns:
        Seconds and result.
    """
    cuda = device.type == "cuda"
    if cuda:
        clock = time.perf_counter
        torch.cuda.synchronize(device)
    began = clock()
    result = call()
    if cuda:
        torch.cuda.synchronize(device)
    return clock() - began, result


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    repeats: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time calls in turn, after one round to warm up: a slow spell of the machine hits them all."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(repeats + 1):
        for name, call in calls.items():
            spent, _ = timed(call, device, clock)
            if number:
                seconds[name].append(spent)
    return seconds


def load_results(path: Path, header: dict[str, Any], fresh: bool) -> dict[str, Any]:
    """Read what an earlier run measured under the same conditions.

    Args:
        path: The JSON.
        header: Environment, versions and settings of this run.
        fresh: Whether to ignore results measured under other conditions.

    Returns:
        The results to add to.

    Raises:
        ValueError: If the file holds results of other conditions and ``fresh`` is not set.
    """
    empty = {**header, "sections": {}}
    if not path.is_file():
        return empty
    earlier = json.loads(path.read_text())
    header = json.loads(json.dumps(header))  # tuples become lists, as in the file
    conditions = ("environment", "versions", "settings")
    differ = [name for name in conditions if earlier.get(name) != header[name]]
    if not differ:
        return {**earlier, **header}
    if fresh:
        return empty
    raise ValueError(
        f"{path} was measured with other {', '.join(differ)}: choose another --output, or let "
        "--fresh replace it"
    )


def stamp() -> dict[str, Any]:
    """Collect what every measurement is stamped with: commit, and how busy the machine is."""
    return {"commit": commit(), "busy_cores_before": busy_cores()}


def commit() -> str | None:
    """Return the commit of the working tree, marked if it has changes; None outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return answer.stdout.strip() or None


def busy_cores(seconds: float = 0.5) -> float | None:
    """Measure how many cores other programs use while this one waits: far above 0, times mislead.

    Args:
        seconds: How long to watch.

    Returns:
        Cores in use; None where the system does not tell (outside Linux).
    """
    try:
        before = _processor_ticks()
        time.sleep(seconds)
        after = _processor_ticks()
    except OSError:
        return None
    total, idle = after[0] - before[0], after[1] - before[1]
    return round((1 - idle / max(1, total)) * (os.cpu_count() or 1), 2)


def _processor_ticks() -> tuple[int, int]:
    """Read the ticks of all cores since the start of the system: in all, and idle."""
    ticks = [int(v) for v in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return sum(ticks), ticks[3] + ticks[4]
