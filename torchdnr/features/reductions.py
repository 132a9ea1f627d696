"""Reductions: what makes ``(n, d)`` features of a layer's output, whatever its size."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchdnr.files import CheckpointError

ReductionLike = str | Sequence[Any] | nn.Module
"""``"flatten"``, ``"avg"``, ``("grid", k)``, ``("project", d)``, or any module to ``(n, d)``."""
CHOICES = '"flatten", "avg", ("grid", k), ("project", d) or an nn.Module'
CHANNELS_FIRST, CHANNELS_LAST = "channels_first", "channels_last"
BLOCKS = 4
"""Rows that each value is added to by a projection. More keep the distances of sparse outputs more
surely (an output of few values that differ) and cost more; from 4 on the gain is small."""
PAIRED = 64
"""Samples whose distances a projection is checked on: 2,016 pairs."""


def find_channels(shape: Sequence[int], square: bool) -> str:
    """Infer from the shape of an output without the samples where its channels are.

    Tokens ``(t, c)`` have them last. Of a map with three sides the two that are equal are its
    height and width, so that ``(c, h, w)`` differs from ``(h, w, c)`` of a Swin transformer: for
    square images, and for maps of one position. Any other map is refused, not guessed. Outputs of
    five dimensions and more have them first.
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
    """View an output ``(n, ...)`` with its channels behind the samples, ``(n, c, ...)``."""
    return output if channels == CHANNELS_FIRST else output.movedim(-1, 1)


