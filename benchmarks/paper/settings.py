"""The paper's experiments: data, networks, layers, sizes of the attacks, in full and in short."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from torchdnr.evaluation.line_up import DEFAULT_ATTACKS, FULL, choose_attacks
from torchdnr.models import (
    CIFAR10_LAYERS,
    MNIST_LAYERS,
    ZOO_MNIST_LAYERS,
    CIFAR10Net,
    MNISTNet,
    ZooMNISTNet,
)
from torchdnr.models.training import CIFAR10_TRAINING, MNIST_TRAINING, TrainingSettings

PAPER, LATER = "paper", "later"


@dataclass(frozen=True)
class Variant:
    """A set of classifiers: network, layers, and how the SVMs get their hyper-parameters.

    Attributes:
        about: Where it comes from.
        network: Its architecture.
        trainings: How that is trained; each goes on from the one before.
        layers: What DNR reads; NR takes the last of them.
        hyperparameters: (C, gamma) of DNR by layer and "combiner"; None: searched.
    """

    about: str
    network: type[nn.Module]
    trainings: tuple[TrainingSettings, ...]
    layers: tuple[str, ...]
    hyperparameters: dict[str, tuple[float, float]] | None = None


@dataclass(frozen=True)
class Protocol:
    """One data set's experiments.

    Attributes:
        dataset: Name for ``load_dataset``, unless a file is given.
        variants: Name to the classifiers.
        runs: Repetitions, each with other samples.
        network_samples: Images that train the networks, the same in all runs.
        svm_samples: Images that fit DNR and NR, drawn per run from the rest of the training set.
        threshold_samples: Images that set theta, drawn per run from what is left then.
        test_samples: Images for the clean accuracy, drawn per run from the test set.
        attacked: Images of these that are attacked.
        eps: Sizes of the attacks, l2.
        sweep_eps: Those of the figure over theta.
        example_eps: That of the figure with images.
        nr_rejects_more_at: Where the paper sees NR reject more than DNR (Sec. IV-B).
        attacks: The line-up.
        note: What has to be said about the data.
    """

    dataset: str
    variants: dict[str, Variant]
    runs: int
    network_samples: int
    svm_samples: int
    threshold_samples: int
    test_samples: int
    attacked: int
    eps: tuple[float, ...]
    sweep_eps: tuple[float, ...]
    example_eps: float
    nr_rejects_more_at: tuple[float, ...]
    attacks: tuple[str, ...] = tuple(choose_attacks([FULL]))
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON values."""
        found = asdict(self)
        for name, variant in self.variants.items():
            found["variants"][name]["network"] = variant.network.__name__
        return found


# C and gamma that the paper's first author found with cross-validation, as printed by the group's
# later code for its own networks (FADER, https://github.com/FrancescoCrecchi/FADER).
_LATER_MNIST = {
    "relu2": (10.0, 1e-3),
    "relu3": (10.0, 1e-2),
    "relu4": (1.0, 1e-2),
    "combiner": (0.1, 1.0),
}
_LATER_CIFAR10 = {
    "pool3": (10.0, 1e-3),
    "relu7": (1.0, 1e-3),
    "flatten": (0.1, 1e-2),
    "combiner": (1e-4, 1.0),
}

MNIST = Protocol(
    dataset="mnist",
    variants={
        PAPER: Variant(
            "Table I, last three layers, hyper-parameters by 5-fold cross-validation",
            MNISTNet,
            (MNIST_TRAINING,),
            MNIST_LAYERS,
        ),
        LATER: Variant(
            "network, layers and hyper-parameters of the group's later code",
            ZooMNISTNet,
            (replace(MNIST_TRAINING, epochs=30),),
            ZOO_MNIST_LAYERS,
            _LATER_MNIST,
        ),
    },
    runs=5,
    network_samples=30_000,
    svm_samples=10_000,
    threshold_samples=1_000,
    test_samples=1_000,
    attacked=1_000,
    eps=(0, 0.5, 1, 1.5, 2, 3, 4, 5),
    sweep_eps=(0.5, 1, 1.5, 2, 3),
    example_eps=1.0,
    nr_rejects_more_at=(0.5,),
)

CIFAR10 = Protocol(
    dataset="cifar10",
    variants={
        PAPER: Variant(
            "Table II; second-to-last max-pooling, last batch norm and last layer; "
            "hyper-parameters by 5-fold cross-validation",
            CIFAR10Net,
            (CIFAR10_TRAINING,),
            CIFAR10_LAYERS,
        ),
        LATER: Variant(
            "Table II; layers and hyper-parameters of the group's later code, whose network has no "
            "hidden fully connected layer and other batch norms, so that its scales differ",
            CIFAR10Net,
            (CIFAR10_TRAINING,),
            ("pool3", "relu7", "flatten"),
            _LATER_CIFAR10,
        ),
    },
    runs=5,
    network_samples=40_000,
    svm_samples=9_000,  # of the paper's 10,000: theta takes the rest, never test images
    threshold_samples=1_000,
    test_samples=1_000,
    attacked=1_000,
    eps=(0, 0.05, 0.1, 0.2, 0.4, 1, 2),
    sweep_eps=(0.05, 0.1, 0.2, 0.4, 1),
    example_eps=0.2,
    nr_rejects_more_at=(0.1, 0.2, 0.4, 1),
)

PROTOCOLS = {"mnist": MNIST, "cifar10": CIFAR10}

# For two cores: short trainings, with a learning rate that rises and falls. CIFAR-10's network is
# at 84.6 % after its first ten epochs.
_CYCLE = TrainingSettings(
    epochs=10,
    lr=0.05,
    momentum=0.9,
    batch_size=128,
    weight_decay=5e-4,
    schedule="one-cycle",
    augment=True,
)
QUICK_TRAININGS = {
    "mnist": (
        TrainingSettings(epochs=8, lr=0.05, momentum=0.9, batch_size=128, schedule="one-cycle"),
    ),
    "cifar10": (_CYCLE, replace(_CYCLE, epochs=5, lr=0.02)),
}


def quick(protocol: Protocol) -> Protocol:
    """Shorten the experiments: fewer samples, short trainings, the default line-up."""
    variants = {
        name: replace(variant, trainings=QUICK_TRAININGS[protocol.dataset])
        for name, variant in protocol.variants.items()
    }
    return replace(
        protocol, variants=variants, svm_samples=2_000, attacked=60, attacks=DEFAULT_ATTACKS
    )
