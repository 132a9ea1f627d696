"""Random changes of training images that leave their class as it is."""

import torch
from torch import Tensor, nn

SHIFT = 4  # pixels


def shift_and_mirror(images: Tensor) -> Tensor:
    """Shift each image by up to 4 pixels in both directions; mirror it with probability 1/2.

    Zeros come in at the borders. The random numbers are those of the CPU's global generator.

    Args:
        images: ``(n, channels, height, width)``.

    Returns:
        Changed images, like ``images``.

    Source: the usual augmentation of CIFAR-10, as in He et al., "Deep residual learning for image
    recognition", 2016, Sec. 4.2.
    """
    n, channels, height, width = images.shape
    shifts = torch.randint(0, 2 * SHIFT + 1, (2, n, 1))
    rows = torch.arange(height) + shifts[0]
    columns = torch.arange(width) + shifts[1]
    mirrored = torch.rand(n, 1) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    rows, columns = rows.to(images.device), columns.to(images.device)
    padded = nn.functional.pad(images, (SHIFT,) * 4)
    each = torch.arange(n, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[None, :, None, None]
    return padded[each, channel, rows[:, None, :, None], columns[:, None, None, :]]