def random_rows(inputs: int, size: int, seed: int) -> Tensor:
    """Draw a sparse Johnson-Lindenstrauss projection of ``inputs`` values to ``size`` rows.

    The ``size`` rows are split into ``BLOCKS`` blocks of one length (2 or 1 where ``size`` is not a
    multiple of 4). In each block every value goes to one random row with a random sign.

    Returns:
        Row of each value in each block, ``(blocks, p)`` int64 on the CPU: 0..d-1 to be added,
        d..2d-1 to be subtracted from row - d.

    Source: Kane, Nelson, "Sparser Johnson-Lindenstrauss transforms", J. ACM 61 (2014), Sec. 1,
    block construction.
    """
    blocks = math.gcd(size, BLOCKS)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(size // blocks, (blocks, inputs), generator=generator)
    rows += torch.arange(blocks).unsqueeze(1) * (size // blocks)
    return rows + size * torch.randint(2, rows.shape, generator=generator)


def sparse_projection(inputs: Tensor, rows: Tensor, size: int) -> Tensor:
    """Apply a projection from ``random_rows`` to inputs ``(n, p)``: ``(n, size)``.

    The expectation of squared distances, over the draw, is the squared distance of the inputs;
    their relative standard deviation is at most ``sqrt(2 / size)``. Cost: one addition per value
    and block, and ``8 * blocks`` bytes per value. Half precision is summed in float32. On a GPU the
    order of the additions may vary from call to call, unless ``torch.use_deterministic_algorithms``
    is on.
    """
    inputs = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
    # Signs as two sets of sums: the large inputs are then read as they are, without a product.
    sums = inputs.new_zeros(inputs.shape[0], 2 * size)
    for block in rows:
        sums = sums.index_add(1, block, inputs)
    return (sums[:, :size] - sums[:, size:]) / math.sqrt(rows.shape[0])


def projection_distortion(inputs: Tensor, projected: Tensor) -> dict[str, float] | None:
    """Compare the distances between all pairs of ``(n, p)`` before and after a projection.

    Returns:
        ``pairs``, the number of pairs at a distance above 0, and of their relative errors
        ``projected distance / distance - 1`` the root mean square ``rms`` and the largest absolute
        value ``max``; None where there is no such pair.
    """
    wide = torch.promote_types(inputs.dtype, torch.float32)
    before, after = F.pdist(inputs.to(wide)), F.pdist(projected.to(wide))
    apart = before > 0
    errors = after[apart] / before[apart] - 1
    if not errors.numel():
        return None
    rms, largest = errors.square().mean().sqrt(), errors.abs().max()
    return {"pairs": errors.numel(), "rms": rms.item(), "max": largest.item()}


class Reduction(nn.Module, ABC):
    """One of the built-in reductions: a name and numbers say all about it.

    ``prepare`` looks at an output once, before the first ``forward``; from then on ``forward``
    depends on nothing but tensors and shapes.

    Attributes:
        memory_format: That of the copy of an output which is best to read; the values of a
            flattened one lie in the order of the channels, whatever the format of the network.
    """

    memory_format = torch.preserve_format

    @property
    def ready(self) -> bool:
        """Whether ``prepare`` has nothing to find out any more."""
        return True

    @abstractmethod
    def spec(self) -> str | list[Any]:
        """Return what ``build_reduction`` makes it of, as JSON values."""

    def prepare(self, output: Tensor, square: bool) -> None:
        """Look at an output of the layer, for images that are square or are not."""


class Flatten(Reduction):
    """All values of the output, one after the other: ``(n, ...)`` to ``(n, d)``."""

    memory_format = torch.contiguous_format

    def spec(self) -> str:
        """Return ``"flatten"``."""
        return "flatten"

    def forward(self, output: Tensor) -> Tensor:
        """Flatten ``(n, ...)``; of ``(n,)`` make one column."""
        return output.flatten(1) if output.dim() > 1 else output.unsqueeze(1)


class Average(Reduction):
    """The mean over all positions: ``(n, c, h, w)`` and tokens ``(n, t, c)`` to ``(n, c)``."""

    def __init__(self, channels: str | None = None) -> None:
        super().__init__()
        if channels not in (None, CHANNELS_FIRST, CHANNELS_LAST):
            raise ValueError(
                f'channels must be "{CHANNELS_FIRST}" or "{CHANNELS_LAST}", got {channels!r}'
            )
        self.channels = channels

    @property
    def ready(self) -> bool:
        """Whether it is known where the channels are."""
        return self.channels is not None

    def spec(self) -> str | list[Any]:
        """Return the name, and where the channels are."""
        return ["avg", self.channels] if self.ready else "avg"

    def prepare(self, output: Tensor, square: bool) -> None:
        """Find the channels, unless they are known."""
        self.channels = self.channels or find_channels(output.shape[1:], square)

    def forward(self, output: Tensor) -> Tensor:
        """Average ``(n, ...)`` over its positions; ``(n, d)`` has none and stays."""
        if output.dim() < 3:
            return output if output.dim() == 2 else output.unsqueeze(1)
        return channels_first(output, cast(str, self.channels)).flatten(2).mean(dim=2)


class Grid(Average):
    """Averages over a grid of k x k parts: maps ``(n, c, h, w)`` to ``(n, c * k * k)``.

    Tokens ``(n, t, c)`` have no second side: they are averaged over k * k runs of consecutive
    tokens, in their order, to ``(n, c * k * k)``.
    """

    def __init__(self, k: int, channels: str | None = None) -> None:
        super().__init__(channels)
        self.k = _check_size("grid", k)

    def spec(self) -> list[Any]:
        """Return the name, k, and where the channels are."""
        return ["grid", self.k, self.channels] if self.ready else ["grid", self.k]

    def forward(self, output: Tensor) -> Tensor:
        """Average ``(n, ...)`` over the parts; ``(n, d)`` has no positions and stays."""
        if output.dim() < 3:
            return super().forward(output)
        output = channels_first(output, cast(str, self.channels))
        positions = tuple(output.shape[2:])
        parts = (self.k**2,) if len(positions) == 1 else (self.k, self.k)
        if len(positions) > 2 or any(p < k for p, k in zip(positions, parts, strict=True)):
            raise ValueError(
                f"a grid of {self.k} x {self.k} parts needs tokens or maps of at least as many "
                f'positions, got {" x ".join(map(str, positions))}; use a smaller grid, or "avg"'
            )
        if len(positions) == 1:
            return F.adaptive_avg_pool1d(output, self.k**2).flatten(1)
        return F.adaptive_avg_pool2d(output, self.k).flatten(1)


class Project(Reduction):
    """A random projection of all values to d features that keeps distances in expectation.

    It is drawn for the size of the output that it meets first, see ``sparse_projection``: ``rows``,
    ``(blocks, values of an output)`` int64, is empty before. ``distortion`` is that of the output
    it was drawn for; None where that held one sample, and after loading.
    """

    memory_format = torch.contiguous_format

    def __init__(self, size: int, seed: int = 0) -> None:
        super().__init__()
        self.size, self.seed = _check_size("project", size), seed
        self.register_buffer("rows", torch.zeros(0, 0, dtype=torch.int64))
        self.distortion: dict[str, float] | None = None

    @property
    def ready(self) -> bool:
        """Whether it is drawn."""
        return self.rows.numel() > 0

    def spec(self) -> list[Any]:
        """Return the name and d; the draw itself is in the buffer ``rows``."""
        return ["project", self.size]

    @torch.inference_mode(False)
    @torch.no_grad()
    def prepare(self, output: Tensor, square: bool) -> None:
        """Draw the projection, unless it is drawn, and see how it keeps distances."""
        flat = output.flatten(1)
        if flat.shape[1] <= self.size:
            raise ValueError(
                f"expected more than {self.size} features to project to {self.size}, got "
                f'{flat.shape[1]}; use "flatten"'
            )
        if not self.ready:
            self.rows = random_rows(flat.shape[1], self.size, self.seed).to(output.device)
            few = flat[:PAIRED]
            self.distortion = projection_distortion(few, self(few))

    def forward(self, output: Tensor) -> Tensor:
        """Project ``(n, ...)`` to ``(n, d)``; half precision is summed in float32."""
        flat = output.flatten(1)
        if flat.shape[1] != self.rows.shape[1]:
            raise ValueError(
                f"expected the {self.rows.shape[1]} features per image that the projection was "
                f"drawn for, got {flat.shape[1]}; give images of the size that fit saw"
            )
        return sparse_projection(flat, self.rows, self.size)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: object, **kwargs: object
    ) -> None:
        """Make a buffer for a draw of any size before torch copies into it."""
        stored = state_dict.get(prefix + "rows")
        if stored is not None and stored.shape != self.rows.shape:
            with torch.inference_mode(False):
                self.rows = torch.empty_like(stored, device=self.rows.device)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


_BUILT_IN = {"flatten": Flatten, "avg": Average, "grid": Grid, "project": Project}


def build_reduction(given: ReductionLike, seed: int = 0) -> nn.Module:
    """Make the reduction that a user asks for; a ``ValueError`` where there is no such.

    It is ``"flatten"``; ``"avg"``; ``("grid", k)``; ``("project", d)``, drawn by ``seed``; or a
    module that takes the layer's output, of any shape, to ``(n, d)``, which is returned as it is.
    ``("avg", "channels_last")`` and ``("grid", k, "channels_last")`` (or ``"channels_first"``) say
    where the channels are, where shapes do not.
    """
    if isinstance(given, nn.Module):
        return given
    is_list = isinstance(given, Sequence) and not isinstance(given, str)
    name, *numbers = (list(given) or [None]) if is_list else [given]
    if not isinstance(name, str) or name not in _BUILT_IN:
        raise ValueError(f"a reduction must be {CHOICES}, got {given!r}")
    try:
        return _BUILT_IN[name](*numbers, **({"seed": seed} if name == "project" else {}))
    except TypeError as error:
        raise ValueError(f"a reduction must be {CHOICES}, got {given!r}") from error


def prepare_reduction(reduction: Reduction, name: str, output: Tensor, inputs: Tensor) -> None:
    """Make a built-in reduction ready for the output of the layer of this name."""
    square = inputs.dim() == 4 and inputs.shape[2] == inputs.shape[3]
    try:
        reduction.prepare(output, square)
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from error


def reduction_text(reduction: nn.Module) -> str:
    """Return a reduction as a user writes it; of a user's module its class."""
    if not isinstance(reduction, Reduction):
        return type(reduction).__name__
    spec = reduction.spec()
    return spec if isinstance(spec, str) else " ".join(map(str, spec))


def _check_size(name: str, size: int) -> int:
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f'("{name}", size) needs a whole number >= 1, got {size!r}')
    return size


