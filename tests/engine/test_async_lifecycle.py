"""Life cycle of adapters in `AsyncLLM`: loads do not block steps, and all memory is freed at the end."""

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from mmlora import AsyncLLM, EngineArgs, LoRAMix, LoRARequest, SamplingParams
from mmlora.async_llm import NUM_LOADERS, RequestStream
from mmlora.errors import AdapterError, AdapterNotFound, EngineDeadError, RequestError
from mmlora.outputs import RequestOutput
from tests.engine.lifecycle import GREEDY, PROMPT, Contents, make_contents

LONG = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
TIMEOUT_S = 120


@pytest.fixture(scope="module")
def contents(text_checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Contents:
    return make_contents(text_checkpoint("llama"), tmp_path_factory.mktemp("contents"))


def start(contents: Contents, **options: Any) -> AsyncLLM:
    options = {"enable_lora": True, "max_loras": 2, "max_model_len": 128, **options}
    return AsyncLLM(EngineArgs(model=str(contents.model), **options))


@pytest.fixture
def llm(contents: Contents) -> Iterator[AsyncLLM]:
    llm = start(contents)
    yield llm
    llm.shutdown()


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, TIMEOUT_S))


async def collect(llm: AsyncLLM, params: SamplingParams, lora: LoRARequest | None = None) -> list[RequestOutput]:
    return [output async for output in llm.generate(PROMPT, params, lora_request=lora)]


async def tokens(llm: AsyncLLM, lora: LoRARequest, params: SamplingParams = GREEDY) -> list[int]:
    outputs = await collect(llm, params, lora)
    return [token for output in outputs for token in output.outputs[0].token_ids][:4]


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.002)


def bytes_of(llm: AsyncLLM) -> tuple[int, int]:
    metrics = llm.engine.metrics
    return metrics.num_host_adapter_bytes, metrics.num_device_adapter_bytes


def test_loading_an_adapter_does_not_block_steps(llm: AsyncLLM, contents: Contents, monkeypatch: Any) -> None:
    host_cache, may_go_on = llm.engine.host_cache, threading.Event()
    load = host_cache._load_adapter
    monkeypatch.setattr(host_cache, "_load_adapter", lambda *args: (may_go_on.wait(TIMEOUT_S), load(*args))[1])

    async def check() -> None:
        adding = asyncio.create_task(llm.add_lora("a", str(contents.paths[0])))
        b = LoRARequest("b", 2, str(contents.paths[1]))
        asking = asyncio.gather(*(tokens(llm, b) for _ in range(NUM_LOADERS + 4)))
        await asyncio.sleep(0)
        try:
            base = collect(llm, LONG)
            assert len(await asyncio.wait_for(base, 20)) > 1 and not adding.done() and not asking.done()
        finally:
            may_go_on.set()
        assert await tokens(llm, await adding) == contents.answers[0]
        assert await asking == [contents.answers[1]] * (NUM_LOADERS + 4)

    run(check())


def test_removal_drains_and_frees(llm: AsyncLLM, contents: Contents) -> None:
    async def check() -> None:
        a = await llm.add_lora("a", str(contents.paths[0]))
        running = asyncio.create_task(tokens(llm, a, LONG))
        await until(lambda: llm.engine.metrics.num_requests_running)
        await llm.remove_lora("a")
        assert await llm.list_loras() == [] and bytes_of(llm) == (contents.sizes[0],) * 2
        with pytest.raises(AdapterNotFound, match="'a' is being unloaded"):
            await tokens(llm, a)
        assert await running == contents.answers[0]
        await until(lambda: bytes_of(llm) == (0, 0))
        idle = await llm.add_lora("idle", str(contents.paths[1]))
        assert await tokens(llm, idle) == contents.answers[1]
        await llm.remove_lora("idle")  # idle: no request triggers the next step
        assert bytes_of(llm) == (0, 0)

    run(check())


