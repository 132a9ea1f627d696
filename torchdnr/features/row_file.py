"""One tensor in a safetensors file that grows by rows, and is read through a memory map."""

import json
import mmap
import os
import platform
import struct
from pathlib import Path

import torch
from torch import Tensor

from torchdnr.files import DamagedFileError

# Names of the format; a layer that returns anything else cannot be stored.
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
# The rows begin at a page: every dtype is aligned, and a map holds no byte of the header.
_PAGE = 4096
_LARGEST = 2**63 - 1


class GrowingFile:
    """A matrix on disk to which rows are added; the number of rows need not be known before.

    Space for the header is left at the start. Until ``finish`` writes it, zeros stand there, which
    no reader takes for a safetensors file: a part is never mistaken for the whole. Rows are written
    and not mapped: on a full disk a write fails with an error, a map kills the process.

    The file is made, or emptied, unless ``rows`` says how many of an unfinished file are kept; what
    follows them is cut off. It is a ``DamagedFileError`` if there are fewer.
    """

    def __init__(
        self, path: Path, name: str, dtype: torch.dtype, width: int, *, rows: int = 0
    ) -> None:
        self.path, self.name, self.dtype, self.width, self.rows = path, name, dtype, width, rows
        keep = _data_start(name) + rows * width * dtype.itemsize
        if rows and (not path.is_file() or path.stat().st_size < keep):
            raise DamagedFileError(f"{path}: expected at least {keep} bytes of features, got less")
        self._file = path.open("r+b" if rows else "w+b", buffering=0)
        self._file.truncate(keep)
        self._file.seek(keep)

    def append(self, rows: Tensor) -> None:
        """Write rows of the file's width and dtype, on any device, behind the others."""
        # Their bytes: numpy, which has the buffer, does not know bfloat16.
        rows = rows.detach().cpu().contiguous()
        rest = rows.view(-1).view(torch.uint8).numpy().data
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror}: cannot write the features of layer {self.name!r} here after "
                f"{self.rows} images; free space or choose another folder",
                str(self.path),
            ) from error
        self.rows += len(rows)

    def sync(self) -> None:
        """Wait until the rows are on disk, where a power cut leaves them."""
        os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Write the header, which makes a safetensors file of it, and close."""
        self.sync()  # a header must not get to the disk before the rows that it promises
        self._file.seek(0)
        self._file.write(_header(self.name, self.dtype, self.rows, self.width))
        self.sync()
        self.close()

    def close(self) -> None:
        """Close the file; what was written stays."""
        self._file.close()


def map_rows(path: Path, name: str, dtype: torch.dtype, rows: int, width: int) -> Tensor:
    """Map a finished file into memory: ``(rows, width)`` on the CPU.

    Pages are read when they are used, and dropped when memory gets short. Writing to the tensor
    changes it for this process only, never the file, which may be unlinked (not on Windows). It is
    a ``DamagedFileError`` if the file is missing, or not the finished file of this tensor.
    """
    header = _header(name, dtype, rows, width)
    expected = len(header) + rows * width * dtype.itemsize
    if not path.is_file() or path.stat().st_size != expected:
        raise DamagedFileError(f"{path}: expected a file of {expected} bytes, got none or another")
    with path.open("rb") as file:
        if file.read(len(header)) != header:
            raise DamagedFileError(f"{path}: expected the features of {name!r}, got another header")
        if width == 0:
            return torch.empty(rows, 0, dtype=dtype)
        mapped = _map(file.fileno(), path)
    values = torch.frombuffer(mapped, dtype=dtype, count=rows * width, offset=len(header))
    return values.view(rows, width)


def _map(descriptor: int, path: Path) -> mmap.mmap:
    try:
        if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
            return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
        # No memory is set aside for changes: else no file could be larger than the memory.
        is_linux = platform.system() == "Linux" and platform.machine() in ("x86_64", "aarch64")
        no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000 if is_linux else 0)  # from Python 3.13
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        return mmap.mmap(descriptor, 0, flags=mmap.MAP_PRIVATE | no_reserve, prot=protection)
    except OSError as error:
        raise OSError(
            error.errno, f"{error.strerror}: cannot map this file of features", str(path)
        ) from error


def _header(name: str, dtype: torch.dtype, rows: int, width: int) -> bytes:
    """Write the format's header: its length, then JSON that spaces fill up to the first row."""
    entry = {
        "dtype": DTYPES[dtype],
        "shape": [rows, width],
        "data_offsets": [0, rows * width * dtype.itemsize],
    }
    length = _data_start(name) - 8
    return struct.pack("<Q", length) + json.dumps({name: entry}).encode().ljust(length)


def _data_start(name: str) -> int:
    """Bytes before the first row, whatever their number turns out to be."""
    longest = {"dtype": "BF16", "shape": [_LARGEST] * 2, "data_offsets": [0, _LARGEST]}
    return -(-(8 + len(json.dumps({name: longest}))) // _PAGE) * _PAGE
