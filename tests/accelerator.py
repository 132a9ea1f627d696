"""An accelerator for tests, without any hardware: its tensors are computed on the CPU.

On it an operation that mixes devices raises, as it would on a real one, and ``waits`` counts what
would make the host stand still until the device is done. It says nothing about speed or rounding.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration

KIND = "pretend"
PACKAGE = str(Path(__file__).parents[1] / "torchdnr")

waits: Counter[str] = Counter()
"""Waits of the host by "operation file:line", the innermost line of the package."""
_lacking: list[torch.dtype] = []

# Their result is a number, or has a size that depends on the values.
READING = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "bincount"}
READING |= {"unique_dim", "unique_consecutive", "_unique", "_unique2"}
CPU_GENERATOR = torch.Generator
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
COPYING = {"_to_copy", "copy_", "_copy_from"}
METADATA = {"size", "stride", "storage_offset", "numel", "dim"}


class DeviceTensor(torch.Tensor):
    """A tensor on the accelerator; ``host`` has its values."""

    @staticmethod
    def __new__(cls, host):
        layout = {"strides": host.stride(), "storage_offset": host.storage_offset()}
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            dtype=host.dtype,
            device=torch.device(KIND, 0),
            dispatch_sizes_strides_policy="sizes",  # those of ``host``, which may be resized
            **layout,
        )
        tensor.host = host
        return tensor

    def __repr__(self):
        return f"{type(self).__name__}({self.host!r})"

    def tolist(self):
        _wait("tolist")
        return self.host.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _call(func, args, kwargs or {})


class DeviceGenerator(torch.Generator):
    """What ``torch.Generator(device)`` makes: the accelerator refuses one of the CPU."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls) if is_ours(device) else CPU_GENERATOR(device)

    def __init__(self, device):
        pass


def is_ours(device):
    return device is not None and torch.device(device).type == KIND


def _wait(what):
    frame = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    if frame is None:  # the test itself looks
        return
    file = Path(frame.f_code.co_filename).relative_to(PACKAGE)
    waits[f"{what} {file}:{frame.f_lineno}"] += 1


def _map(change, value):
    """Change what is in a value, which may be nested lists."""
    if isinstance(value, tuple | list):
        return type(value)(_map(change, item) for item in value)
    return change(value)


def _to_host(leaf):
    if isinstance(leaf, DeviceTensor):
        return leaf.host
    return torch.device("cpu") if isinstance(leaf, torch.device) and is_ours(leaf) else leaf


def _call(func, args, kwargs):
    """Run an operation of PyTorch on the CPU, once it is allowed and its waits are counted."""
    name = func._schema.name.removeprefix("aten::")
    tensors = []
    _map(lambda leaf: tensors.append(leaf) if isinstance(leaf, torch.Tensor) else None, list(args))
    tensors += [value for value in kwargs.values() if isinstance(value, torch.Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, DeviceTensor)]
    if name.removeprefix("sym_") in METADATA:
        return getattr(ours[0].host, name.removeprefix("sym_"))(*args[1:])
    device = kwargs.get("device")
    makes_ours = is_ours(device) if device is not None else bool(ours)
    _refuse_mixtures(name, tensors, ours)
    _count_waits(name, args, kwargs, ours)
    result = func(
        *(_map(_to_host, arg) for arg in args),
        **{key: _map(_to_host, value) for key, value in kwargs.items()},
    )
    if name in ("copy_", "_copy_from"):
        return args[0] if name == "copy_" else args[1]
    if name == "_to_copy" and result is _to_host(args[0]):
        result = result.clone()
    wrappers = {id(tensor.host): tensor for tensor in ours}

    def wrap(leaf):
        if not isinstance(leaf, torch.Tensor) or isinstance(leaf, DeviceTensor) or not makes_ours:
            return leaf
        if leaf.dtype in _lacking:
            raise TypeError(f"{KIND}:0 has no {leaf.dtype}")
        known = wrappers.get(id(leaf))  # what is changed in place stays itself
        return DeviceTensor(leaf) if known is None else known

    return _map(wrap, result)


