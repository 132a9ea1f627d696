"""Tensors on disk: safetensors with JSON metadata, written whole or not at all, never pickle."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import uuid
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write strict JSON atomically; infinity, paths, devices and the like become text."""
    text = json.dumps(plain_json(content), indent=1, allow_nan=False) + "\n"
    atomic_write_bytes(path, text.encode())


def read_json(path: str | Path) -> Any:  # noqa: ANN401 - whatever the file holds
    """Read a JSON file.

    Raises:
        ValueError: If the file is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from None


def plain_json(value: object) -> Any:  # noqa: ANN401 - as the value
    """Convert to what strict JSON holds: infinity, paths, devices and the like become text."""
    if isinstance(value, Mapping):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | None) else str(value)


METADATA_KEY = "torchdnr"
FORMAT_VERSION = 1


class CheckpointError(ValueError):
    """A file is not the one that was asked for: damaged, of another kind, or of another run."""


class DamagedFileError(CheckpointError):
    """A file cannot be read as safetensors, or its contents are not as they were saved."""


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; move it onto ``path`` when the block ends well.

    A reader sees the old file or the new one, never a part. When the block raises, the temporary
    file is removed and ``path`` stays as it was. Missing parent folders are made. The temporary one
    is in the same folder: renaming is atomic only within one file system.

    Raises:
        OSError: If the folder cannot be made or written to (the subclass that fits the cause).
    """
    path = Path(path)
    # Another name for each writer: two processes that write the same file never share a temporary.
    temporary = path.parent / f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        temporary.touch()  # fails here, before any costly work in the block
    except OSError as error:
        # OSError picks the subclass from errno: PermissionError, NotADirectoryError, ...
        raise OSError(
            error.errno, f"{error.strerror}: cannot write here; choose a writable folder", str(path)
        ) from error
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())  # on disk before the name points at it: survives a power cut
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Write ``data`` to ``path`` whole or not at all; as ``atomic_path``."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def digest(state: Mapping[str, Any]) -> str:
    """Compute a fingerprint of a state dict: of its names, and of what they hold.

    Of dense tensors that is dtype, shape and values, on any device and in any memory layout; of
    anything else, such as the extra state of a module, the parts that pickle would take it into.
    It is SHA-256 as 64 hexadecimal digits; the order of the names does not matter.

    Raises:
        TypeError: If a value cannot be taken apart, such as a lock, an open file, or one that
            holds itself.
    """
    fingerprint = hashlib.sha256()
    for name in sorted(state):
        try:
            for part in _parts(name, state[name]):
                fingerprint.update(part)
        except RecursionError as error:
            raise TypeError(f"{name!r} of the state dict holds itself: no fingerprint") from error
    return fingerprint.hexdigest()


def _parts(name: str, value: Any) -> Iterator[bytes | memoryview]:  # noqa: ANN401
    """Yield the bytes that tell a named value of a state dict from others."""
    if isinstance(value, Tensor):
        if value.is_meta:
            raise TypeError(f"{name!r} of the state dict is a tensor without values (meta)")
        yield from _tensor_parts(name, value.detach().cpu())
    elif value is None or isinstance(value, str | bytes | int | float | complex):
        yield f"{name} {value!r};".encode()
    elif callable(value) and hasattr(value, "__qualname__"):  # a function or a class
        yield f"{name} {value.__module__}.{value.__qualname__};".encode()
    elif isinstance(value, list | tuple):
        yield f"{name} {len(value)} items;".encode()
        for number, item in enumerate(value):
            yield from _parts(f"{name}[{number}]", item)
    elif isinstance(value, Mapping):
        yield from _parts(name, sorted(value.items(), key=lambda item: repr(item[0])))
    elif isinstance(value, Set):
        yield from _parts(name, sorted(digest({"": member}) for member in value))
    else:
        try:
            reduced = value.__reduce_ex__(2)
        except RecursionError:
            raise
        except Exception as error:  # of any class: the code is that of the value
            raise TypeError(f"{name!r} of the state dict has no fingerprint: {error}") from error
        if not isinstance(reduced, str):  # the last two are iterators
            reduced = [*reduced[:3], *(list(items or ()) for items in reduced[3:5])]
        yield from _parts(name, reduced)


