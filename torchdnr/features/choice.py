"""The layers of a network: a table of what they give, and a choice where the user makes none."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from torchdnr.decisions import class_scores, evaluation_mode
from torchdnr.features.reductions import Reduction, ReductionLike, build_reduction

LARGEST = 4096
"""Most features that a layer keeps flat or averaged."""
PROJECTED = 1024
"""Features that a larger layer is projected to."""
WINDOWS = ((2 / 3, 5 / 6), (1 / 2, 2 / 3))
"""Shares of the depth of the last layer between which the other layers are looked for."""


@dataclass(frozen=True)
class LayerRow:
    """One layer of a ``LayerTable``.

    Attributes:
        name: As in ``net.named_modules()``, and as ``DNR`` takes it.
        module: Its class.
        output: Shape of its output for one image, without the samples.
        flatten: Number of features of all its values.
        avg: Number of features of their mean over positions; None where the reduction does not
            fit, or the shape does not say where the channels are.
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
        rows: The layers that have features.
        unusable: Name -> reason, for the others.
        k: Parts along each side of the grid.
    """

    rows: list[LayerRow]
    unusable: dict[str, str]
    k: int

    def __str__(self) -> str:
        head = ("layer", "module", "output", "flatten", "avg", f"grid {self.k}")
        body = []
        for row in self.rows:
            sizes = ["-" if n is None else f"{n:,}" for n in (row.flatten, row.avg, row.grid)]
            body.append((row.name, row.module, " x ".join(map(str, row.output)) or "1", *sizes))
        widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
        lines = []
        for line in (head, ["-" * width for width in widths], *body):
            cells = [f"{t:{side}{w}}" for t, side, w in zip(line, "<<<>>>", widths, strict=True)]
            lines.append("  ".join(cells).rstrip())
        lines += [f"not usable: {name} ({reason})" for name, reason in self.unusable.items()]
        return "\n".join(lines)

    __repr__ = __str__


def layer_table(
    net: nn.Module, image_size: int | tuple[int, int], channels: int = 3, *, k: int = 2
) -> LayerTable:
    """Tabulate the layers of a network and the numbers of features that they give.

    The network runs once on one image of random values, in evaluation mode and without gradient,
    and is not changed.

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
    rows = []
    for name, shape in shapes.items():
        avg, grid = (reduced_size(r, shape, size[0] == size[1]) for r in ("avg", ("grid", k)))
        rows.append(LayerRow(name, kinds[name], shape[1:], math.prod(shape), avg, grid))
    return LayerTable(rows, unusable, k)


