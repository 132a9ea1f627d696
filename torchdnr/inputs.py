"""Checks of images, at the borders where a user hands them in."""

from torch import Tensor


def check_images(name: str, images: Tensor, bounds: tuple[float, float] = (0.0, 1.0)) -> None:
    """Refuse a batch of images that is empty, not floating point, or outside ``bounds``.

    Args:
        name: What the message calls them.
        images: Candidate batch, ``(n, ...)``.
        bounds: Smallest and largest value allowed.

    Raises:
        ValueError: If it is; also for NaN.
    """
    if images.ndim < 2 or len(images) == 0:
        raise ValueError(
            f"{name} must be a non-empty batch (n, ...), got shape {tuple(images.shape)}"
        )
    if not images.is_floating_point():
        raise ValueError(
            f"{name} must be floating point in {bounds}, got {images.dtype}; scale the images"
        )
    low, high = images.min(), images.max()
    if not (low >= bounds[0] and high <= bounds[1]):  # also true of NaN
        raise ValueError(
            f"{name} must lie in {bounds}, got values from {low:g} to {high:g}; "
            "scale or clamp the images, and keep normalisation inside the model"
        )
