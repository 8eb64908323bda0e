"""Concurrent adapter updates, and updates while requests run."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from mmlora.lora.request import LoRARequest
from mmlora.lora.resolver import LoRAResolver, LoRAResolverRegistry
from mmlora.server.api import build_app
from mmlora.server.launch import load_served_models
from mmlora.server.lora.resolved import start_resolution
from tests.server.conftest import RunningServer, run_app, slow_steps, wait_for
from tests.server.lora.admin import (
    BASE_NAMES,
    card,
    chat,
    complete,
    error_of,
    leave_nothing,
    load,
    names,
    run_updatable,
    unload,
)


@pytest.fixture(scope="module")
def shared(tiny_phi4: Path, adapters: dict[str, str]) -> Iterator[RunningServer]:
    with run_updatable(tiny_phi4, adapters) as shared:
        yield shared


@pytest.fixture
def server(shared: RunningServer) -> Iterator[RunningServer]:
    with leave_nothing(shared):
        yield shared


@contextmanager
def slow_loads(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Block loads until the yielded event is set."""
    host_cache = server.llm.engine.host_cache
    assert host_cache is not None
    load_adapter, may_end = host_cache._load_adapter, threading.Event()

    def load_slowly(*arguments: Any) -> Any:
        assert may_end.wait(30)
        return load_adapter(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(host_cache, "_load_adapter", load_slowly)
        yield may_end
        may_end.set()


def test_requests_succeed_while_their_adapter_is_replaced(
    server: RunningServer, adapters: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load(server, lora_name="sql", lora_path=adapters["words"])
    is_over, process = threading.Event(), server.llm.engine.process_input

    def process_slowly(*arguments: Any) -> Any:
        time.sleep(0.05)  # between the lookup of the name and that of its adapter
        return process(*arguments)

    monkeypatch.setattr(server.llm.engine, "process_input", process_slowly)

    def ask() -> list[int]:
        found = []
        while not is_over.is_set():
            found.append(chat(server, "sql", max_tokens=2).status_code)
        return found

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        try:
            for index in range(12):
                path = adapters[("speech", "words")[index % 2]]
                assert load(server, lora_name="sql", lora_path=path, load_inplace=True).status_code == 200
        finally:
            is_over.set()
    statuses = [status for future in asking for status in future.result()]
    assert len(statuses) >= 4 and set(statuses) == {200}


def test_unload_lets_running_requests_finish(server: RunningServer, adapters: dict[str, str]) -> None:
    load(server, lora_name="sql", lora_path=adapters["words"])
    expected = chat(server, "sql", max_tokens=40, ignore_eos=True).json()["choices"]
    with slow_steps(server.llm, 0.02), ThreadPoolExecutor(1) as pool:
        running = pool.submit(chat, server, "sql", max_tokens=40, ignore_eos=True)
        wait_for(lambda: server.llm.engine.has_unfinished_requests)
        assert unload(server, lora_name="sql").status_code == 200
        assert not running.done()
        assert error_of(chat(server, "sql"), 404)["code"] == "model_not_found"
        assert error_of(unload(server, lora_name="sql"), 404)["code"] == "adapter_not_found"
        assert (
            load(server, lora_name="sql", lora_path=adapters["speech"]).status_code == 200
        )  # a new adapter of the name can be loaded
        assert running.result().json()["choices"] == expected


@pytest.mark.parametrize("ask", [chat, complete])
@pytest.mark.parametrize("is_draining", [False, True])
def test_a_request_in_preparation_does_not_reload_an_unloaded_adapter(
    server: RunningServer,
    adapters: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    is_draining: bool,
    ask: Callable[[RunningServer, str], httpx.Response],
) -> None:
    load(server, lora_name="sql", lora_path=adapters["words"])
    engine = server.llm.engine
    process = engine.process_input

    def process_late(*arguments: Any) -> Any:
        assert unload(server, lora_name="sql").status_code == 200
        return process(*arguments)

    with slow_steps(server.llm, 0.02), ThreadPoolExecutor(1) as pool:
        if is_draining:
            running = pool.submit(chat, server, "sql", max_tokens=60, ignore_eos=True)
            wait_for(lambda: engine.has_unfinished_requests)
        monkeypatch.setattr(engine, "process_input", process_late)
        error = error_of(ask(server, "sql"), 404)
        assert (error["param"], error["code"]) == ("model", "model_not_found")
        if is_draining:
            assert running.result().status_code == 200
    assert [info.name for info in engine.list_loras()] == ["started"]


def test_one_of_several_concurrent_loads_of_a_name_wins(server: RunningServer, adapters: dict[str, str]) -> None:
    paths = [adapters["words"], adapters["speech"]] * 4
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda path: load(server, lora_name="sql", lora_path=path), paths))
    assert sorted(answer.status_code for answer in answers) == [200] + [400] * 7
    assert all("is already loaded" in answer.text for answer in answers if answer.status_code == 400)
    winner = next(path for answer, path in zip(answers, paths, strict=True) if answer.status_code == 200)
    assert card(server, "sql")["root"] == winner
    digest = {info.name: info.digest for info in server.llm.engine.list_loras()}["sql"]
    assert chat(server, "sql").json()["lora"]["digest"] == digest == card(server, "sql")["adapter"]["digest"]


