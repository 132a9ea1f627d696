"""Train the paper's network, then fit DNR and NR on it: `python train.py --help`."""

import argparse
import sys
import warnings
from collections.abc import Sequence

# Importing gpytorch makes torch announce the end of torch.jit.script: no news for our users.
warnings.filterwarnings("ignore", r"`torch\.jit\.script` is deprecated", FutureWarning)

from torchdnr.cli.classifiers import make_classifiers, summarise  # noqa: E402
from torchdnr.cli.console import Console, run_command  # noqa: E402 - after the filter
from torchdnr.cli.options import train_parser  # noqa: E402
from torchdnr.cli.run_folder import find_device, prepare  # noqa: E402
from torchdnr.distributed.processes import Processes, joined  # noqa: E402


def train(options: argparse.Namespace, processes: Processes, console: Console) -> None:
    """Make what the run folder lacks, and report how it does on clean images."""
    console.stages = 3
    with processes.first_alone():  # it downloads and writes what the others then find
        job = prepare(options, console, processes)
    classifiers = make_classifiers(job, console, processes)
    if processes.first:
        console.say(summarise(job, classifiers).text)
        console.say(
            f"network, DNR and NR: {job.folder}/; next: python attack.py --run {job.folder}"
        )
    processes.wait()  # nobody leaves while the first one may still fail


def run(options: argparse.Namespace, console: Console) -> None:
    """Join the other processes of the job, if any, and do this one's part."""
    with joined(find_device(options.device)) as processes:
        console.join(processes.rank, processes.count)
        train(options, processes, console)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments; None: those of the process.

    Returns:
        Exit code: 0 done, 2 error, 130 stopped by Ctrl-C.
    """
    options = train_parser().parse_args(argv)
    return run_command(options, lambda console: run(options, console))


if __name__ == "__main__":
    sys.exit(main())
