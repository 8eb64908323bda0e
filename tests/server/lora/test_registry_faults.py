"""Faults of the adapter registry under a running server: updates fail with a reason, nothing changes, nothing hangs."""

from __future__ import annotations

import logging
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from mmlora.async_llm import AsyncLLM
from mmlora.config import EngineArgs
from mmlora.errors import ConfigError
from mmlora.lora.store import registry
from mmlora.server.api import build_app
from mmlora.server.launch import load_served_models
from tests.server.conftest import RunningServer, in_thread, run_app, wait_for
from tests.server.lora.admin import chat, error_of, load, names, unload


@contextmanager
def run_registered(model: Path, file: Path) -> Iterator[RunningServer]:
    """Run a server with a registry."""
    options: dict[str, Any] = {"served_model_name": "tiny", "enable_lora": True, "max_loras": 2, "device": "cpu"}
    llm = AsyncLLM(EngineArgs(str(model), lora_registry=str(file), **options))
    try:
        models = load_served_models(llm)
        with run_app(build_app(llm, models, allow_lora_updates=True)) as address:
            yield RunningServer(llm, address, models)
    finally:
        llm.shutdown()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "the-secret-folder"
    path.mkdir()
    return path


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def mount(folder: Path, stack: ExitStack) -> Callable[..., None]:
    """Mount a small file system, which needs root; return a function that mounts it again with other options."""

    def run(*arguments: str) -> None:
        subprocess.run(["mount", *arguments, str(folder)], check=True, capture_output=True)

    try:
        run("-t", "tmpfs", "-o", "size=128k", "tmpfs")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a file system cannot be mounted here")
    stack.callback(subprocess.run, ["umount", "--lazy", str(folder)], check=True)
    return lambda options: run("-o", f"remount,{options}")


