"""Where features go that come batch by batch: into memory, or into files, one per layer."""

import errno
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from torchdnr.features.row_file import DTYPES, GrowingFile, map_rows

Layout = dict[str, tuple[torch.dtype, int]]
"""Layer name -> dtype and number d of its features."""


class RowsInMemory:
    """Features that are gathered in memory, in their final place where their number is known.

    Args:
        n: Rows of all batches together, if known.
    """

    def __init__(self, n: int | None) -> None:
        self._n, self._rows = n, 0
        self._whole: dict[str, Tensor] = {}
        self._parts: list[dict[str, Tensor]] = []
        self._bytes: dict[str, int] = {}  # held so far, by layer

    def largest(self, values: Mapping[str, Tensor]) -> int:
        """Tell what these features take at the most, in bytes, once this batch is added.

        Where their number is known, that is what all of them take; else what has come so far, and
        once more the largest layer, which is copied when its parts are joined.
        """
        if self._n is not None:
            return row_bytes(values) * self._n
        held = [self._bytes.get(name, 0) + _bytes_of(rows) for name, rows in values.items()]
        return sum(held) + max(held)

    def append(self, values: Mapping[str, Tensor]) -> None:
        """Add the rows of one batch.

        Args:
            values: Layer name -> features ``(n, d)``, of the same d and dtype as before.

        Raises:
            ValueError: If a layer changed its number of features or its dtype.
        """
        if not self._bytes:
            self._layout = layout_of(values)
            if self._n is not None:
                self._whole = {k: v.new_empty(self._n, v.shape[1]) for k, v in values.items()}
        check_layout(values, self._layout)
        for name, rows in values.items():
            self._bytes[name] = self._bytes.get(name, 0) + _bytes_of(rows)
            if self._n is not None:
                self._whole[name][self._rows : self._rows + len(rows)] = rows
        if self._n is None:
            self._parts.append(dict(values))
        self._rows += len(next(iter(values.values())))

    def finish(self) -> dict[str, Tensor]:
        """Return layer name -> features ``(n, d)``; to be called once."""
        if self._n is not None:
            return self._whole
        # pop: the parts of a layer are freed as soon as they are joined.
        return {name: torch.cat([part.pop(name) for part in self._parts]) for name in self._bytes}

    def moved_to(self, files: "LayerFiles") -> "LayerFiles":
        """Write what was gathered to files, and drop it here."""
        while self._parts:
            files.append(self._parts.pop(0))
        return files


