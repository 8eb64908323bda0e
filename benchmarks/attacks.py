"""Measure what hostile media cost text requests: latency of completions, quiet and under attack, and memory.

`mmlora serve` runs the bundled assistant in a subprocess. Clients in another one, which has a lower priority, send one
kind of file of `attack_files.py` over and over, half of them leaving after half a second. A healthy client sends short
completions meanwhile. During the last attack the server gets SIGTERM.

    .venv/bin/python benchmarks/attacks.py [--only NAME ...]
"""

import argparse
import base64
import json
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, Final

import httpx
from attack_files import FILES

TEXT: Final = {"prompt": "what is two plus three?", "max_tokens": 16, "ignore_eos": True}
MIN_COMPLETIONS: Final = 20
DRAIN_TIMEOUT_S: Final = 5
MIB: Final = 2**20


@dataclass(frozen=True)
class Server:
    """A running server and its address."""

    process: subprocess.Popen[str]
    address: str

    def resident_bytes(self) -> tuple[int, int]:
        """Return the resident memory of the server, and of its workers together."""
        pid = self.process.pid
        tasks = Path(f"/proc/{pid}/task").iterdir()
        children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
        return resident_bytes(pid), sum(map(resident_bytes, filter(is_worker, children)))


@dataclass(frozen=True)
class Measurement:
    """Latencies of completions in ms, and the peak memory of the server and of its workers in bytes."""

    latencies: list[float]
    server_bytes: int
    worker_bytes: int

    @property
    def p99(self) -> float:
        """The 99th percentile of the latencies."""
        return statistics.quantiles(self.latencies, n=100, method="inclusive")[98]


def is_worker(pid: int) -> bool:
    """Return whether a child is a worker: one that is just being started has the memory of its parent."""
    try:
        return b"media.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process, 0 if it has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS")), 0)


@contextmanager
def serve() -> Iterator[Server]:
    """Run a server until the end of a block."""
    options = ["--port", "0", "--uvicorn-log-level", "error", "--drain-timeout", str(DRAIN_TIMEOUT_S)]
    command = [sys.executable, "-m", "mmlora.cli", "serve", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            yield Server(process, process.stdout.readline().split()[3].removesuffix("/v1"))
        finally:
            process.kill()


def measure(server: Server, seconds: float) -> Measurement:
    """Send completions and health checks one after the other."""
    latencies, peaks, end_s = [], [], time.monotonic() + seconds
    with httpx.Client(timeout=120) as client:
        while time.monotonic() < end_s or len(latencies) < MIN_COMPLETIONS:
            start_s = time.perf_counter()
            client.post(f"{server.address}/v1/completions", json=TEXT).raise_for_status()
            latencies.append(1000 * (time.perf_counter() - start_s))
            client.get(f"{server.address}/health").raise_for_status()
            peaks.append(server.resident_bytes())
    return Measurement(latencies, *(max(sizes) for sizes in zip(*peaks, strict=True)))


def attack(address: str, name: str, num_clients: int, is_over: Event, results: "SimpleQueue[Any]") -> None:
    """Send a file from several clients until it is over; runs in a separate process."""
    os.nice(10)
    file = FILES[name]
    url = f"data:;base64,{base64.b64encode(file.build()).decode()}"
    part = {"type": f"{file.modality}_url", f"{file.modality}_url": {"url": url}}
    body = json.dumps({"messages": [{"role": "user", "content": [part]}], "max_tokens": 1}).encode()
    answers: Counter[str] = Counter()
    durations_s = [0.0]

    def send(timeout_s: float) -> None:
        while not is_over.is_set():
            start_s = time.monotonic()
            try:
                response = httpx.post(
                    f"{address}/v1/chat/completions",
                    content=body,
                    headers={"content-type": "application/json"},
                    timeout=timeout_s,
                )
            except httpx.HTTPError as error:
                answers[type(error).__name__] += 1
                if isinstance(error, httpx.ConnectError):  # the server has ended
                    return
            else:
                durations_s.append(time.monotonic() - start_s)
                answers[f"{response.status_code} {response.json().get('error', {}).get('message', '')}".strip()] += 1

    results.put(len(body))
    timeouts_s = [20.0 if number % 2 == 0 else 0.5 for number in range(num_clients)]
    threads = [threading.Thread(target=send, args=(timeout_s,)) for timeout_s in timeouts_s]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    results.put((answers, max(durations_s)))


def report(server: Server, name: str, seconds: float, num_clients: int, *, is_last: bool) -> None:
    """Attack with one kind of file and print a row; end the server during the last attack."""
    quiet = measure(server, seconds)
    context = multiprocessing.get_context("spawn")
    is_over, results = context.Event(), context.SimpleQueue()
    attacker = context.Process(target=attack, args=(server.address, name, num_clients, is_over, results))
    attacker.start()
    num_bytes = results.get()
    time.sleep(1.0)
    busy = measure(server, seconds)
    if is_last:
        start_s = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        code = server.process.wait(120)
        print(f"SIGTERM during the last attack: exit code {code} after {time.monotonic() - start_s:.1f} s")
    is_over.set()
    answers, slowest_s = results.get()
    attacker.join()
    server_mib = (busy.server_bytes - quiet.server_bytes) / MIB
    worker_mib = (busy.worker_bytes - quiet.worker_bytes) / MIB
    print(
        f"{name:<32} {num_bytes / 1e6:5.1f} MB  p50 {statistics.median(quiet.latencies):4.0f} -> "
        f"{statistics.median(busy.latencies):4.0f} ms  p99 {quiet.p99:4.0f} -> {busy.p99:4.0f} ms "
        f"({busy.p99 / quiet.p99:5.2f})  server {server_mib:+5.0f} MiB, workers {worker_mib:+5.0f} MiB  "
        f"slowest answer {slowest_s:4.1f} s\n    {dict(answers)}",
        flush=True,
    )


def main() -> None:
    """Run the attacks and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=FILES, default=list(FILES), metavar="NAME")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    parser.add_argument("--num-clients", type=int, default=4, help="attackers")
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, {options.num_clients} attackers")
    with serve() as server:
        measure(server, options.seconds)  # the first steps are slower
        for name in options.only:
            report(server, name, options.seconds, options.num_clients, is_last=name == options.only[-1])


if __name__ == "__main__":
    main()
