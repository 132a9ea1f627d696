"""The network that a file of a classifier belongs to, in a wrapper (`nn.DataParallel`) or not."""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from torchdnr.distributed.processes import warn_once
from torchdnr.files import CheckpointError, check_tensors, digest
from torchdnr.models.paper import compare_states

WRAPPERS = "module", "_orig_mod"
"""What ``DataParallel``, ``DistributedDataParallel`` and ``torch.compile`` call a network."""


def bare_name(name: str) -> str:
    """Return a name in a network as it would be without wrappers."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def network_digest(net: nn.Module) -> str:
    """Compute the fingerprint of a network's state, wrapped or not."""
    state = net.state_dict()
    bare = {bare_name(name): value for name, value in state.items()}
    return digest(bare if len(bare) == len(state) else state)


def has_digest(net: nn.Module, expected: str) -> bool:
    """Tell whether this is the network of a fingerprint, of this version or of an earlier one.

    Earlier ones did not look through wrappers.
    """
    return expected in (network_digest(net), digest(net.state_dict()))


def warn_unless_savable(kind: str, own_state: Mapping[str, Any], net: nn.Module) -> None:
    """Warn before a fit of what ``save`` will refuse: state that no file holds or knows again."""
    state = net.state_dict().items()
    others = {name: v for name, v in state if not isinstance(v, Tensor) or v.is_meta}
    try:
        check_tensors(own_state, f"this {kind}")
        digest(others)
    except TypeError as error:
        warn_once(f"{error}; fit goes on, but save will raise this", stacklevel=3)


def copy_with_state(net: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> nn.Module:
    """Copy a network, and give the copy a state of the same architecture, wrapped or not.

    Raises ``CheckpointError`` where the state, which ``path`` holds, does not fit.
    """
    net = deepcopy(net)
    known = {bare_name(name): name for name in net.state_dict()}
    state = {known.get(bare_name(name), name): value for name, value in state.items()}
    if difference := compare_states(net.state_dict(), state):
        raise CheckpointError(
            f"{path} holds a network that does not fit this {type(net).__name__}: {difference}; "
            "build the network that was trained"
        )
    net.load_state_dict(state)
    return net


def with_names_of(net: nn.Module, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Name the layers in what ``DNR.settings`` returned as this network does, wrapped or not.

    A name stays that the network does not have.
    """
    modules = [name for name, _ in net.named_modules(remove_duplicate=False) if name]
    known = {bare_name(name): name for name in reversed(modules)} | {n: n for n in modules}
    names = {name: known.get(name, known.get(bare_name(name), name)) for name in metadata["layers"]}

    def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
        return {names.get(name, name): value for name, value in values.items()}

    options = metadata["options"]
    by_layer = ("reductions", "sizes", "selection")
    return {
        **metadata,
        **{key: renamed(metadata[key]) for key in by_layer if key in metadata},
        "options": {**options, "hyperparameters": renamed(options["hyperparameters"])},
        "layers": list(names.values()),
    }
