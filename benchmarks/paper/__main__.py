"""Repeat the paper's experiments: `python -m benchmarks.paper mnist` or `cifar10`.

All runs of a data set, then figures and tables. Every piece is kept in the folder as soon as it is
made: a run that was stopped goes on with the same command. Several machines can share the runs:
`--stage network` on one of them, copy the folder to the others, `--runs 0 1` here, `--runs 2 3 4`
there, copy the run-N folders together, `--stage report`. `--quick` means fewer samples, and run 0
alone unless `--runs` names others.
`--record` writes to benchmarks/results/paper/ instead of the folder.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.paper.merge import RESULTS, write_report
from benchmarks.paper.run import (
    Study,
    attack,
    finish,
    make_classifiers,
    make_network,
    network_accuracy,
)
from benchmarks.paper.settings import PROTOCOLS, QUICK_TRAININGS, Protocol, quick
from torchdnr.cli.console import Console, command
from torchdnr.cli.run_folder import find_device
from torchdnr.data import load_dataset
from torchdnr.evaluation.line_up import ATTACKS, DEFAULT, FULL, choose_attacks
from torchdnr.files import atomic_write_bytes
from torchdnr.models.training import TrainingSettings

STAGES = "network", "fit", "attack", "report"


def make_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument
    option("dataset", choices=list(PROTOCOLS))
    option("--quick", action="store_true", help="run 0 alone, fewer samples, short training")
    option(
        "--runs",
        type=int,
        nargs="+",
        metavar="N",
        help="these runs only (default: all; with --quick the first)",
    )
    option("--variants", nargs="+", metavar="NAME", help="paper, later (default: both)")
    option("--stage", choices=STAGES, help="up to this stage only; report: nothing but that")
    option(
        "--epochs",
        type=int,
        nargs="+",
        metavar="N",
        help="epochs of the networks, trained as --quick does: one number per rise and fall of "
        "the learning rate",
    )
    option("--attacked", type=int, metavar="N", help="images to attack per run")
    option(
        "--attack",
        nargs="+",
        metavar="NAME",
        choices=[DEFAULT, FULL, *ATTACKS],
        help="the line-up (default: that of attack.py)",
    )
    option(
        "--reattack",
        action="store_true",
        help="attack again at every theta for Fig. 4, which takes many times as long",
    )
    option("--source", help="data set as for train.py, such as npz:FILE (default: by its name)")
    option("--note", metavar="TEXT", help="what the report has to say about these data, kept")
    option("--record", action="store_true", help="write to the repository's results")
    option("--data-root", default="data", metavar="DIR", help="downloads (default: %(default)s)")
    option("--folder", metavar="DIR", help="where the pieces live (default: runs/paper/NAME)")
    option("--device", help="cpu, cuda or cuda:N (default: cuda if there is one, else cpu)")
    option("--quiet", action="store_true", help="no messages, no progress bars")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    options = make_parser().parse_args(argv)
    with command(options.quiet, packages=("torchdnr", "benchmarks", "__main__")) as console:
        repeat(options, console)
    return console.status


def repeat(options: argparse.Namespace, console: Console) -> None:
    """Make what is asked for, and what is missing for it."""
    protocol = settle(options)
    name = options.dataset + ("-quick" if options.quick else "")
    folder = Path(options.folder or Path("runs/paper") / name)
    data = load_dataset(options.source or options.dataset, options.data_root)
    if data.labels_test is None:
        raise ValueError(f"{options.source} has no test set: give one with x_test and y_test")
    note = folder / "note.txt"
    if not protocol.note and note.exists():
        protocol = replace(protocol, note=note.read_text())
    # Of the algorithms that a GPU may choose from, those that always give the same numbers.
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    study = Study(protocol, data, folder, find_device(options.device), console.progress)
    study.claim_folder()
    if protocol.note:
        atomic_write_bytes(note, protocol.note.encode())
    stage = options.stage or STAGES[-1]
    if options.stage != STAGES[-1]:
        make(study, options, stage, console)
    if stage == STAGES[-1]:
        results = RESULTS if options.record else folder / "report"
        print(write_report(study, name, results, options.variants))
        console.say(f"figures and numbers: {results}/")


def make(study: Study, options: argparse.Namespace, stage: str, console: Console) -> None:
    """Make networks, classifiers, attacks and sweeps, up to a stage."""
    protocol = study.protocol
    runs = options.runs or range(1 if options.quick else protocol.runs)
    variants = options.variants or list(protocol.variants)
    pieces = [] if stage == STAGES[0] else [(name, run) for name in variants for run in runs]
    console.stages = len(variants) + len(pieces)
    for name in variants:
        with console.stage(f"network, {name}", protocol.variants[name].about):
            make_network(study, protocol.variants[name])
        found = network_accuracy(study, protocol.variants[name])
        console.say(f"    {found:.2%} of the test set")
    for name, run in pieces:
        with console.stage(f"{name}, run {run}", f"up to {stage}"):
            make_classifiers(study, name, run)
            if stage == "attack":
                attack(study, name, run)
            if stage == STAGES[-1]:
                finish(study, name, run, reattack=options.reattack)


def settle(options: argparse.Namespace) -> Protocol:
    """Apply the options to the protocol of the data set.

    Raises:
        ValueError: If there is no such variant or run.
    """
    protocol = PROTOCOLS[options.dataset]
    protocol = quick(protocol) if options.quick else protocol
    if options.attacked is not None:
        if not 1 <= options.attacked <= protocol.test_samples:
            raise ValueError(
                f"--attacked must be in 1..{protocol.test_samples}, got {options.attacked}"
            )
        protocol = replace(protocol, attacked=options.attacked)
    if options.attack is not None:  # always with the paper's own, to which the others compare
        chosen = choose_attacks([*options.attack, "line-search-pgd"])
        protocol = replace(protocol, attacks=tuple(chosen))
    if options.note is not None:
        protocol = replace(protocol, note=options.note)
    if options.epochs is not None:
        first, last = QUICK_TRAININGS[options.dataset][0], QUICK_TRAININGS[options.dataset][-1]
        cycles = [first] + [last] * (len(options.epochs) - 1)
        trainings = tuple(map(_with_epochs, cycles, options.epochs))
        variants = {
            name: replace(variant, trainings=trainings)
            for name, variant in protocol.variants.items()
        }
        protocol = replace(protocol, variants=variants)
    wanted = set(options.variants or ()) - set(protocol.variants)
    if wanted:
        raise ValueError(
            f"no variant {sorted(wanted)}; choose from: {', '.join(protocol.variants)}"
        )
    if options.runs is not None and not all(0 <= run < protocol.runs for run in options.runs):
        raise ValueError(f"--runs must be in 0..{protocol.runs - 1}, got {options.runs}")
    return protocol


def _with_epochs(training: TrainingSettings, epochs: int) -> TrainingSettings:
    return replace(training, epochs=epochs)


if __name__ == "__main__":
    sys.exit(main())
