"""Data sets: where they come from, how they are split, image files."""

from torchdnr.data.readers import read_folder, read_npz
from torchdnr.data.sources import SOURCES, Dataset, Splits, load_dataset, split

__all__ = [
    "SOURCES",
    "Dataset",
    "Splits",
    "load_dataset",
    "read_folder",
    "read_npz",
    "split",
]
