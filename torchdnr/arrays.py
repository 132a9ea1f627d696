"""Arrays of other libraries and lists of numbers as tensors: the one place where they come in."""

from collections.abc import Iterable, Mapping
from itertools import chain
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn

ArrayLike = Any
"""A tensor, an array of numpy or of a library that converts to one, or a nested list of numbers."""


def as_tensor(name: str, value: ArrayLike) -> Tensor:
    """Convert an array or a nested list of numbers; return a tensor as it is.

    It has the array's dtype, on the CPU, perhaps on its memory; that of a list is the default one,
    or int64. Messages call it ``name``.

    Raises:
        TypeError: If it holds anything but numbers, or rows of different lengths.
    """
    if isinstance(value, Tensor):
        return value
    try:
        if hasattr(value, "__array__"):
            value = value.__array__()
            if value.dtype.kind not in "biuf":
                raise TypeError(f"dtype {value.dtype}")
            dtype, copy = value.dtype.newbyteorder("="), not value.flags.writeable
            return torch.from_numpy(value.astype(dtype, order="C", copy=copy))
        if isinstance(value, list | tuple):
            return torch.tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name} must hold numbers, and rows of one length, got {_description(value)}: {error}"
        ) from error
    raise TypeError(
        f"{name} must be a tensor, an array or a list of numbers, got {_description(value)}"
    )


def as_features(name: str, value: ArrayLike, like: Tensor | None = None) -> Tensor:
    """Convert features or other numbers; integers from elsewhere become floating point.

    A tensor is returned as it is; others get the dtype and device of ``like``.
    """
    if isinstance(value, Tensor):
        return value
    features = as_tensor(name, value)
    if not features.is_floating_point():
        features = features.to(torch.get_default_dtype())
    return features if like is None else features.to(like)


def as_images(name: str, value: ArrayLike, model: object = None) -> Tensor:
    """Convert images, in the floating point of a model, if it is a module, and on its device.

    A tensor is returned as it is. Integers stay integers: how they are scaled to [0, 1] is for the
    caller to say.
    """
    if isinstance(value, Tensor):
        return value
    images = as_tensor(name, value)
    like = torch.empty(0)
    if isinstance(model, nn.Module):
        tensors = chain(model.parameters(), model.buffers())
        like = next((tensor for tensor in tensors if tensor.is_floating_point()), like)
    return images.to(like) if images.is_floating_point() else images.to(like.device)


def as_data(value: ArrayLike | Iterable[Any], model: object = None) -> Tensor | Iterable[Any]:
    """Convert images as ``as_images`` does; return a tensor or a loader of batches as it is."""
    if isinstance(value, Tensor):
        return value
    is_loader = isinstance(value, Iterable) and not isinstance(value, str | Mapping)
    is_array = hasattr(value, "__array__") or isinstance(_first(value), Number | str)
    return value if is_loader and not is_array else as_images("inputs", value, model)


def as_labels(name: str, value: ArrayLike, device: torch.device | None = None) -> Tensor:
    """Convert class indices to int64, on a device, by default the CPU.

    A tensor is returned as it is, and values that are no integers keep their dtype.
    """
    if isinstance(value, Tensor):
        return value
    labels = as_tensor(name, value)
    no_integers = labels.is_floating_point() or labels.dtype == torch.bool
    return labels.to(device, labels.dtype if no_integers else torch.int64)


def _first(value: object) -> object:
    """Return the first thing in nested lists."""
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return value


def _description(value: object) -> str:
    if isinstance(value, list | tuple) and value:
        return f"a list of {type(_first(value)).__name__}, {_first(value)!r} first"
    dtype = getattr(value, "dtype", None)
    return type(value).__name__ + ("" if dtype is None else f" of dtype {dtype}")
