"""Load, reload and unload adapters during the soak test, and track which of them a request may have used."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field

import httpx

Possible = frozenset[str | None]  # digests that a name may have; None: not served


@dataclass
class ServedName:
    """The history of an adapter name.

    Attributes:
        history: start (s, monotonic) and possible digests of each period.
    """

    name: str
    history: list[tuple[float, Possible]] = field(default_factory=lambda: [(0.0, frozenset({None}))])

    @property
    def now(self) -> Possible:
        """The digests that the name may have now."""
        return self.history[-1][1]

    def note(self, possible: Possible) -> None:
        """Start a period with other possible digests."""
        self.history.append((time.monotonic(), possible))

    def between(self, start_s: float, end_s: float) -> Possible:
        """Return the digests that a request in this interval may have used."""
        last = max(index for index, (since, _) in enumerate(self.history) if since <= start_s)
        return frozenset().union(*(possible for since, possible in self.history[last:] if since <= end_s))

    def forget_before(self, start_s: float) -> None:
        """Drop periods that ended before the oldest running request."""
        last = max(index for index, (since, _) in enumerate(self.history) if since <= start_s)
        del self.history[:last]


class Churn:
    """Loads, reloads and unloads adapters at random.

    Args:
        client: of the server.
        versions: path and digest of each adapter.
        names: adapter names to use.
        rng: source of all choices.
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
        """Make one change, and check the server's response."""
        served = self.names[self._rng.choice(list(self.names))]
        path, digest = self._rng.choice(self._versions)
        if self._rng.random() < 0.1:
            await self._load_missing()
        elif served.now == {None}:
            await self._change(served, "load", frozenset({digest}), {"lora_path": path})
        elif self._rng.random() < 0.5:
            await self._change(served, "reload", frozenset({digest}), {"lora_path": path, "load_inplace": True})
        else:
            await self._change(served, "unload", frozenset({None}), {})

    async def unload_all(self) -> None:
        """Unload all adapters."""
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

    async def _load_missing(self) -> None:
        body = {"lora_name": "ghost", "lora_path": "/there/is/no/such/adapter"}
        response = await self._client.post("/v1/load_lora_adapter", json=body)
        self.num_done["bad load"] += 1
        if response.status_code not in (400, 404):
            self.problems.append(f"load of a missing adapter: {response.status_code} {response.text}")
