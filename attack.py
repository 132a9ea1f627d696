"""Attack a network, NR and DNR, and tell what is left of them: `python attack.py --help`."""

import argparse
import sys
import warnings
from collections.abc import Sequence

# Importing gpytorch makes torch announce the end of torch.jit.script: no news for our users.
warnings.filterwarnings("ignore", r"`torch\.jit\.script` is deprecated", FutureWarning)

from torchdnr.cli.attack import Evaluation, plan  # noqa: E402
from torchdnr.cli.classifiers import make_classifiers, summarise  # noqa: E402
from torchdnr.cli.console import Console, run_command  # noqa: E402 - after the filter
from torchdnr.cli.options import attack_parser  # noqa: E402
from torchdnr.cli.report import FILES, find_report, write_report  # noqa: E402
from torchdnr.cli.run_folder import find_device, prepare  # noqa: E402
from torchdnr.distributed.processes import Processes, joined  # noqa: E402


def attack(options: argparse.Namespace, processes: Processes, console: Console) -> None:
    """Make what the run folder lacks, attack the classifiers, check that, and report."""
    console.stages = 5 + options.checks
    with processes.first_alone():  # it downloads and writes what the others then find
        job = prepare(options, console, processes)
        settings = plan(options, job)
    classifiers = make_classifiers(job, console, processes)
    clean = summarise(job, classifiers)
    console.say(clean.text)
    evaluation = Evaluation(job, settings, classifiers, clean.classifiers, processes, console)
    report = find_report(evaluation) if processes.first else None
    if processes.broadcast_text("done" if report else ""):
        console.say(f"the attacks are done already: this is {job.folder}/results.json")
    else:
        report = evaluate(evaluation, console)
    if processes.first:
        print(f"\n{report}\n")
        files = [name for name in FILES if (job.folder / name).exists()]
        console.say(f"{', '.join(files)}: in {job.folder}/")


def evaluate(evaluation: Evaluation, console: Console) -> str | None:
    """Attack, check and report; the text of the report, in the first process."""
    settings, checks = evaluation.settings, {}
    sizes = " ".join(f"{eps:g}" for eps in settings["eps"])
    names = ", ".join(settings["attacks"])
    what = f"{names} on DNN, NR and DNR, {settings['samples']} test images"
    with console.stage("attacks", f"{what}, norm {float(settings['norm']):g}, eps {sizes}"):
        curves = evaluation.attack()
    if settings["checks"]:
        with console.stage("checks", "were the attacks as strong as they should be?"):
            checks = evaluation.check(curves)
    report = None
    if evaluation.processes.first:
        with console.stage("report", f"tables and figures in {evaluation.job.folder}"):
            report = write_report(evaluation, curves, checks, console)
    evaluation.processes.wait()  # nobody leaves while the report may still fail
    return report


def run(options: argparse.Namespace, console: Console) -> None:
    """Join the other processes of the job, if any, and do this one's part."""
    with joined(find_device(options.device)) as processes:
        console.join(processes.rank, processes.count)
        attack(options, processes, console)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments; None: those of the process.

    Returns:
        Exit code: 0 done, 2 error, 130 stopped by Ctrl-C.
    """
    options = attack_parser().parse_args(argv)
    return run_command(options, lambda console: run(options, console))


if __name__ == "__main__":
    sys.exit(main())
