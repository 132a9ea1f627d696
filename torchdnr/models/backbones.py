"""Torchvision classifiers as networks on images in [0, 1], with all their outputs or some."""

import difflib
import pickle
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from torchdnr.models.paper import Normalise, compare_states

if TYPE_CHECKING:  # torchvision takes seconds to import, and most runs do without it
    from torchvision.models import WeightsEnum

NETWORK = "network"
"""Name of the torchvision model inside a backbone: its layers are called ``network.NAME``."""

# What torchvision's classifiers were trained with, where their weights say nothing else.
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


class SelectOutputs(nn.Module):
    """Keep some of a network's outputs, in the order of the classes."""

    outputs: Tensor

    def __init__(self, outputs: Sequence[int]) -> None:
        super().__init__()
        # Not persistent: a choice, not something that was learned.
        self.register_buffer("outputs", torch.tensor(list(outputs)), persistent=False)

    def forward(self, logits: Tensor) -> Tensor:
        """Select of logits ``(n, k)``; ``(n, c)``."""
        return logits[:, self.outputs]


def build_backbone(
    name: str, num_classes: int, *, outputs: Sequence[int] | None = None
) -> nn.Sequential:
    """Build a torchvision classifier on images in [0, 1], with random weights.

    Args:
        name: Name in ``torchvision.models.list_models(torchvision.models)``.
        num_classes: Classes c of the images, >= 2.
        outputs: Which outputs of the network published for ImageNet these are, in the order of the
            classes; default: the network gets an output per class.

    Returns:
        Images ``(n, 3, H, W)`` in [0, 1] to logits ``(n, c)``; the torchvision model is its part
        ``network``.

    Raises:
        ValueError: If there is no such classifier, or ``outputs`` are not ``num_classes`` different
            numbers of outputs.
    """
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=5) or known
        raise ValueError(f"no backbone {name!r}; choose from: {', '.join(close)}")
    published = models.get_model_weights(name).DEFAULT
    total = num_classes if outputs is None else len(published.meta["categories"])
    parts = OrderedDict(normalise=_normalise(published), network=_build(name, total))
    if outputs is not None:
        _check_outputs(outputs, num_classes, total)
        parts["outputs"] = SelectOutputs(outputs)
    return nn.Sequential(parts)


def load_weights(backbone: nn.Module, name: str, weights: str | Path) -> None:
    """Load published weights, or those in a file, into the torchvision model of a backbone.

    Args:
        backbone: From ``build_backbone``.
        name: As there.
        weights: Name of weights that torchvision has of it, such as ``DEFAULT``, downloaded on
            first use; or a file with a state dict of the torchvision model: ``.safetensors``, or
            what ``torch.save`` wrote. The latter is a pickle, as are torchvision's; they are read
            by PyTorch's restricted unpickler, which makes tensors and plain containers only.

    Raises:
        ConnectionError: If a download fails.
        FileNotFoundError: If there are neither such weights nor such a file.
        ValueError: If it is no state dict, or of another network; ``backbone`` is then unchanged.
    """
    from torchvision.models import get_model_weights

    network = backbone.get_submodule(NETWORK)
    published = get_model_weights(name).__members__
    known = str(weights) in published
    loaded = _download(published[str(weights)]) if known else _read_state(Path(weights))
    # Counters of batch norms, which older files lack, decide nothing.
    counters = {k: v for k, v in network.state_dict().items() if k.endswith("num_batches_tracked")}
    if difference := compare_states(network.state_dict(), {**counters, **loaded}):
        raise ValueError(
            f"{weights} does not fit this {type(network).__name__}: {difference}; give the weights "
            "of this network, and the outputs to keep if they are for more classes"
        )
    network.load_state_dict(loaded, strict=False)


def _normalise(published: "WeightsEnum") -> Normalise:
    transforms = published.transforms()
    mean, std = (getattr(transforms, name, None) for name in ("mean", "std"))
    return Normalise(mean or IMAGENET_MEAN, std or IMAGENET_STD)


def _build(name: str, outputs: int) -> nn.Module:
    from torchvision.models import get_model

    # Without the first those two warn that random weights take long; without the second they return
    # the outputs of auxiliary heads as well while they are trained.
    options = {"init_weights": True, "aux_logits": False}
    special = options if name in ("googlenet", "inception_v3") else {}
    return get_model(name, weights=None, num_classes=outputs, **special)


def _check_outputs(outputs: Sequence[int], classes: int, total: int) -> None:
    inside = all(0 <= output < total for output in outputs)
    if not inside or len(set(outputs)) != classes or len(outputs) != classes:
        raise ValueError(
            f"outputs must be {classes} different numbers in 0..{total - 1}, one per class, got "
            f"{list(outputs)}"
        )


def _download(weights: "WeightsEnum") -> Mapping[str, Tensor]:
    try:
        return weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"what was downloaded from {weights.url} must be tensors alone, got "
            f"{str(error).splitlines()[0]}; delete that file"
        ) from error
    except (OSError, RuntimeError) as error:
        raise ConnectionError(
            f"cannot download {weights.url}: {error}; connect to a network, or give a file"
        ) from error


def _read_state(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(
            f"no file {path}; expected the weights of the backbone: a file, or a name that "
            "torchvision has for it, such as DEFAULT"
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # A restricted reader: it makes tensors and plain containers, and calls nothing else.
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{path} must be a state dict, as a .safetensors file or from torch.save, got another "
            f"or a damaged file ({reason})"
        ) from error
    if not isinstance(state, Mapping) or not all(map(torch.is_tensor, state.values())):
        raise ValueError(
            f"{path} must be a state dict, names to tensors, got {type(state).__name__}; save "
            "net.state_dict()"
        )
    return state