def reduction_metadata(reduction: nn.Module) -> Any:  # noqa: ANN401 - any JSON value
    """Return what a file says of a reduction; of a user's module only how it prints."""
    return reduction.spec() if isinstance(reduction, Reduction) else {"module": repr(reduction)}


def reductions_of_file(
    path: str | Path, metadata: Mapping[str, Any], given: Mapping[str, nn.Module]
) -> dict[str, ReductionLike]:
    """Collect the reductions of the layers that a file names, by layer; ``given`` by the user.

    Files of version 0.1 have no reductions: all their layers are flat.
    """
    saved = {name: "flatten" for name in metadata["layers"]} | metadata.get("reductions", {})
    modules = {name: r["module"] for name, r in saved.items() if isinstance(r, Mapping)}
    if missing := sorted(set(modules) - set(given)):
        name = missing[0]
        raise CheckpointError(
            f"{path}: the reduction of layer {name!r} is a module that the file does not hold, "
            f"{_one_line(modules[name])}; pass one like it, as in layers={{{name!r}: module}}"
        )
    if unknown := sorted(set(given) - set(modules)):
        raise CheckpointError(
            f"{path}: expected modules for the layers {sorted(modules)} alone, got some for "
            f"{unknown}; leave them out: built-in reductions come from the file"
        )
    for name, text in modules.items():
        if repr(given[name]) != text:
            raise CheckpointError(
                f"{path}: expected {_one_line(text)} as the reduction of layer {name!r}, got "
                f"{_one_line(repr(given[name]))}; build it as the saved one was"
            )
    return saved | dict(given)


def _one_line(text: str) -> str:
    return " ".join(text.split())
