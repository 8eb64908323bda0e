"""Resolvers: names, order, isolation, shared resolutions, and the cache of unknown names."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from mmlora.errors import AdapterError, AdapterMismatch, AdapterNotFound, ConfigError, MMLoRAError, ResolverError
from mmlora.lora.request import LoRARequest
from mmlora.lora.resolution import LoRAResolution, ResolutionLimits
from mmlora.lora.resolver import LoRAResolver, LoRAResolverRegistry, derive_lora_id, is_lora_name

Behavior = Callable[[str], Awaitable[object]]


class Scripted(LoRAResolver):
    """Resolver that runs a coroutine function and records its calls."""

    def __init__(self, behavior: Behavior) -> None:
        self._behavior = behavior
        self.asked: list[str] = []
        self.bases: set[str] = set()
        self.loops: set[int] = set()

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        self.asked.append(lora_name)
        self.bases.add(base_model_name)
        self.loops.add(id(asyncio.get_running_loop()))
        return await self._behavior(lora_name)  # type: ignore[return-value]


def found(path: str) -> Behavior:
    async def behavior(name: str) -> object:
        return LoRARequest(name, derive_lora_id(name), path)

    return behavior


def returning(value: object) -> Behavior:
    async def behavior(_: str) -> object:
        return value

    return behavior


def raising(error: BaseException) -> Behavior:
    async def behavior(_: str) -> object:
        raise error

    return behavior


async def hanging(_: str) -> object:
    await asyncio.sleep(60)
    return None


async def unstoppable(_: str) -> object:
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        try:
            await asyncio.sleep(0.05)
        except asyncio.CancelledError:
            continue
    return None


async def exiting_in_a_task(_: str) -> object:
    async def leave() -> None:
        raise SystemExit(3)

    return await asyncio.gather(leave())


async def stopping(_: str) -> object:
    asyncio.get_running_loop().stop()
    return await hanging(_)


async def accept_all(_: LoRARequest) -> None:
    return None


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[Scripted]]]:
    """`register(a, b)` registers resolvers `r0`, `r1` with these behaviors; the registry is restored after the test."""
    monkeypatch.setattr(LoRAResolverRegistry, "_resolvers", {})

    def register(*behaviors: Behavior) -> list[Scripted]:
        resolvers = [Scripted(behavior) for behavior in behaviors]
        for index, resolver in enumerate(resolvers):
            LoRAResolverRegistry.register_resolver(f"r{index}", resolver)
        return resolvers

    yield register


def make(accept: Callable[[LoRARequest], Awaitable[None]] = accept_all, **limits: float) -> LoRAResolution:
    defaults = {"timeout_s": 0.2, "miss_lifetime_s": 60.0}
    return LoRAResolution("base", accept, ResolutionLimits(**{**defaults, **limits}))  # type: ignore[arg-type]


def resolve(resolution: LoRAResolution, name: str = "x") -> LoRARequest:
    return asyncio.run(asyncio.wait_for(resolution.resolve(name), 20))


def test_the_registry_keeps_the_order_and_replaces_with_a_warning(
    register: Callable[..., list[Scripted]], caplog: pytest.LogCaptureFixture
) -> None:
    first, second = register(returning(None), returning(None))
    assert list(LoRAResolverRegistry.get_supported_resolvers()) == ["r0", "r1"]
    assert LoRAResolverRegistry.get_supported_resolvers() == {"r0", "r1"}
    assert LoRAResolverRegistry.get_resolver("r1") is second
    LoRAResolverRegistry.register_resolver("r0", second)
    assert LoRAResolverRegistry.get_resolver("r0") is second
    assert "'r0'" in caplog.text and "replaced" in caplog.text
    with pytest.raises(ConfigError, match="no resolver 'r9'; registered: 'r0', 'r1'"):
        LoRAResolverRegistry.get_resolver("r9")
    with pytest.raises(ConfigError, match="'bad' is a str; it must be a LoRAResolver"):
        LoRAResolverRegistry.register_resolver("bad", "me")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["sql", "org/repo", "org/repo/sub", "v1.2", "a:b@main", "Ärger", "a b", "a" * 255])
def test_an_ordinary_name_is_resolved(name: str) -> None:
    assert is_lora_name(name)


HOSTILE = {
    "empty": "",
    "parent": "..",
    "inner parent": "a/../b",
    "absolute": "/etc/passwd",
    "home": "~root",
    "hidden": ".ssh",
    "hidden part": "a/.ssh",
    "double slash": "a//b",
    "end slash": "a/",
    "backslash": "a\\..\\b",
    "NUL": "a\0b",
    "line": "a\n",
    "star": "a*",
    "question": "a?b",
    "set": "a[b]",
    "fragment": "a#b",
    "percent": "%2e%2e",
    "braces": "{lora_name}",
    "surrogate": "\ud800",
    "long": "x" * 256,
    "10 kB": "a/" * 5000 + "a",
    "bytes": "é" * 200,
}


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_names_never_reach_a_resolver(register: Callable[..., list[Scripted]], name: str) -> None:
    (resolver,) = register(found("here"))
    with pytest.raises(AdapterNotFound) as info:
        resolve(make(), name)
    assert resolver.asked == [] and len(str(info.value)) < 400


def test_the_first_registered_that_knows_a_name_wins(register: Callable[..., list[Scripted]]) -> None:
    unaware, first, second = register(returning(None), found("first"), found("second"))
    assert resolve(make()).lora_path == "first"
    assert (unaware.asked, first.asked, second.asked) == (["x"], ["x"], [])
    assert unaware.bases == {"base"}


BAD: dict[str, Behavior] = {
    "raises": raising(RuntimeError("boom")),
    "exits": raising(SystemExit(3)),
    "exits in its own task": exiting_in_a_task,
    "stops the loop": stopping,
    "interrupts": raising(KeyboardInterrupt()),
    "cancels": raising(asyncio.CancelledError()),
    "hangs": hanging,
    "cannot be stopped": unstoppable,
    "returns text": returning("path"),
    "returns another name": returning(LoRARequest("y", 1, "path")),
    "returns nothing awaitable": lambda _: None,  # type: ignore[dict-item,return-value]
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_a_bad_resolver_does_not_hide_the_next(
    register: Callable[..., list[Scripted]], bad: Behavior, caplog: pytest.LogCaptureFixture
) -> None:
    register(bad, found("second"))
    assert resolve(make()).lora_path == "second"
    assert "resolver 'r0' failed for adapter 'x'" in caplog.text


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_after_a_failure_the_adapter_is_not_reported_as_unknown(
    register: Callable[..., list[Scripted]], bad: Behavior
) -> None:
    failing, _ = register(bad, returning(None))
    resolution = make()
    for _ in range(2):  # the failure is not cached: the next request may find it
        with pytest.raises(ResolverError, match=r"'x' cannot be resolved now: r0 \(\w+\) failed"):
            resolve(resolution)
    assert failing.asked == ["x", "x"]


def test_error_details_are_logged_but_not_sent_to_the_client(
    register: Callable[..., list[Scripted]], caplog: pytest.LogCaptureFixture
) -> None:
    register(raising(OSError("https://user:hunter2@host")), found("p"))

    async def refuse(_: LoRARequest) -> None:
        raise RuntimeError("hunter2")

    with pytest.raises(ResolverError) as info:
        resolve(make(refuse))
    assert "hunter2" not in str(info.value) and "r0" in str(info.value)
    assert "hunter2" in caplog.text


@pytest.mark.parametrize("error", [FileNotFoundError("s3://b/x"), AdapterNotFound("gone")], ids=["file", "adapter"])
def test_not_found_may_be_raised(register: Callable[..., list[Scripted]], error: Exception) -> None:
    register(raising(error))
    with pytest.raises(AdapterNotFound, match="no resolver knows an adapter called 'x'"):
        resolve(make())


@pytest.mark.parametrize("error", [AdapterMismatch("rank"), AdapterNotFound("no file")], ids=["mismatch", "missing"])
def test_an_unusable_adapter_is_skipped(register: Callable[..., list[Scripted]], error: MMLoRAError) -> None:
    register(found("bad"), found("good"))
    accepted = []

    async def accept(request: LoRARequest) -> None:
        if request.lora_path == "bad":
            raise error
        accepted.append(request)

    assert accepted == [] and resolve(make(accept)).lora_path == "good"
    assert [request.lora_path for request in accepted] == ["good"]
    register(found("bad"), found("bad"))
    with pytest.raises(AdapterError, match="'x' was found by r0, r1, but cannot be used") as info:
        resolve(make(accept))
    assert type(info.value) is AdapterError


def test_a_panic_during_a_load_fails_one_request(register: Callable[..., list[Scripted]]) -> None:
    class Panic(BaseException):
        pass

    register(found("p"))

    async def accept(_: LoRARequest) -> None:
        raise Panic("of a library in Rust")

    resolution = make(accept)
    for _ in range(2):
        with pytest.raises(ResolverError, match="r0"):
            resolve(resolution)


def test_requests_of_all_threads_share_one_resolution_on_one_loop(register: Callable[..., list[Scripted]]) -> None:
    async def slowly(name: str) -> object:
        await asyncio.sleep(0.1)
        return await found("p")(name)

    (resolver,) = register(slowly)
    accepted = []

    async def accept(request: LoRARequest) -> None:
        accepted.append(request)

    resolution = make(accept, timeout_s=5)

    async def many() -> list[LoRARequest]:
        return list(await asyncio.gather(*(resolution.resolve(name) for name in ["x", "y"] * 20)))

    with ThreadPoolExecutor(4) as pool:
        requests = [request for part in pool.map(lambda _: asyncio.run(many()), range(4)) for request in part]
    assert len(requests) == 160 and {request.lora_name for request in requests} == {"x", "y"}
    assert sorted(resolver.asked) == ["x", "y"] and len(accepted) == 2
    assert len(resolver.loops) == 1
    resolve(make(accept), "z")  # another engine in this process
    assert len(resolver.loops) == 1


def test_a_cancelled_caller_does_not_cancel_the_resolution(register: Callable[..., list[Scripted]]) -> None:
    release = threading.Event()

    async def when_released(name: str) -> object:
        await asyncio.to_thread(release.wait, 10)
        return await found("p")(name)

    (resolver,) = register(when_released)
    resolution = make(timeout_s=10)

    async def leave_and_stay() -> LoRARequest:
        leaving, staying = (asyncio.create_task(resolution.resolve("x")) for _ in range(2))
        while not resolver.asked:
            await asyncio.sleep(0.01)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        release.set()
        return await staying

    assert asyncio.run(leave_and_stay()).lora_path == "p"
    assert resolver.asked == ["x"]


def test_an_unknown_name_is_cached_for_its_lifetime(
    register: Callable[..., list[Scripted]], monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 100.0
    monkeypatch.setattr("mmlora.lora.resolution.time", SimpleNamespace(monotonic=lambda: now_s))
    (resolver,) = register(returning(None))
    resolution = make(miss_lifetime_s=60)
    for _ in range(5):
        with pytest.raises(AdapterNotFound):
            resolve(resolution)
    assert resolver.asked == ["x"]
    now_s += 61
    with pytest.raises(AdapterNotFound):
        resolve(resolution)
    assert resolver.asked == ["x", "x"]


def test_the_cache_of_unknown_names_is_bounded(register: Callable[..., list[Scripted]]) -> None:
    (resolver,) = register(returning(None))
    resolution = make(max_misses=2)
    for name in ("a", "b", "a", "c", "a", "b"):  # c evicts b, then b evicts c
        with pytest.raises(AdapterNotFound):
            resolve(resolution, name)
    assert resolver.asked == ["a", "b", "c", "b"]


def test_concurrent_resolutions_are_bounded(register: Callable[..., list[Scripted]]) -> None:
    register(hanging)
    resolution = make(max_pending=3, timeout_s=0.3)

    async def flood() -> list[BaseException | LoRARequest]:
        return await asyncio.gather(*(resolution.resolve(f"n{i}") for i in range(5)), return_exceptions=True)

    messages = [str(error) for error in asyncio.run(flood())]
    assert sum("3 adapters are being resolved; try again later" in message for message in messages) == 2
    assert sum("TimeoutError" in message for message in messages) == 3


@pytest.mark.parametrize("name", ["MMLORA_LORA_RESOLVER_TIMEOUT_S", "MMLORA_LORA_RESOLVER_MISS_LIFETIME_S"])
def test_limits_come_from_the_environment(name: str) -> None:
    limits = ResolutionLimits.from_environment({name: "7.5"})
    assert 7.5 in (limits.timeout_s, limits.miss_lifetime_s)
    for text in ("0", "-1", "soon", "inf", "nan"):
        with pytest.raises(ConfigError, match=f"{name}='{text}': must be a positive number"):
            ResolutionLimits.from_environment({name: text})


def test_derived_ids_are_stable_and_below_the_ids_of_default_adapters() -> None:
    assert derive_lora_id("sql") == 22174702242023591
    ids = {derive_lora_id(f"name {i}") for i in range(1000)}
    assert len(ids) == 1000 and min(ids) >= 2**32 and max(ids) < 2**62


def test_a_failure_is_logged_with_its_resolver(
    register: Callable[..., list[Scripted]], caplog: pytest.LogCaptureFixture
) -> None:
    register(raising(ValueError("why")))
    with caplog.at_level(logging.WARNING), pytest.raises(ResolverError):
        resolve(make())
    assert "ValueError: why" in caplog.text
