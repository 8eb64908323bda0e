"""Measure the effect of 500 slow clients (slowloris) on healthy ones: latency of short chats with and without them.

`mmlora serve` runs the bundled assistant in a subprocess; the slow clients run in another. Half of them never finish
the head of their request, the others never finish the body; each sends a byte per second and reconnects when closed.

    .venv/bin/python benchmarks/slow_clients.py
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from multiprocessing.synchronize import Event
from urllib.parse import urlsplit

import httpx

BODY = {"messages": [{"role": "user", "content": "what is two plus three?"}], "max_tokens": 16, "ignore_eos": True}
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


def drip(address: str, num_clients: int, are_connected: Event) -> None:
    """Run slow clients until terminated, with little CPU time, so that they do not slow down the measured server."""
    parts = urlsplit(address)
    clients: list[socket.socket | None] = [None] * num_clients
    while True:
        for number, client in enumerate(clients):
            time.sleep(1 / num_clients)
            try:
                if client is None:
                    client = socket.create_connection((parts.hostname or "", parts.port or 0))
                    client.setblocking(False)
                    client.send(HEAD + (b"x-never-ends: " if number % 2 else b"content-length: 100000\r\n\r\n"))
                else:
                    client.send(b"x")
                clients[number] = client
            except OSError:  # closed by the server
                assert client is not None, "the server accepts no connection"
                client.close()
                clients[number] = None
        are_connected.set()


async def measure(address: str, num_requests: int, concurrency: int) -> list[float]:
    """Return the latencies of healthy requests in ms."""
    latencies: list[float] = []
    async with httpx.AsyncClient(timeout=120) as client:

        async def ask(count: int) -> None:
            for _ in range(count):
                start = time.perf_counter()
                answer = await client.post(f"{address}/v1/chat/completions", json=BODY)
                answer.raise_for_status()
                latencies.append(1000 * (time.perf_counter() - start))

        await asyncio.gather(*(ask(num_requests // concurrency) for _ in range(concurrency)))
    return latencies


def show(name: str, latencies: list[float]) -> float:
    """Print a row and return its p99."""
    percentiles = statistics.quantiles(latencies, n=100)
    print(f"{name:<24} p50 {percentiles[49]:7.1f} ms   p99 {percentiles[98]:7.1f} ms   ({len(latencies)} requests)")
    return percentiles[98]


def main() -> None:
    """Measure without and with slow clients in turns, and print both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-clients", type=int, default=500)
    parser.add_argument("--num-requests", type=int, default=400, help="healthy requests per round")
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    command = [sys.executable, "-m", "mmlora.cli", "serve", "--port", "0", "--uvicorn-log-level", "error"]
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}", end="")
    print(f", torch {version('torch')}, uvicorn {version('uvicorn')}; {json.dumps(BODY)}")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        address = server.stdout.readline().split()[3].removesuffix("/v1")
        asyncio.run(measure(address, 40, options.concurrency))
        for _ in range(options.rounds):
            latencies = asyncio.run(measure(address, options.num_requests, options.concurrency))
            alone = show("without slow clients", latencies)
            context = multiprocessing.get_context("spawn")
            are_connected = context.Event()
            drippers = context.Process(target=drip, args=(address, options.num_clients, are_connected))
            drippers.start()
            are_connected.wait()
            latencies = asyncio.run(measure(address, options.num_requests, options.concurrency))
            p99 = show(f"with {options.num_clients} slow clients", latencies)
            print(f"p99 with / without slow clients: {p99 / alone:.2f}")
            drippers.terminate()
            drippers.join()
        server.terminate()


if __name__ == "__main__":
    main()