def test_reloads_and_tensors_swap_between_steps(llm: AsyncLLM, contents: Contents, tmp_path: Path) -> None:
    async def check() -> None:
        path = contents.write(tmp_path / "a", 0)
        a = await llm.add_lora("a", str(path))
        running: list[asyncio.Task[list[int]]] = []
        for content in (1, 2, 3):
            running.append(asyncio.create_task(tokens(llm, a, LONG)))
            await until(lambda: llm.engine.metrics.total_requests.get("explicit") == len(running) * 2 - 1)
            contents.write(path, content)
            assert await llm.reload_lora("a") == a
            assert await tokens(llm, a) == contents.answers[content]
        assert await asyncio.gather(*running) == contents.answers[:3]
        policy = await llm.add_lora("policy", **contents.tensors(4))
        assert await tokens(llm, policy) == contents.answers[4]
        assert await llm.add_lora("policy", **contents.tensors(5)) == policy
        assert await tokens(llm, policy) == contents.answers[5]
        assert bytes_of(llm)[0] == contents.sizes[3] + contents.sizes[5]

    run(check())


def test_pinning_and_unpinning(llm: AsyncLLM, contents: Contents) -> None:
    async def check() -> None:
        a, b = [await llm.add_lora(name, str(contents.paths[i])) for i, name in enumerate("ab")]
        await llm.pin_lora("a")
        assert [(info.is_pinned, info.is_on_device) for info in await llm.list_loras()] == [
            (True, True),
            (False, False),
        ]
        with pytest.raises(AdapterError, match="at most 1 may be"):
            await llm.pin_lora(b.lora_int_id)
        await llm.pin_lora("a", is_pinned=False)
        await llm.pin_lora("b")
        assert await tokens(llm, a) == contents.answers[0]
        assert [info.is_pinned for info in await llm.list_loras()] == [False, True]

    run(check())


def test_an_idle_engine_keeps_nothing_of_its_last_request(llm: AsyncLLM, contents: Contents) -> None:
    async def check() -> None:
        a, b = [await llm.add_lora(name, str(contents.paths[i])) for i, name in enumerate("ab")]
        mix = LoRAMix([(a, 1.0), (b, 1.0)])  # its matrices are freed with its requests
        assert len([output async for output in llm.generate(PROMPT, GREEDY, lora_request=mix)]) > 0
        await asyncio.wait_for(until(lambda: bytes_of(llm) == (sum(contents.sizes[:2]), 0)), 10)

    run(check())


def test_delivering_the_last_output_keeps_no_adapter(llm: AsyncLLM, contents: Contents, monkeypatch: Any) -> None:
    """The engine thread is still busy with the delivery when the event loop already has the output."""
    put, may_go_on = RequestStream.put, threading.Event()

    def put_slowly(stream: RequestStream, output: Any) -> None:
        put(stream, output)
        if output.finished:
            may_go_on.wait(TIMEOUT_S)

    async def check() -> None:
        a, b = [await llm.add_lora(name, str(contents.paths[i])) for i, name in enumerate("ab")]
        monkeypatch.setattr(RequestStream, "put", put_slowly)
        mix = LoRAMix([(a, 1.0), (b, 1.0)])
        try:
            assert len([output async for output in llm.generate(PROMPT, GREEDY, lora_request=mix)]) > 0
            await asyncio.wait_for(until(lambda: bytes_of(llm) == (sum(contents.sizes[:2]), 0)), 10)
        finally:
            may_go_on.set()

    run(check())


def test_a_cancelled_change_completes_and_affects_no_other_request(llm: AsyncLLM, contents: Contents) -> None:
    async def check() -> None:
        a = await llm.add_lora("a", str(contents.paths[0]))
        for _ in range(20):
            change = asyncio.create_task(llm.reload_lora("a"))
            await asyncio.sleep(0.001)
            change.cancel()
        assert llm.is_alive and await tokens(llm, a) == contents.answers[0]

    run(check())


