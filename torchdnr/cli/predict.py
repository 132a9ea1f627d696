"""Label image files, or reject them, with a classifier of a run folder."""

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn

from torchdnr.cli.adversarial import load_robust
from torchdnr.cli.console import Console, command
from torchdnr.cli.declaration import number
from torchdnr.cli.network import choose_network
from torchdnr.cli.options import add_device_options
from torchdnr.cli.run_folder import find_device, read_settings, remembered_format, svm_images
from torchdnr.cli.settings import CLASSIFIERS, ROBUST
from torchdnr.data.readers import find_images, read_batches
from torchdnr.decisions import REJECT, class_scores, has_reject_column, predict_labels
from torchdnr.dnr import DNR, NR
from torchdnr.evaluation.explanation import explain
from torchdnr.files import atomic_path
from torchdnr.models.paper import load_network
from torchdnr.resources import default_batch_size, progress_bar

_DESCRIPTION = """\
Label image files with a classifier of a run folder that train.py made, or reject them. The data
set is not needed, but for --explain. Images are read as those of folder: data sets are: turned as
their EXIF data say, 16-bit and floating-point values scaled to [0, 1], transparency on white; the
short side is resized to what the network takes, then the centre is cropped to a square. Writes a
CSV file with a row per image: file, label (empty if rejected), class (its number, -1 if rejected),
rejected (0 or 1), best_label and best_score (the class with the highest score, rejected or not),
threshold, which the best score must exceed. Exit status: 0; 1 if a file could not be read, which
has no row; 2 error."""

COLUMNS = "file", "label", "class", "rejected", "best_label", "best_score", "threshold"
SOME_UNREADABLE = 1
EXPLAINED = 8
PROG = "python -m torchdnr.predict"


def predict_parser(prog: str = PROG) -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = argparse.ArgumentParser(prog=prog, description=_DESCRIPTION)
    option = parser.add_argument
    option("images", nargs="+", type=Path, metavar="IMAGE_OR_FOLDER", help="image files to label")
    option("--run", type=Path, required=True, metavar="DIR", help="run folder, made by train.py")
    option("--csv", metavar="FILE", help="file to write (default: standard output)")
    option(
        "--classifier",
        choices=CLASSIFIERS,
        default="DNR",
        help="DNN is the network alone, which rejects nothing (default: %(default)s)",
    )
    option(
        "--explain",
        metavar="PICTURE",
        help=f"image file to write: the first {EXPLAINED} images, and the training images that "
        "decided on them, by layer; needs the data set",
    )
    option("--data-root", default="data", metavar="DIR", help="of that data set (default: data)")
    option("--all-scores", action="store_true", help='add a column "score CLASS" for every class')
    add_device_options(option)
    option(
        "--batch-size",
        type=number(1),
        metavar="N",
        help="images per forward pass; lower it if memory runs out (default: 256, fewer of large "
        "images)",
    )
    option("--quiet", action="store_true", help="no summary, no progress bar")
    return parser


def load_classifier(
    folder: Path, name: str, device: torch.device, *, channels_last: bool | None = None
) -> nn.Module:
    """Load a classifier of a run folder, without the data that it was made with.

    ``channels_last`` is the memory format; None: the one that the folder remembers.
    """
    settings = read_settings(folder)
    if channels_last is None:
        channels_last = remembered_format(folder)
    network = {part: getattr(settings, part) for part in ("backbone", "weights", "outputs")}
    shape, classes = tuple(settings.image_shape), len(settings.classes)
    preset = choose_network(settings.dataset, shape, classes, **network)
    if name == ROBUST:
        model: nn.Module = load_robust(folder, settings, preset.build)
    else:
        model = load_network(preset.build(), folder / "network.safetensors")
    if name not in ("DNN", ROBUST):
        kind = NR if name == "NR" else DNR
        model = kind.load(folder / f"{name.lower()}.safetensors", model)
    model = model.to(device).eval()
    return model.to(memory_format=torch.channels_last) if channels_last else model


def predict(options: argparse.Namespace, console: Console) -> int:
    """Label the images, and write the table; return how many files could not be read."""
    files = find_images(options.images)
    settings, device = read_settings(options.run), find_device(options.device)
    model: Any = load_classifier(
        options.run, options.classifier, device, channels_last=options.channels_last
    )
    classes, images_read, rejected, unreadable = settings.classes, 0, 0, 0
    training, explained = _training_images(options, device), []

    def count_unreadable(file: Path, error: Exception) -> None:
        nonlocal unreadable
        unreadable += 1
        print(f"cannot read {file}: {error}", file=sys.stderr)

    scores = [f"score {name}" for name in classes] if options.all_scores else []
    bar = progress_bar(console.progress, total=len(files), unit="image")
    with _open_table(options.csv) as table, bar:
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow([*COLUMNS, *scores])
        shape = settings.image_shape
        size = options.batch_size or default_batch_size(torch.empty(1, *shape, device=device))
        for readable, images in read_batches(files, shape, size, count_unreadable):
            if training is not None and images_read < EXPLAINED:
                explained.append(images[: EXPLAINED - images_read].to(device))
            for row in _rows(model, readable, images.to(device), classes):
                images_read += 1
                rejected += row[COLUMNS.index("rejected")]
                writer.writerow(row if scores else row[: len(COLUMNS)])
            bar.n = images_read + unreadable
            bar.refresh()
    if training is not None and explained:
        explain(model, torch.cat(explained), options.explain, training, classes)
    console.say(
        f"{options.classifier}: {images_read:,} images, {rejected:,} rejected, "
        f"{unreadable:,} unreadable" + (f": {options.csv}" if options.csv else "")
    )
    return unreadable


def _training_images(
    options: argparse.Namespace, device: torch.device
) -> tuple[Tensor, Tensor] | None:
    """Load what the SVMs were fitted on, if decisions are to be explained."""
    if options.explain is None:
        return None
    if options.classifier not in ("DNR", "NR"):
        raise ValueError(f"--explain needs the classifier DNR or NR, got {options.classifier}")
    return svm_images(options.run, options.data_root, device)


def _rows(
    model: nn.Module, files: list[Path], images: Tensor, classes: Sequence[str]
) -> Iterator[list[Any]]:
    """Label a batch; a row of the table for each image, with the scores of all classes."""
    with torch.no_grad():
        output, reject = class_scores(model(images)).cpu(), has_reject_column(model, None)
    scores, theta = (output[:, :-1], output[0, -1].item()) if reject else (output, "")
    columns = files, predict_labels(output, reject).tolist(), scores.argmax(dim=1).tolist()
    for file, label, best, row in zip(*columns, scores.tolist(), strict=True):
        rejected = label == REJECT
        name = "" if rejected else classes[label]
        yield [file, name, label, int(rejected), classes[best], row[best], theta, *row]


@contextmanager
def _open_table(path: str | None) -> Iterator[TextIO]:
    """Open the table for writing: a file, which appears when it is whole, or standard output."""
    if path is None:
        yield sys.stdout
        return
    with (
        atomic_path(path) as temporary,
        # File names that are no UTF-8 are written byte for byte.
        temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as opened,
    ):
        yield opened


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Run the command line; return 0 if done, 1 if but for unreadable files, else as train.py."""
    options = predict_parser(prog).parse_args(argv)
    with command(options.quiet, resumes=False) as console:
        console.status = SOME_UNREADABLE if predict(options, console) else 0
    return console.status