class LayerFiles:
    """The features of several layers in a folder that nothing else uses, one file per layer.

    Args:
        folder: An existing folder.
        n: Rows of all batches together, if known: whether the disk has room for them is then seen
            at the first batch.
        layout: The files that an earlier call began, if they are to go on.
        rows: Rows that it wrote.

    Raises:
        DamagedFileError: If the files hold less than that.
    """

    def __init__(
        self, folder: Path, n: int | None, layout: Layout | None = None, rows: int = 0
    ) -> None:
        self.folder, self.rows, self._n = folder, rows, n
        self.layout: Layout = {}
        self._files: dict[str, GrowingFile] = {}
        if layout:
            self._open(layout)

    def append(self, values: Mapping[str, Tensor]) -> None:
        """Add the rows of one batch.

        Args:
            values: Layer name -> features ``(n, d)``, of the same d and dtype as before.

        Raises:
            OSError: If the disk has no room for them, or cannot be written.
            ValueError: If a layer changed its number of features or its dtype, or has a dtype that
                cannot be stored.
        """
        if not self._files:
            self._check_space(row_bytes(values) * (self._n or 0))
            self._open(layout_of(values))
        check_layout(values, self.layout)
        for name, rows in values.items():
            self._files[name].append(rows)
        self.rows += len(next(iter(values.values())))

    def sync(self) -> None:
        """Wait until all rows are on disk."""
        for file in self._files.values():
            file.sync()

    def finish(self) -> dict[str, Tensor]:
        """Complete the files and map them: layer name -> features ``(n, d)``."""
        for file in self._files.values():
            file.finish()
        return map_files(self.folder, self.layout, self.rows)

    def close(self) -> None:
        """Close the files as they are."""
        for file in self._files.values():
            file.close()

    def _open(self, layout: Layout) -> None:
        for name, (dtype, _) in layout.items():
            if dtype not in DTYPES:
                raise ValueError(
                    f"layer {name!r} must return one of {', '.join(map(str, DTYPES))} to be "
                    f"stored, got {dtype}; choose another layer"
                )
        self.layout = layout
        paths = _paths(self.folder, layout)
        for name, (dtype, width) in layout.items():
            self._files[name] = GrowingFile(paths[name], name, dtype, width, rows=self.rows)

    def _check_space(self, needed: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(
                errno.ENOSPC,
                f"{os.strerror(errno.ENOSPC)}: the features take {needed / 2**30:.2f} GiB and "
                f"{free / 2**30:.2f} GiB are left; free space or choose another folder",
                str(self.folder),
            )


def map_files(folder: Path, layout: Layout, rows: int) -> dict[str, Tensor]:
    """Map the files that ``LayerFiles.finish`` has completed.

    Args:
        folder: Where they are.
        layout: Of their layers.
        rows: Rows that they hold.

    Returns:
        Layer name -> features ``(rows, d)``.

    Raises:
        DamagedFileError: If a file is missing or not as it was completed.
    """
    paths = _paths(folder, layout)
    return {
        name: map_rows(paths[name], name, dtype, rows, width)
        for name, (dtype, width) in layout.items()
    }


@contextmanager
def temporary_files(n: int | None, needed: int, memory_limit: int) -> Iterator[LayerFiles]:
    """Make files for features that do not fit into memory.

    Args:
        n: Rows of all batches together, if known.
        needed: Bytes that the features take.
        memory_limit: Bytes that they may take in memory.

    Yields:
        Files in a temporary folder. It is removed at the end of the block; what is mapped by then
        takes room on the disk until the tensors are gone (on Windows the folder stays).

    Warns (``UserWarning``) of the size and the folder.
    """
    with tempfile.TemporaryDirectory(
        prefix="torchdnr-features-", ignore_cleanup_errors=True
    ) as folder:
        warnings.warn(
            f"the features take {needed / 2**20:.0f} MiB{'' if n else ' or more'} and memory_limit "
            f"is {memory_limit / 2**20:.0f} MiB: they go to the temporary folder {folder}; to keep "
            "them, and to go on after a stop, say in which folder",
            stacklevel=6,
        )
        files = LayerFiles(Path(folder), n)
        try:
            yield files
        finally:
            files.close()


def layout_of(values: Mapping[str, Tensor]) -> Layout:
    """Describe the features of a batch."""
    return {name: (rows.dtype, rows.shape[1]) for name, rows in values.items()}


def check_layout(values: Mapping[str, Tensor], expected: Layout) -> None:
    """Refuse a batch whose features are not like those before it."""
    for name, (dtype, width) in layout_of(values).items():
        if (dtype, width) != expected[name]:
            raise ValueError(
                f"layer {name!r} must return the same number of features in every batch, "
                f"{expected[name][1]} of {expected[name][0]}, got {width} of {dtype}; give all "
                "images the same size"
            )


def row_bytes(values: Mapping[str, Tensor]) -> int:
    """Bytes that the features of one image take."""
    return sum(dtype.itemsize * width for dtype, width in layout_of(values).values())


def _bytes_of(rows: Tensor) -> int:
    return rows.element_size() * rows.numel()


def _paths(folder: Path, layout: Layout) -> dict[str, Path]:
    """Name the files; the number keeps apart names that a file system cannot."""
    plain = {name: re.sub(r"[^A-Za-z0-9._-]", "_", name)[:100] for name in layout}
    return {name: folder / f"{i}-{plain[name]}.safetensors" for i, name in enumerate(layout)}
