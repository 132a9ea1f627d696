"""Features in a folder on disk, from which an extraction that was stopped goes on.

The folder holds one safetensors file per layer, the labels if there are any, and a record of the
batches that are done.
"""

import json
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from torchdnr.feature_rows import LayerFiles, Layout, map_files
from torchdnr.features.row_file import DTYPES
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

_OR = "choose another folder, or delete this one"


class FeatureStore:
    """Features on disk that are kept, to be completed or to be found again by a later call.

    Every call brings all batches again from the first on. Those that are in the store are
    recognised by their images and not computed again. Rows are on disk before the record says so.

    Args:
        folder: Where; made if it is missing.
        run: All that decides the features beside the images, as JSON values.
        n: Rows of all batches together, if known.

    Raises:
        CheckpointError: If the folder holds the features of another run, or files of others.
        OSError: If the folder cannot be made or written to.

    Warns (``UserWarning``) if the files are damaged; the extraction then starts again.
    """

    def __init__(self, folder: str | Path, run: Mapping[str, Any], n: int | None) -> None:
        self.folder, self._n, self._run = Path(folder), n, dict(run)
        self._seen, self._next, self._recorded_at = 0, "", time.monotonic()
        self._start_afresh()
        try:
            self._resume()
        except DamagedFileError as error:
            warnings.warn(f"features are taken again from the start: {error}", stacklevel=4)
            self._start_afresh()
        if self._found is None:
            self._record()  # a folder that cannot be written to is seen here, before any work

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Record what is done, whatever stopped the work, and close the files."""
        try:
            if self._found is None:
                # On a full disk the record before this one stands.
                with suppress(*([] if error is None else [OSError])):
                    self._record()
        finally:
            self._files.close()

    def holds(self, images: Tensor, labels: Tensor | None) -> bool:
        """Tell whether the next batch is in the store already.

        Args:
            images: The batch that follows those asked about before.
            labels: Its labels, if there are any.

        Returns:
            Whether there is nothing to compute; otherwise ``append`` has to follow.

        Raises:
            CheckpointError: If the store has another batch at this place, or none and is complete.
        """
        parts = {"images": images} if labels is None else {"images": images, "labels": labels}
        self._next, place = digest(parts)[:16], self._seen
        self._seen += 1
        if place == len(self._batches):
            if self._found is not None:
                raise CheckpointError(f"{self.folder}: expected {place} batches, got more; {_OR}")
            return False
        if self._batches[place] != self._next:
            raise CheckpointError(
                f"{self.folder}: expected the images that its features were taken from, got others "
                f"in batch {place + 1}; give the same images in the same batches and order (a "
                f"loader must neither shuffle nor augment), {_OR}"
            )
        return True

    def append(self, values: Mapping[str, Tensor]) -> None:
        """Add the rows of the batch that ``holds`` was asked about; see ``LayerFiles``."""
        self._files.append(values)
        self._batches.append(self._next)
        if time.monotonic() - self._recorded_at > RECORD_SECONDS:
            self._record()

    def finish(self, labels: Tensor | None) -> dict[str, Tensor]:
        """Complete the store, or find it complete, and map the features.

        Args:
            labels: Of all rows, if there are any; they are kept beside the features.

        Returns:
            Layer name -> features ``(n, d)``, mapped from the files.

        Raises:
            CheckpointError: If there were fewer batches than the store has.
        """
        if self._seen < len(self._batches):
            raise CheckpointError(
                f"{self.folder}: expected {len(self._batches)} batches, got {self._seen}; {_OR}"
            )
        if self._found is None:
            if labels is not None:
                save_tensors(self.folder / LABELS, {"labels": labels}, {}, kind="labels")
            self._found = self._files.finish()
            self._record()
        return self._found

    def _start_afresh(self) -> None:
        self._files = LayerFiles(self.folder, self._n)
        self._batches: list[str] = []
        self._found: dict[str, Tensor] | None = None  # the features, once they are complete

    def _record(self) -> None:
        """Note which batches are done, once their rows are safe on the disk."""
        if self._found is None:
            self._files.sync()
        layout = {name: [DTYPES[dtype], d] for name, (dtype, d) in self._files.layout.items()}
        record = {
            "kind": KIND,
            "format_version": FORMAT_VERSION,
            "run": self._run,
            "complete": self._found is not None,
            "rows": self._files.rows,
            "layout": layout,
            "batches": self._batches,
        }
        atomic_write_bytes(self.folder / RECORD, json.dumps(record).encode())
        self._recorded_at = time.monotonic()

    def _resume(self) -> None:
        """Take up what an earlier call of the same run left, if anything."""
        record = _read_record(self.folder)
        if record is None:
            return
        run = record["run"]
        if differ := sorted(k for k in {*run, *self._run} if run.get(k) != self._run.get(k)):
            raise CheckpointError(
                f"{self.folder}: expected the features of this run, got those of one with other "
                f"{', '.join(differ)}; {_OR}"
            )
        dtypes = {text: dtype for dtype, text in DTYPES.items()}
        layout: Layout = {name: (dtypes[t], d) for name, (t, d) in record["layout"].items()}
        if record["complete"]:
            self._found = map_files(self.folder, layout, record["rows"])
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
    found = (record.get("kind"), record.get("format_version")) if isinstance(record, dict) else ()
    if found != (KIND, FORMAT_VERSION):
        raise CheckpointError(
            f"{path}: expected the record of a {KIND}, format version {FORMAT_VERSION}, got "
            f"another file or version; {_OR}"
        )
    return record
