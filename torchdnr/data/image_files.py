"""Open an image file as what it shows: upright, in 8 bits, scaled as its mode means, on white."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

UNREADABLE = OSError, ValueError, SyntaxError, Image.DecompressionBombError
"""What is raised for a file that is no image, damaged, of unknown scale, or of too many pixels."""

MODES = {1: "L", 3: "RGB"}
"""Pillow's name for images of so many channels."""

_BITS, _PHOTOMETRIC = 258, 262  # tags of a TIFF
_WHITE_IS_ZERO = 0


def open_image(file: str | Path, channels: int = 3) -> Image.Image:
    """Open an image file as a viewer shows it.

    It is turned as its EXIF data say. Grey values of 16 bits, or of as many as a TIFF says, are
    scaled from their whole range, floating point from [0, 1]. What is transparent shows a white
    ground. The image has ``channels`` of 8 bits, 1 for grey (mode "L") or 3 for colours ("RGB").

    It is an ``OSError`` if the file cannot be read or is no image, and a ``ValueError`` if nothing
    says what its values mean: floating point outside [0, 1], or integers that are signed or of more
    than 16 bits.
    """
    with Image.open(file) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith(("I", "F")):
            image = _grey(image, opened)
        if image.mode in ("La", "RGBa") or image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert(MODES[channels])


def _grey(image: Image.Image, opened: Image.Image) -> Image.Image:
    """Scale one channel of more than 8 bits, which Pillow would clip at 255, to 8 bits.

    ``opened`` is the file that the image was made of: what it says of the values.
    """
    values = np.asarray(image).astype(np.float64)
    low, high, largest = values.min(), values.max(), 1.0
    tags = getattr(opened, "tag_v2", {})  # of a TIFF
    if image.mode == "F":
        expected = "floating point, expected values in [0, 1]"
    else:  # mode "I" of a PNG too, in earlier versions of Pillow
        expected = "integers, expected unsigned ones of at most 16 bits"
        known = opened.mode.startswith("I;16") or opened.format in ("PNG", "PPM", "JPEG2000")
        largest = 2.0 ** min(16, tags.get(_BITS, (16,))[0]) - 1 if known else 0.0
    if not (low >= 0 and high <= largest):  # also true of NaN
        raise ValueError(f"{expected}, got {low:.4g} to {high:.4g}")
    if isinstance(ground := opened.info.get("transparency"), int):
        values[values == ground] = largest
    values = values / max(largest, 1.0)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        values = 1 - values
    return Image.fromarray((values * 255).round().astype(np.uint8))
