"""One contender per fresh process: requests in, timings and peak memory out, as JSON lines.

A process of its own gives each contender its own peak memory and its own thread pools. All
processes of a case stay alive while it is measured, so that the repeats are interleaved: a machine
that slows down for a while slows all contenders. What runs in them stands in contenders.py
and gradient.py.
"""

import importlib
import json
import os
import resource
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

SHORT = 0.5
"""Seconds for which a short call is repeated, at most SHORT_CALLS times."""
SHORT_CALLS = 20

Say = Callable[[str], None]
Run = Callable[[dict[str, Any]], dict[str, Any]]


class Worker:
    """A process that holds one contender.

    Args:
        job: JSON values; ``section`` says which function ``prepare_<section>`` is called.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        self.process = subprocess.Popen(
            # Not its other warnings: that a solver did not converge is for the reader.
            [sys.executable, "-W", "ignore::FutureWarning", "-m", "benchmarks.svm.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "KINETO_LOG_LEVEL": "99"},  # the profiler says when it starts
        )
        self._send(job)

    def ask(self, request: dict[str, Any] | None = None, *, limit: float) -> dict[str, Any]:
        """Send a request, or none to wait for the preparations, and read the answer.

        Args:
            request: JSON values.
            limit: Seconds after which the process is killed.

        Returns:
            The answer; ``{"error": reason}`` if there is none or the contender raised.
        """
        start = time.perf_counter()
        timer = threading.Timer(limit, self.process.kill)
        timer.start()
        try:
            if request is not None:
                self._send(request)
            line = self.process.stdout.readline()
        finally:
            timer.cancel()
        if line:
            return json.loads(line)
        late = time.perf_counter() - start >= limit
        return {"error": f"stopped after {limit:.0f} s" if late else "its process died"}

    def close(self) -> None:
        """End the process: of itself, now that no request can come, or else by force."""
        with suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def _send(self, message: dict[str, Any]) -> None:
        with suppress(BrokenPipeError):  # a dead process shows when its answer is read
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()


def measure_interleaved(
    jobs: dict[str, dict[str, Any]],
    request: dict[str, Any],
    *,
    repeats: int,
    budget: float,
    say: Say,
    finish: Callable[[str, Worker, float], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Measure contenders in turn, round after round.

    Args:
        jobs: Contender to its job.
        request: What each is asked in each round.
        repeats: Rounds; a contender leaves when another one would exceed its budget, or when it
            extrapolated its time.
        budget: Seconds per contender.
        say: Reports progress.
        finish: Called with each contender, its process and a time limit after the last round.

    Returns:
        Contender to its last answer with the ``seconds`` of all rounds, or ``{"error": reason}``.
    """
    limit = 3 * budget + 600  # beyond what a contender that keeps to its budget can need
    records: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        workers = {p: stack.enter_context(closing(Worker(job))) for p, job in jobs.items()}
        for peer, worker in workers.items():
            records[peer] = {"seconds": [], **worker.ask(limit=limit)}
        spent = dict.fromkeys(workers, 0.0)
        running = [peer for peer in workers if "error" not in records[peer]]
        for rounds in range(1, repeats + 1):
            for peer in list(running):
                start = time.perf_counter()
                answer = workers[peer].ask(request, limit=limit)
                spent[peer] += time.perf_counter() - start
                records[peer] = merge(records[peer], answer)
                say(f"{peer}, round {rounds}: {describe(answer)}")
                over = spent[peer] * (rounds + 1) / rounds > budget
                if over or "error" in answer or "extrapolated_from" in answer:
                    running.remove(peer)
        for peer, worker in workers.items():
            if "error" in records[peer]:
                say(f"{peer}: {records[peer]['error']}")
            elif finish is not None:
                finish(peer, worker, limit)
    return records


def merge(record: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    """Append the lists of seconds, let the last answer decide the rest; an error replaces all."""
    if "error" in answer:
        return {"error": answer["error"]}
    return {**record, **answer, "seconds": record["seconds"] + answer["seconds"]}


def describe(answer: dict[str, Any]) -> str:
    """Say in a few words how long it took."""
    if "error" in answer:
        return answer["error"]
    note = answer.get("extrapolated_from")
    return f"{min(answer['seconds']):.4g} s" + (f" (extrapolated from {note})" if note else "")


def repeat_short(call: Callable[[], object], device: str) -> list[float]:
    """Time a call once, or, where it is short, again and again for half a second.

    Args:
        call: What is timed.
        device: Synchronised on both sides where it is not the CPU.

    Returns:
        Seconds of each call.
    """
    seconds: list[float] = []
    while not seconds or (sum(seconds) < SHORT and len(seconds) < SHORT_CALLS):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds


def synchronize(device: str) -> None:
    """Wait for the device, so that a clock read next to it is true."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize()


def peak_memory_mib() -> float:
    """Return the peak resident memory of this process since its start or the last reset."""
    # Not ru_maxrss where it can be helped: on Linux it starts at the peak of the parent process.
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def reset_peak_memory() -> None:
    """Let the peak start at the present memory, where the system can do that (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def serve() -> None:
    """Prepare the contender that the first line names, then answer one request per line."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a contender prints must not end up among the answers

    def attempt(call: Callable[..., Any], argument: dict[str, Any]) -> Any:  # noqa: ANN401
        try:
            return call(argument)
        except Exception as error:  # any failure of a contender is a result to report
            traceback.print_exc()
            return {"error": f"{type(error).__name__}: {error}"[:500]}

    def reply(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    job = json.loads(sys.stdin.readline())
    start = time.perf_counter()
    name = "gradient" if job["section"] == "gradient" else "contenders"
    module = importlib.import_module(f"benchmarks.svm.{name}")
    run = attempt(getattr(module, f"prepare_{job['section']}"), job)
    if isinstance(run, dict):
        reply(run)
        return
    reply({"prepared_seconds": time.perf_counter() - start})
    reset_peak_memory()
    baseline = peak_memory_mib()
    for line in sys.stdin:
        answer = attempt(run, json.loads(line))
        reply({"peak_mib": peak_memory_mib() - baseline, **answer})


if __name__ == "__main__":
    serve()
