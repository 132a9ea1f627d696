"""A table of the layers of a network, for whoever has to choose some."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchdnr.features.layers import evaluation_mode
from torchdnr.features.reductions import ReductionLike, build_reduction


@dataclass(frozen=True)
class LayerRow:
    """One layer of a ``LayerTable``.

    Attributes:
        name: As in ``net.named_modules()``, and as ``DNR`` takes it.
        module: Its class.
        output: Shape of its output for one image, without the samples.
        flatten: Number of features of all its values.
        avg: Number of features of their mean over positions; None where the reduction does not
            fit, or cannot tell where the channels are.
        grid: Number of features of a grid; None as for ``avg``.
    """

    name: str
    module: str
    output: tuple[int, ...]
    flatten: int
    avg: int | None
    grid: int | None


@dataclass(frozen=True)
class LayerTable:
    """The layers of a network in the order in which they end; it prints as a table.

    Attributes:
        rows: The layers that features can be taken of.
        unusable: Name -> reason, for the others.
        k: Parts along each side of the grid.
    """

    rows: list[LayerRow]
    unusable: dict[str, str]
    k: int

    def __str__(self) -> str:
        head = ("layer", "module", "output", "flatten", "avg", f"grid {self.k}")
        body = [
            (
                row.name,
                row.module,
                " x ".join(map(str, row.output)) or "1",
                *(
                    "-" if size is None else f"{size:,}"
                    for size in (row.flatten, row.avg, row.grid)
                ),
            )
            for row in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if index < 3 else cell.rjust(width)
                for index, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in (head, tuple("-" * width for width in widths), *body)
        ]
        lines += [f"not usable: {name} ({reason})" for name, reason in self.unusable.items()]
        return "\n".join(lines)

    __repr__ = __str__


def layer_table(
    net: nn.Module, image_size: int | tuple[int, int], channels: int = 3, *, k: int = 2
) -> LayerTable:
    """Tabulate the layers of a network and the numbers of features that they give.

    The network runs once on one image of random values, in evaluation mode and without gradient,
    and is left as found.

    Args:
        net: Any network on images.
        image_size: Height and width, or one number for both.
        channels: Channels of the images.
        k: Parts along each side of the grid.

    Returns:
        A table to be printed, with ``rows`` to be read.

    Raises:
        ValueError: If the network fails on such an image.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    parameter = next((p for p in net.parameters() if p.is_floating_point()), torch.zeros(()))
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, channels, *size, generator=generator).to(parameter)
    with torch.no_grad():
        shapes, unusable, _ = observe(net, image, lambda output: tuple(output.shape))
    kinds = {name: type(module).__name__ for name, module in net.named_modules()}
    square = size[0] == size[1]
    rows = [
        LayerRow(name, kinds[name], shape[1:], *_sizes(shape, square, k))
        for name, shape in shapes.items()
    ]
    return LayerTable(rows, unusable, k)


def observe(
    net: nn.Module, image: Tensor, keep: Callable[[Tensor], Any]
) -> tuple[dict[str, Any], dict[str, str], Any]:
    """Run a network on one image and look at the output of every layer.

    Args:
        net: Any network; it runs in evaluation mode, and is left as found.
        image: What it takes, ``(1, ...)``.
        keep: Takes what is wanted of an output, when the layer returns.

    Returns:
        Layer name -> what was kept, for layers that return one row per sample, in the order in
        which they end (that of the last run, of a layer that runs several times); name -> reason
        for the others; and the output of the network.

    Raises:
        ValueError: If the network fails on the image.
    """
    kept: dict[str, Any] = {}
    unusable = {name: "did not run" for name, _ in net.named_modules() if name}

    def hook_of(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            kept.pop(name, None)
            output = output[0] if isinstance(output, tuple | list) and output else output
            if not isinstance(output, Tensor):
                unusable[name] = f"returns {type(output).__name__}"
            elif output.dim() == 0 or output.shape[0] != 1:
                unusable[name] = f"returns {tuple(output.shape)} for one image"
            else:
                unusable.pop(name, None)
                kept[name] = keep(output)

        return hook

    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(net))
        for name, module in net.named_modules():
            if name:
                stack.callback(module.register_forward_hook(hook_of(name)).remove)
        try:
            scores = net(image)
        except Exception as error:
            raise ValueError(
                f"the network fails on an image {tuple(image.shape[1:])}: {error}; give the size "
                "of image that it is built for"
            ) from error
    return kept, unusable, scores


def reduced_size(reduction: ReductionLike, shape: tuple[int, ...], square: bool) -> int | None:
    """Compute the number of features that a reduction makes of an output, without computing them.

    Args:
        reduction: As for ``build_reduction``; not a projection.
        shape: Of the output, ``(1, ...)``.
        square: Whether the images are square.

    Returns:
        Number of features; None where the reduction does not fit.
    """
    module, output = build_reduction(reduction), torch.empty(shape, device="meta")
    try:
        module.prepare(output, square)
        return module(output).shape[1]
    except ValueError:
        return None


def _sizes(shape: tuple[int, ...], square: bool, k: int) -> tuple[int | None, ...]:
    return tuple(reduced_size(r, shape, square) for r in ("flatten", "avg", ("grid", k)))
