"""Adapters that a client loads, reloads and unloads under a storm, and which of them a request may have met."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field

import httpx

Possible = frozenset[str | None]  # digests that a name may have; None: it is not served


@dataclass
class ServedName:
    """A name over time.

    Attributes:
        history: since when (s, monotonic) the name may have had which digests.
    """

    name: str
    history: list[tuple[float, Possible]] = field(default_factory=lambda: [(0.0, frozenset({None}))])

    @property
    def now(self) -> Possible:
        """What it may have now."""
        return self.history[-1][1]

    def note(self, possible: Possible) -> None:
        """It may have other digests from now on."""
        self.history.append((time.monotonic(), possible))

    def between(self, start_s: float, end_s: float) -> Possible:
        """What a request of this time may have met."""
        last = max(index for index, (since, _) in enumerate(self.history) if since <= start_s)
        return frozenset().union(*(possible for since, possible in self.history[last:] if since <= end_s))

    def forget_before(self, start_s: float) -> None:
        """Drop what no request that still runs can have met."""
        last = max(index for index, (since, _) in enumerate(self.history) if since <= start_s)
        del self.history[:last]


class Churn:
    """Loads, reloads and unloads adapters at random.

    Args:
        client: of the server.
        versions: path and digest of each version.
        names: under which they are served.
        rng: chooses.
    """

    def __init__(
        self, client: httpx.AsyncClient, versions: list[tuple[str, str]], names: list[str], rng: random.Random
    ) -> None:
        self._client = client
        self._versions = versions
        self._rng = rng
        self.names = {name: ServedName(name) for name in names}
        self.problems: list[str] = []
        self.num_done: dict[str, int] = {"load": 0, "reload": 0, "unload": 0, "bad load": 0}

    async def step(self) -> None:
        """Do one change; what the server says to it must be right."""
        served = self.names[self._rng.choice(list(self.names))]
        path, digest = self._rng.choice(self._versions)
        if self._rng.random() < 0.1:
            await self._load_nothing()
        elif served.now == {None}:
            await self._change(served, "load", frozenset({digest}), {"lora_path": path})
        elif self._rng.random() < 0.5:
            await self._change(served, "reload", frozenset({digest}), {"lora_path": path, "load_inplace": True})
        else:
            await self._change(served, "unload", frozenset({None}), {})

    async def unload_all(self) -> None:
        """Leave the server as it was."""
        for served in self.names.values():
            if served.now != {None}:
                await self._change(served, "unload", frozenset({None}), {})

    async def _change(self, served: ServedName, what: str, after: Possible, fields: dict[str, object]) -> None:
        served.note(served.now | after)
        route = "unload_lora_adapter" if what == "unload" else "load_lora_adapter"
        response = await self._client.post(f"/v1/{route}", json={"lora_name": served.name, **fields})
        if response.status_code == 200:
            served.note(after)
            self.num_done[what] += 1
        else:
            self.problems.append(f"{what} of {served.name}: {response.status_code} {response.text}")

    async def _load_nothing(self) -> None:
        body = {"lora_name": "ghost", "lora_path": "/there/is/no/such/adapter"}
        response = await self._client.post("/v1/load_lora_adapter", json=body)
        self.num_done["bad load"] += 1
        if response.status_code not in (400, 404):
            self.problems.append(f"load of nothing: {response.status_code} {response.text}")
