"""Attack a network, NR and DNR, check the attacks, and report what is left of them."""

import argparse
from collections.abc import Sequence

from torchdnr.cli.classifiers import make_classifiers, summarise
from torchdnr.cli.console import Console, command
from torchdnr.cli.declaration import in_words
from torchdnr.cli.evaluation import Evaluation
from torchdnr.cli.launch import further_processes, process_count
from torchdnr.cli.options import attack_parser
from torchdnr.cli.report import FILES, load_report, write_report
from torchdnr.cli.run_folder import find_device, prepare
from torchdnr.cli.settings import SAMPLES, AttackSettings
from torchdnr.distributed.processes import joined
from torchdnr.evaluation.shares import split_into_shares


def attack(options: argparse.Namespace, console: Console) -> None:
    """Make what the run folder lacks, attack the classifiers, check that, and report."""
    with joined(find_device(options.device)) as processes:
        console.join(processes.rank, processes.count)
        with processes.first_alone():  # it downloads and writes what the others then read
            job = prepare(options, console, processes)
            made = job.settings.classifiers
            images, classes = job.images("test")[0], job.dataset.classes
            settings = AttackSettings.from_options(options, images, made, classes)
        console.stages = len(made) + 2 + settings.checks + settings.stratified + settings.sweep
        classifiers = make_classifiers(job, console, processes)
        surrogate = classifiers["DNN"]
        classifiers = {name: classifiers[name] for name in settings.classifiers or made}
        clean = summarise(job, classifiers)
        console.say(clean.text)
        evaluation = Evaluation(job, settings, classifiers, surrogate, clean, processes, console)
        report = load_report(evaluation) if processes.first else None
        if processes.broadcast_text("done" if report else ""):
            console.say(f"the attacks are done already: this is {job.folder}/results.json")
        else:
            what = f"{', '.join(settings.attacks)} on {', '.join(classifiers)}"
            sizes = f"norm {in_words(settings.norm)}, eps {in_words(settings.eps)}"
            with console.stage("attacks", f"{what}, {settings.samples} images, {sizes}"):
                curves = evaluation.attack()
            results = evaluation.examine(curves)
            if processes.first:
                with console.stage("report", f"tables and figures in {job.folder}"):
                    report = write_report(evaluation, curves, results)
            processes.wait()  # none leaves while the report may still fail
        if processes.first:
            print(f"\n{report}\n")
            files = [name for name in FILES if (job.folder / name).exists()]
            console.say(f"{', '.join(files)}: in {job.folder}/")


def main(
    argv: Sequence[str] | None = None, prog: str = "attack.py", *, processes: int | None = 1
) -> int:
    """Run the command line; return 0 if done, 2 after an error, 130 if stopped by Ctrl-C.

    Without --processes it is this one alone, or ``processes``; None: as many as pay.
    """
    options = attack_parser(prog, processes).parse_args(argv)
    with command(options.quiet) as console:
        shares = 3 * len(split_into_shares(options.samples or SAMPLES))  # of DNN, NR and DNR
        count = process_count(options.processes, options.device, shares)
        with further_processes(count, attack, options):
            attack(options, console)
    return console.status
