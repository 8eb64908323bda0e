"""Adapters that resolvers find when a request names them, over HTTP."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import shutil
import sys
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from mmlora.async_llm import AsyncLLM
from mmlora.config import EngineArgs
from mmlora.errors import AdapterNotFound, ConfigError, MMLoRAError, RequestError
from mmlora.lora.adapter import AdapterReport
from mmlora.lora.request import LoRARequest
from mmlora.lora.resolver import LoRAResolver, LoRAResolverRegistry, derive_lora_id, resolver_loop
from mmlora.server.api import build_app
from mmlora.server.errors import Refusal
from mmlora.server.launch import load_served_models
from mmlora.server.lora.resolved import start_resolution
from mmlora.server.lora.served_models import ServedAdapter, ServedModels
from tests.plugins.s3 import put, run_s3
from tests.server.conftest import RunningServer, run_app
from tests.server_process import run_process

ROOT = Path(__file__).resolve().parents[3]
ALLOWED = {"MMLORA_ALLOW_RUNTIME_LORA_UPDATING": "True"}


class FolderResolver(LoRAResolver):
    """Resolver that knows copies of one adapter under any name and records its calls."""

    def __init__(self, paths: dict[str, Path]) -> None:
        self.paths = paths
        self.asked: list[str] = []

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        self.asked.append(lora_name)
        await asyncio.sleep(0.05)
        path = self.paths.get(lora_name)
        return LoRARequest(lora_name, derive_lora_id(lora_name), str(path)) if path else None


@pytest.fixture(autouse=True)
def clean_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoRAResolverRegistry, "_resolvers", {})


@pytest.fixture(scope="module")
def llm(tiny_phi4: Path, adapters: dict[str, str]) -> Iterator[AsyncLLM]:
    options: dict[str, Any] = {"served_model_name": "tiny", "enable_lora": True, "max_loras": 1, "max_cpu_loras": 1}
    llm = AsyncLLM(EngineArgs(str(tiny_phi4), default_mm_loras={"audio": adapters["speech"]}, **options))
    yield llm
    llm.shutdown()


@pytest.fixture
def start(llm: AsyncLLM) -> Iterator[Any]:
    """`start(environment)`: a server with separate served models on the module's engine."""
    with ExitStack() as stack:

        def start(environment: dict[str, str]) -> RunningServer:
            models = load_served_models(llm)
            start_resolution(llm, models, environment)
            return RunningServer(llm, stack.enter_context(run_app(build_app(llm, models))))

        yield start
    for info in llm.engine.list_loras():
        asyncio.run(llm.remove_lora(info.name))


def post(server: RunningServer, **fields: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 3, **fields}
    return httpx.post(f"{server.address}/v1/chat/completions", json=body, timeout=60)


def cards(server: RunningServer) -> dict[str, dict[str, Any]]:
    return {card["id"]: card for card in httpx.get(f"{server.address}/v1/models").json()["data"]}


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    return dict(response.json()["error"])


@pytest.fixture
def folder(adapters: dict[str, str], tmp_path: Path) -> Path:
    """`sql` and `org/repo` are valid, `damaged` is truncated, `other` names another base model."""
    root = tmp_path / "loras"
    for name in ("sql", "org/repo", "damaged", "other"):
        shutil.copytree(adapters["words"], root / name)
    weights = root / "damaged" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    config = root / "other" / "adapter_config.json"
    config.write_text(re.sub(r'("base_model_name_or_path": )[^,]*', r'\1"org/other-model"', config.read_text()))
    return root


