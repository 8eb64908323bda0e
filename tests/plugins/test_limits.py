"""Blocking calls of resolvers: a hung call blocks no other resolver, no later call and no exit of the process."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mmlora.errors import ResolverError
from mmlora.lora.resolver import LoRAResolver, resolver_loop
from mmlora.plugins.limits import MAX_THREADS, ResolverThreads
from mmlora.plugins.lora_filesystem_resolver import FilesystemResolver
from mmlora.plugins.lora_fsspec_resolver import FsspecResolver
from mmlora.plugins.lora_hf_hub_resolver import HubResolver
from tests.plugins.conftest import resolve, write_adapter

BUNDLED: dict[str, Callable[[Path], LoRAResolver]] = {
    "filesystem": FilesystemResolver,
    "fsspec": lambda path: FsspecResolver("memory://loras", path),
    "hub": lambda _: HubResolver({}),
}


def run(threads: ResolverThreads, function: Callable[..., Any], *args: Any) -> Any:
    return asyncio.run_coroutine_threadsafe(threads.run(function, *args), resolver_loop()).result(30)


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Block calls until the test is over."""
    gate = threading.Event()
    yield gate
    gate.set()


@pytest.mark.parametrize("make", BUNDLED.values(), ids=BUNDLED.keys())
def test_a_hung_resolver_fails_fast_and_does_not_block_others(
    make: Callable[[Path], LoRAResolver], tmp_path: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapter(tmp_path / "sql")
    hung = make(tmp_path)
    monkeypatch.setattr(hung, "_find", lambda *_: gate.wait(60) and None)
    tasks = [asyncio.run_coroutine_threadsafe(hung.resolve_lora("b", "x"), resolver_loop()) for _ in range(MAX_THREADS)]
    assert resolve(FilesystemResolver(tmp_path), "sql") is not None
    for task in tasks:
        task.cancel()  # as on a timeout; the thread keeps running
    with pytest.raises(ResolverError, match=f"{MAX_THREADS} calls have not ended"):
        resolve(hung, "y")


def test_a_call_that_has_returned_frees_its_thread() -> None:
    threads = ResolverThreads(1)
    for _ in range(3):
        assert run(threads, lambda value: value, 5) == 5
        with pytest.raises(FileNotFoundError, match="gone"):
            run(threads, open_nothing)


def open_nothing() -> None:
    raise FileNotFoundError("gone")


def test_after_a_thread_could_not_be_started_the_next_call_works(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = ResolverThreads(1)

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(ResolverError, match="no thread can be started: can't start new thread"):
            asyncio.run(threads.run(len, "x"))
    assert run(threads, len, "x") == 1


def test_a_hung_call_does_not_keep_the_process_from_exiting() -> None:
    code = """
import asyncio, threading
from mmlora.plugins.limits import ResolverThreads

async def main():
    try:
        await asyncio.wait_for(ResolverThreads().run(threading.Event().wait), 0.2)
    except TimeoutError:
        print("left")

asyncio.run(main())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, "left\n"), result.stderr
