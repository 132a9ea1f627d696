"""A fitted DNR or NR in a file: SVMs, threshold, settings; the network stays apart."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from torchdnr.files import CheckpointError, digest, load_tensors, save_tensors
from torchdnr.reduction_metadata import reductions_of_file

if TYPE_CHECKING:
    from torchdnr.layer_svms import LayerSVMs

Classifier = TypeVar("Classifier", bound="LayerSVMs")


def save_classifier(model: "LayerSVMs", path: str | Path) -> None:
    """Save what ``LayerSVMs.save`` describes."""
    tensors = {k: v for k, v in model.state_dict().items() if not k.startswith("features.net.")}
    metadata = {**model.settings(), "network_digest": digest(model.net.state_dict())}
    save_tensors(path, tensors, metadata, kind=type(model).__name__)


def load_classifier(
    kind: type[Classifier],
    path: str | Path,
    net: nn.Module,
    *,
    strict: bool,
    layers: Mapping[str, nn.Module],
) -> Classifier:
    """Load what ``LayerSVMs.load`` describes; the arguments are its own."""
    tensors, metadata = load_tensors(path, kind=kind.__name__)
    if strict and metadata["network_digest"] != digest(net.state_dict()):
        raise CheckpointError(
            f"{path}: expected the network it was fitted on, got one with other weights; load "
            "those weights first, or pass strict=False"
        )
    try:
        reductions = reductions_of_file(path, metadata, layers)
        model = kind._on_layers(net, reductions, metadata["options"])
        model.features.sizes = metadata.get("sizes", {})
        model.selection = metadata["selection"]
        for name, svm in model._svms().items():
            svm.C, svm.gamma = model.selection[name]["C"], model.selection[name]["gamma"]
        # The network has its weights, and some networks change themselves when they load.
        model.features.net = None
        model.load_state_dict(tensors)
        model.features.net = net
    except (KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: expected the contents of a {kind.__name__} of this version, got others "
            f"({error}); fit it again, or use the torchdnr version that wrote it"
        ) from error
    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    return model.to(device)
