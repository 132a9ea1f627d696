"""What devices can do: PyTorch has many kinds, and none is named here but the CPU."""

import torch


def has_float64(device: torch.device) -> bool:
    """Return whether a device computes in float64, which the SVMs' solver needs; Apple's do not."""
    try:
        torch.empty(0, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return False
    return True


def default_device() -> torch.device:
    """Choose an accelerator if there is one that computes in float64, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or not has_float64(accelerator):
        return torch.device("cpu")
    return accelerator


def device_name(device: torch.device) -> str:
    """Return the name that the maker gave a device, where PyTorch knows it."""
    name = getattr(torch.get_device_module(device), "get_device_name", str)
    return name(device)


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was asked for; a CPU always has."""
    if device.type == "cpu":
        return
    try:
        torch.accelerator.synchronize(device)
    except RuntimeError:  # not all kinds have streams
        torch.get_device_module(device).synchronize()


def take_peak_memory_mib(device: torch.device) -> float | None:
    """Return the most memory allocated on a device since the last call; None if unknown."""
    if device.type == "cpu":
        return None
    try:
        peak = torch.accelerator.max_memory_allocated(device) / 2**20
        torch.accelerator.reset_peak_memory_stats(device)
    except (RuntimeError, NotImplementedError):  # not all kinds keep count
        return None
    return peak
