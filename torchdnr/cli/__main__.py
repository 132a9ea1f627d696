"""The command `torchdnr`, also `python -m torchdnr.cli`: train, attack, predict."""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version

from torchdnr.cli import attack, predict, train

COMMANDS = {
    "train": (train.main, "train a network, and fit DNR and NR on it"),
    "attack": (attack.main, "attack them, and report what is left of them"),
    "predict": (predict.main, "label image files, or reject them"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand that is named first; return its exit code."""
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="torchdnr",
        description="Deep Neural Rejection: classifiers that reject what they do not know.",
        epilog="commands:\n"
        + "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
        + "\n\ntorchdnr COMMAND --help lists the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"torchdnr {version('torchdnr')}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="see below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the command")
    options = parser.parse_args(argv)
    run, _ = COMMANDS[options.command]
    # From a shell they start further processes: not where this is called from Python.
    shared = {"processes": None} if argv is None and run is not predict.main else {}
    return run(options.arguments, prog=f"torchdnr {options.command}", **shared)


if __name__ == "__main__":
    sys.exit(main())
