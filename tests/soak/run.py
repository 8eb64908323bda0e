"""`soak`: run a server in a subprocess under load, and report the results."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import random
import re
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.server_process import ServerProcess, run_serve
from tests.soak.churn import Churn
from tests.soak.questions import QuestionSet, prepare
from tests.soak.storm import MAX_OPEN, Storm

QUIET_S = 30.0  # time limit for the server to become idle after the load
MiB = 2**20
STDERR = 2  # of this process, even if Python's is captured


@dataclass(frozen=True)
class Report:
    """Results of a soak test.

    Attributes:
        wrong: unexpected responses and statuses.
        left: resources that the server still used in the end.
        memory: resident set of the server as (seconds since start, bytes).
    """

    seconds: float
    num_clients: int
    counts: dict[str, int]
    changes: dict[str, int]
    latencies_s: list[float]
    wrong: list[str]
    left: list[str]
    memory: list[tuple[float, int]]

    @property
    def problems(self) -> list[str]:
        """Everything that makes the test fail."""
        return [*self.wrong, *self.left]

    @property
    def slope_mib_per_min(self) -> float:
        """Growth of the resident set in the second half."""
        half = [(at, size) for at, size in self.memory if at > self.seconds / 2]
        times, sizes = zip(*half, strict=True)
        return statistics.linear_regression(times, sizes).slope * 60 / MiB

    def as_dict(self) -> dict[str, Any]:
        """Return figures for display."""
        cuts = statistics.quantiles(self.latencies_s, n=100)
        sizes = [size for _, size in self.memory]
        return {
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
            "seconds": round(self.seconds),
            "clients": self.num_clients,
            "requests": self.counts,
            "adapter changes": self.changes,
            "p50 and p99 of complete responses, s": [round(cuts[49], 3), round(cuts[98], 3)],
            "resident set at start, middle, end, MiB": [
                size // MiB for size in (sizes[0], sizes[len(sizes) // 2], sizes[-1])
            ],
            "growth in the second half, MiB/min": round(self.slope_mib_per_min, 3),
            "problems": self.problems[:50],
            "number of problems": len(self.problems),
        }


def soak(folder: Path, seconds: float, num_clients: int, seed: int = 0) -> Report:
    """Run a soak test.

    Args:
        folder: for the model and its adapters.
        seconds: duration of the load.
        num_clients: concurrent clients.
        seed: of all random choices.
    """
    question_set = prepare(folder, seed)
    with _serve(question_set) as server:
        return asyncio.run(_soak(question_set, server.address, server.process.pid, seconds, num_clients, seed))


async def _soak(
    question_set: QuestionSet, address: str, pid: int, seconds: float, num_clients: int, seed: int
) -> Report:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=num_clients)
    async with httpx.AsyncClient(base_url=address, timeout=120, limits=limits, trust_env=False) as client:
        before = await _held(client)
        versions = [(str(question_set.paths[name]), question_set.digests[name]) for name in ("v0", "v1", "v2", "v3")]
        churn = Churn(client, versions, ["come", "and", "go"], random.Random(seed))
        storm = Storm(client, question_set, churn, seed)
        memory: list[tuple[float, int]] = []
        watch = asyncio.create_task(_watch(pid, memory))
        await storm.run(num_clients, seconds)
        watch.cancel()
        await churn.unload_all()
        left = await _left(client, before)
        counts = {**storm.counts, "aborted": int(await _num_aborted(client))}
    return Report(
        seconds,
        num_clients,
        counts,
        churn.num_done,
        storm.latencies_s,
        [*storm.wrong, *churn.problems],
        left,
        memory,
    )


@contextmanager
def _serve(question_set: QuestionSet) -> Iterator[ServerProcess]:
    """Run `mmlora serve` with small limits, so that requests compete for every resource."""
    modules = [f"{name}={question_set.paths[name]}" for name in ("fixed", "other")]
    options = {
        "--served-model-name": "storm",
        "--default-mm-loras": json.dumps({"audio": str(question_set.paths["audio"])}),
        "--max-loras": "3",
        "--max-cpu-loras": "6",
        "--max-num-seqs": "24",
        "--max-queued-requests": str(MAX_OPEN - 24),
        "--max-num-batched-tokens": "512",
        "--kv-cache-memory-bytes": str(12 * MiB),
        "--encoder-cache-memory-bytes": str(1 * MiB),
        "--uvicorn-log-level": "warning",
    }
    arguments = [str(question_set.model), "--enable-lora", *(part for option in options.items() for part in option)]
    arguments += ["--lora-modules", *modules]
    allowed = {"MMLORA_ALLOW_RUNTIME_LORA_UPDATING": "true"}
    with run_serve(*arguments, stderr=STDERR, **allowed) as server:
        yield server


async def _num_aborted(client: httpx.AsyncClient) -> float:
    """Return the number of requests aborted because their client disconnected."""
    found = re.search(r'^mmlora:request_success_total\{finished_reason="abort".*\} (.*)$', await _metrics(client), re.M)
    return float(found[1]) if found else 0.0


async def _metrics(client: httpx.AsyncClient) -> str:
    return (await client.get("/metrics")).text


async def _held(client: httpx.AsyncClient) -> dict[str, float]:
    """Return the resources that the server uses, from its metrics."""
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "lora_bytes")
    samples = [
        line.rsplit(" ", 1) for line in (await _metrics(client)).splitlines() if line and not line.startswith("#")
    ]
    return {
        name: float(value)
        for name, value in samples
        if any(name.startswith(f"mmlora:{known}") for known in names) and 'place="slot"' not in name
    }


async def _left(client: httpx.AsyncClient, before: dict[str, float]) -> list[str]:
    """Return the resources that an idle server uses beyond those from before."""
    deadline = time.monotonic() + QUIET_S
    while True:
        held = await _held(client)
        left = [
            f"{name} is {value}, was {before.get(name)}" for name, value in held.items() if value != before.get(name)
        ]
        if not left or time.monotonic() > deadline:
            return left
        await asyncio.sleep(0.2)


async def _watch(pid: int, memory: list[tuple[float, int]]) -> None:
    start_s = time.monotonic()
    while True:
        fields = Path(f"/proc/{pid}/statm").read_text().split()
        memory.append((time.monotonic() - start_s, int(fields[1]) * os.sysconf("SC_PAGE_SIZE")))
        await asyncio.sleep(1)
