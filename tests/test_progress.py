"""Progress bars are for people who look on: on a terminal, and not if they asked for silence."""

import os
from contextlib import contextmanager, redirect_stderr, suppress
from threading import Thread

import pytest
import torch
from PIL import Image
from small_models import LAYERS, make_images, small_dnr, small_network

from torchdnr import DNR
from torchdnr.attacks import pgd
from torchdnr.cli.console import Console
from torchdnr.cli.options import train_parser
from torchdnr.cli.run_folder import prepare
from torchdnr.data import load_dataset
from torchdnr.evaluation import build_line_up, security_evaluation


@contextmanager
def terminal():
    """Let stderr be a terminal, and collect what it shows."""
    pty = pytest.importorskip("pty", reason="terminals are tested on Unix")
    import termios

    reader, writer = pty.openpty()
    termios.tcsetwinsize(writer, (24, 80))
    shown = []

    def look_on():
        with suppress(OSError):  # the other end is closed
            while part := os.read(reader, 4096):
                shown.append(part.decode(errors="replace"))

    watcher = Thread(target=look_on)
    watcher.start()
    with os.fdopen(writer, "w") as screen, redirect_stderr(screen):
        yield shown
    watcher.join()
    os.close(reader)


@pytest.fixture
def folder(tmp_path):
    for place in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / place).mkdir(parents=True)
        for number in range(8):
            Image.new("RGB", (32, 32), (number, 0, 0)).save(tmp_path / place / f"{number}.png")
    return tmp_path


def read(folder, progress):
    load_dataset(f"folder:{folder}", image_size=8, progress=progress)


def fit(_folder, progress):
    images = make_images(30)
    model = DNR(small_network(), LAYERS, folds=2, stacking_folds=2, C_grid=(1.0,))
    model.fit(images, torch.arange(30) % 3, progress=progress)


def evaluate(_folder, progress):
    images = make_images(30)
    model = small_dnr(images)
    labels = torch.arange(30) % 3
    attacks = build_line_up(
        ["pgd", "boundary-walk"], images, progress=progress, options={"steps": 3}
    )
    security_evaluation(model, images[:2], labels[:2], [0.5], attacks=attacks, progress=progress)
    pgd(model, images[:2], labels[:2], 0.5, steps=2, progress=progress)


WORK = {"reading a folder": read, "fit": fit, "attacks": evaluate}


@pytest.mark.parametrize("work", WORK)
def test_no_bar_goes_into_pipes_and_log_files(work, folder, capsys):
    WORK[work](folder, progress=True)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("progress", [True, False])
def test_a_terminal_shows_bars_unless_they_are_not_wanted(work, folder, progress):
    with terminal() as shown:
        WORK[work](folder, progress=progress)
    assert ("%|" in "".join(shown)) == progress


@pytest.mark.parametrize("quiet", [True, False])
def test_quiet_reads_folder_data_without_a_bar(quiet, folder):
    asked = ["--dataset", f"folder:{folder}", "--run", str(folder / "run"), "--device", "cpu"]
    asked += ["--network-samples", "4", "--svm-samples", "10", "--threshold-samples", "2"]
    with terminal() as shown:
        prepare(train_parser().parse_args(asked), Console(quiet=quiet))
    assert ("%|" in "".join(shown)) == (not quiet)
    assert quiet == (not "".join(shown))