@pytest.fixture
def filesystem(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment that enables `lora_filesystem_resolver`, as in the reference document."""
    monkeypatch.setenv("MMLORA_LORA_RESOLVER_CACHE_DIR", str(folder))
    return {**ALLOWED, "MMLORA_PLUGINS": "lora_filesystem_resolver"}


@pytest.mark.parametrize("name", ["sql", "org/repo"])
def test_an_unknown_model_is_resolved_and_then_served(
    start: Any, filesystem: dict[str, str], folder: Path, name: str
) -> None:
    server = start(filesystem)
    assert set(cards(server)) == {"tiny", "audio"}
    answer = post(server, model=name).json()
    assert (answer["model"], answer["lora"]["adapter"], answer["lora"]["reason"]) == (name, name, "explicit")
    card = cards(server)[name]
    assert (card["root"], card["parent"]) == (str(folder / name), "tiny")
    assert card["adapter"]["digest"] == answer["lora"]["digest"] and card["adapter"]["matched"] > 0
    assert httpx.get(f"{server.address}/v1/models/{name}").json() == card
    shutil.rmtree(folder / name)  # no resolver is asked again
    assert post(server, model=name).json()["choices"] == answer["choices"]


@pytest.mark.parametrize("lora", ["sql", [{"name": "sql"}]], ids=["text", "list"])
def test_a_name_in_the_lora_field_is_resolved(start: Any, filesystem: dict[str, str], lora: Any) -> None:
    server = start(filesystem)
    assert post(server, lora=lora).json()["lora"]["adapter"] == "sql"
    assert "sql" in cards(server)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"model": "nobody"}, "model", "model_not_found"),
        ({"model": "../loras/sql"}, "model", "model_not_found"),
        ({"model": "a\0b"}, "model", "model_not_found"),
        ({"model": "x" * 10_000}, "model", "model_not_found"),
        ({"lora": "nobody"}, "lora", "adapter_not_found"),
        ({"lora": [{"name": "/etc"}]}, "lora", "adapter_not_found"),
        ({"lora": ""}, "lora", "adapter_not_found"),
    ],
    ids=lambda value: "" if isinstance(value, str) else repr(value)[:30],
)
def test_a_name_that_no_resolver_knows_is_404(
    start: Any, filesystem: dict[str, str], fields: dict[str, Any], param: str, code: str
) -> None:
    server = start(filesystem)
    error = error_of(post(server, **fields), 404)
    assert (error["param"], error["code"]) == (param, code)
    assert len(error["message"]) < 400
    assert set(cards(server)) == {"tiny", "audio"}
    assert post(server, model="sql").status_code == 200


def test_an_unusable_resolved_adapter_is_400_and_names_only_the_resolver(
    start: Any, filesystem: dict[str, str], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = start(filesystem)
    error = error_of(post(server, model="damaged"), 400)
    assert error["code"] == "adapter_error"
    assert "lora_filesystem_resolver" in error["message"] and str(folder) not in error["message"]
    assert f"adapter 'damaged' cannot be used: {folder}" in caplog.text
    assert "damaged" not in cards(server)
    assert "damaged" not in [info.name for info in server.llm.engine.list_loras()]


def test_a_resolver_failure_is_503_without_its_message(start: Any) -> None:
    class Broken(LoRAResolver):
        async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
            raise OSError("https://user:hunter2@host")

    LoRAResolverRegistry.register_resolver("broken", Broken())
    error = error_of(post(start(ALLOWED), model="sql"), 503)
    assert (error["type"], error["code"]) == ("service_unavailable_error", "resolver_error")
    assert "broken (OSError)" in error["message"] and "hunter2" not in error["message"]


def test_an_adapter_of_another_base_model_logs_a_warning(
    start: Any, filesystem: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    server = start(filesystem)
    assert post(server, model="other").status_code == 200
    assert "adapter 'other' was trained on 'org/other-model'" in caplog.text
    caplog.clear()
    assert post(server, model="sql").status_code == 200
    assert "was trained on" not in caplog.text


@pytest.mark.parametrize("value", [None, "", "0", "false"])
def test_resolvers_are_disabled_by_default(
    start: Any, filesystem: dict[str, str], value: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    environment = {**filesystem, "MMLORA_ALLOW_RUNTIME_LORA_UPDATING": value or ""}
    assert error_of(post(start(environment), model="sql"), 404)["code"] == "model_not_found"
    assert "lora_filesystem_resolver needs MMLORA_ALLOW_RUNTIME_LORA_UPDATING=true" in caplog.text


def test_the_enabling_variable_is_validated(start: Any) -> None:
    for value in ("1", "true", "TRUE"):
        start({"MMLORA_ALLOW_RUNTIME_LORA_UPDATING": value})
    with pytest.raises(ConfigError, match="MMLORA_ALLOW_RUNTIME_LORA_UPDATING='yes': must be 1, true, 0 or false"):
        start({"MMLORA_ALLOW_RUNTIME_LORA_UPDATING": "yes"})


def test_many_requests_for_a_new_name_resolve_it_once(start: Any, adapters: dict[str, str]) -> None:
    resolver = FolderResolver({"sql": Path(adapters["words"])})
    LoRAResolverRegistry.register_resolver("folder", resolver)
    server = start(ALLOWED)
    with ThreadPoolExecutor(12) as pool:
        answers = [answer.json() for answer in pool.map(lambda _: post(server, model="sql"), range(12))]
    assert resolver.asked == ["sql"]
    assert len({answer["lora"]["digest"] for answer in answers}) == 1


@pytest.mark.parametrize(
    ("fields", "asked", "status"),
    [
        ({"lora": [{"name": f"good{i}"} for i in range(17)]}, [], 400),
        ({"model": "good", "lora": "good2"}, [], 400),
        ({"model": "good", "lora": []}, [], 400),
        ({"model": "good", "lora": [{"name": "good"}, {"name": "good2"}]}, [], 400),
        ({"lora": [{"name": "good"}, {"name": "nobody"}, {"name": "good2"}]}, ["good", "nobody"], 404),
        ({"model": "nobody", "lora": "nobody"}, ["nobody"], 404),
        ({"model": "good", "lora": [{"name": "good", "scale": 0.5}]}, ["good"], 200),
    ],
    ids=["too many", "two", "base", "mix", "one unknown", "unknown", "scaled"],
)
def test_resolvers_are_not_asked_for_invalid_requests(
    start: Any, adapters: dict[str, str], fields: dict[str, Any], asked: list[str], status: int
) -> None:
    names = ["good", *(f"good{i}" for i in range(17))]
    resolver = FolderResolver({name: Path(adapters["words"]) for name in names})
    LoRAResolverRegistry.register_resolver("folder", resolver)
    response = post(start(ALLOWED), **fields)
    assert (response.status_code, resolver.asked) == (status, asked)
    assert adapters["words"] not in response.text


def test_a_path_that_is_not_utf8_does_not_break_the_model_list(
    start: Any, adapters: dict[str, str], tmp_path: Path
) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/lora\xff"))
    shutil.copytree(adapters["words"], path)
    LoRAResolverRegistry.register_resolver("folder", FolderResolver({"sql": path}))
    server = start(ALLOWED)
    assert post(server, model="sql").status_code == 200
    assert cards(server)["sql"]["root"] == f"{tmp_path}/lora?"
    assert httpx.get(f"{server.address}/v1/models/sql").json()["root"] == f"{tmp_path}/lora?"


def test_a_relative_path_is_never_taken_as_a_hub_id(
    start: Any, adapters: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **_: fetched.append(args))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(adapters["words"], tmp_path / "loras" / "sql")
    LoRAResolverRegistry.register_resolver(
        "folder", FolderResolver({"sql": Path("loras/sql"), "evil": Path("loras/evil")})
    )
    server = start(ALLOWED)
    assert error_of(post(server, model="evil"), 400)["code"] == "adapter_error"
    assert post(server, model="sql").status_code == 200
    assert cards(server)["sql"]["root"] == str(tmp_path / "loras" / "sql")
    assert fetched == []


def test_a_served_adapter_does_not_keep_evicted_weights(start: Any, adapters: dict[str, str]) -> None:
    resolver = FolderResolver({"one": Path(adapters["words"]), "two": Path(adapters["vision"])})
    LoRAResolverRegistry.register_resolver("folder", resolver)
    server = start(ALLOWED)
    host_cache = server.llm.engine.host_cache
    assert host_cache is not None
    first = post(server, model="one").json()
    request = LoRARequest("one", derive_lora_id("one"), adapters["words"])
    weights = weakref.ref(host_cache.get(request))
    assert post(server, model="two").status_code == 200  # max_cpu_loras=1, max_loras=1
    gc.collect()
    assert weights() is None and {"one", "two"} <= set(cards(server))
    assert post(server, model="one").json()["choices"] == first["choices"]  # and it is reloaded automatically


def test_the_documented_s3_resolver_works_as_written(
    start: Any, adapters: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("S3_PATH_TEMPLATE", "loras/{base_model_name}/{lora_name}")
    monkeypatch.setenv("LOCAL_PATH_TEMPLATE", f"{tmp_path}/{{lora_name}}")
    with run_s3(monkeypatch):
        for name in ("sql", "chat"):
            put(f"tiny/{name}", {path.name: path.read_bytes() for path in Path(adapters["words"]).iterdir()})
        scope: dict[str, Any] = {}
        for snippet in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "resolvers.md").read_text(), re.DOTALL):
            exec(compile(snippet, "resolvers.md", "exec"), scope)
        server = start(ALLOWED)
        for name in ("sql", "chat"):  # the second resolution reuses the S3 client
            assert post(server, model=name).json()["lora"]["adapter"] == name
            assert cards(server)[name]["root"] == str(tmp_path / name)
        assert error_of(post(server, model="nobody"), 404)["code"] == "model_not_found"
        asyncio.run_coroutine_threadsafe(_close(scope["s3_resolver"].s3), resolver_loop()).result(30)


async def _close(s3: Any) -> None:
    await (await s3.set_session()).close()


def served(name: str, default_for: str | None = None) -> ServedAdapter:
    return ServedAdapter(name, LoRARequest(name, 1, "p"), "d", AdapterReport(1, {}), default_for)


def test_names_are_added_and_removed() -> None:
    models = ServedModels("base", "root", 10, [served("audio", "audio")])
    models.add_adapter(served("sql"))
    assert models.names == ["base", "audio", "sql"]
    for name in ("sql", "base", "audio"):
        with pytest.raises(RequestError, match=f"the name '{name}' is taken; served models are 'base', 'audio', 'sql'"):
            models.add_adapter(served(name))
    new = served("sql")
    models.add_adapter(new, replace=True)
    for name in ("base", "audio"):
        with pytest.raises(RequestError, match="is taken"):
            models.add_adapter(served(name), replace=True)
    assert models.remove_adapter("sql") is new and models.names == ["base", "audio"]
    with pytest.raises(AdapterNotFound, match="the adapter 'sql' does not exist; served models are 'base', 'audio'"):
        models.remove_adapter("sql")
    with pytest.raises(RequestError, match="'audio' is the default for audio and cannot be unloaded"):
        models.remove_adapter("audio")


def test_messages_list_only_the_first_of_many_names() -> None:
    adapters = [served(f"{index}-{'x' * 250}") for index in range(2000)]
    models = ServedModels("base", "root", 10, adapters)
    for refused in (
        lambda: models.select_adapter("y" * 300, None),
        lambda: models.select_adapter(None, "y" * 300),
        lambda: models.remove_adapter("y" * 300),
        lambda: models.add_adapter(adapters[7]),
        lambda: models.model_card("y" * 300),
    ):
        with pytest.raises(MMLoRAError) as error:
            refused()
        assert len(str(error.value)) < 600, str(error.value)
    with pytest.raises(Refusal, match=r"'0-x.*, '6-x.* and 1993 more \(/v1/models lists all\)$"):
        models.select_adapter("y", None)
    with pytest.raises(Refusal, match=r"'7-x.* and 1992 more \(/v1/models lists all\); \[\] selects the base model$"):
        models.select_adapter(None, "y")


def test_names_are_thread_safe() -> None:
    models = ServedModels("base", "root", 10)
    start = threading.Barrier(4)

    def work(thread: int) -> None:
        start.wait()
        for index in range(300):
            models.add_adapter(served(f"{thread}-{index}"))
            assert f"{thread}-{index}" in models.names and len(models.model_cards()) > 1
            if index % 2:
                models.remove_adapter(f"{thread}-{index}")

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
    finally:
        sys.setswitchinterval(interval)
    assert sorted(models.names) == sorted(["base", *(f"{t}-{i}" for t in range(4) for i in range(0, 300, 2))])


def test_the_example_serves_a_resolved_adapter() -> None:
    example = str(ROOT / "examples" / "lora_resolver.py")
    with run_process(example, "0", HF_HUB_DISABLE_PROGRESS_BARS="1") as server:
        messages = [{"role": "user", "content": "what is two plus three?"}]
        body = {"model": "spanish-lora", "messages": messages, "temperature": 0}
        answer = httpx.post(f"{server.address}/v1/chat/completions", json=body, timeout=60).json()
        assert answer["choices"][0]["message"]["content"] == "cinco"
        names = [card["id"] for card in httpx.get(f"{server.address}/v1/models").json()["data"]]
        assert names == ["assistant", "spanish-lora"]


def test_adapters_of_the_registry_are_restored(tiny_phi4: Path, adapters: dict[str, str], tmp_path: Path) -> None:
    """A valid adapter is listed in `/v1/models` as before, a changed one with its problem."""
    options: dict[str, Any] = {"enable_lora": True, "lora_registry": str(tmp_path / "registry"), "max_model_len": 64}
    paths = {name: Path(shutil.copytree(adapters["speech"], tmp_path / name)) for name in ("kept", "changed")}
    llm = AsyncLLM(EngineArgs(str(tiny_phi4), **options))
    for name, path in paths.items():
        llm.engine.add_lora(name, str(path))
    llm.shutdown()
    config = paths["changed"] / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": ', '"lora_alpha": 1'))
    llm = AsyncLLM(EngineArgs(str(tiny_phi4), **options))
    try:
        cards = {card["id"]: card["adapter"] for card in load_served_models(llm).model_cards()}
        assert cards["kept"]["problem"] is None and cards["kept"]["matched"] > 0
        assert "changed" in cards["changed"]["problem"]
    finally:
        llm.shutdown()
