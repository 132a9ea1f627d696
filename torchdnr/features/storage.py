"""Where the features of a data set are gathered: in memory, in files, or in a store that is kept.

A store is a folder from which an extraction that was stopped goes on. It holds one safetensors file
per layer, the labels if there are any, and a record of the batches that are done.
"""

import errno
import json
import os
import re
import shutil
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from torchdnr.features.row_file import DTYPES, GrowingFile, map_rows
from torchdnr.files import (
    CheckpointError,
    DamagedFileError,
    atomic_write_bytes,
    digest,
    save_tensors,
)

RECORD = "features.json"
LABELS = "labels.safetensors"
KIND = "feature store"
FORMAT_VERSION = 1
RECORD_SECONDS = 5.0
"""Time between two records: a kill or a power cut costs that, and the batch under way."""

_ADVICE = "choose another folder, or delete this one"

Layout = dict[str, tuple[torch.dtype, int]]
"""Layer name -> dtype and number d of its features."""


class RowsInMemory:
    """Features that are gathered in memory, in their final place where their number n is known."""

    def __init__(self, n: int | None) -> None:
        self._n, self._rows = n, 0
        self._whole: dict[str, Tensor] = {}
        self._parts: list[dict[str, Tensor]] = []
        self._bytes = Counter[str]()  # held so far, by layer

    def bytes_with(self, values: Mapping[str, Tensor]) -> int:
        """Return the largest number of bytes that these features take once this batch is added.

        Where their number is known, that is what all of them take; else what has come so far, and
        once more the largest layer, which is copied when its parts are joined.
        """
        if self._n is not None:
            return row_bytes(values) * self._n
        sizes = [self._bytes[name] + rows.nbytes for name, rows in values.items()]
        return sum(sizes) + max(sizes)

    def append(self, values: Mapping[str, Tensor]) -> None:
        """Add the rows of one batch, of the same number of features and dtype as before."""
        if not self._bytes:
            self._layout = layout_of(values)
            if self._n is not None:
                self._whole = {k: v.new_empty(self._n, v.shape[1]) for k, v in values.items()}
        check_layout(values, self._layout)
        self._bytes.update({name: rows.nbytes for name, rows in values.items()})
        if self._n is None:
            self._parts.append(dict(values))
        for name, whole in self._whole.items():
            whole[self._rows : self._rows + len(values[name])] = values[name]
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
    """The features of all layers in a folder that nothing else uses, one file per layer.

    Where the number n of rows is known, a disk that is too full for them is noticed at the first
    batch. ``layout`` and ``rows`` say what an earlier call wrote, if its files are to go on; it is
    a ``DamagedFileError`` if they hold less.
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
        """Add the rows of one batch, if all layers are as before and their dtypes can be stored."""
        if not self._files:
            needed, free = row_bytes(values) * (self._n or 0), shutil.disk_usage(self.folder).free
            if needed > free:
                raise OSError(
                    errno.ENOSPC,
                    f"{os.strerror(errno.ENOSPC)}: the features take {needed / 2**30:.2f} GiB and "
                    f"{free / 2**30:.2f} GiB are left; free space or choose another folder",
                    str(self.folder),
                )
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


def map_files(folder: Path, layout: Layout, rows: int) -> dict[str, Tensor]:
    """Map the files that ``LayerFiles.finish`` has completed: layer name -> ``(rows, d)``."""
    paths = _paths(folder, layout)
    return {
        name: map_rows(paths[name], name, dtype, rows, width)
        for name, (dtype, width) in layout.items()
    }


@contextmanager
def temporary_files(n: int | None, needed: int, memory_limit: int) -> Iterator[LayerFiles]:
    """Make files in a temporary folder for features that do not fit into memory, and warn of it.

    The folder is removed at the end of the block; what is mapped by then takes space on the disk
    until the tensors are gone (on Windows the folder stays).
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
        with closing(LayerFiles(Path(folder), n)) as files:
            yield files


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
    """Return the bytes that the features of one image take."""
    return sum(dtype.itemsize * width for dtype, width in layout_of(values).values())


def _paths(folder: Path, layout: Layout) -> dict[str, Path]:
    """Name the files; the number keeps apart names that a file system cannot."""
    plain = {name: re.sub(r"[^A-Za-z0-9._-]", "_", name)[:100] for name in layout}
    return {name: folder / f"{i}-{plain[name]}.safetensors" for i, name in enumerate(layout)}


