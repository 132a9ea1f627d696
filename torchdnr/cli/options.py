"""The parsers of the command lines, made from the settings, and the way back to a command."""

import argparse
from collections.abc import Callable, Sequence

from torchdnr.cli.declaration import dest_of, flag_of, in_words, number, option_fields
from torchdnr.cli.settings import AttackSettings, RunSettings
from torchdnr.evaluation.line_up import ATTACKS

_TRAIN = """\
Make a run folder: train the paper's network on one part of a data set (Table I for 28 x 28 grey
images, Table II for 32 x 32 colour images), or load a torchvision classifier with --backbone; fit
the classifiers with a reject option, DNR and NR, on another part, and set their rejection
thresholds on a third. --adversarial adds classifiers that are trained against attacks. What the
folder holds already is kept; a run that was stopped goes on where it was when the same command is
given again."""

_ATTACK = """\
Attack the classifiers of a run folder, the network (DNN), NR, DNR and what --adversarial adds,
with adversarial examples of growing size, made with full knowledge of the classifier, and report
how often each is still right or rejects. First makes whatever the run folder lacks, as train.py
does: without options this is the whole job, on 5,000 handwritten digits. Then checks whether the
attacks were as strong as they should be. Prints a table and the checks, and writes report.html,
results.json, results.csv, curve.png and examples.png. A run that was stopped goes on where it was
when the same command is given again. Started from a shell on a CPU, it shares the work among a
process per core: --processes."""


def train_parser(prog: str = "train.py", processes: int | None = 1) -> argparse.ArgumentParser:
    """Build the parser of ``train.py``. Options of the run folder are None where not given."""
    parser = argparse.ArgumentParser(prog=prog, description=_TRAIN)
    _add_common_options(parser, processes)
    _add_settings(parser, RunSettings, batch_size=["--batch-size"])
    return parser


def attack_parser(prog: str = "attack.py", processes: int | None = 1) -> argparse.ArgumentParser:
    """Build the parser of ``attack.py``. Options of the run folder are None where not given."""
    width = max(map(len, ATTACKS))
    attacks = "\n".join(f"  {name:<{width}}  {entry.help}" for name, entry in ATTACKS.items())
    parser = argparse.ArgumentParser(
        prog=prog,
        description=_ATTACK,
        epilog=f"attacks, in the order in which they run:\n{attacks}",
        formatter_class=argparse.RawDescriptionHelpFormatter,  # keeps the lines of the epilog
    )
    _add_common_options(parser, processes)
    _add_settings(parser, RunSettings)
    _add_settings(parser, AttackSettings)
    fields = option_fields(AttackSettings)
    parser.set_defaults(**{dest_of(entry): entry.metadata["default"] for entry in fields})
    return parser


def _add_settings(
    parser: argparse.ArgumentParser, kind: type, batch_size: Sequence[str] = ()
) -> None:
    """Add the options of a class of settings; ``batch_size`` are further names of that option."""
    group: argparse._ActionsContainer = parser
    for entry in option_fields(kind):
        if heading := entry.metadata["heading"]:
            group = parser.add_argument_group(heading)
        flags = [*(batch_size if entry.name == "batch_size" else ()), flag_of(entry)]
        group.add_argument(*flags, **{"dest": entry.name, **entry.metadata["parsing"]})


def _add_common_options(parser: argparse.ArgumentParser, processes: int | None) -> None:
    option = parser.add_argument
    option(
        "--run",
        metavar="DIR",
        help="run folder. It remembers the options that it was made with, but for --device, "
        "--data-root, --channels-last, --processes, --quiet and those of the attack (default: "
        "runs/ and the data set's name)",
    )
    option("--data-root", default="data", metavar="DIR", help="downloads (default: %(default)s)")
    add_device_options(option)
    option(
        "--processes",
        type=number(1),
        default=processes,
        metavar="N",
        help="processes on this machine that share the work; the results are the same (default: on "
        "a CPU one per core, as far as the images and 4 GiB of memory for each go round; on a GPU "
        "1, as each needs a GPU of its own; under torchrun those that it starts)",
    )
    option("--quiet", action="store_true", help="only the results: no messages, no progress bars")


def add_device_options(option: Callable[..., argparse.Action]) -> None:
    """Add the options for the device and the network's memory format, by ``add_argument``."""
    option(
        "--device", help="cpu, cuda, cuda:N, xpu, ... (default: a GPU if there is one, else cpu)"
    )
    option(
        "--channels-last",
        action=argparse.BooleanOptionalAction,
        help="keep weights and maps of the network in the order height, width, channels: the same "
        "but for rounding, and often faster, also on a CPU (default: what the run folder "
        "remembers, else whichever is faster once the network is trained)",
    )


def option_words(settings: RunSettings | AttackSettings) -> list[str]:
    """Write settings as the words of a command line that gives each of them."""
    words: list[str] = []
    for entry in option_fields(type(settings)):
        value = getattr(settings, entry.name)
        if isinstance(value, bool):
            if value != entry.metadata["default"]:
                words.append(flag_of(entry).replace("--", "--" if value else "--no-", 1))
        elif value is not None:
            values = value if isinstance(value, list) else [value]
            words += [flag_of(entry), *map(in_words, values)]
    return words
