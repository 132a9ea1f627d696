"""Read images and labels: from an npz file, a folder of classes, or single image files."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from torchdnr.data.image_files import MODES, UNREADABLE, open_image
from torchdnr.distributed.processes import warn_once
from torchdnr.resources import progress_bar

if TYPE_CHECKING:  # torchvision takes seconds to import, and most runs do without it
    from torchvision.datasets import ImageFolder

MAX_CHANNELS = 4  # tells NCHW from NHWC


def read_npz(path: Path) -> tuple[Any, ...]:
    """Read ``x_train``, ``y_train`` and, unless the file is a pool, ``x_test``, ``y_test``.

    Args:
        path: An npz file: images uint8 NHWC or NHW, or float NCHW in [0, 1]; labels integer.

    Returns:
        Class names, then for training and, where there is one, test: images ``(n, C, H, W)``, uint8
        or float32, and labels ``(n,)``, int64.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, holds pickled objects, or its arrays are not as described.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; expected an npz file, check the path")
    try:
        with np.load(path, allow_pickle=False) as opened:
            arrays = {name: opened[name] for name in opened.files}
    except Exception as error:  # zipfile, zlib and numpy raise different ones
        raise ValueError(
            f"{path} must be an npz file of plain arrays, got {type(error).__name__}: {error}; "
            "write it with numpy.savez(path, x_train=..., y_train=..., x_test=..., y_test=...)"
        ) from error
    names: tuple[str, ...] = ("x_train", "y_train", "x_test", "y_test")
    if missing := [name for name in names if name not in arrays]:
        if missing != ["x_test", "y_test"]:
            raise ValueError(f"{path} must hold {', '.join(names)}, lacks {missing}; add them")
        names = names[:2]
    parts = {
        name: (_check_images if name.startswith("x") else _check_labels)(name, arrays[name])
        for name in names
    }
    c = _check_classes(path, parts)
    return tuple(map(str, range(c))), *parts.values()


def _check_images(name: str, array: np.ndarray) -> Tensor:
    expected = "uint8 NHWC or NHW, or float NCHW in [0, 1]"
    if array.dtype == np.uint8 and array.ndim in (3, 4):
        images = to_nchw(torch.from_numpy(array))
    elif np.issubdtype(array.dtype, np.floating) and array.ndim == 4:
        images = torch.from_numpy(array.astype(np.float32))
    else:
        raise ValueError(f"{name} must be {expected}, got {array.dtype} {array.shape}; convert it")
    if not 1 <= images.shape[1] <= MAX_CHANNELS or not images.numel():
        raise ValueError(
            f"{name} must be {expected}, at least one image of 1 to {MAX_CHANNELS} channels, got "
            f"{array.dtype} {array.shape}; transpose it"
        )
    if images.is_floating_point():
        low, high = images.aminmax()
        if not (low >= 0 and high <= 1):  # NaN fails too
            raise ValueError(
                f"{name} must be in [0, 1], got {low:.4g} to {high:.4g}; scale it (uint8: / 255)"
            )
    return images


def _check_labels(name: str, array: np.ndarray) -> Tensor:
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]  # as Keras stores CIFAR-10
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"{name} must be integer (n,), got {array.dtype} {array.shape}; pass class numbers"
        )
    return torch.from_numpy(array.astype(np.int64))


def _check_classes(path: Path, parts: dict[str, Tensor]) -> int:
    """Check that labels fit the images and are 0..c-1; return the number of classes c."""
    for part in ("train", "test"):
        if f"x_{part}" in parts and len(parts[f"x_{part}"]) != len(parts[f"y_{part}"]):
            raise ValueError(
                f"{path}: x_{part} and y_{part} must be equally long, got "
                f"{len(parts[f'x_{part}'])} and {len(parts[f'y_{part}'])}; pair them up"
            )
    labels = parts["y_train"].unique().tolist()
    c = len(labels)
    extra = sorted(set(parts.get("y_test", parts["y_train"]).tolist()) - set(range(c)))
    if labels != list(range(c)) or c < 2 or extra:
        raise ValueError(
            f"{path}: labels must be 0..c-1, c >= 2, every class in y_train, got {labels[:20]} in "
            f"y_train and {extra[:20]} in y_test besides; number the classes from 0 without gaps"
        )
    return c


def read_folder(path: Path, image_size: int, progress: bool = True) -> tuple[Any, ...]:
    """Read ``train/CLASS/*`` and ``val/CLASS/*`` into memory; warn about unreadable files.

    Images are opened by ``open_image``.

    Args:
        path: The folder that holds ``train`` and ``val``.
        image_size: Side of the squares, in pixels, >= 1: short side resized, centre cropped.
        progress: Whether to show progress bars.

    Returns:
        Class names, then for ``train`` and for ``val``: images ``(n, 3, image_size, image_size)``,
        uint8, and labels ``(n,)``, int64.

    Raises:
        FileNotFoundError: If a folder is missing, or a class folder holds no image file.
        ValueError: If the classes of the two folders differ, or a class has no readable image.
    """
    from torchvision.datasets import ImageFolder

    if image_size < 1:
        raise ValueError(f"image_size must be >= 1, got {image_size}; pass pixels, such as 224")
    for part in ("train", "val"):
        if not (path / part).is_dir():
            raise FileNotFoundError(
                f"no folder {path / part}; expected {path} to hold train/CLASS/* and val/CLASS/*"
            )
    train, test = (ImageFolder(path / part, loader=open_image) for part in ("train", "val"))
    if train.classes != test.classes or len(train.classes) < 2:
        raise ValueError(
            f"{path}: train/ and val/ must have the same class folders, at least two, got "
            f"{train.classes[:20]} and {test.classes[:20]}; make them equal"
        )
    crop = square_crop(image_size)
    first, second = (_read_images(f, crop, image_size, progress) for f in (train, test))
    return tuple(train.classes), *first, *second


