"""`Storm`: concurrent clients, of which some disconnect early or send malformed requests; each response is checked."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import httpx

from tests.soak.churn import Churn, Possible
from tests.soak.endpoints import endpoint_requests, read_response
from tests.soak.questions import MIX, Question, QuestionSet

Json = dict[str, Any]
MAX_OPEN = 56  # requests that the server accepts concurrently, fewer than clients
MALFORMED: list[tuple[str, bytes, int]] = [
    ("chat/completions", b"{", 400),
    ("chat/completions", b'{"messages": []}', 400),
    ("chat/completions", b'{"messages": [{"role": "user", "content": "x"}], "model": "no-such-model"}', 404),
    ("chat/completions", b'{"messages": [{"role": "user", "content": "x"}], "lora": "no-such-adapter"}', 404),
    ("chat/completions", b'{"messages": [{"role": "user", "content": "x"}], "temperature": -1}', 400),
    ("chat/completions", b'{"messages": [{"role": "user", "content": "x"}], "unknown_field": 1}', 400),
    (
        "chat/completions",
        b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": '
        b'{"url": "data:image/png;base64,AAAA"}}]}]}',
        400,
    ),
    (
        "chat/completions",
        b'{"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": '
        b'{"data": "UklGRgAAAABXQVZF", "format": "wav"}}]}]}',
        400,
    ),
    ("completions", b'{"prompt": []}', 400),
    ("completions", b'{"prompt": [999999], "max_tokens": 1}', 400),
    ("completions", b'{"prompt": "x", "max_tokens": 100000000, "n": 100000}', 400),
    ("load_lora_adapter", b'{"lora_name": "x"}', 400),
    ("no/such/route", b"{}", 404),
]


@dataclass(frozen=True)
class LoRASelection:
    """Request fields that select an adapter, the expected reason, and the digests that it may resolve to."""

    fields: Json
    reason: str
    allowed: Callable[[float, float], Possible]


class Storm:
    """Sends requests and checks the responses.

    Args:
        client: of the server.
        question_set: questions and expected texts.
        churn: adapters that change meanwhile.
        seed: of all random choices.

    Attributes:
        wrong: unexpected texts and statuses.
        counts: requests by kind, and responses by status.
        latencies_s: of responses without streaming.
    """

    def __init__(self, client: httpx.AsyncClient, question_set: QuestionSet, churn: Churn, seed: int) -> None:
        self._client = client
        self._question_set = question_set
        self._churn = churn
        self._seed = seed
        self._started_s: dict[int, float] = {}  # start of the current request, by client
        self._open: set[int] = set()  # clients with a request in flight
        self._num_begun = 0
        self.wrong: list[str] = []
        self.counts: Counter[str] = Counter()
        self.latencies_s: list[float] = []

    async def run(self, num_clients: int, seconds: float) -> None:
        """Run `num_clients` clients for some seconds."""
        end_s = time.monotonic() + seconds
        await asyncio.gather(self._run_churn(end_s), *(self._run_client(i, end_s) for i in range(num_clients)))

    async def _run_churn(self, end_s: float) -> None:
        rng = random.Random(self._seed)
        while time.monotonic() < end_s:
            await self._churn.step()
            oldest_s = min(self._started_s.values(), default=time.monotonic())
            for served in self._churn.names.values():
                served.forget_before(oldest_s)
            await asyncio.sleep(rng.uniform(0.02, 0.4))

    async def _run_client(self, index: int, end_s: float) -> None:
        rng = random.Random(f"{self._seed}-{index}")
        while time.monotonic() < end_s:
            self._started_s[index] = time.monotonic()
            self._open.add(index)
            self._num_begun += 1
            dice = rng.random()
            try:
                if dice < 0.05:
                    await self._send_malformed(rng)
                elif dice < 0.15:
                    await self._disconnect_early(rng)
                else:
                    await self._ask(rng)
            except httpx.HTTPError as error:
                self.wrong.append(f"connection: {error!r}")
            self._open.remove(index)
            await asyncio.sleep(rng.uniform(0, 0.05))

    async def _send_malformed(self, rng: random.Random) -> None:
        route, body, status = rng.choice(MALFORMED)
        before = self._load()
        response = await self._client.post(f"/v1/{route}", content=body, headers={"content-type": "application/json"})
        self._count("malformed", response.status_code)
        if response.status_code == 429:
            self._judge_refusal(response, None, before)
        elif response.status_code != status or "message" not in response.json()["error"]:
            self.wrong.append(f"malformed {body!r}: {response.status_code} instead of {status}: {response.text[:200]}")

    async def _disconnect_early(self, rng: random.Random) -> None:
        question, choice = rng.choice(self._question_set.questions), self._choose(rng, frozenset())
        question = replace(question, body={**question.body, "max_tokens": 200, "ignore_eos": True})
        request = rng.choice(endpoint_requests(question, choice.fields, is_stream=rng.random() < 0.7))
        self.counts["disconnected"] += 1
        with suppress(TimeoutError):
            async with asyncio.timeout(rng.uniform(0, 0.3)):
                async with self._client.stream("POST", request.route, **request.arguments) as response:
                    async for _ in response.aiter_lines():
                        pass

    async def _ask(self, rng: random.Random) -> None:
        question = rng.choice(self._question_set.questions)
        choice = self._choose(rng, question.kinds)
        is_stream = rng.random() < 0.5
        request = rng.choice(endpoint_requests(question, choice.fields, is_stream=is_stream))
        start_s, before = time.monotonic(), self._load()
        if is_stream:
            async with self._client.stream("POST", request.route, **request.arguments) as response:
                await response.aread()
        else:
            response = await self._client.post(request.route, **request.arguments)
            self.latencies_s.append(time.monotonic() - start_s)
        kind = "+".join(sorted(question.kinds)) or "text"
        self._count(f"{kind} {request.route}{' stream' if is_stream else ''}", response.status_code)
        allowed = choice.allowed(start_s, time.monotonic())
        if response.status_code != 200:
            return self._judge_refusal(response, allowed, before)
        text, lora = read_response(request.route, response.text, is_stream=is_stream)
        self._judge(question, choice, allowed, text, lora)

    def _judge(self, question: Question, choice: LoRASelection, allowed: Possible, text: str, lora: Json) -> None:
        description = f"{question.name} with {choice.fields}: {lora}"
        if lora.get("digest") not in allowed:
            self.wrong.append(f"{description}: the digest is none of {allowed}")
        elif lora.get("reason") != choice.reason:
            self.wrong.append(f"{description}: the reason is not {choice.reason}")
        elif text != self._question_set.expected(question, lora["digest"]):
            self.wrong.append(
                f"{description}: {text!r} is not {self._question_set.expected(question, lora['digest'])!r}"
            )

    def _judge_refusal(self, response: httpx.Response, allowed: Possible | None, before: tuple[int, int]) -> None:
        is_gone = response.status_code == 404 and allowed is not None and None in allowed
        is_busy = response.status_code == 429 and response.headers.get("retry-after", "").isdecimal()
        # An upper bound of concurrent requests; the server may still count clients that have just disconnected.
        is_busy &= before[0] + self._num_begun - before[1] > MAX_OPEN // 2
        if not (is_gone or is_busy):
            self.wrong.append(f"{response.status_code}: {response.text[:300]}")

    def _load(self) -> tuple[int, int]:
        """Return the numbers of requests in flight and of all requests so far."""
        return len(self._open), self._num_begun

    def _choose(self, rng: random.Random, kinds: frozenset[str]) -> LoRASelection:
        digests = self._question_set.digests
        automatic, reason = (digests["audio"], "default:audio") if "audio" in kinds else (None, "none")

        def only(digest: str | None) -> Callable[[float, float], Possible]:
            return lambda start_s, end_s: frozenset({digest})

        served = self._churn.names[rng.choice(list(self._churn.names))]
        return rng.choice(
            [
                LoRASelection({}, reason, only(automatic)),
                LoRASelection({"model": "storm"}, reason, only(automatic)),
                LoRASelection({"lora": []}, "explicit:base", only(None)),
                LoRASelection({"model": "fixed"}, "explicit", only(digests["fixed"])),
                LoRASelection({"model": "audio"}, "explicit", only(digests["audio"])),
                LoRASelection(
                    {"lora": [{"name": name, "scale": scale} for name, scale in MIX.items()]},
                    "explicit",
                    only(digests["mix"]),
                ),
                LoRASelection({"model": served.name}, "explicit", served.between),
                LoRASelection({"lora": served.name}, "explicit", served.between),
            ]
        )

    def _count(self, kind: str, status: int) -> None:
        self.counts[kind] += 1
        self.counts[f"status {status}"] += 1
