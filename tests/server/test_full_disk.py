"""A full disk during adapter downloads: the request fails with a reason, others are unaffected, a retry succeeds."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, constants

from mmlora.lora.loading.files import CONFIG_FILE, WEIGHTS_FILE
from mmlora.lora.resolver import LoRAResolver, LoRAResolverRegistry
from mmlora.plugins.lora_fsspec_resolver import FsspecResolver
from mmlora.plugins.lora_hf_hub_resolver import HubResolver
from mmlora.server.lora.resolved import start_resolution
from tests.plugins import test_hub_resolver
from tests.plugins.s3 import put, run_s3
from tests.plugins.test_hub_resolver import hub  # noqa: F401  # a fixture
from tests.server.conftest import RunningServer
from tests.server.lora.admin import chat, error_of, leave_nothing, load, names, run_updatable

DISK_BYTES = 32 * 1024  # an adapter's tensors have more
Disk = tuple[Path, Callable[[], None]]


@pytest.fixture(scope="module")
def shared(tiny_phi4: Path, adapters: dict[str, str]) -> Iterator[RunningServer]:
    with run_updatable(tiny_phi4, adapters) as server:
        yield server


@pytest.fixture
def server(shared: RunningServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningServer]:
    monkeypatch.setattr(LoRAResolverRegistry, "_resolvers", {})
    with leave_nothing(shared):
        yield shared


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A small separate file system, and a function that enlarges it; mounting needs root."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o"]
    command = [*mount, f"size={DISK_BYTES}", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    yield path, lambda: subprocess.run(["mount", "-o", "remount,size=64m", str(path)], check=True) and None
    subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.fixture
def files(adapters: dict[str, str]) -> dict[str, bytes]:
    return {name: Path(adapters["words"], name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)}


def check_outcome(server: RunningServer, disk: Disk, name: str, resolver: LoRAResolver) -> None:
    """Check for a 503 and unaffected other models while the disk is full, and for the adapter once there is space."""
    path, make_room = disk
    served, answer = names(server), chat(server, "started").json()["choices"]
    LoRAResolverRegistry.register_resolver("test", resolver)
    assert server.models is not None
    start_resolution(server.llm, server.models, {"MMLORA_ALLOW_RUNTIME_LORA_UPDATING": "true"})
    error = error_of(chat(server, name), 503)
    assert "cannot be resolved now: test" in error["message"] and str(path) not in error["message"]
    assert names(server) == served
    assert chat(server, "started").json()["choices"] == answer
    make_room()
    assert chat(server, name).json()["lora"]["adapter"] == name


def test_a_download_from_s3(server: RunningServer, disk: Disk, files: dict[str, bytes]) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch, run_s3(monkeypatch):
        put("team/sql", files)
        check_outcome(server, disk, "sql", FsspecResolver("s3://loras/team", disk[0]))
        assert [entry for entry in os.listdir(disk[0]) if entry.startswith(".")] == []


@pytest.mark.filterwarnings("ignore:Not enough free disk space")
def test_a_download_from_the_hub(
    server: RunningServer,
    disk: Disk,
    files: dict[str, bytes],
    hub: HfApi,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(disk[0]))
    monkeypatch.setattr(test_hub_resolver, "REPOSITORY", files)
    check_outcome(server, disk, "org/repo", HubResolver({"org/repo": None}, api=hub))


def test_an_adapter_that_a_client_loads_from_the_hub(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, adapters: dict[str, str]
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    error = error_of(load(server, lora_name="sql", lora_path="org/repo"), 503)
    assert "org/repo" in error["message"] and "No space left on device" in error["message"]
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: adapters["words"])
    assert load(server, lora_name="sql", lora_path="org/repo").status_code == 200
