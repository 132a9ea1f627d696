"""Find image files, and read them in batches; broken ones are told, not fatal."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from torchdnr.data.readers import UNREADABLE, square_crop

_MODES = {1: "L", 3: "RGB"}
"""Pillow's name for images of so many channels."""


def find_images(paths: Sequence[Path]) -> list[Path]:
    """List the image files that are meant.

    Args:
        paths: Files, which are taken whatever they are called; and folders, of which, with all
            below them, the files are taken that are called as images are (.jpg, .png, ...).

    Returns:
        The files, those of a folder sorted.

    Raises:
        FileNotFoundError: If there is no such file or folder, or a folder holds no image.
    """
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"no file or folder {path}; check the path")
        inside = [path]
        if path.is_dir():
            files = (file for file in path.rglob("*") if file.suffix.lower() in IMG_EXTENSIONS)
            inside = sorted(file for file in files if file.is_file())
        if not inside:
            raise FileNotFoundError(
                f"no image in {path}; expected files that end in {', '.join(IMG_EXTENSIONS)}"
            )
        found += inside
    return found


def read_batches(
    files: Sequence[Path],
    shape: Sequence[int],
    batch_size: int,
    unreadable: Callable[[Path, Exception], None],
) -> Iterator[tuple[list[Path], Tensor]]:
    """Read images as the data set ``folder:`` does: short side resized, centre cropped.

    Args:
        files: From ``find_images``.
        shape: (channels, side, side) that the network takes; 1 channel is grey, 3 are colours.
        batch_size: Most files per batch, >= 1.
        unreadable: Called with every file that cannot be read, and why.

    Yields:
        Files that were read, and their images ``(k, *shape)``, float32 in [0, 1]; k >= 1.

    Raises:
        ValueError: If no image file can have such a shape.
    """
    channels, height, width = shape
    if channels not in _MODES or height != width:
        raise ValueError(
            f"images from files are square, of 1 or 3 channels, and the network takes "
            f"{tuple(shape)}; predict with torchdnr in Python"
        )
    crop = square_crop(height)
    for start in range(0, len(files), batch_size):
        images, read = [], []
        for file in files[start : start + batch_size]:
            try:
                with Image.open(file) as opened:
                    images.append(crop(opened.convert(_MODES[channels])))
            except UNREADABLE as error:
                unreadable(file, error)
            else:
                read.append(file)
        if read:
            yield read, torch.stack(images).float() / 255
