"""Networks: the paper's, torchvision's, and their training."""

from torchdnr.models.adversarial import Adversary, WeakAttackWarning
from torchdnr.models.backbones import build_backbone, load_weights
from torchdnr.models.paper import (
    CIFAR10_LAYERS,
    MNIST_LAYERS,
    ZOO_MNIST_LAYERS,
    CIFAR10Net,
    MNISTNet,
    Network,
    Normalise,
    ZooMNISTNet,
    load_network,
    save_network,
)
from torchdnr.models.training import (
    ADVERSARIAL_TRAINING,
    CIFAR10_TRAINING,
    MNIST_TRAINING,
    TrainingSettings,
    train_network,
)

__all__ = [
    "ADVERSARIAL_TRAINING",
    "CIFAR10_LAYERS",
    "CIFAR10_TRAINING",
    "MNIST_LAYERS",
    "MNIST_TRAINING",
    "ZOO_MNIST_LAYERS",
    "Adversary",
    "CIFAR10Net",
    "MNISTNet",
    "Network",
    "Normalise",
    "TrainingSettings",
    "WeakAttackWarning",
    "ZooMNISTNet",
    "build_backbone",
    "load_network",
    "load_weights",
    "save_network",
    "train_network",
]
