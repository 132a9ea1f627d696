"""Random changes of images in windows: the proposals of the Square attack.

An image is ``(n, c, height, width)`` here. Each row has its windows elsewhere; they are told by
comparing coordinates with offsets drawn on the device, so that nothing waits for it.

Source: Andriushchenko et al., "Square attack: a query-efficient black-box adversarial attack via
random search", ECCV 2020, Algorithms 2 and 3.
"""

import math

import torch
from torch import Tensor

from torchdnr.attacks.points import Region

_TILES = 5  # along each side of the first pattern of l2 and l1
_LEAST_SIDE = 3  # of a window of l2 and l1, where the image is larger


def first_pattern(region: Region, generator: torch.Generator) -> Tensor:
    """Draw a point at the surface of each ball: vertical stripes, or for l2 and l1 a grid of tiles.

    Args:
        region: Ball and box of each row, with finite radii.
        generator: On the device of the region.

    Returns:
        Points, ``(n, ...)``, not projected on the box.
    """
    images, _ = _as_images(region.center, region)
    n, c, _, width = images.shape
    if region.norm == math.inf:
        move = _signs((n, c, 1, width), images, generator).expand_as(images)
    else:
        move = _tiles(images, region.norm, generator)
        move = move / _length(move, region.norm, (1, 2, 3))
    return region.center + region.eps.view(-1, *[1] * (region.center.ndim - 1)) * move.reshape(
        region.center.shape
    )


def changed_window(
    points: Tensor, region: Region, share: float, generator: torch.Generator
) -> Tensor:
    """Change each point in a random window.

    Args:
        points: Within the balls, ``(n, ...)``.
        region: Ball and box of each row, with finite radii.
        share: Share of a channel that the window covers, in (0, 1].
        generator: On the device of the region.

    Returns:
        Points, ``(n, ...)``, within the balls; not projected on the box.
    """
    images, center = _as_images(points, region)
    n, c, height, width = images.shape
    linf = region.norm == math.inf
    sides = _window_sides(share, height, width, 1 if linf else _LEAST_SIDE)
    eps = region.eps.view(-1, 1, 1, 1)
    if linf:
        window, _ = _window(images, sides, generator)
        moved = center + eps * _signs((n, c, 1, 1), images, generator)
        changed = torch.where(window, moved, images)
    else:
        changed = center + _moved_mass(images - center, eps, region.norm, sides, generator)
    return changed.reshape(points.shape)


def _as_images(points: Tensor, region: Region) -> tuple[Tensor, Tensor]:
    """View points and centres as images; flat ones have one channel and one row of pixels."""
    shape = (1, *points.shape[1:]) if points.ndim == 2 else points.shape[-2:]
    return tuple(t.reshape(len(t), -1, *shape) for t in (points, region.center))


def _window_sides(share: float, height: int, width: int, least: int) -> tuple[int, int]:
    """Choose a window that covers a share of the image: a square, or wider where that is too high.

    It is smaller than the image, so that there is a choice of places.
    """
    most = max(1, height - 1), max(1, width - 1)
    side = max(least, round(math.sqrt(share * height * width)))
    if side > most[0]:
        return most[0], min(most[1], max(least, round(share * height * width / most[0])))
    if side > most[1]:
        return min(most[0], max(least, round(share * height * width / most[1]))), most[1]
    return side, side


