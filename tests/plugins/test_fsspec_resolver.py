"""`lora_fsspec_resolver`: S3 through a local server, and atomic downloads."""

from __future__ import annotations

import asyncio
import os
import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from mmlora.errors import AdapterError, ConfigError, ResolverError
from mmlora.lora.loading.files import CONFIG_FILE, WEIGHTS_FILE
from mmlora.lora.resolver import resolver_loop
from mmlora.plugins.lora_fsspec_resolver import FsspecResolver
from tests.plugins.conftest import FILES, read_files, resolve
from tests.plugins.s3 import put, run_s3


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    """Provide the `memory://` file system of this process with the adapter `sql` under `/loras`."""
    filesystem = MemoryFileSystem()
    filesystem.store.clear()
    store(filesystem, "/loras/sql", {**FILES, "optimizer.pt": b"not needed"})
    yield filesystem
    filesystem.store.clear()


def store(filesystem: MemoryFileSystem, folder: str, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        filesystem.pipe_file(f"{folder}/{name}", content)


def left(downloads: Path) -> list[str]:
    return sorted(os.listdir(downloads)) if downloads.exists() else []


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as monkeypatch, run_s3(monkeypatch) as address:
        yield address


@pytest.fixture
def s3_environment(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the S3 variables again, which `clean_registry` removes."""
    for name, value in {
        "AWS_ENDPOINT_URL": s3,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "very-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)


def test_an_adapter_is_downloaded_from_s3(s3_environment: None, tmp_path: Path) -> None:
    put("team/sql", {**FILES, "optimizer.pt": b"not needed"})
    put("team/org/repo", FILES)
    resolver = FsspecResolver("s3://loras/team", tmp_path)
    for name in ("sql", "org/repo"):
        request = resolve(resolver, name)
        assert request is not None and request.lora_name == name
        assert read_files(request.lora_path) == FILES
    assert resolve(resolver, "unknown") is None
    assert resolve(FsspecResolver("s3://no-such-bucket", tmp_path), "sql") is None


def test_new_files_under_a_name_on_s3_are_a_new_directory(s3_environment: None, tmp_path: Path) -> None:
    put("changing/sql", FILES)
    resolver = FsspecResolver("s3://loras/changing/{lora_name}", tmp_path)
    old, again = resolve(resolver, "sql"), resolve(resolver, "sql")
    assert old is not None and old == again
    put("changing/sql", {WEIGHTS_FILE: FILES[WEIGHTS_FILE][::-1]})  # of the same size
    new = resolve(resolver, "sql")
    assert new is not None and read_files(new.lora_path)[WEIGHTS_FILE] == FILES[WEIGHTS_FILE][::-1]
    assert read_files(old.lora_path) == FILES  # for running requests


def test_a_template_contains_both_names(memory: MemoryFileSystem, tmp_path: Path) -> None:
    store(memory, "/by-base/llama/sql/v1", FILES)
    resolver = FsspecResolver("memory://by-base/{base_model_name}/{lora_name}/v1", tmp_path)
    assert resolve(resolver, "sql", base="llama") is not None
    assert resolve(resolver, "sql", base="phi") is None


@pytest.mark.parametrize(
    "name", ["unknown", "", "..", "../loras/sql", "sql/../sql", "sql\0", "s*", "sql?x", "x" * 10_000]
)
def test_other_names_are_unknown_and_leave_nothing(memory: MemoryFileSystem, tmp_path: Path, name: str) -> None:
    downloads = tmp_path / "downloads"
    assert resolve(FsspecResolver("memory://loras", downloads), name) is None
    assert left(downloads) == []


def test_an_adapter_without_tensors_is_unknown(memory: MemoryFileSystem, tmp_path: Path) -> None:
    store(memory, "/loras/half", {CONFIG_FILE: b"{}"})
    assert resolve(FsspecResolver("memory://loras", tmp_path), "half") is None


def test_a_name_is_not_parsed_as_part_of_the_url(memory: MemoryFileSystem, tmp_path: Path) -> None:
    """`a::b` would chain two file systems if the URL were parsed with it."""
    store(memory, "/loras/a::b", FILES)
    request = resolve(FsspecResolver("memory://loras", tmp_path), "a::b")
    assert request is not None and Path(request.lora_path).parent == tmp_path


@pytest.mark.parametrize("claim", [True, False], ids=["claimed", "found"])
def test_a_file_that_is_too_large_leaves_nothing(
    memory: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, claim: bool
) -> None:
    if not claim:
        info = MemoryFileSystem.info
        monkeypatch.setattr(MemoryFileSystem, "info", lambda self, path: {**info(self, path), "size": None})
    with pytest.raises(AdapterError, match=f"{WEIGHTS_FILE} has 10240 bytes or more; .*MAX_BYTES allows 9999"):
        resolve(FsspecResolver("memory://loras", tmp_path, 9999), "sql")
    assert left(tmp_path) == []


class CutFile:
    """File that ends or fails after some bytes."""

    def __init__(self, file: Any, error: Exception | None) -> None:
        self._file, self._error = file, error
        self._is_cut = False

    def __enter__(self) -> CutFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, _: int) -> bytes:
        if self._is_cut and self._error is not None:
            raise self._error
        chunk = b"" if self._is_cut else self._file.read(100)
        self._is_cut = True
        return bytes(chunk)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (None, "ended after 100 of 10240 bytes"),
        (ConnectionResetError("reset"), "cannot be read after 100 bytes: reset"),
    ],
    ids=["short", "reset"],
)
def test_a_truncated_download_leaves_nothing_and_the_next_one_is_complete(
    memory: MemoryFileSystem,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception | None,
    expected: str,
) -> None:
    resolver = FsspecResolver("memory://loras", tmp_path)
    plain = MemoryFileSystem.open

    def cut(self: MemoryFileSystem, path: str, *args: Any) -> Any:
        file = plain(self, path, *args)
        return CutFile(file, error) if path.endswith(WEIGHTS_FILE) else file

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "open", cut)
        with pytest.raises(ResolverError, match=expected):
            resolve(resolver, "sql")
    assert left(tmp_path) == []
    request = resolve(resolver, "sql")
    assert request is not None and read_files(request.lora_path) == FILES


def test_a_full_disk_is_named_and_leaves_no_partial_files(memory: MemoryFileSystem, tmp_path: Path) -> None:
    """The file size limit of the process makes the same call fail as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(ResolverError, match=f"{tmp_path} cannot be written: "):
            resolve(FsspecResolver("memory://loras", tmp_path), "sql")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert left(tmp_path) == []


def test_concurrent_downloads_of_one_adapter_both_succeed(memory: MemoryFileSystem, tmp_path: Path) -> None:
    barrier = threading.Barrier(2, timeout=30)
    resolvers = [FsspecResolver("memory://loras", tmp_path) for _ in range(2)]
    for resolver in resolvers:
        read = resolver._read

        def together(name: str, *args: Any, read: Any = read) -> Iterator[bytes]:
            yield from read(name, *args)
            if name == WEIGHTS_FILE:
                barrier.wait()

        resolver._read = together  # type: ignore[method-assign,assignment]

    async def both() -> list[Any]:
        return await asyncio.gather(*(resolver.resolve_lora("base", "sql") for resolver in resolvers))

    one, other = asyncio.run_coroutine_threadsafe(both(), resolver_loop()).result(60)
    assert one == other and read_files(one.lora_path) == FILES
    assert left(tmp_path) == [Path(one.lora_path).name]


def test_an_abandoned_download_stops(memory: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resolver = FsspecResolver("memory://loras", tmp_path)
    monkeypatch.setattr("mmlora.plugins.lora_fsspec_resolver.CHUNK_BYTES", 100)
    has_begun, has_left = threading.Event(), threading.Event()
    plain = MemoryFileSystem.open

    def waiting(self: MemoryFileSystem, path: str, *args: Any) -> Any:
        has_begun.set()
        has_left.wait(30)
        return plain(self, path, *args)

    monkeypatch.setattr(MemoryFileSystem, "open", waiting)
    future = asyncio.run_coroutine_threadsafe(resolver.resolve_lora("base", "sql"), resolver_loop())
    assert has_begun.wait(30)
    future.cancel()
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0), resolver_loop()).result(
        30
    )  # the cancellation has reached the task
    has_left.set()
    deadline = time.monotonic() + 30
    while left(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("/some/directory", "is a local directory; use lora_filesystem_resolver instead"),
        ("file:///some/directory", "is a local directory; use lora_filesystem_resolver instead"),
        ("memory://x/{name}", r"unknown \['name'\]; allowed are lora_name, base_model_name"),
        ("memory://x/{lora_name.__class__}", "unknown"),
        ("nonsense://user:hunter2@x", "Protocol not known: nonsense"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_without_showing_it(tmp_path: Path, url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as info:
        FsspecResolver(url, tmp_path)
    assert "hunter2" not in str(info.value)
