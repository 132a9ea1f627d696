"""The JSON of bench_svm.py: what an earlier run left, and what each record is stamped with."""

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


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
    found = json.loads(path.read_text())
    header = json.loads(json.dumps(header))  # tuples become lists, as in the file
    conditions = ("environment", "versions", "settings")
    differ = [name for name in conditions if found.get(name) != header[name]]
    if not differ:
        return {**found, **header}
    if fresh:
        return empty
    raise ValueError(
        f"{path} was measured with other {', '.join(differ)}: choose another --output, or let "
        "--fresh replace it"
    )


def commit() -> str | None:
    """Return the commit of the working tree, marked if it has changes; None outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return found.stdout.strip() or None


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
