"""Loading and unloading adapters: responses, and the models that are served then."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import NotFoundError

from mmlora.async_llm import AsyncLLM
from mmlora.config import EngineArgs
from mmlora.errors import AdapterError
from mmlora.server.api import build_app
from mmlora.server.args import LoRAModule
from mmlora.server.launch import load_served_models
from tests.server.conftest import RunningServer, input_audio_part, post_json, run_app, text_part
from tests.server.lora.admin import (
    BASE_NAMES,
    card,
    chat,
    error_of,
    leave_nothing,
    load,
    names,
    run_updatable,
    unload,
)
from tests.server_process import run_serve

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def shared(tiny_phi4: Path, adapters: dict[str, str]) -> Iterator[RunningServer]:
    with run_updatable(tiny_phi4, adapters) as shared:
        yield shared


@pytest.fixture
def server(shared: RunningServer) -> Iterator[RunningServer]:
    with leave_nothing(shared):
        yield shared


def run_documented(command: str) -> str:
    """Run a command of the documentation and return its output."""
    arguments = shlex.split(command.replace("\\\n", ""))
    assert arguments[:3] == ["curl", "-X", "POST"]
    if shutil.which("curl"):
        environment = {**os.environ, "no_proxy": "localhost"}
        return subprocess.run([*arguments, "-sS"], capture_output=True, text=True, check=True, env=environment).stdout
    name, _, value = arguments[arguments.index("-H") + 1].partition(": ")
    return httpx.post(arguments[3], content=arguments[arguments.index("-d") + 1], headers={name: value}).text


def test_the_documented_commands_work_as_written(tiny_phi4: Path, adapters: dict[str, str]) -> None:
    """The commands in `docs/adapters.md` work with a server started from the command line."""
    text = (ROOT / "docs" / "adapters.md").read_text()
    commands = re.findall(r"```bash\n(curl -X POST .*?)```", text, re.DOTALL)
    variable = re.findall(r"```bash\nexport (MMLORA_ALLOW\w+)=(\w+)\n```", text)
    assert len(commands) == 3 and variable == [("MMLORA_ALLOW_RUNTIME_LORA_UPDATING", "True")]
    options = ["--enable-lora", "--served-model-name", "tiny", "--device", "cpu", "--max-model-len", "64"]
    with run_serve(str(tiny_phi4), *options, **dict(variable)) as server:
        address = server.address
        paths = {"/path/to/sql-lora-adapter": adapters["words"], "/path/to/adapter/v2": adapters["vision"]}
        for old, new in [*paths.items(), ("http://localhost:8000", address.replace("127.0.0.1", "localhost"))]:
            commands = [command.replace(old, new) for command in commands]
        assert run_documented(commands[0]) == "Success: LoRA adapter 'sql_adapter' added successfully"
        assert run_documented(commands[1]) == "Success: LoRA adapter 'my-adapter' added successfully"
        assert run_documented(commands[1]) == "Success: LoRA adapter 'my-adapter' added successfully"
        listed = [card["id"] for card in httpx.get(f"{address}/v1/models").json()["data"]]
        assert listed == ["tiny", "sql_adapter", "my-adapter"]
        assert run_documented(commands[2]) == "Success: LoRA adapter 'sql_adapter' removed successfully"
        assert "does not exist" not in run_documented(commands[1]) and "error" in run_documented(commands[2])


@pytest.mark.parametrize("name", ["sql", "org/repo/sql", "été 1", "x" * 255])
def test_a_loaded_adapter_is_served_immediately(server: RunningServer, adapters: dict[str, str], name: str) -> None:
    answer = load(server, lora_name=name, lora_path=adapters["words"], base_model_name="org/base")
    assert (answer.status_code, answer.text) == (200, f"Success: LoRA adapter '{name}' added successfully")
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    with server.client as client:
        listed = {model.id: model.to_dict() for model in client.models.list()}
    assert (listed[name]["root"], listed[name]["parent"]) == (adapters["words"], "org/base")
    asked = server.ask(text_part("hi"), model=name)
    assert (asked["lora"]["adapter"], asked["lora"]["reason"]) == (name, "explicit")
    assert asked["lora"]["digest"] == listed[name]["adapter"]["digest"]  # type: ignore[index,call-overload]
    answer = unload(server, lora_name=name)
    assert (answer.status_code, answer.text) == (200, f"Success: LoRA adapter '{name}' removed successfully")
    assert name not in names(server)
    with pytest.raises(NotFoundError, match="does not exist"):
        server.ask(text_part("hi"), model=name)


def test_an_adapter_is_unloaded_by_its_id(server: RunningServer, adapters: dict[str, str]) -> None:
    for name in ("one", "two"):
        load(server, lora_name=name, lora_path=adapters["words"])
    ids = {name: card(server, name)["adapter"]["lora_int_id"] for name in ("one", "two")}
    assert all(0 < lora_int_id < 2**53 for lora_int_id in ids.values())
    error = error_of(unload(server, lora_name="one", lora_int_id=ids["two"]), 400)
    assert error["param"] == "lora_int_id" and f"the id of 'one' is {ids['one']}" in error["message"]
    assert unload(server, lora_int_id=ids["two"]).text == "Success: LoRA adapter 'two' removed successfully"
    assert unload(server, lora_name="one", lora_int_id=ids["one"]).status_code == 200
    assert error_of(unload(server, lora_int_id=ids["two"]), 404)["param"] == "lora_int_id"


@pytest.mark.parametrize(
    ("body", "status", "param", "text"),
    [
        ({}, 400, "lora_name", "lora_name and lora_path are required"),
        ({"lora_name": "new"}, 400, "lora_path", "lora_path is required"),
        ({"lora_path": "words"}, 400, "lora_name", "lora_name is required"),
        (
            {"name": "new", "path": "words"},
            400,
            "lora_name",
            "unknown field 'name', 'path'; allowed are lora_name, lora_p",
        ),
        ({"lora_name": "", "lora_path": "words"}, 400, "lora_name", 'received ""'),
        ({"lora_name": "x" * 256, "lora_path": "words"}, 400, "lora_name", "255"),
        ({"lora_name": 7, "lora_path": "words"}, 400, "lora_name", "received 7"),
        ({"lora_name": "a\nb", "lora_path": "words"}, 400, "lora_name", "printable"),
        ({"lora_name": "new", "lora_path": ""}, 400, "lora_path", 'received ""'),
        ({"lora_name": "new", "lora_path": "memory:new"}, 400, "lora_path", "a directory or a Hub id"),
        ({"lora_name": "new", "lora_path": "a\0b"}, 404, None, "a\\x00b"),
        ({"lora_name": "new", "lora_path": "/no/such/directory"}, 404, None, "/no/such/directory"),
        ({"lora_name": "new", "lora_path": "words", "load_inplace": "yes"}, 400, "load_inplace", '"yes"'),
        ({"lora_name": "tiny", "lora_path": "words"}, 400, "lora_name", "'tiny' is the name of the base model"),
        ({"lora_name": "tiny", "lora_path": "words", "load_inplace": True}, 400, "lora_name", "base model"),
        ({"lora_name": "audio", "lora_path": "words"}, 400, "lora_name", "the default adapter for audio"),
        ({"lora_name": "audio", "lora_path": "words", "load_inplace": True}, 400, "lora_name", "default adapter"),
        ({"lora_name": "started", "lora_path": "words"}, 400, "lora_name", "'started' is already loaded"),
        ({"lora_name": "new", "lora_path": "damaged"}, 400, None, "is not a valid safetensors file"),
        ({"lora_name": "started", "lora_path": "damaged", "load_inplace": True}, 400, None, "safetensors"),
    ],
    ids=lambda value: "" if isinstance(value, dict | int) or value is None else value[:24],
)
def test_a_refused_load_gives_a_reason_and_changes_nothing(
    server: RunningServer,
    adapters: dict[str, str],
    tmp_path: Path,
    body: dict[str, Any],
    status: int,
    param: str | None,
    text: str,
) -> None:
    damaged = Path(shutil.copytree(adapters["words"], tmp_path / "damaged"))
    weights = damaged / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    before = card(server, "started")
    if body.get("lora_path") in ("words", "damaged"):
        body = {**body, "lora_path": {"damaged": str(damaged), **adapters}[body["lora_path"]]}
    error = error_of(load(server, **body), status)
    assert error["param"] == param and text in error["message"] and len(str(error)) < 800
    assert names(server) == BASE_NAMES and card(server, "started") == before
    assert chat(server, "started").status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "param", "text"),
    [
        ({}, 400, "lora_name", "lora_name or lora_int_id is required"),
        ({"lora_name": None, "lora_int_id": None}, 400, "lora_name", "is required"),
        ({"lora_name": "nobody"}, 404, None, "the adapter 'nobody' does not exist"),
        ({"lora_name": ""}, 404, None, "the adapter '' does not exist"),
        ({"lora_int_id": 12345}, 404, "lora_int_id", "lora_int_id=12345"),
        ({"lora_int_id": "1"}, 400, "lora_int_id", '"1"'),
        ({"lora_int_id": 0}, 400, "lora_int_id", "received 0"),
        ({"lora_int_id": 10**400}, 400, "lora_int_id", "lora_int_id"),
        ({"lora_int_id": True}, 400, "lora_int_id", "received true"),
        ({"lora_name": "tiny"}, 400, "lora_name", "'tiny' is the base model, which cannot be unloaded"),
        ({"lora_name": "audio"}, 400, None, "'audio' is the default for audio and cannot be unloaded"),
        ({"lora_int_id": 2**62}, 400, None, "'audio' is the default for audio and cannot be unloaded"),
        ({"lora_name": "started", "lora_path": "x"}, 400, "lora_path", "unknown field 'lora_path'"),
    ],
    ids=lambda value: "" if isinstance(value, dict | int) or value is None else value[:24],
)
def test_a_refused_unload_gives_a_reason(
    server: RunningServer, body: dict[str, Any], status: int, param: str | None, text: str
) -> None:
    error = error_of(unload(server, **body), status)
    assert error["param"] == param and text in error["message"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"lora_name": "\xff"}', b'{"lora_name": "\\ud800"}'])
def test_an_invalid_body_is_400(server: RunningServer, content: bytes) -> None:
    for route in ("load", "unload"):
        error_of(post_json(f"{server.address}/v1/{route}_lora_adapter", content), 400)


def test_a_default_stays_when_another_name_of_its_files_is_unloaded(
    server: RunningServer, adapters: dict[str, str], wav: bytes
) -> None:
    def adapter_of_audio() -> Any:
        return server.ask(input_audio_part(wav), text_part("x"))["lora"]

    before = adapter_of_audio()
    assert before["reason"] == "default:audio"
    assert load(server, lora_name="copy", lora_path=adapters["speech"]).status_code == 200
    assert unload(server, lora_name="copy").status_code == 200
    assert adapter_of_audio() == before
    assert chat(server, "copy").status_code == 404 and chat(server, "audio").status_code == 200


def test_a_large_body_is_refused(server: RunningServer) -> None:
    assert error_of(load(server, lora_name="x" * 2**16, lora_path="p"), 413)["code"] == "request_too_large"


def test_update_routes_are_disabled_by_default(server: RunningServer, adapters: dict[str, str]) -> None:
    models = load_served_models(server.llm)
    with run_app(build_app(server.llm, models, api_key="key")) as address:
        for route in ("load", "unload"):
            url = f"{address}/v1/{route}_lora_adapter"
            assert httpx.post(url, json={}).status_code == 401
            error = error_of(httpx.post(url, json={}, headers={"authorization": "Bearer key"}), 404)
            assert "MMLORA_ALLOW_RUNTIME_LORA_UPDATING=true" in error["message"]
    with run_app(build_app(server.llm, models, api_key="key", allow_lora_updates=True)) as address:
        body = {"lora_name": "sql", "lora_path": adapters["words"]}
        assert httpx.post(f"{address}/v1/load_lora_adapter", json=body).status_code == 401
        headers = {"authorization": "Bearer key"}
        assert httpx.post(f"{address}/v1/load_lora_adapter", json=body, headers=headers).status_code == 200
        assert httpx.post(f"{address}/v1/unload_lora_adapter", json={"lora_name": "sql"}).status_code == 401
        response = httpx.post(f"{address}/v1/unload_lora_adapter", json={"lora_name": "sql"}, headers=headers)
        assert response.status_code == 200


def test_without_enable_lora_an_update_gives_the_reason(tiny_phi4: Path) -> None:
    llm = AsyncLLM(EngineArgs(str(tiny_phi4), served_model_name="tiny", max_model_len=64, device="cpu"))
    try:
        with run_app(build_app(llm, load_served_models(llm), allow_lora_updates=True)) as address:
            plain = RunningServer(llm, address)
            assert "--enable-lora" in error_of(load(plain, lora_name="a", lora_path="b"), 400)["message"]
            assert "--enable-lora" in error_of(unload(plain, lora_name="a"), 400)["message"]
    finally:
        llm.shutdown()


def test_reload_in_place_serves_the_new_version(server: RunningServer, adapters: dict[str, str]) -> None:
    load(server, lora_name="sql", lora_path=adapters["words"], base_model_name="org/base")
    old_card, old = card(server, "sql"), chat(server, "sql", logprobs=True).json()
    answer = load(server, lora_name="sql", lora_path=adapters["speech"], load_inplace=True)
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'sql' added successfully")
    new_card, new = card(server, "sql"), chat(server, "sql", logprobs=True).json()
    assert new["choices"] != old["choices"] and new["lora"]["digest"] != old["lora"]["digest"]
    assert new_card["adapter"]["digest"] == new["lora"]["digest"]
    assert (new_card["root"], new_card["parent"]) == (adapters["speech"], "org/base")
    assert new_card["adapter"]["lora_int_id"] == old_card["adapter"]["lora_int_id"]
    load(server, lora_name="sql", lora_path=adapters["words"], load_inplace=True)
    assert chat(server, "sql", logprobs=True).json()["choices"] == old["choices"]


def test_changed_files_are_read_again(server: RunningServer, adapters: dict[str, str], tmp_path: Path) -> None:
    path = shutil.copytree(adapters["words"], tmp_path / "sql")
    load(server, lora_name="sql", lora_path=str(path))
    digest = card(server, "sql")["adapter"]["digest"]
    shutil.copytree(adapters["vision"], path, dirs_exist_ok=True)
    assert load(server, lora_name="sql", lora_path=str(path), load_inplace=True).status_code == 200
    assert card(server, "sql")["adapter"]["digest"] not in (None, digest)


def test_an_unwritable_registry_keeps_the_adapter_served(
    server: RunningServer, adapters: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load(server, lora_name="sql", lora_path=adapters["words"])

    def fail(_: object) -> None:
        raise AdapterError("lora_registry cannot be written: disk full")

    with monkeypatch.context() as patch:
        patch.setattr(server.llm.engine.host_cache, "remove", fail)
        assert "disk full" in error_of(unload(server, lora_name="sql"), 400)["message"]
    assert chat(server, "sql").status_code == 200


def test_an_adapter_removed_through_python_can_be_unloaded_or_reloaded(
    server: RunningServer, adapters: dict[str, str]
) -> None:
    for repair in (unload, load):
        load(server, lora_name="sql", lora_path=adapters["words"])
        asyncio.run(server.llm.remove_lora("sql"))
        assert error_of(chat(server, "sql"), 500)["param"] == "model"
        body = {"lora_path": adapters["words"], "load_inplace": True} if repair is load else {}
        assert repair(server, lora_name="sql", **body).status_code == 200
    assert chat(server, "sql").status_code == 200


def test_client_loaded_adapters_are_restored_after_a_restart(
    tiny_phi4: Path, adapters: dict[str, str], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"enable_lora": True, "lora_registry": str(tmp_path / "registry"), "max_model_len": 64}
    modules = [LoRAModule("started", adapters["vision"])]
    for bodies in ([("sql", "words"), ("started", "speech"), ("sql", "speech")], []):
        llm = AsyncLLM(EngineArgs(str(tiny_phi4), served_model_name="tiny", device="cpu", **options))
        try:
            with run_app(build_app(llm, load_served_models(llm, modules), allow_lora_updates=True)) as address:
                running = RunningServer(llm, address)
                for name, path in bodies:
                    answer = load(running, lora_name=name, lora_path=adapters[path], load_inplace=True)
                    assert answer.status_code == 200
                assert names(running) == ["tiny", "started", "sql"]
                root = "speech" if bodies else "vision"  # `--lora-modules` says so
                assert card(running, "started")["root"] == adapters[root]
                assert card(running, "sql")["root"] == adapters["speech"]
                assert chat(running, "started").status_code == chat(running, "sql").status_code == 200
        finally:
            llm.shutdown()


@pytest.mark.parametrize(
    "path", ["missing/at/all/x", "./empty", "broken", "other", "~/broken", "org/nothing", "broken@v"]
)
def test_errors_do_not_tell_where_the_server_runs(
    server: RunningServer, adapters: dict[str, str], path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "secret-place"
    for folder in ("empty", "broken", "other"):
        (home / folder).mkdir(parents=True)
    (home / "broken/adapter_config.json").write_text("[")
    shutil.copytree(adapters["words"], home / "other", dirs_exist_ok=True)
    (home / "other/adapter_config.json").write_text('{"peft_type": "VERA"}')
    monkeypatch.chdir(home)
    monkeypatch.setenv("HOME", str(home))
    answer = load(server, lora_name="a", lora_path=path)
    assert answer.status_code in (400, 404), answer.text
    message = answer.json()["error"]["message"]
    assert path.removeprefix("./") in message and "secret" not in message and str(Path.cwd().parent) not in message
