"""What a file of a classifier says of its reductions, and how they come back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from torchdnr.features.reductions import Reduction, ReductionLike
from torchdnr.files import CheckpointError


def reduction_metadata(reduction: nn.Module) -> Any:  # noqa: ANN401 - any JSON value
    """Return what a file says of a reduction; of a user's module only how it prints."""
    return reduction.spec() if isinstance(reduction, Reduction) else {"module": repr(reduction)}


def reductions_of_file(
    path: str | Path, metadata: Mapping[str, Any], given: Mapping[str, nn.Module]
) -> dict[str, ReductionLike]:
    """Collect the reductions of the layers that a file names.

    Args:
        path: Of the file, for messages.
        metadata: Its ``layers`` and ``reductions``; files of version 0.1 have no reductions, and
            all their layers are flat.
        given: The user's own modules, by layer.

    Returns:
        Layer name -> reduction.

    Raises:
        CheckpointError: If a module is missing, not wanted, or prints in another way than the one
            that was saved.
    """
    found = {name: "flatten" for name in metadata["layers"]} | metadata.get("reductions", {})
    own = {name: r["module"] for name, r in found.items() if isinstance(r, Mapping)}
    if missing := sorted(set(own) - set(given)):
        name = missing[0]
        raise CheckpointError(
            f"{path}: the reduction of layer {name!r} is a module that the file does not hold, "
            f"{_one_line(own[name])}; pass one like it, as in layers={{{name!r}: module}}"
        )
    if unknown := sorted(set(given) - set(own)):
        raise CheckpointError(
            f"{path}: expected modules for the layers {sorted(own)} alone, got some for {unknown}; "
            "leave them out: built-in reductions come from the file"
        )
    for name, text in own.items():
        if repr(given[name]) != text:
            raise CheckpointError(
                f"{path}: expected {_one_line(text)} as the reduction of layer {name!r}, got "
                f"{_one_line(repr(given[name]))}; build it as the saved one was"
            )
    return found | dict(given)


def _one_line(text: str) -> str:
    return " ".join(text.split())
