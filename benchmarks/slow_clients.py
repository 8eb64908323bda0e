"""Measure what 500 slow clients cost healthy ones: latencies of short chats without and beside them.

`mmlora serve` runs the bundled assistant in a process of its own, and so do the slow clients: of half of them the head
never ends, of the other half the body, a byte a second each. One that is closed connects again.
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
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"


def drip(address: str, num_clients: int, are_connected: Event) -> None:
    """Be that many slow clients until terminated, at hardly any cost: the CPU is for those who are measured."""
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
            except OSError:  # the server has closed it
                assert client is not None, "no connection can be made"
                client.close()
                clients[number] = None
        are_connected.set()


async def measure(address: str, num_requests: int, concurrency: int) -> list[float]:
    """Latencies (ms) of healthy requests."""
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
    """Print a row; returns the p99."""
    percentiles = statistics.quantiles(latencies, n=100)
    print(f"{name:<24} p50 {percentiles[49]:7.1f} ms   p99 {percentiles[98]:7.1f} ms   ({len(latencies)} requests)")
    return percentiles[98]


def main() -> None:
    """Print both, in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-clients", type=int, default=500)
    parser.add_argument("--num-requests", type=int, default=400, help="healthy ones in each round")
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
            alone = show("alone", asyncio.run(measure(address, options.num_requests, options.concurrency)))
            context = multiprocessing.get_context("spawn")
            are_connected = context.Event()
            drippers = context.Process(target=drip, args=(address, options.num_clients, are_connected))
            drippers.start()
            are_connected.wait()
            beside = asyncio.run(measure(address, options.num_requests, options.concurrency))
            print(f"p99 beside / alone: {show(f'beside {options.num_clients} slow', beside) / alone:.2f}")
            drippers.terminate()
            drippers.join()
        server.terminate()


if __name__ == "__main__":
    main()