def _tensor_parts(name: str, tensor: Tensor) -> Iterator[bytes | memoryview]:
    if hasattr(tensor, "__tensor_flatten__"):  # a subclass of several tensors
        names, context = tensor.__tensor_flatten__()
        yield from _parts(name, [type(tensor), [getattr(tensor, n) for n in names], context])
    elif tensor.is_quantized:
        yield from _parts(name, [tensor.int_repr(), tensor.dequantize()])
    elif tensor.layout != torch.strided:
        yield from _parts(f"{name} {tensor.layout}", tensor.to_dense())
    else:
        tensor = tensor.resolve_conj().resolve_neg().contiguous()
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode()
        yield tensor.reshape(-1).view(torch.uint8).numpy().data


def check_tensors(values: Mapping[str, Any], what: str) -> None:
    """Refuse a state dict that `save_tensors` could not write.

    Args:
        values: Values by name.
        what: Whose state dict it is, for the message.

    Raises:
        TypeError: If one of them is not a dense tensor.
    """
    for name, value in values.items():
        is_tensor = isinstance(value, Tensor) and not value.is_quantized
        if not is_tensor or value.layout != torch.strided:
            got = (
                f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            )
            raise TypeError(
                f"{what} cannot be saved: expected dense tensors in its state dict, got {got} for "
                f"{name!r}; keep it outside the state dict"
            )


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], kind: str
) -> None:
    """Save tensors and JSON metadata in one safetensors file, whole or not at all.

    Args:
        path: The file to write; missing parent folders are made, an existing file is replaced.
        tensors: Named tensors, any device; views and shared storage are allowed (each is copied).
        metadata: What JSON can hold: dict, list, str, int, float, bool, None; tuples come back as
            lists.
        kind: What the file is, such as ``"network"``; `load_tensors` refuses any other kind.

    Raises:
        OSError: If the folder cannot be made or written to.
        TypeError: If ``metadata`` holds what JSON cannot, or a value is not a dense tensor.
    """
    check_tensors(tensors, f"this {kind}")
    try:
        text = json.dumps(dict(metadata))
    except (TypeError, ValueError) as error:
        raise TypeError(f"metadata must be what JSON can hold, for {path}: {error}") from error
    # clone: safetensors refuses tensors that share storage, and a view would store all of its base.
    stored = {
        name: tensor.detach().clone(memory_format=torch.contiguous_format).cpu()
        for name, tensor in tensors.items()
    }
    header = {
        "kind": kind,
        "format_version": FORMAT_VERSION,
        "metadata": text,
        "digest": _checksum(stored, text),
    }
    with atomic_path(path) as temporary:
        mode = temporary.stat().st_mode  # follows the umask; save_file would leave 0600
        save_file(stored, temporary, metadata={METADATA_KEY: json.dumps(header)})
        temporary.chmod(mode)


def load_tensors(
    path: str | Path, kind: str, device: str | torch.device = "cpu"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load what `save_tensors` wrote, after checking that every bit is as written.

    Args:
        path: The file to read.
        kind: The kind it was saved as.
        device: Where the tensors go.

    Returns:
        The named tensors, contiguous and writable, and the metadata.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is of another kind or not from torchdnr; its subclass
            ``DamagedFileError`` if it is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            errno.ENOENT, f"no {kind} file here; check the path or make the {kind} first", str(path)
        )
    try:
        with safe_open(path, framework="pt", device="cpu") as opened:
            stored = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    except SafetensorError as error:
        raise DamagedFileError(
            f"{path}: expected a {kind} file in safetensors format, got a damaged or foreign file "
            f"({error}); delete it and make the {kind} again"
        ) from error
    header = _read_header(path, stored, kind)
    if header["digest"] != _checksum(tensors, header["metadata"]):
        raise DamagedFileError(
            f"{path}: expected the {kind} as it was saved, got other contents (its checksum "
            f"differs); delete it and make the {kind} again"
        )
    return {name: tensor.to(device) for name, tensor in tensors.items()}, json.loads(
        header["metadata"]
    )


def _read_header(path: Path, stored: Mapping[str, str], kind: str) -> dict[str, Any]:
    try:
        header = json.loads(stored[METADATA_KEY])
        actual, version = header["kind"], header["format_version"]
        header["digest"], header["metadata"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: expected a {kind} file written by torchdnr, got a safetensors file without "
            "its header; give the file that torchdnr saved"
        ) from error
    if actual != kind:
        raise CheckpointError(
            f"{path}: expected a {kind} file, got a {actual} file; give the path of the {kind}"
        )
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: expected format version {FORMAT_VERSION}, got {version}; "
            f"use the torchdnr version that wrote it, or make the {kind} again"
        )
    return header


def _checksum(tensors: Mapping[str, Tensor], metadata: str) -> str:
    return hashlib.sha256(f"{digest(tensors)} {metadata}".encode()).hexdigest()
