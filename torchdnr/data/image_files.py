"""Open an image file as what it shows: upright, in 8 bits, scaled as its mode means, on white."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

UNREADABLE = OSError, ValueError, SyntaxError, Image.DecompressionBombError
"""What is raised for a file that is no image, damaged, of unknown scale, or of too many pixels."""

MODES = {1: "L", 3: "RGB"}
"""Pillow's name for images of so many channels."""


def open_image(file: str | Path, channels: int = 3) -> Image.Image:
    """Open an image file as a viewer shows it.

    It is turned as its EXIF data say. Grey values of 16 bits are scaled from 0..65535, floating
    point from [0, 1]. What is transparent shows a white ground.

    Args:
        file: The file.
        channels: 1 for grey (mode "L"), 3 for colours (mode "RGB").

    Returns:
        The image, 8 bits per channel.

    Raises:
        OSError: If it cannot be read, or is no image.
        ValueError: If nothing says what its values mean: floating point outside [0, 1], or 32-bit
            integers.
    """
    with Image.open(file) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith(("I", "F")):
            image = _grey(image, sixteen_bits=opened.format != "TIFF" or opened.mode != "I")
        if image.mode in ("La", "RGBa") or image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert(MODES[channels])


def _grey(image: Image.Image, sixteen_bits: bool) -> Image.Image:
    """Scale one channel of more than 8 bits, which Pillow would clip at 255, to 8 bits."""
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F":
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= 1):  # also true of NaN
            raise ValueError(
                f"floating point, expected values in [0, 1], got {low:.4g} to {high:.4g}"
            )
        values = values * 255
    elif sixteen_bits:  # mode "I" of a PNG too, in earlier versions of Pillow
        values = values / 257
    else:
        raise ValueError("32-bit integers, whose largest value is unknown; save it with 16 bits")
    return Image.fromarray(values.round().astype(np.uint8))