def observe(
    net: nn.Module, image: Tensor, keep: Callable[[Tensor], Any]
) -> tuple[dict[str, Any], dict[str, str], Any]:
    """Run a network on one image ``(1, ...)`` and look at the output of every layer.

    Returns:
        Layer name -> what ``keep`` took of its output, for layers that return one row per sample,
        in the order in which they end (that of the last run, of a layer that runs more than once);
        name -> reason for the others; and the output of the network.
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
                stack.enter_context(module.register_forward_hook(hook_of(name)))
        try:
            scores = net(image)
        except Exception as error:
            raise ValueError(
                f"the network fails on an image {tuple(image.shape[1:])}: {error}; give the size "
                "of image that it is built for"
            ) from error
    return kept, unusable, scores


def reduced_size(reduction: ReductionLike, shape: tuple[int, ...], square: bool) -> int | None:
    """Compute how many features a reduction makes of an output; None where it does not fit.

    Nothing is computed of values: the reduction is a built-in one, but not a projection.
    """
    module = cast(Reduction, build_reduction(reduction))
    output = torch.empty(shape, device="meta")
    try:
        module.prepare(output, square)
        return module(output).shape[1]
    except ValueError:
        return None


@dataclass(frozen=True)
class _Bottleneck:
    """A layer that every path from the image to the scores passes through."""

    name: str
    depth: int
    shape: tuple[int, ...]


def default_layers(net: nn.Module, images: Tensor) -> dict[str, ReductionLike]:
    """Choose up to three late layers of a network, of different depth, and their reductions.

    Candidates are the layers that every path from the image to the scores passes through: no
    branch of a block, no auxiliary head. Dropout, activations, and layers whose values are the
    scores do not count; nor do layers that return what another returned. Depth is the number of
    layers with weights (convolutions, linear layers, attention) that ended so far. Chosen are the
    deepest one, and the least nested, then latest one in each of two windows before it: from 2/3
    to 5/6 of its depth, and from 1/2 to 2/3; where there is none, the latest one before.

    A layer keeps all its values up to 4,096; a larger one is averaged over its positions, or, where
    they cannot be told from channels, projected to 1,024 features.

    Args:
        net: Any network on images that returns its scores, or what ``class_scores`` takes them
            from. It runs once, in evaluation mode, and is not changed.
        images: Images of the size to come, ``(n, ...)``, on the device of the network; the first
            one is used.

    Returns:
        Layer name -> reduction, first to last; what ``DNR`` takes as ``layers``.

    Raises:
        ValueError: If the network fails on such an image, if autograd does not follow it, or if it
            has no layer to choose.
        TypeError: If no scores are found in what the network returns.
    """
    candidates = _bottlenecks(net, images[:1])
    if not candidates:
        raise ValueError(
            "found no layer to choose: none that every path to the scores passes through; name "
            "layers yourself, see layer_table"
        )
    square = images.dim() == 4 and images.shape[2] == images.shape[3]
    return {layer.name: _reduction(layer.shape, square) for layer in _spread(candidates)}


def _spread(candidates: list[_Bottleneck]) -> list[_Bottleneck]:
    """Choose the deepest layer and one in each window before it."""
    deepest = max(layer.depth for layer in candidates)
    chosen = [[layer for layer in candidates if layer.depth == deepest][-1]]
    for low, high in WINDOWS:
        earlier = [layer for layer in candidates if layer.depth < chosen[0].depth]
        window = [x for x in earlier if low * deepest <= x.depth <= high * deepest]
        if window:
            least = min(layer.name.count(".") for layer in window)
            chosen.insert(0, [layer for layer in window if layer.name.count(".") == least][-1])
        elif earlier:
            below = [layer for layer in earlier if layer.depth <= high * deepest]
            chosen.insert(0, (below or earlier)[-1])
    return chosen


def _reduction(shape: tuple[int, ...], square: bool) -> ReductionLike:
    for reduction in ("flatten", "avg"):
        size = reduced_size(reduction, shape, square)
        if size is not None and size <= LARGEST:
            return reduction
    return ("project", PROJECTED)


@torch.enable_grad()
def _bottlenecks(net: nn.Module, image: Tensor) -> list[_Bottleneck]:
    entry = image.detach().clone().requires_grad_() * 1  # not a leaf: it has a node in the graph
    modules = dict(net.named_modules())
    depth = 0
    kept, _, scores = observe(net, entry, lambda output: (output.grad_fn, output))
    scores = class_scores(scores)
    if scores.grad_fn is None:
        raise ValueError(
            "cannot follow the network from the image to its scores: it must return scores that "
            "autograd can differentiate; name layers yourself, see layer_table"
        )
    on_all_paths = _nodes_on_all_paths(scores.grad_fn, entry.grad_fn)
    layers: dict[Any, _Bottleneck] = {}  # by node of the graph
    for name, (node, output) in kept.items():
        module = modules[name]
        depth += any(p.dim() > 1 for p in module.parameters(recurse=False))
        if depth == 0 or node not in on_all_paths or _is_activation(module):
            continue
        if output.numel() == scores.numel() and torch.equal(output.flatten(), scores.flatten()):
            continue
        # Of layers that return the same tensor the last to end counts: the outermost.
        layers.pop(node, None)
        layers[node] = _Bottleneck(name, depth, tuple(output.shape))
    return list(layers.values())


def _is_activation(module: nn.Module) -> bool:
    """Return whether a module is a dropout, an activation, or changes nothing but the shape."""
    homes = "torch.nn.modules.activation", "torch.nn.modules.dropout", "torch.nn.modules.flatten"
    trivial = type(module).__module__ in homes or isinstance(module, nn.Identity)
    return trivial and next(module.parameters(), None) is None


def _nodes_on_all_paths(last: Any, first: Any) -> set[Any]:  # noqa: ANN401 - nodes of autograd
    """Find the nodes of an autograd graph that every path from ``first`` to ``last`` contains.

    In topological order a node is on all paths if and only if no edge passes over it.
    """
    inputs: dict[Any, list[Any]] = {}  # those that lead back to first; filled in topological order
    stack = [(last, False)]
    seen = set()
    while stack:
        node, expanded = stack.pop()
        before = [n for n, _ in node.next_functions if n is not None]
        if expanded:
            before = [n for n in before if n in inputs]
            if before or node is first:
                inputs[node] = before
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(n, False) for n in before if n not in seen]
    consumers = dict.fromkeys(inputs, 0)
    for before in inputs.values():
        for node in before:
            consumers[node] += 1
    on_all_paths, passing = set(), 0
    for node, before in inputs.items():
        passing -= len(before)
        if passing == 0:
            on_all_paths.add(node)
        passing += consumers[node]
    return on_all_paths