def test_a_cancelled_removal_frees_the_name(llm: AsyncLLM, contents: Contents, monkeypatch: Any) -> None:
    host_cache, has_begun, may_go_on = llm.engine.host_cache, threading.Event(), threading.Event()
    remove = host_cache.remove
    monkeypatch.setattr(
        host_cache, "remove", lambda name: (has_begun.set(), may_go_on.wait(TIMEOUT_S), remove(name))[2]
    )

    async def check() -> None:
        a = await llm.add_lora("a", str(contents.paths[0]))
        assert await tokens(llm, a) == contents.answers[0]
        removing = asyncio.create_task(llm.remove_lora("a"))
        await until(has_begun.is_set)
        removing.cancel()
        await asyncio.wait({removing})
        may_go_on.set()
        await asyncio.wait_for(until(lambda: bytes_of(llm) == (0, 0)), 10)  # no request triggers the next step
        assert await tokens(llm, a) == contents.answers[0]

    run(check())


def test_a_failing_pin_does_not_block_steps(llm: AsyncLLM, contents: Contents, monkeypatch: Any) -> None:
    """The slot fails to load while the adapter is being reloaded, so the pin is reverted only after the reload."""
    host_cache, slots, may_go_on = llm.engine.host_cache, llm.engine.slots, threading.Event()
    load, pin = host_cache._load_adapter, host_cache.pin
    reloading = threading.Thread(target=lambda: host_cache.reload("a"))

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    def pin_and_reload(name: str) -> Any:
        adapter = pin(name)
        monkeypatch.setattr(host_cache, "_load_adapter", lambda *args: (may_go_on.wait(TIMEOUT_S), load(*args))[1])
        reloading.start()
        while not host_cache.find("a").lock.locked():
            pass
        return adapter

    async def check() -> None:
        await llm.add_lora("a", str(contents.paths[0]))
        monkeypatch.setattr(slots, "_load", fail)
        monkeypatch.setattr(host_cache, "pin", pin_and_reload)
        pinning = asyncio.create_task(llm.pin_lora("a"))
        await until(reloading.is_alive)
        await asyncio.sleep(0.1)
        try:
            await asyncio.wait_for(collect(llm, GREEDY), 20)
            assert not pinning.done()
        finally:
            may_go_on.set()
        with pytest.raises(AdapterError, match="'a' could not be put into a slot: out of memory"):
            await pinning
        reloading.join()
        assert [info.is_pinned for info in await llm.list_loras()] == [False]

    run(check())


def test_errors_reach_the_caller(llm: AsyncLLM, contents: Contents) -> None:
    async def check() -> None:
        with pytest.raises(AdapterNotFound, match="/no/such/adapter"):
            await llm.add_lora("a", "/no/such/adapter")
        for change in (llm.remove_lora, llm.reload_lora, llm.pin_lora):
            with pytest.raises(AdapterNotFound, match="no adapter 'a' is loaded"):
                await change("a")
        assert llm.is_alive

    run(check())
    plain = start(contents, enable_lora=False)
    plain.shutdown()
    with pytest.raises(RequestError, match="enable_lora=False"):
        run(plain.remove_lora("a"))
    llm.shutdown()
    with pytest.raises(EngineDeadError, match="stopped"):
        run(llm.remove_lora("a"))


def test_many_clients_change_adapters_while_others_generate(llm: AsyncLLM, contents: Contents) -> None:
    """Each output belongs to a version of the name, each error is an `AdapterError`, and all bytes are freed."""

    async def client(name: str, index: int) -> int:
        num_answers = 0
        for step in range(12):
            content = (index + step) % 6
            try:
                if step % 4 == 3:
                    await llm.remove_lora(name)
                elif step % 4 == 2:
                    await llm.reload_lora(name, str(contents.paths[content]))
                else:
                    lora = await llm.add_lora(name, **contents.tensors(content))
                    assert await tokens(llm, lora) in contents.answers
                    num_answers += 1
            except AdapterError:
                continue
        return num_answers

    async def check() -> None:
        num_answers = sum(await asyncio.gather(*(client("xyz"[i % 3], i) for i in range(9))))
        assert num_answers > 10
        for info in await llm.list_loras():
            await llm.remove_lora(info.name)
        await until(lambda: not llm.engine.has_unfinished_requests)
        assert bytes_of(llm) == (0, 0)

    run(check())
