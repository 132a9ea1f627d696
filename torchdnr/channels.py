"""Where a layer's output has its channels."""

import math
from collections.abc import Sequence

from torch import Tensor

CHANNELS_FIRST, CHANNELS_LAST = "channels_first", "channels_last"


def find_channels(shape: Sequence[int], square: bool) -> str:
    """Tell from the shape of an output without the samples where its channels are.

    Tokens ``(t, c)`` have them last. Of a map with three sides the two that are equal are its
    height and width, so that ``(c, h, w)`` is told from ``(h, w, c)`` of a Swin transformer: of
    square images, and of maps of one position. Any other map is refused, not guessed. Outputs of
    five dimensions and more have them first.

    Args:
        shape: Sides of the output.
        square: Whether the images are square.

    Returns:
        ``"channels_first"`` or ``"channels_last"``.

    Raises:
        ValueError: If the shape does not tell.
    """
    if len(shape) != 3:
        return CHANNELS_LAST if len(shape) == 2 else CHANNELS_FIRST
    first, last = shape[1] == shape[2], shape[0] == shape[1]
    known = square or shape[1] == 1
    if known and first != last:
        return CHANNELS_FIRST if first else CHANNELS_LAST
    if math.prod(shape) == 1:
        return CHANNELS_FIRST
    why = "two sides must be equal and one must differ" if square else "the images are not square"
    raise ValueError(
        f"cannot tell where the channels of maps {tuple(shape)} are: {why}"
        f'; say so, as in ("avg", "{CHANNELS_FIRST}") or ("grid", 2, "{CHANNELS_LAST}")'
    )


def channels_first(output: Tensor, channels: str) -> Tensor:
    """Move the channels of an output ``(n, ...)`` behind the samples, if they are elsewhere.

    Args:
        output: Of a layer, with positions.
        channels: Where its channels are.

    Returns:
        ``(n, c, ...)``, a view.
    """
    return output if channels == CHANNELS_FIRST else output.movedim(-1, 1)


def check_channels(channels: str | None) -> str | None:
    """Return ``channels`` if it is one of the two words or None.

    Args:
        channels: What a user gave.

    Returns:
        The same.

    Raises:
        ValueError: If it is anything else.
    """
    if channels not in (None, CHANNELS_FIRST, CHANNELS_LAST):
        raise ValueError(
            f'channels must be "{CHANNELS_FIRST}" or "{CHANNELS_LAST}", got {channels!r}'
        )
    return channels
