"""Where the value of a tensor may be looked at without waiting for the device."""

from torch import Tensor


def free_to_look(tensor: Tensor) -> bool:
    """Tell whether Python may branch on the values: on a CPU they are there, elsewhere it waits."""
    return tensor.device.type == "cpu"
