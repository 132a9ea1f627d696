"""Work shared by the processes of torch.distributed."""

from torchdnr.distributed.processes import (
    ALONE,
    PeerError,
    Processes,
    alone,
    current,
    joined,
    local_device,
)

__all__ = [
    "ALONE",
    "PeerError",
    "Processes",
    "alone",
    "current",
    "joined",
    "local_device",
]
