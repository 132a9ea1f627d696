"""Attack a network, NR and DNR, and tell what is left of them: `python attack.py --help`."""

import sys
import warnings
from collections.abc import Sequence

# Importing gpytorch makes torch announce the end of torch.jit.script: no news for our users.
warnings.filterwarnings("ignore", r"`torch\.jit\.script` is deprecated", FutureWarning)

from torchdnr.cli import Console, run_command  # noqa: E402 - after the filter
from torchdnr.cli_evaluation import FILES, Evaluation, plan  # noqa: E402
from torchdnr.cli_options import attack_parser  # noqa: E402
from torchdnr.cli_settings import prepare  # noqa: E402
from torchdnr.pipeline import make_classifiers, summarise  # noqa: E402


def attack(evaluation: Evaluation, console: Console) -> None:
    """Make what the run folder lacks, attack the classifiers, and write the report."""
    console.stages = 5
    job = evaluation.job
    classifiers = make_classifiers(job, console)
    clean = summarise(job, classifiers)
    console.say(clean.text)
    table = evaluation.earlier_table(clean)
    if table is None:
        table = evaluation.run(classifiers, clean, console)
    else:
        console.say(f"the attacks are done already: this is {evaluation.results}")
    print(f"\n{table}\n")
    files = [name for name in FILES if (job.folder / name).exists()]
    console.say(f"{', '.join(files)}: in {job.folder}/")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments; None: those of the process.

    Returns:
        Exit code: 0 done, 2 error, 130 stopped by Ctrl-C.
    """
    options = attack_parser().parse_args(argv)
    return run_command(
        options, lambda console: attack(plan(options, prepare(options, console)), console)
    )


if __name__ == "__main__":
    sys.exit(main())