def square_crop(image_size: int) -> Callable[[Any], Tensor]:
    """Make the transform of an image of Pillow: short side resized, centre cropped; uint8 CHW."""
    from torchvision.transforms import v2

    return v2.Compose([v2.Resize(image_size), v2.CenterCrop(image_size), v2.PILToTensor()])


def _read_images(
    folder: "ImageFolder", crop: Callable[[Any], Tensor], image_size: int, progress: bool
) -> tuple[Tensor, Tensor]:
    images = torch.empty(len(folder.samples), 3, image_size, image_size, dtype=torch.uint8)
    labels: list[int] = []
    unreadable = []
    bar = progress_bar(
        progress, folder.samples, desc=f"reading {Path(folder.root).name}", unit="image"
    )
    for file, label in bar:
        try:
            images[len(labels)] = crop(folder.loader(file))
        except UNREADABLE as error:
            unreadable.append(f"{file} ({error})")
        else:
            labels.append(label)
    if unreadable:
        warn_once(
            f"{len(unreadable)} of {len(folder.samples)} images in {folder.root} are unreadable "
            f"and left out, first: {unreadable[0]}",
            stacklevel=4,
        )
    if len(set(labels)) < len(folder.classes):
        raise ValueError(
            f"{folder.root}: a class has no readable image, expected one at least; replace them"
        )
    return images[: len(labels)], torch.tensor(labels)


def read_mask(path: Path, shape: Sequence[int]) -> Tensor:
    """Read which pixels of an image may change: those where a picture or a tensor is not zero.

    Args:
        path: A picture of the size of the images, black where nothing may change; or one tensor or
            array, like one image or ``(H, W)``, in a file of ``torch.save`` (``.pt``, ``.pth``,
            read by PyTorch's restricted unpickler) or of ``numpy.save`` (``.npy``).
        shape: Shape of one image, ``(C, H, W)``.

    Returns:
        Mask, bool ``(C, H, W)``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read, has another size, or nothing may change.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; expected a mask, check the path")
    try:
        if path.suffix in (".pt", ".pth"):
            values = torch.load(path, map_location="cpu", weights_only=True)
        elif path.suffix == ".npy":
            values = torch.as_tensor(np.load(path, allow_pickle=False))
        else:
            values = torch.as_tensor(np.array(open_image(path))).amax(dim=-1)
        mask = (values != 0).expand(tuple(shape))
    except Exception as error:  # whatever Pillow, numpy and PyTorch raise of a foreign file
        raise ValueError(
            f"{path} must be a picture of {shape[-2]} x {shape[-1]} pixels, or a tensor like one "
            f"image, {tuple(shape)}, in a .pt or .npy file, got "
            f"{type(error).__name__}: {str(error).splitlines()[0]}; make one of that size"
        ) from error
    if not mask.any():
        raise ValueError(
            f"{path} must be other than zero where the attacks may change an image, got zero "
            "everywhere; make those pixels white"
        )
    return mask


def to_nchw(images: Tensor) -> Tensor:
    """Reorder images ``(n, H, W)`` or ``(n, H, W, C)`` to ``(n, C, H, W)``."""
    return images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()


def find_images(paths: Sequence[Path]) -> list[Path]:
    """List files, and the image files in and below folders, sorted, by suffix (.jpg, ...)."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    images: list[Path] = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"no file or folder {path}; check the path")
        files = [path]
        if path.is_dir():
            suffixed = (file for file in path.rglob("*") if file.suffix.lower() in IMG_EXTENSIONS)
            files = sorted(file for file in suffixed if file.is_file())
        if not files:
            raise FileNotFoundError(
                f"no image in {path}; expected files that end in {', '.join(IMG_EXTENSIONS)}"
            )
        images += files
    return images


def read_batches(
    files: Sequence[Path],
    shape: Sequence[int],
    batch_size: int,
    unreadable: Callable[[Path, Exception], None],
) -> Iterator[tuple[list[Path], Tensor]]:
    """Read images as the data set ``folder:`` does: short side resized, centre cropped.

    Yields the files of a batch that could be read, and their images ``(k, *shape)``, float32 in
    [0, 1], k >= 1; calls ``unreadable`` with the others, and why.
    """
    channels, height, width = shape
    if channels not in MODES or height != width:
        raise ValueError(
            f"image files are read as squares of 1 or 3 channels, but the network takes "
            f"{tuple(shape)}; call the classifier from Python instead"
        )
    crop = square_crop(height)
    for start in range(0, len(files), batch_size):
        images, read = [], []
        for file in files[start : start + batch_size]:
            try:
                images.append(crop(open_image(file, channels)))
            except UNREADABLE as error:
                unreadable(file, error)
            else:
                read.append(file)
        if read:
            yield read, torch.stack(images).float() / 255
