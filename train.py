"""Train the paper's network, then fit DNR and NR on it: `python train.py --help`."""

import sys
import warnings
from collections.abc import Sequence

# Importing gpytorch makes torch announce the end of torch.jit.script: no news for our users.
warnings.filterwarnings("ignore", r"`torch\.jit\.script` is deprecated", FutureWarning)

from torchdnr.cli import Console, run_command  # noqa: E402 - after the filter
from torchdnr.cli_options import train_parser  # noqa: E402
from torchdnr.cli_settings import Job, prepare  # noqa: E402
from torchdnr.pipeline import make_classifiers, summarise  # noqa: E402


def train(job: Job, console: Console) -> None:
    """Make what the run folder lacks, and report how it does on clean images."""
    console.stages = 3
    classifiers = make_classifiers(job, console)
    console.say(summarise(job, classifiers).text)
    console.say(f"network, DNR and NR: {job.folder}/; next: python attack.py --run {job.folder}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments; None: those of the process.

    Returns:
        Exit code: 0 done, 2 error, 130 stopped by Ctrl-C.
    """
    options = train_parser().parse_args(argv)
    return run_command(options, lambda console: train(prepare(options, console), console))


if __name__ == "__main__":
    sys.exit(main())
