"""Where a number was measured, and with which versions."""

import platform
from importlib.metadata import version
from pathlib import Path

import torch

from torchdnr.resources import device_name


def describe_environment(device: torch.device | str) -> dict[str, object]:
    """Describe versions, and the hardware around a device, to be stored beside the results."""
    device = torch.device(device)
    return {
        "torchdnr": version("torchdnr"),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": device_name(device),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()  # Linux; elsewhere platform knows
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
