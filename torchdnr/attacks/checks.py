"""Checks of the arguments of an attack, made once per call."""

from numbers import Integral

import torch
from torch import Tensor

from torchdnr.arrays import ArrayLike, as_images, as_labels, as_tensor
from torchdnr.attacks.projections import check_norm
from torchdnr.decisions import check_images

_LEVEL_SLACK = 1e-2  # of a level: what float32 makes of a value on it


def checked_inputs(
    inputs: ArrayLike,
    labels: ArrayLike,
    norm: float,
    bounds: tuple[float, float],
    model: object = None,
) -> tuple[Tensor, Tensor]:
    """Convert inputs and labels; refuse those, or a norm or bounds, that no attack can work with.

    Arrays get the device and the floating point of the model. Errors are ValueErrors, or a
    TypeError for what holds no numbers.
    """
    inputs = as_images("inputs", inputs, model)
    labels = as_labels("labels", labels, inputs.device)
    check_norm(norm)
    if not bounds[0] < bounds[1]:
        raise ValueError(f"bounds must be (smallest, largest), got {bounds}")
    check_images("inputs", inputs, bounds)
    if inputs.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"inputs must be float32 or float64, got {inputs.dtype}: budgets and margins drown in "
            "its rounding; convert with inputs.float() and let the model cast"
        )
    if labels.shape != inputs.shape[:1]:
        raise ValueError(
            f"labels must be (n,) with n = {len(inputs)} rows of inputs, got {tuple(labels.shape)}"
        )
    if labels.dtype != torch.int64:
        raise ValueError(
            f"labels must be int64 class indices, got {labels.dtype}; convert with labels.long()"
        )
    if labels.device != inputs.device:
        raise ValueError(
            f"labels must be on the device of inputs, {inputs.device}, got {labels.device}"
        )
    if labels.min() < 0:
        raise ValueError(f"labels must be >= 0, got {labels.min()}: attack inputs of known class")
    return inputs, labels


def check_like(name: str, images: Tensor, inputs: Tensor, *, same_length: bool = False) -> None:
    """Refuse images unlike the attacked inputs in shape, dtype or device: ValueError.

    The number of rows has to agree with ``same_length`` only.
    """
    skip = 0 if same_length else 1
    if images.shape[skip:] != inputs.shape[skip:] or images.ndim != inputs.ndim:
        expected = tuple(inputs.shape) if same_length else ("m", *inputs.shape[1:])
        raise ValueError(f"{name} must have the shape {expected}, got {tuple(images.shape)}")
    if images.dtype != inputs.dtype or images.device != inputs.device:
        raise ValueError(
            f"{name} must be like inputs, {inputs.dtype} on {inputs.device}, "
            f"got {images.dtype} on {images.device}"
        )


def check_pool(
    pool: Tensor, classes: Tensor | None, inputs: Tensor, bounds: tuple[float, float]
) -> None:
    """Refuse a pool of starting points, or its classes, unlike the inputs: ValueError."""
    check_images("init_inputs", pool, bounds)
    check_like("init_inputs", pool, inputs)
    if classes is not None:
        _check_classes("init_labels", classes, pool, "m")


def _check_classes(name: str, classes: Tensor, rows: Tensor, count: str) -> None:
    """Refuse classes that are not int64, one for each of the rows, on their device: ValueError."""
    given = classes.shape, classes.dtype, classes.device
    if given != (rows.shape[:1], torch.int64, rows.device):
        raise ValueError(
            f"{name} must be int64 ({count},) with {count} = {len(rows)} on {rows.device}, "
            f"got {classes.dtype} {tuple(classes.shape)} on {classes.device}"
        )


def check_eps(eps: float | Tensor, inputs: Tensor) -> Tensor:
    """Turn ``eps`` into one radius >= 0 per input, like ``inputs``, ``(n,)``; else ValueError."""
    radius = torch.as_tensor(eps, dtype=inputs.dtype, device=inputs.device)
    if radius.shape not in ((), inputs.shape[:1]):
        raise ValueError(
            f"eps must be a number or (n,) with n = {len(inputs)}, got {tuple(radius.shape)}"
        )
    if not (radius >= 0).all():
        raise ValueError(f"eps must be >= 0 and not NaN, got {radius.min():g}")
    return radius.expand(len(inputs))


def check_count(name: str, value: int, smallest: int) -> None:
    """Refuse a count below ``smallest``: ValueError."""
    if value < smallest:
        raise ValueError(f"{name} must be >= {smallest}, got {value}")


def as_targets(targets: ArrayLike | None, device: torch.device) -> int | Tensor | None:
    """Convert targets: one class for all becomes an int, anything else a tensor."""
    if targets is None or isinstance(targets, Integral):
        return targets if targets is None else int(targets)
    targets = as_labels("targets", targets, device)
    return int(targets) if targets.ndim == 0 and not targets.is_floating_point() else targets


def check_targets(targets: int | Tensor | None, labels: Tensor) -> Tensor | None:
    """Return the target of each input, ``(n,)``; ValueError if one is no class or the true one.

    One class for all may be that of some inputs: these have nothing to reach.
    """
    if targets is None:
        return None
    if not isinstance(targets, Tensor):
        if targets < 0:
            raise ValueError(f"targets must be a class >= 0 or one for each input, got {targets}")
        return torch.full_like(labels, targets)
    _check_classes("targets", targets, labels, "n")
    if targets.min() < 0 or (targets == labels).any():
        raise ValueError(
            "targets must be classes >= 0 other than the true ones: to be accepted as the true "
            "class is no evasion"
        )
    return targets


def check_mask(mask: ArrayLike | None, inputs: Tensor) -> Tensor | None:
    """Return a mask as bool like the inputs, None where it changes nothing; else ValueError."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        mask = as_tensor("mask", mask).to(inputs.device)
    try:
        mask = mask.expand(inputs.shape)
    except (RuntimeError, AttributeError):
        raise ValueError(
            f"mask must be a tensor like one input, {tuple(inputs.shape[1:])}, or like all, "
            f"{tuple(inputs.shape)}, got {tuple(getattr(mask, 'shape', ())) or type(mask).__name__}"
        ) from None
    if mask.device != inputs.device:
        raise ValueError(
            f"mask must be on the device of inputs, {inputs.device}, got {mask.device}"
        )
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError("mask must be bool or hold 0 and 1: where an input may change")
    return None if mask.all() else mask.bool()


def check_levels(levels: int | None, inputs: Tensor, bounds: tuple[float, float]) -> None:
    """Refuse fewer than two levels, and inputs between levels: ValueError."""
    if levels is None:
        return
    check_count("levels", levels, 2)
    level = (inputs - bounds[0]) * ((levels - 1) / (bounds[1] - bounds[0]))
    off = (level - level.round()).abs().max().item()
    if off > _LEVEL_SLACK:
        raise ValueError(
            f"inputs must lie on {levels} levels, as pixels of images do, got values {off:.2g} of "
            "a level off; round them, or leave out levels"
        )


def check_steps(steps: int, step_size: float | None = None, *, smallest: int = 1) -> None:
    """Refuse too few steps, and a step size that is not positive and finite: ValueError."""
    check_count("steps", steps, smallest)
    if step_size is not None and not 0 < step_size < torch.inf:
        raise ValueError(f"step_size must be > 0 and finite, got {step_size}")