def _refuse_mixtures(name, tensors, ours):
    plain = [tensor for tensor in tensors if not isinstance(tensor, DeviceTensor)]
    # Numbers may be anywhere; a copy is there to cross over; indices are taken from the CPU.
    if ours and any(t.ndim for t in plain) and name not in COPYING | INDEXING:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {name} got {KIND}:0 and cpu"
        )


def _count_waits(name, args, kwargs, ours):
    if name in COPYING:
        source, target = (args[1], args[0]) if name == "copy_" else (args[0], kwargs.get("device"))
        target = target.device if isinstance(target, torch.Tensor) else target
        crossing = target is not None and is_ours(target) != isinstance(source, DeviceTensor)
        number = name == "copy_" and source.device.type == "cpu" and source.ndim == 0
        if crossing and not number and not kwargs.get("non_blocking"):
            _wait("copy")
    elif ours and name in READING:
        _wait(name)
    elif ours and name == "repeat_interleave" and kwargs.get("output_size") is None:
        _wait(name)
    elif ours and name in INDEXING:
        indices = [index for index in args[1] if index is not None]
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            _wait("boolean index")
        elif any(index.device.type == "cpu" and index.ndim for index in indices):
            _wait("index from the cpu")


class _Factories(TorchFunctionMode):
    """Make tensors of Python's numbers by way of the CPU: PyTorch's own way ends in C++."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        generator = kwargs.get("generator")
        if generator is not None:
            here = is_ours(kwargs.get("device")) or any(isinstance(a, DeviceTensor) for a in args)
            if here != isinstance(generator, DeviceGenerator):
                raise RuntimeError(f"Expected a {KIND if here else 'cpu'} generator")
        if func in (torch.tensor, torch.as_tensor) and is_ours(kwargs.get("device")):
            device = kwargs.pop("device")
            if isinstance(args[0], torch.Tensor):
                return args[0].to(device=device, dtype=kwargs.get("dtype"))
            return func(*args, **kwargs).to(device)
        return func(*args, **kwargs)


_plugged = []  # the library that serves the operations, for life; and whether it is plugged in


def _is_plugged():
    return _plugged[-1:] == [True]


class _Module(getattr(backend_registration, "_DummyBackendModule", object)):
    is_available = staticmethod(_is_plugged)
    synchronize = staticmethod(lambda: None)


class _Hook(getattr(backend_registration, "_DummyPrivateUse1Hook", object)):
    def is_available(self):
        return _is_plugged()


def on_accelerator(function):
    """Wrap a function of tensors: it runs on the accelerator, where it may not make the host wait.

    Called inside ``accelerator()``, with tensors of the CPU, it returns such tensors.
    """

    def call(*args):
        device = torch.device(KIND, 0)
        args = [arg.to(device) if isinstance(arg, torch.Tensor) else arg for arg in args]
        result = function(*args)
        assert not waits, waits
        return _map(torch.Tensor.cpu, result)

    return call


def register():
    """Make the accelerator known to PyTorch, before its first backward pass counts the devices."""
    if _plugged or not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        return
    backend_registration._setup_privateuseone_for_python_backend(
        KIND, backend_module=_Module(), hook=_Hook()
    )
    library = torch.library.Library("_", "IMPL")
    library.fallback(lambda op, *args, **kwargs: _call(op, args, kwargs), "PrivateUse1")
    _plugged.append(library)


@contextmanager
def accelerator(*, float64=True) -> Iterator[torch.device]:
    """Plug the accelerator in, and count its waits from 0."""
    if not _plugged:
        pytest.skip("needs PyTorch 2.10, whose devices may be made in Python")
    waits.clear()
    _lacking[:] = [] if float64 else [torch.float64]
    _plugged.append(True)
    torch.Generator = DeviceGenerator
    try:
        with _Factories():
            yield torch.device(KIND, 0)
    finally:
        torch.Generator = CPU_GENERATOR
        _plugged.pop()