def lock(file: Path, stack: ExitStack) -> None:
    other = sqlite3.connect(file, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    stack.callback(other.close)


def fill(file: Path) -> None:
    with (file.parent / "filler").open("wb", buffering=0) as filler, pytest.raises(OSError, match="No space"):
        while True:
            filler.write(bytes(4096))


# What happens to the file, then the status and a part of the message.
FAULTS: dict[str, tuple[int, str]] = {
    "locked": (503, "locked"),
    "full": (503, "full"),
    "read-only": (500, "readonly"),
    "garbage": (500, "not a database"),
    "torn": (500, "malformed"),
    "empty": (500, "no such table"),
    "deleted": (500, "unable to open"),
    "folder deleted": (500, "unable to open"),
    "folder instead": (500, "unable to open"),
}


def spoil(fault: str, file: Path, stack: ExitStack, remount: Callable[..., None] | None) -> None:
    if fault == "locked":
        lock(file, stack)
    elif fault == "full":
        fill(file)
    elif fault == "read-only":
        assert remount is not None
        remount("ro")
    elif fault == "torn":
        content = bytearray(file.read_bytes())
        content[100:] = b"\xff" * (len(content) - 100)
        file.write_bytes(content)
    elif fault == "folder deleted":
        shutil.rmtree(file.parent)
    elif fault in ("deleted", "folder instead"):
        file.unlink()
        if fault == "folder instead":
            file.mkdir()
    else:
        file.write_bytes(b"garbage " * 1000 if fault == "garbage" else b"")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_fails_updates_and_changes_nothing(
    tiny_phi4: Path,
    adapters: dict[str, str],
    folder: Path,
    stack: ExitStack,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fault: str,
) -> None:
    status, text = FAULTS[fault]
    remount = mount(folder, stack) if fault in ("full", "read-only") else None
    monkeypatch.setattr(registry, "BUSY_TIMEOUT_S", 0.3)
    file = folder / "registry.sqlite"
    with run_registered(tiny_phi4, file) as server:
        for name in ("first", "second"):
            assert load(server, lora_name=name, lora_path=adapters["words"]).status_code == 200
        before = chat(server, "first").json()["choices"]
        spoil(fault, file, stack, remount)
        for update in (
            lambda: load(server, lora_name="third", lora_path=adapters["vision"]),
            lambda: load(server, lora_name="first", lora_path=adapters["vision"], load_inplace=True),
            lambda: unload(server, lora_name="first"),
            lambda: unload(server, lora_name="first"),
        ):
            caplog.clear()
            start_s = time.monotonic()
            response = update()
            assert time.monotonic() - start_s < 10
            error = error_of(response, status)
            assert error["code"] == "registry_error" and text in error["message"], error
            assert "secret" not in response.text and "registry.sqlite" not in response.text
            errors = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
            assert len(errors) == 1 and str(file) in errors[0]
            assert ("retry-after" in response.headers) == (status == 503)
        assert names(server) == ["tiny", "first", "second"]
        assert [info.name for info in server.llm.engine.list_loras()] == ["first", "second"]
        assert chat(server, "first").json()["choices"] == before
        assert error_of(unload(server, lora_name="third"), 404)


def test_updates_work_again_when_the_lock_is_free(tiny_phi4: Path, adapters: dict[str, str], folder: Path) -> None:
    file = folder / "registry.sqlite"
    with run_registered(tiny_phi4, file) as server:
        assert load(server, lora_name="first", lora_path=adapters["words"]).status_code == 200
        with ExitStack() as stack:
            lock(file, stack)
            waiting, results = in_thread(unload, server, lora_name="first")
            time.sleep(0.3)
            assert chat(server, "first").status_code == 200  # until the registry is written, nothing has changed
            assert httpx.get(f"{server.address}/health").status_code == 200
        waiting.join()
        assert results[0].status_code == 200 and names(server) == ["tiny"]
    with run_registered(tiny_phi4, file) as server:
        assert names(server) == ["tiny"]


def test_a_read_only_registry_is_served_but_not_changed(
    tiny_phi4: Path, adapters: dict[str, str], folder: Path, stack: ExitStack
) -> None:
    remount = mount(folder, stack)
    file = folder / "registry.sqlite"
    with run_registered(tiny_phi4, file) as server:
        assert load(server, lora_name="first", lora_path=adapters["words"]).status_code == 200
    remount("ro")
    with run_registered(tiny_phi4, file) as server:
        assert chat(server, "first").status_code == 200
        assert "readonly" in error_of(unload(server, lora_name="first"), 500)["message"]
        assert names(server) == ["tiny", "first"]
    with pytest.raises(ConfigError, match="unable to open database file"):
        registry.AdapterRegistry(folder / "another.sqlite")


def test_a_path_that_the_registry_cannot_store_is_refused(
    tiny_phi4: Path, adapters: dict[str, str], folder: Path, tmp_path: Path
) -> None:
    latin, link = tmp_path / "caf\udce9", tmp_path / "link"
    shutil.copytree(adapters["words"], latin)
    link.symlink_to(latin)
    with run_registered(tiny_phi4, folder / "registry.sqlite") as server:
        response = load(server, lora_name="first", lora_path=str(link))
        assert "surrogates not allowed" in error_of(response, 500)["message"]
        assert "secret" not in response.text and names(server) == ["tiny"]


def test_two_servers_share_a_registry(tiny_phi4: Path, adapters: dict[str, str], folder: Path) -> None:
    """Each server reads the file when it starts; the last change of a name decides what the next start loads."""
    file = folder / "registry.sqlite"
    with run_registered(tiny_phi4, file) as one:
        assert load(one, lora_name="shared", lora_path=adapters["words"]).status_code == 200
        with run_registered(tiny_phi4, file) as two:
            assert names(two) == ["tiny", "shared"]
            loads = [
                in_thread(load, server, lora_name=f"{prefix}{index}", lora_path=adapters["vision"])
                for index in range(4)
                for prefix, server in (("one", one), ("two", two))
            ]
            for thread, _ in loads:
                thread.join()
            assert [result[0].status_code for _, result in loads] == [200] * 8
            assert not {"two0", "two3"} & set(names(one)) and not {"one0", "one3"} & set(names(two))
            assert unload(one, lora_name="shared").status_code == 200
            assert chat(two, "shared").status_code == 200  # it serves the adapter until its next start
            assert load(one, lora_name="same", lora_path=adapters["words"]).status_code == 200
            assert load(two, lora_name="same", lora_path=adapters["vision"]).status_code == 200
            assert unload(two, lora_name="one0").status_code == 404
    with run_registered(tiny_phi4, file) as three:
        loaded = {f"{prefix}{index}" for prefix in ("one", "two") for index in range(4)}
        assert set(names(three)) == {"tiny", "same", *loaded}
        path = httpx.get(f"{three.address}/v1/models/same").json()["root"]
        assert path == str(Path(adapters["vision"]).resolve())
        wait_for(lambda: not three.llm.engine.has_unfinished_requests)
