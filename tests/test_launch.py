"""A command that starts further processes: one console, one message, and all of them end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from torchdnr.cli.launch import container_limits, process_count

# Two processes that meet, do something, each for itself, and meet again.
SCRIPT = """
import argparse, os, signal, sys, time, warnings
warnings.filterwarnings("ignore")
import torch
from torchdnr.cli.console import command
from torchdnr.cli.launch import further_processes
from torchdnr.distributed import joined


def work(options, console):
    with joined(torch.device("cpu")) as processes:
        console.join(processes.rank, processes.count)
        console.say("shown once")
        (options.folder / str(processes.rank)).write_text(str(os.getpid()))
        processes.wait()
        if options.which in (processes.rank, "all"):
            if options.what == "error":
                raise OSError("the disk is full")
            if options.what == "bug":
                {}["nothing"]
            if options.what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
        elif options.what:
            time.sleep(options.seconds)
        print(torch.get_num_threads(), os.environ["WORLD_SIZE"], flush=True)
        processes.wait()


if __name__ == "__main__":
    from pathlib import Path

    what, which, seconds, folder = sys.argv[1:]
    which = int(which) if which.isdigit() else which
    options = argparse.Namespace(
        what=what, which=which, seconds=float(seconds), folder=Path(folder)
    )
    torch.set_num_threads(6)
    with command(False) as console, further_processes(2, work, options):
        work(options, console)
    assert "WORLD_SIZE" not in os.environ and torch.get_num_threads() == 6
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    sys.exit(console.status)
"""
SOON = 100  # seconds, on a busy machine; the processes would sleep for longer


@pytest.fixture
def start(tmp_path):
    """Start the script: what happens, in which process, and how long the others sleep."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    started = []

    def start(what="", which="none", seconds=1000):
        command = [sys.executable, str(script), what, which, str(seconds), str(tmp_path)]
        env = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env=env, start_new_session=True, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def pids(folder):
    """Wait until both processes have written their number."""
    until = time.monotonic() + SOON
    while time.monotonic() < until:
        texts = [path.read_text() for path in map(folder.joinpath, "01") if path.exists()]
        if len(texts) == 2 and all(texts):
            return list(map(int, texts))
        time.sleep(0.05)
    raise TimeoutError("the processes have not started")


def all_end(numbers):
    """Wait until none of these processes runs."""
    until = time.monotonic() + SOON
    while time.monotonic() < until:
        if not any(Path(f"/proc/{number}").exists() for number in numbers):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
def test_they_share_the_threads_and_only_the_first_talks(start, tmp_path):
    process = start()
    out, err = process.communicate(timeout=SOON)
    assert process.returncode == 0, err
    assert out.splitlines() == ["3 2"] * 2  # 6 threads for two processes
    assert err.count("shown once") == 1 and err.count("took") == 1
    assert all_end(pids(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("which", ["1", "all"])
def test_an_error_is_told_once_and_ends_all_soon(start, tmp_path, which):
    process = start("error", which)
    out, err = process.communicate(timeout=SOON)
    assert process.returncode == 2 and out == ""
    assert err.splitlines() == ["shown once", "error: the disk is full"]
    assert all_end(pids(tmp_path))


@pytest.mark.slow
def test_a_bug_in_another_process_shows_where_it_is(start, tmp_path):
    process = start("bug", "1")
    _, err = process.communicate(timeout=SOON)
    assert process.returncode == 2
    assert err.count("KeyError: 'nothing'") == 1 and '{}["nothing"]' in err
    assert all_end(pids(tmp_path))


@pytest.mark.slow
def test_one_that_is_killed_ends_all_soon(start, tmp_path):
    process = start("kill", "1")
    _, err = process.communicate(timeout=SOON)
    assert process.returncode == 2
    assert err.splitlines()[1:] == [
        "error: a process was killed by signal 9, perhaps for lack of memory; the same command "
        "goes on, and with a lower --processes takes less"
    ]
    assert all_end(pids(tmp_path))


@pytest.mark.slow
def test_ctrl_c_stops_all_with_one_message(start, tmp_path):
    process = start("sleep", "none")
    numbers = pids(tmp_path)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to all of them
    _, err = process.communicate(timeout=SOON)
    assert process.returncode == 130
    assert err.splitlines() == ["shown once", "", "stopped; the same command goes on from here"]
    assert all_end(numbers)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks at the processes of Linux")
def test_none_is_left_where_the_first_is_killed(start, tmp_path):
    process = start("sleep", "none")
    numbers = pids(tmp_path)
    process.kill()
    process.communicate()
    assert all_end(numbers)


def test_how_many_are_started(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert process_count(None, "cpu", most=1) == 1
        assert 1 <= process_count(None, "cpu", most=2) <= 2
        assert 1 <= process_count(None, "cpu") <= 3
        assert process_count(5, "cpu", most=1) == 5  # as asked
    finally:
        torch.set_num_threads(threads)


def test_torchrun_has_started_all(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert process_count(None, "cpu") == process_count(1, "cpu") == 1
    with pytest.raises(ValueError, match="--processes 3 starts processes, and torchrun has"):
        process_count(3, "cpu")


@pytest.mark.parametrize(
    ("cpu", "memory", "limits"),
    [
        ("200000 100000", "4294967296", (2, 2**32)),
        ("max 100000", "max", (float("inf"), float("inf"))),
        (None, None, (float("inf"), float("inf"))),
    ],
)
def test_the_limits_of_a_container_are_read(tmp_path, cpu, memory, limits):
    if cpu is not None:
        (tmp_path / "cpu.max").write_text(f"{cpu}\n")
        (tmp_path / "memory.max").write_text(f"{memory}\n")
    assert container_limits(tmp_path) == limits
