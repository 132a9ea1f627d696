"""The paper's networks, the layers that DNR reads from them, and their files.

Each is built for a number of classes c, and of colour channels of the images.
"""

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn

from torchdnr.files import CheckpointError, load_tensors, save_tensors

# "The last three layers" (Section IV): the two hidden ones after their ReLU, and the logits.
MNIST_LAYERS = ("relu_fc1", "relu_fc2", "logits")
# Second-to-last max-pooling (4,096 features), last batch norm and its ReLU (2,048), last layer
# before the logits (512).
CIFAR10_LAYERS = ("pool3", "relu7", "fc")

# What the authors' later code reads from that of the zoo, below: 1,600, 576 and 32 features.
ZOO_MNIST_LAYERS = ("relu2", "relu3", "relu4")

Network = TypeVar("Network", bound=nn.Module)


class MNISTNet(nn.Sequential):
    """The paper's MNIST network: images in [0, 1], ``(n, channels, 28, 28)``, to logits.

    Table I with unpadded convolutions, and dropout between the hidden layers, as in Carlini's
    network that it follows. The softmax of Table I is left to the loss. The weights start at He's
    values: from PyTorch's default ones, Table III's learning rate leaves the network at chance
    level on a few thousand digits.

    Source: Table I of Sotgiu et al., "Deep neural rejection against adversarial examples", 2020;
    Carlini, Wagner, "Towards evaluating the robustness of neural networks", 2017, Table I.
    """

    def __init__(self, num_classes: int = 10, channels: int = 1) -> None:
        super().__init__(
            OrderedDict(
                conv1=nn.Conv2d(channels, 32, 3),
                relu1=nn.ReLU(),
                conv2=nn.Conv2d(32, 32, 3),
                relu2=nn.ReLU(),
                pool1=nn.MaxPool2d(2),
                conv3=nn.Conv2d(32, 64, 3),
                relu3=nn.ReLU(),
                conv4=nn.Conv2d(64, 64, 3),
                relu4=nn.ReLU(),
                pool2=nn.MaxPool2d(2),
                flatten=nn.Flatten(),
                fc1=nn.Linear(64 * 4 * 4, 200),
                relu_fc1=nn.ReLU(),
                dropout=nn.Dropout(0.5),
                fc2=nn.Linear(200, 200),
                relu_fc2=nn.ReLU(),
                logits=nn.Linear(200, num_classes),
            )
        )
        _he_initialise_(self)


class ZooMNISTNet(nn.Sequential):
    """The MNIST network of the authors' model zoo: images ``(n, channels, 28, 28)`` to logits.

    Not Table I, though the zoo names the paper: three convolutions, two of them with stride 2, and
    one hidden layer of 32 units. The hyper-parameters published later belong to it. The weights
    start at He's values.

    Source: secml-zoo, model "mnist-cnn", and the FADER code by the same group.
    """

    def __init__(self, num_classes: int = 10, channels: int = 1) -> None:
        super().__init__(
            OrderedDict(
                conv1=nn.Conv2d(channels, 64, 5, stride=2),
                relu1=nn.ReLU(),
                conv2=nn.Conv2d(64, 64, 3, stride=2),
                relu2=nn.ReLU(),
                conv3=nn.Conv2d(64, 64, 3),
                relu3=nn.ReLU(),
                flatten=nn.Flatten(),
                fc1=nn.Linear(64 * 3 * 3, 32),
                relu4=nn.ReLU(),
                dropout=nn.Dropout(0.5),
                logits=nn.Linear(32, num_classes),
            )
        )
        _he_initialise_(self)


class CIFAR10Net(nn.Sequential):
    """The paper's CIFAR10 network: images in [0, 1], ``(n, channels, 32, 32)``, to logits.

    Table II; a step inside the network maps [0, 1] to [-1, 1]. Convolutions are padded but for the
    last, so that 512 features enter the fully connected layer, which, as in the table, has no ReLU.
    The weights start at He's values.

    Source: Table II of Sotgiu et al., "Deep neural rejection against adversarial examples", 2020;
    the padding is that of the FADER code by the same group.
    """

    def __init__(self, num_classes: int = 10, channels: int = 3) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict(normalise=Normalise(0.5, 0.5))
        widths = [(64, 64), (128, 128), (256, 256), (512,)]
        index = 0
        for block, block_widths in enumerate(widths, start=1):
            for width in block_widths:
                index += 1
                padding = 0 if width == 512 else 1
                # No bias: the batch norm that follows would take it away again.
                layers[f"conv{index}"] = nn.Conv2d(channels, width, 3, padding=padding, bias=False)
                layers[f"norm{index}"] = nn.BatchNorm2d(width)
                layers[f"relu{index}"] = nn.ReLU()
                channels = width
            layers[f"pool{block}"] = nn.MaxPool2d(2)
            layers[f"dropout{block}"] = nn.Dropout(block / 10)
        layers["flatten"] = nn.Flatten()
        layers["fc"] = nn.Linear(512, 512)
        layers["logits"] = nn.Linear(512, num_classes)
        super().__init__(layers)
        _he_initialise_(self)


class Normalise(nn.Module):
    """Subtract a mean and divide by a standard deviation, inside the network.

    Args:
        mean: One number for all channels, or one per channel.
        std: As ``mean``, > 0.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: float | list[float], std: float | list[float]) -> None:
        super().__init__()
        for name, value in (("mean", mean), ("std", std)):
            values = Tensor([value] if isinstance(value, int | float) else value).clone()
            # Not persistent: constants of the architecture, not something that was learned.
            self.register_buffer(name, values.reshape(-1, 1, 1), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalise images ``(n, channels, height, width)``; same shape out."""
        return (inputs - self.mean) / self.std


def save_network(net: nn.Module, path: str | Path) -> None:
    """Save the weights and buffers of a network in one safetensors file, whole or not at all."""
    save_tensors(path, net.state_dict(), {"architecture": type(net).__name__}, kind="network")


def load_network(net: Network, path: str | Path) -> Network:
    """Load what `save_network` wrote into a network of the same architecture, and return it.

    It is filled in place; its device and training mode stay.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is damaged, foreign, or of another architecture; ``net`` is
            then unchanged.
    """
    tensors, metadata = load_tensors(path, kind="network")
    if difference := compare_states(net.state_dict(), tensors):
        raise CheckpointError(
            f"{path} ({metadata['architecture']}) does not fit this {type(net).__name__}: "
            f"{difference}; build the network that was saved (architecture, classes, channels)"
        )
    net.load_state_dict(tensors)
    return net


def compare_states(expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> str:
    """Say how state dicts differ in names and shapes; an empty text if they do not."""
    shapes, others = (
        {name: tuple(tensor.shape) for name, tensor in state.items()} for state in (expected, got)
    )
    differ = [name for name in shapes | others if shapes.get(name) != others.get(name)]
    if not differ:
        return ""
    first, first_other = (state.get(differ[0], "none") for state in (shapes, others))
    return f"{len(differ)} tensors differ, first {differ[0]!r}: expected {first}, got {first_other}"


def _he_initialise_(net: nn.Module) -> None:
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
