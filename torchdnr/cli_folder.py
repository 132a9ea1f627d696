"""What a run folder was made with: read, and compared with what is asked for now."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchdnr.evaluation.curve import read_json

SAMPLE_OPTIONS = "network_samples", "svm_samples", "threshold_samples"

_SETTING_TYPES = {
    "dataset": str,
    "seed": int,
    **dict.fromkeys(SAMPLE_OPTIONS, int),
    "epochs": int,
    "batch_size": int,
    "layers": list,
    "rejection_rate": float,
}


def read_settings(folder: Path) -> dict[str, Any]:
    """Read what a finished run folder was made with.

    Args:
        folder: The run folder.

    Returns:
        What its ``settings.json`` holds.

    Raises:
        FileNotFoundError: If it is no run folder.
        ValueError: If its settings are damaged, or lack what came later.
    """
    settings = remembered_settings(folder)
    if not settings:
        raise FileNotFoundError(
            f"{folder} holds no classifiers; expected a run folder: python train.py --run {folder}"
        )
    if missing := [name for name in ("classes", "image_shape") if name not in settings]:
        raise ValueError(
            f"{folder} is of an older version: its settings.json lacks {' and '.join(missing)}; "
            f"python train.py --run {folder} adds them, where the data set is at hand"
        )
    return settings


def remembered_settings(folder: Path) -> dict[str, Any]:
    """Read what the folder was made with; a folder in which nothing was made yet binds nobody."""
    path, made = folder / "settings.json", any(folder.glob("[!.]*.safetensors"))
    if made and not path.exists():
        raise ValueError(
            f"{folder} holds classifiers but no settings.json, so what they were made with is "
            "unknown; choose another --run, or delete the folder"
        )
    if not made:
        return {}
    settings = read_json(path)
    if (
        not isinstance(settings, dict)
        or not _SETTING_TYPES.items()
        <= {name: type(value) for name, value in settings.items()}.items()
    ):
        raise ValueError(f"{path} does not hold the settings of a run; choose another --run")
    return settings


def check_agreement(folder: Path, remembered: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse options that disagree with what a run folder was made with.

    Args:
        folder: The run folder.
        remembered: What its ``settings.json`` holds.
        given: Options that were given.

    Raises:
        ValueError: If any differ: all of them are named, with both values.
    """
    differ = [name for name in remembered if name in given and given[name] != remembered[name]]
    if differ:
        both = ", ".join(
            f"{_option(name)} {_words(remembered[name])} (given: {_words(given[name])})"
            for name in differ
        )
        raise ValueError(
            f"{folder} was made with {both}; choose another --run, delete the folder, or "
            f"drop {' and '.join(map(_option, differ))}"
        )


def _option(name: str) -> str:
    if name == "batch_size":
        return "--train-batch-size"  # attack.py has another --batch-size
    return f"--{name.replace('_', '-')}"


def _words(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def check_data(folder: Path, remembered: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuse a data set whose contents are others than those a run folder was made with.

    Args:
        folder: The run folder.
        remembered: What its ``settings.json`` holds.
        settings: What it would hold now.

    Raises:
        ValueError: If the digests of the data differ.
    """
    if remembered.get("data_digest", settings["data_digest"]) != settings["data_digest"]:
        raise ValueError(
            f"{folder} was made with other contents of {settings['dataset']}; choose another --run"
        )
