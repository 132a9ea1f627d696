"""Start further processes on this machine, which share the work of a command with the first."""

import argparse
import math
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from torchdnr.cli.console import Console, is_for_user
from torchdnr.cli.run_folder import find_device
from torchdnr.distributed.processes import PeerError

Work = Callable[[argparse.Namespace, Console], None]

_MEMORY = 4 * 2**30  # of the machine, for each process that is started without being asked for
_LAST_WORDS = 10.0  # seconds that a process which fails has to say why


def process_count(asked: int | None, device: str | None, most: int | None = None) -> int:
    """Choose how many processes share the work of a command that torchrun has not started.

    Args:
        asked: As many as the user wants; None: on a CPU one per core that PyTorch uses, and per
            4 GiB of memory, else one.
        device: Name of the device; None: a GPU if there is one, else the CPU.
        most: As many as the work can be divided among; None: any number.

    Raises:
        ValueError: If several are asked for and torchrun has started this process.
    """
    if "WORLD_SIZE" in os.environ:
        if asked is not None and asked > 1:
            raise ValueError(
                f"--processes {asked} starts processes, and torchrun has done so: give one of the "
                "two"
            )
        return 1
    if asked is not None:
        return asked
    if find_device(device).type != "cpu":
        return 1
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on all systems
        return 1
    allowed, granted = container_limits()
    cores = math.ceil(min(torch.get_num_threads(), allowed))
    return max(1, min(cores, most or cores, round(min(memory, granted) / _MEMORY)))


def container_limits(folder: Path = Path("/sys/fs/cgroup")) -> tuple[float, float]:
    """Read how many cores and bytes a container (control group v2) may use; infinite without one.

    Neither PyTorch nor the operating system heeds these where it counts cores and memory.
    """
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        memory = (folder / "memory.max").read_text().strip()
        cores = math.inf if quota == "max" else int(quota) / int(period)
        return cores, math.inf if memory == "max" else int(memory)
    except (OSError, ValueError):  # no such limits here
        return math.inf, math.inf


@contextmanager
def further_processes(count: int, work: Work, options: argparse.Namespace) -> Iterator[None]:
    """Run the block as the first of ``count`` processes, while the others run ``work``.

    They share the cores of this one. Only the first heeds Ctrl-C and tells of errors; if one of
    them ends, so do the others.

    Raises:
        PeerError: If another process fails, with what it has to say; soon after it does.
    """
    if count == 1:
        yield
        return
    threads = torch.get_num_threads()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, multi_tenant=True)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    ranks = [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), **address}
        | dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(count))
        for rank in range(count)
    ]
    kept = {name: os.environ.get(name) for name in ranks[0]}
    share = max(1, threads // count)
    context = multiprocessing.get_context("spawn")
    others: list[SpawnProcess] = []
    receivers: list[Connection] = []

    def heed(number: int, frame: object) -> None:
        if any(other.exitcode for other in others):
            raise PeerError("another process of this job has ended")

    handlers = {signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN)}  # they inherit it
    try:
        for rank in ranks[1:]:
            receiver, sender = context.Pipe(duplex=False)
            given = sender, rank, share, work, options
            other = context.Process(target=_follow, args=given, daemon=True)
            other.start()
            others.append(other)
            sender.close()  # the other's alone now: it reads as ended when the other has
            receivers.append(receiver)
        if hasattr(signal, "SIGCHLD"):
            handlers[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, heed)
        signal.signal(signal.SIGINT, handlers[signal.SIGINT])
        os.environ.update(ranks[0])
        torch.set_num_threads(share)
        yield
        for other in others:
            other.join()
        if any(other.exitcode for other in others):
            raise PeerError("another process of this job has ended")
    except PeerError as error:
        raise PeerError(_last_words(others, receivers) or str(error)) from error
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)
        for other in others:
            other.kill()
            other.join()
        torch.set_num_threads(threads)
        for name, value in kept.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _follow(
    sender: Connection, rank: dict[str, str], threads: int, work: Work, options: argparse.Namespace
) -> NoReturn:
    """Do the work in a further process, and tell the first why it fails, if it does by itself."""
    threading.Thread(target=_end_with_the_first, daemon=True).start()
    os.environ.update(rank)
    torch.set_num_threads(threads)
    try:
        work(options, Console(quiet=True))
    except PeerError:  # another one has failed, and tells why
        sys.exit(1)
    except Exception as error:
        sender.send(str(error) if is_for_user(error) else traceback.format_exc())
        sys.exit(1)
    sys.exit(0)


def _end_with_the_first() -> None:
    """Wait for the end of the process that started this one, however it comes, and end too."""
    first = multiprocessing.parent_process()
    if first is not None:
        first.join()
    os._exit(1)


def _last_words(others: list[SpawnProcess], receivers: list[Connection]) -> str:
    """Return what the process that failed has sent, or that it was killed; "" if it is unknown."""
    left = dict(zip(receivers, others, strict=True))
    while left and wait(left, timeout=_LAST_WORDS):
        for receiver, other in [*left.items()]:
            if receiver.poll():
                try:
                    return receiver.recv()
                except EOFError:  # it has ended without a word
                    del left[receiver]
                other.join()
                if other.exitcode is not None and other.exitcode < 0:
                    return (
                        f"a process was killed by signal {-other.exitcode}, perhaps for lack of "
                        "memory; the same command goes on, and with a lower --processes takes less"
                    )
    return ""
