"""Train the paper's network, then fit DNR and NR on it."""

import argparse
from collections.abc import Sequence

from torchdnr.cli.classifiers import make_classifiers, summarise
from torchdnr.cli.console import Console, command
from torchdnr.cli.launch import further_processes, process_count
from torchdnr.cli.options import train_parser
from torchdnr.cli.run_folder import find_device, prepare
from torchdnr.distributed.processes import joined


def train(options: argparse.Namespace, console: Console) -> None:
    """Make what the run folder lacks, and report how it does on clean images."""
    with joined(find_device(options.device)) as processes:
        console.join(processes.rank, processes.count)
        with processes.first_alone():  # it downloads and writes what the others then read
            job = prepare(options, console, processes)
        console.stages = len(job.settings.classifiers)
        classifiers = make_classifiers(job, console, processes)
        if processes.first:
            console.say(summarise(job, classifiers).text)
            made, then = ", ".join(classifiers), f"python attack.py --run {job.folder}"
            console.say(f"{made}: {job.folder}/; next: {then}")
        processes.wait()  # none leaves while the first one may still fail


def main(
    argv: Sequence[str] | None = None, prog: str = "train.py", *, processes: int | None = 1
) -> int:
    """Run the command line; return 0 if done, 2 after an error, 130 if stopped by Ctrl-C.

    Without --processes it is this one alone, or ``processes``; None: as many as pay.
    """
    options = train_parser(prog, processes).parse_args(argv)
    with command(options.quiet) as console:
        count = process_count(options.processes, options.device)
        with further_processes(count, train, options):
            train(options, console)
    return console.status
