"""Features of named layers of any network, all of one forward pass."""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from threading import RLock, get_ident
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from torchdnr.decisions import evaluation_mode
from torchdnr.features.reductions import (
    Reduction,
    ReductionLike,
    build_reduction,
    prepare_reduction,
    reduction_text,
)

# So many layer names fit in an error message; a longer list shows its first and last ones.
NAMES_SHOWN = 20


class LayerFeatures(nn.Module):
    """Compute features of named layers of a network: their outputs, reduced to ``(n, d)``.

    The network runs in evaluation mode whatever mode it is in, and is not changed: training flags,
    ``requires_grad``, hooks. Several threads may call it at a time. Gradients flow to the inputs
    and to the parameters. Each output is copied when the layer returns, so that a later in-place
    operation (``ReLU(inplace=True)``, ``out += identity``) does not change it. Of a layer that runs
    more than once in a forward pass the last run counts. Of a layer that returns a tuple or a list
    the first element counts (attention modules return outputs, weights).

    Args:
        net: Any network. Its layers keep the samples in their first dimension, unless a module of
            your own is the reduction.
        layers: Names as in ``net.named_modules()``, or a mapping from name to reduction, see
            ``build_reduction``. None: no layers yet.
        seed: Of random projections.

    Attributes:
        scale_0, ...: Factors of the features of each layer, ``(d,)``, see ``set_scales``, or None.
        reductions: One module per layer. A built-in one that depends on the layer's output is made
            ready by ``prepare_features``, or else by the first call.
        sizes: Layer name -> ``output``, the shape of one sample's output (of an output without its
            first dimension), and ``features``, how many the reduction makes of it; from
            ``prepare_features``.
    """

    def __init__(
        self,
        net: nn.Module,
        layers: Sequence[str] | Mapping[str, ReductionLike] | None,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.layers = () if layers is None else _check_layers(net, layers)
        self.net, self.seed = net, seed
        given = layers if isinstance(layers, Mapping) else dict.fromkeys(self.layers, "flatten")
        self.given = {name: given[name] for name in self.layers}
        self.reductions = nn.ModuleList(build_reduction(r, seed) for r in self.given.values())
        self.sizes: dict[str, dict[str, Any]] = {}
        for index in range(len(self.layers)):
            self.register_buffer(f"scale_{index}", None)

    def set_scales(self, scales: Mapping[str, Tensor]) -> None:
        """Multiply the features of some layers by factors, ``(d,)`` by name, from now on."""
        for index, name in enumerate(self.layers):
            scale = scales.get(name)
            setattr(self, f"scale_{index}", None if scale is None else scale.to(self._device()))

    def _device(self) -> torch.device | None:
        """Return where the network is, if it has parameters."""
        return next((p.device for p in self.parameters()), None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy it without the hooks of calls that are under way in other threads."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        with _HOOKS:
            copied.__setstate__(deepcopy(self.__dict__, memo))
        for module in copied.net.modules():
            for key in [key for key in module._forward_hooks if isinstance(key, _Key)]:
                del module._forward_hooks[key]
        return copied

    def describe(self) -> str:
        """Return a line per layer: name, output, reduction, number of features where known."""
        lines, scaled = [], self._scales()
        for name, reduction in zip(self.layers, self.reductions, strict=True):
            known = self.sizes.get(name, {"output": "(...)", "features": "?"})
            shape = str(known["output"]).replace("[", "(").replace("]", ")")
            text = reduction_text(reduction)
            if name in scaled:
                text += ", scaled one by one"
            lines.append(f"{name}: {shape} -> {text} -> {known['features']} features")
        return "\n".join(lines) or "no layers yet: fit chooses them"

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        """Run the network once and return the features ``(n, d)`` of its layers, by name.

        Their dtype and device are those of the layer's output (a projection makes float32 of half
        precision).
        """
        return self.reduce(self.outputs(inputs), inputs)

    def reduce(self, outputs: dict[str, Tensor], inputs: Tensor) -> dict[str, Tensor]:
        """Make features of what ``self.outputs(inputs)`` returned."""
        features = {}
        with evaluation_mode(self.reductions):
            for (name, output), reduction in zip(outputs.items(), self.reductions, strict=True):
                if isinstance(reduction, Reduction) and not reduction.ready:
                    prepare_reduction(reduction, name, output, inputs)
                features[name] = _check_features(name, reduction(output), inputs.shape[0])
        for name, scale in self._scales().items():
            features[name] = features[name] * scale
        return features

    def _scales(self) -> dict[str, Tensor]:
        """Return the factors of the layers that have some."""
        scales = ((name, getattr(self, f"scale_{i}")) for i, name in enumerate(self.layers))
        return {name: scale for name, scale in scales if scale is not None}

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: object, **kwargs: object
    ) -> None:
        """Make a buffer for factors of any number, or none, before torch copies into them."""
        for index in range(len(self.layers)):
            stored = state_dict.get(f"{prefix}scale_{index}")
            with torch.inference_mode(False):
                empty = None if stored is None else torch.empty_like(stored, device=self._device())
            setattr(self, f"scale_{index}", empty)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def outputs(self, inputs: Tensor) -> dict[str, Tensor]:
        """Run the network once and return the outputs of its layers, by name: ``(n, ...)``.

        Only one that a module of the user's reduces may have its samples elsewhere.
        """
        if not self.layers:
            raise RuntimeError("no layers are chosen yet; name some, or call fit, which does")
        runs: dict[int, dict[str, Tensor]] = {}  # outputs by layer, of each thread
        hooked = _traced_hook if torch.compiler.is_dynamo_compiling() else _thread_hook
        with ExitStack() as stack:
            stack.enter_context(evaluation_mode(self.net))
            stack.enter_context(_calling())
            for name, reduction in zip(self.layers, self.reductions, strict=True):
                # Looked up at each call: a deep copy of this module then hooks its own layers.
                layer = self.net.get_submodule(name)
                memory_format = torch.preserve_format
                if isinstance(reduction, Reduction):
                    memory_format = reduction.memory_format
                stack.enter_context(hooked(layer, _capture(name, runs, memory_format)))
            self.net(inputs)
        captured = _of_this_call(runs)
        missing = [name for name in self.layers if name not in captured]
        if missing:
            raise RuntimeError(
                f"layers {missing} did not run in the forward pass; expected every layer to be "
                "called, not only its weights used by a parent or by compiled code; choose other "
                "layers, or pass the network before torch.compile; a network that runs layers in "
                "threads of its own has to be called by one thread at a time"
            )
        for name, reduction in zip(self.layers, self.reductions, strict=True):
            if isinstance(reduction, Reduction):  # others may know where the samples are
                _check_rows(name, captured[name], inputs.shape[0])
        return {name: captured[name] for name in self.layers}


def _check_layers(net: nn.Module, given: Iterable[str]) -> tuple[str, ...]:
    if isinstance(given, str):
        raise ValueError(
            f"layers must be a list of names, got the string {given!r}; pass [{given!r}]"
        )
    layers = tuple(given)
    if not layers:
        raise ValueError("layers must name at least one layer, got none; see net.named_modules()")
    repeated = sorted({name for name in layers if layers.count(name) > 1})
    if repeated:
        raise ValueError(
            f"layers must be named once each, got {repeated} more than once; drop the rest"
        )
    # A module that is registered under two names may be asked for by either.
    names = [name for name, _ in net.named_modules(remove_duplicate=False) if name]
    for name in layers:
        if name not in names:
            raise ValueError(f"no layer {name!r}; {_suggest(name, names)}")
    return layers


def _suggest(name: object, names: list[str]) -> str:
    if close := difflib.get_close_matches(str(name), names, n=5):
        return f"did you mean: {', '.join(close)}"
    if len(names) <= NAMES_SHOWN:
        return f"choose from: {', '.join(names)}"
    half = NAMES_SHOWN // 2
    return (
        f"choose from the {len(names)} names of net.named_modules(): "
        f"{', '.join(names[:half])}, ..., {', '.join(names[-half:])}"
    )


_HOOKS = RLock()
"""Held while hooks change, and while a classifier is copied."""


class _Key:
    """Key of a hook of ours among those of a layer."""


_CALLERS: dict[int, int] = {}
"""Threads that are in a forward pass for features, and how many passes deep."""


@contextmanager
def _calling() -> Iterator[None]:
    """Count this thread among the callers."""
    if torch.compiler.is_dynamo_compiling():
        yield
        return
    thread = get_ident()
    _CALLERS[thread] = _CALLERS.get(thread, 0) + 1
    try:
        yield
    finally:
        _CALLERS[thread] -= 1
        if not _CALLERS[thread]:
            del _CALLERS[thread]


def _of_this_call(runs: dict[int, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Choose the run of this thread, or else that of the one thread that the network ran in."""
    if torch.compiler.is_dynamo_compiling():
        return runs[0]
    others = [run for thread, run in runs.items() if thread != get_ident()]
    return runs.get(get_ident()) or (others[0] if len(others) == 1 else {})


@contextmanager
def _thread_hook(layer: nn.Module, capture: Callable[[int, Any], None]) -> Iterator[None]:
    """Hook a layer, but for the calls of other callers, who run the same network meanwhile.

    Without ``register_forward_hook``, which may give two threads the same key.
    """
    thread, key = get_ident(), cast(int, _Key())

    def hook(_module: nn.Module, _inputs: object, output: Any) -> None:  # noqa: ANN401
        # A network that is compiled by itself cannot ask for its thread.
        this = thread if torch.compiler.is_dynamo_compiling() else get_ident()
        if this == thread or this not in _CALLERS:
            capture(this, output)

    with _HOOKS:
        layer._forward_hooks[key] = hook
    try:
        yield
    finally:
        with _HOOKS:
            del layer._forward_hooks[key]


@contextmanager
def _traced_hook(layer: nn.Module, capture: Callable[[int, Any], None]) -> Iterator[None]:
    """Hook a layer while a program is traced: `torch.compile` cannot trace a registration."""
    hooks = layer._forward_hooks
    key: Any = f"torchdnr {len(hooks)}"  # torch's own keys are numbers
    layer._forward_hooks = {**hooks, key: lambda _module, _inputs, output: capture(0, output)}
    try:
        yield
    finally:
        layer._forward_hooks = hooks


def _capture(
    name: str, runs: dict[int, dict[str, Tensor]], memory_format: torch.memory_format
) -> Callable[[int, Any], None]:
    def capture(thread: int, output: Any) -> None:  # noqa: ANN401 - what the layer returns
        if isinstance(output, tuple | list) and output:
            output = output[0]
        if not isinstance(output, Tensor):
            raise TypeError(
                f"layer {name!r} must return a tensor, or a tuple that starts with one, "
                f"got {type(output).__name__}; choose a layer inside it"
            )
        runs.setdefault(thread, {})[name] = output.clone(memory_format=memory_format)

    return capture


def _check_rows(name: str, output: Tensor, n: int) -> None:
    if output.dim() == 0 or output.shape[0] != n:
        raise ValueError(
            f"layer {name!r} must return one row per sample, (n, ...) with n = {n}, "
            f"got {tuple(output.shape)}; build it with batch_first=True if it has that option, "
            "pass a module as its reduction that returns (n, d), or choose another layer"
        )


def _check_features(name: str, features: Tensor, n: int) -> Tensor:
    if not isinstance(features, Tensor) or features.dim() != 2 or features.shape[0] != n:
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(
            f"the reduction of layer {name!r} must return features (n, d) with n = {n}, got {got}; "
            "mind where the layer has its samples"
        )
    return features