def test_a_valid_load_after_a_failed_load_of_its_name_succeeds(
    server: RunningServer, adapters: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with slow_loads(server, monkeypatch) as is_loading, ThreadPoolExecutor(2) as pool:
        bad = pool.submit(load, server, lora_name="sql", lora_path="/no/such/directory")
        good = pool.submit(load, server, lora_name="sql", lora_path=adapters["words"])
        is_loading.set()
        assert (bad.result().status_code, good.result().status_code) in ((404, 200), (400, 200))


def test_a_load_waits_for_an_unload_of_its_name(
    server: RunningServer, adapters: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load(server, lora_name="sql", lora_path=adapters["words"])
    host_cache = server.llm.engine.host_cache
    assert host_cache is not None
    remove, may_end = host_cache.remove, threading.Event()

    def remove_slowly(name: str | int) -> None:
        assert may_end.wait(30)
        remove(name)

    monkeypatch.setattr(host_cache, "remove", remove_slowly)
    with ThreadPoolExecutor(2) as pool:
        unloading = pool.submit(unload, server, lora_name="sql")
        wait_for(lambda: "sql" not in names(server))
        loading = pool.submit(load, server, lora_name="sql", lora_path=adapters["words"])
        time.sleep(0.3)
        may_end.set()
        assert unloading.result().status_code == loading.result().status_code == 200
    assert chat(server, "sql").status_code == 200


@pytest.fixture
def resolving(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningServer]:
    """A second server on the same engine; it uses the resolvers that the test registers."""
    models = load_served_models(server.llm)
    monkeypatch.setattr(LoRAResolverRegistry, "_resolvers", {})
    start_resolution(server.llm, models, {"MMLORA_ALLOW_RUNTIME_LORA_UPDATING": "1"})
    with run_app(build_app(server.llm, models, allow_lora_updates=True)) as address:
        yield RunningServer(server.llm, address)


def test_a_resolver_does_not_replace_an_adapter_that_a_client_loaded(
    resolving: RunningServer, adapters: dict[str, str]
) -> None:
    class Late(LoRAResolver):
        async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
            response = await asyncio.to_thread(load, resolving, lora_name=lora_name, lora_path=adapters["words"])
            assert response.status_code == 200
            return LoRARequest(lora_name, 77, adapters["speech"])

    LoRAResolverRegistry.register_resolver("late", Late())
    assert chat(resolving, "sql").status_code == 200
    assert card(resolving, "sql")["root"] == adapters["words"]
    assert unload(resolving, lora_name="sql").status_code == 200


def test_a_resolver_can_reload_an_adapter_after_it_has_drained(
    resolving: RunningServer, adapters: dict[str, str]
) -> None:
    class Ready(LoRAResolver):
        async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
            return LoRARequest(lora_name, 78, adapters["words"]) if lora_name == "sql" else None

    LoRAResolverRegistry.register_resolver("ready", Ready())
    assert chat(resolving, "sql").status_code == 200
    with slow_steps(resolving.llm, 0.02), ThreadPoolExecutor(1) as pool:
        running = pool.submit(chat, resolving, "sql", max_tokens=60, ignore_eos=True)
        wait_for(lambda: resolving.llm.engine.has_unfinished_requests)
        assert unload(resolving, lora_name="sql").status_code == 200
        assert chat(resolving, "sql").status_code == 503
        assert running.result().status_code == 200
    wait_for(lambda: chat(resolving, "sql").status_code == 200)
    assert unload(resolving, lora_name="sql").status_code == 200


def test_server_and_engine_agree_after_concurrent_loads_and_unloads(
    server: RunningServer, adapters: dict[str, str]
) -> None:
    """All served adapters can be used, and the engine has no others."""
    start = threading.Barrier(6)

    def work(thread: int) -> set[int]:
        start.wait()
        found = set()
        for index in range(8):
            name, path = f"name{index % 2}", adapters[("words", "speech")[(thread + index) % 2]]
            found.add(load(server, lora_name=name, lora_path=path, load_inplace=index % 3 == 0).status_code)
            found.add(chat(server, name, max_tokens=1).status_code)
            found.add(unload(server, lora_name=name).status_code)
        return found

    with ThreadPoolExecutor(6) as pool:
        statuses = set().union(*pool.map(work, range(6)))
    assert statuses <= {200, 400, 404}
    wait_for(lambda: not server.llm.engine.has_unfinished_requests)
    assert {info.name for info in server.llm.engine.list_loras()} == set(names(server)) - {"tiny", "audio"}
    assert all(chat(server, name).status_code == 200 for name in names(server))


@pytest.mark.parametrize("is_good", [True, False])
def test_a_load_completes_after_its_client_disconnected(
    server: RunningServer, adapters: dict[str, str], monkeypatch: pytest.MonkeyPatch, is_good: bool, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(adapters["words"], tmp_path / "sql"))
    if not is_good:
        config = path / "adapter_config.json"
        config.write_text(config.read_text().replace('"use_qalora": false', '"use_qalora": true'))
    with slow_loads(server, monkeypatch) as may_end:
        body = {"lora_name": "sql", "lora_path": str(path)}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.address}/v1/load_lora_adapter", json=body, timeout=httpx.Timeout(30, read=0.5))
        assert names(server) == BASE_NAMES
        with ThreadPoolExecutor(1) as pool:
            unloading = pool.submit(unload, server, lora_name="started")  # other names are not locked
            assert unloading.result(20).status_code == 200
        may_end.set()
        host_cache = server.llm.engine.host_cache
        assert host_cache is not None
        wait_for(lambda: all(entry.digest is not None for entry in host_cache.entries))
    assert load(server, lora_name="started", lora_path=adapters["vision"]).status_code == 200
    if is_good:
        wait_for(lambda: "sql" in names(server))
        assert chat(server, "sql").status_code == 200 and unload(server, lora_name="sql").status_code == 200
    else:
        assert error_of(chat(server, "sql"), 404) and names(server) == BASE_NAMES