class FeatureStore:
    """Features on disk that are kept, to be completed or read again by a later call.

    Every call brings all batches again from the first on. Those that are in the store are
    recognised by their images and not computed again. Rows are on disk before the record says so.
    If the files are damaged, the extraction starts again with a warning; a folder that holds the
    features of another run, or files of others, is refused (``CheckpointError``). ``run`` is all
    that decides the features beside the images, as JSON values.
    """

    def __init__(self, folder: str | Path, run: Mapping[str, Any], n: int | None) -> None:
        self.folder, self._n, self._run = Path(folder), n, dict(run)
        self._seen, self._next, self._recorded_at = 0, "", time.monotonic()
        self._files, self._batches = LayerFiles(self.folder, n), list[str]()
        self._features: dict[str, Tensor] | None = None  # the features, once they are complete
        try:
            self._resume()
        except DamagedFileError as error:
            warnings.warn(f"features are extracted again from the start: {error}", stacklevel=4)
            self._files, self._batches = LayerFiles(self.folder, n), []
        if self._features is None:
            self._record()  # a folder that cannot be written to is noticed here, before any work

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *details: object) -> None:
        """Record what is done, whatever stopped the work, and close the files."""
        try:
            if self._features is None:
                # On a full disk the record before this one stands.
                with suppress(*([] if kind is None else [OSError])):
                    self._record()
        finally:
            self._files.close()

    def holds(self, images: Tensor, labels: Tensor | None) -> bool:
        """Return whether the next batch is in the store already; else ``append`` has to follow.

        Raises ``CheckpointError`` if the store has another batch at this place, or is complete
        without it.
        """
        parts = {"images": images} if labels is None else {"images": images, "labels": labels}
        self._next, place = digest(parts)[:16], self._seen
        self._seen += 1
        if place == len(self._batches):
            if self._features is not None:
                raise CheckpointError(
                    f"{self.folder}: expected {place} batches, got more; {_ADVICE}"
                )
            return False
        if self._batches[place] != self._next:
            raise CheckpointError(
                f"{self.folder}: expected the images that its features were taken from, got others "
                f"in batch {place + 1}; give the same images in the same batches and order (a "
                f"loader must neither shuffle nor augment), {_ADVICE}"
            )
        return True

    def append(self, values: Mapping[str, Tensor]) -> None:
        """Add the rows of the batch that ``holds`` was asked about; see ``LayerFiles``."""
        self._files.append(values)
        self._batches.append(self._next)
        if time.monotonic() - self._recorded_at > RECORD_SECONDS:
            self._record()

    def finish(self, labels: Tensor | None) -> dict[str, Tensor]:
        """Complete the store, unless it is complete already, and map the features.

        Labels, if there are any, are kept beside them. Fewer batches than the store has are
        refused.
        """
        if self._seen < len(self._batches):
            raise CheckpointError(
                f"{self.folder}: expected {len(self._batches)} batches, got {self._seen}; {_ADVICE}"
            )
        if self._features is None:
            if labels is not None:
                save_tensors(self.folder / LABELS, {"labels": labels}, {}, kind="labels")
            self._features = self._files.finish()
            self._record()
        return self._features

    def _record(self) -> None:
        """Note which batches are done, once their rows are safe on the disk."""
        if self._features is None:
            self._files.sync()
        layout = {name: [DTYPES[dtype], d] for name, (dtype, d) in self._files.layout.items()}
        record = {
            "kind": KIND,
            "format_version": FORMAT_VERSION,
            "run": self._run,
            "complete": self._features is not None,
            "rows": self._files.rows,
            "layout": layout,
            "batches": self._batches,
        }
        atomic_write_bytes(self.folder / RECORD, json.dumps(record).encode())
        self._recorded_at = time.monotonic()

    def _resume(self) -> None:
        """Continue what an earlier call of the same run began, if any."""
        record = _read_record(self.folder)
        if record is None:
            return
        run = record["run"]
        if differ := sorted(k for k in {*run, *self._run} if run.get(k) != self._run.get(k)):
            raise CheckpointError(
                f"{self.folder}: expected the features of this run, got those of one with other "
                f"{', '.join(differ)}; {_ADVICE}"
            )
        dtypes = {text: dtype for dtype, text in DTYPES.items()}
        layout: Layout = {name: (dtypes[t], d) for name, (t, d) in record["layout"].items()}
        if record["complete"]:
            self._features = map_files(self.folder, layout, record["rows"])
        elif record["rows"]:
            self._files = LayerFiles(self.folder, self._n, layout, record["rows"])
        self._batches = record["batches"]


def _read_record(folder: Path) -> dict[str, Any] | None:
    """Read the record of a folder; None if the folder is still to be filled."""
    path = folder / RECORD
    if not path.is_file():
        if others := sorted(folder.glob("*.safetensors")):
            raise CheckpointError(
                f"{folder}: expected an empty folder or a {KIND}, got {others[0].name} and no "
                f"{RECORD}; choose another folder"
            )
        return None
    try:
        record = json.loads(path.read_bytes())
    except ValueError as error:
        raise DamagedFileError(f"{path}: expected JSON, got something else ({error})") from error
    kind = (record.get("kind"), record.get("format_version")) if isinstance(record, dict) else ()
    if kind != (KIND, FORMAT_VERSION):
        raise CheckpointError(
            f"{path}: expected the record of a {KIND}, format version {FORMAT_VERSION}, got "
            f"another file or version; {_ADVICE}"
        )
    return record