def _window(
    images: Tensor, sides: tuple[int, int], generator: torch.Generator
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Place a window in each row; return it, bool ``(n, 1, h, w)``, and coordinates in it."""
    inside, coordinates = [], []
    for length, side in zip(images.shape[-2:], sides, strict=True):
        offset = torch.randint(
            length - side + 1, (len(images), 1), generator=generator, device=images.device
        )
        coordinate = torch.arange(length, device=images.device) - offset
        inside.append((coordinate >= 0) & (coordinate < side))
        coordinates.append(coordinate.clamp(0, side - 1))
    window = inside[0][:, :, None] & inside[1][:, None, :]
    return window[:, None], tuple(coordinates)


def _moved_mass(
    move: Tensor, eps: Tensor, norm: float, sides: tuple[int, int], generator: torch.Generator
) -> Tensor:
    """Take the perturbation out of two windows, and put it, as a new pattern, into one of them.

    What the whole perturbation leaves of its radius is spent as well.
    """
    n, c = move.shape[:2]
    window, (i, j) = _window(move, sides, generator)
    emptied = _window(move, sides, generator)[0] | window
    variant = torch.randint(2, (n, 1, 1), generator=generator, device=move.device)
    pattern = _patterns(*sides, like=move)[variant, i[:, :, None], j[:, None, :]][:, None]
    pattern = torch.where(window, pattern, 0)
    pattern = pattern / _length(pattern, norm, (2, 3))
    there = torch.where(window, move, 0)
    there = there / _length(there, norm, (2, 3))
    fresh = _signs((n, c, 1, 1), move, generator) * pattern + there
    fresh = fresh / _length(fresh, norm, (2, 3))
    powers = move.abs() ** norm
    unused = (eps**norm - powers.sum(dim=(1, 2, 3), keepdim=True)).clamp_min(0)
    taken = torch.where(emptied, powers, 0).sum(dim=(2, 3), keepdim=True)
    available = (taken + unused / c) ** (1 / norm)
    return torch.where(emptied, 0, move) + available * fresh


def _tiles(images: Tensor, norm: float, generator: torch.Generator) -> Tensor:
    """Cover images with a grid of patterns, each with a sign of its own in each channel."""
    inside, tile, coordinates, sides = [], [], [], []
    for length in images.shape[-2:]:
        side = max(1, length // _TILES)
        count = min(_TILES, length)
        place = torch.arange(length, device=images.device) - (length - side * count) // 2
        inside.append((place >= 0) & (place < side * count))
        tile.append((place // side).clamp(0, count - 1))
        coordinates.append(place % side)
        sides.append(side)
    n, c = images.shape[:2]
    signs = _signs((n, c, _TILES, _TILES), images, generator)
    signs = signs[:, :, tile[0][:, None], tile[1]]
    variant = torch.randint(2, (n, 1, 1), generator=generator, device=images.device)
    patterns = _patterns(*sides, like=images)[variant, coordinates[0][:, None], coordinates[1]]
    return torch.where(inside[0][:, None] & inside[1], signs * patterns[:, None], 0)


def _patterns(height: int, width: int, *, like: Tensor) -> Tensor:
    """Return two peaks of opposite signs, one above and one beside the other, ``(2, h, w)``."""
    half, other = height // 2, width // 2
    above = [_peak(half, width, like), -_peak(height - half, width, like)]
    beside = [_peak(height, other, like), -_peak(height, width - other, like)]
    return torch.stack([torch.cat(above, dim=0), torch.cat(beside, dim=1)])


def _peak(height: int, width: int, like: Tensor) -> Tensor:
    """Return values that fall off in square rings: at distance r, the sum of 1 / k^2 for k > r."""
    rows = (torch.arange(height, device=like.device) - height // 2).abs()
    columns = (torch.arange(width, device=like.device) - width // 2).abs()
    ring = torch.maximum(rows[:, None], columns)
    terms = 1 / torch.arange(max(height, width) // 2 + 1, 0, -1, device=like.device).square()
    return terms.to(like.dtype).cumsum(dim=0).flip(0)[ring]


def _signs(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    signs = torch.randint(2, shape, generator=generator, device=like.device)
    return (2 * signs - 1).to(like.dtype)


def _length(values: Tensor, norm: float, dims: tuple[int, ...]) -> Tensor:
    """Return norms over some dimensions, 1 where they are 0."""
    length = torch.linalg.vector_norm(values, norm, dim=dims, keepdim=True)
    return torch.where(length > 0, length, 1)
