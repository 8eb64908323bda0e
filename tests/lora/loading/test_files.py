"""Adapter paths and files: local directories, the Hub and memory; loaded tensors are copies."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mmlora.errors import AdapterError, AdapterMismatch, AdapterNotFound
from mmlora.lora.loading.files import files_from_memory, read_adapter, reason_of, resolve_adapter_path

COMMIT = "0123456789012345678901234567890123456789"


@pytest.fixture
def adapter(tiny_llama: nn.Module, save_adapter: Any) -> Path:
    return save_adapter(tiny_llama, "a")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None, list[str]]]:
    """Record requests to a fake Hub that has `org/many` with adapters in two folders."""
    asked: list[tuple[str, str | None, list[str]]] = []
    for folder in ("", "sql", "deep/er"):
        (tmp_path / "snapshot" / folder).mkdir(parents=True, exist_ok=True)

    def download(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo_id, revision, allow_patterns))
        if repo_id != "org/many":
            raise OSError(f"{repo_id} is offline")
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return asked


@pytest.mark.parametrize(
    ("path", "revision", "folder"),
    [
        ("org/many", None, ""),
        ("org/many@v1.0", "v1.0", ""),
        ("org/many@refs/pr/3", "refs/pr/3", ""),
        ("org/many/sql", None, "sql"),
        ("org/many/deep/er@main", "main", "deep/er"),
    ],
)
def test_hub_paths(hub: Any, tmp_path: Path, path: str, revision: str | None, folder: str) -> None:
    assert resolve_adapter_path(path) == tmp_path / "snapshot" / folder
    prefix = folder + "/" if folder else ""
    files = [prefix + "adapter_config.json", prefix + "adapter_model.safetensors"]
    assert hub == [("org/many", revision, files)]


def test_missing_hub_adapters_are_named(hub: Any) -> None:
    with pytest.raises(AdapterNotFound, match=r"'org/other': no directory .*, and not on the Hub .*is offline"):
        resolve_adapter_path("org/other")
    with pytest.raises(AdapterNotFound, match="org/many on the Hub has no adapter in 'nothing'"):
        resolve_adapter_path("org/many/nothing")


@pytest.mark.parametrize(
    "path",
    [
        *("/nowhere/at/all", "../x", "~nobody-here/x", "a\0b", "./x", "org/../x", "org/x/../../y", "org/x@../../main"),
        *("org/x@", "@main", "org/x@a@b", "org//x", "org/x/.hidden", "https://example.com/x"),
    ],
    ids=repr,
)
def test_invalid_paths_never_reach_the_hub(
    hub: Any, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapterNotFound, match="adapter path"):
        resolve_adapter_path(path)
    assert hub == []


def test_a_local_directory_takes_precedence_over_the_hub(hub: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("org/many", "org/many@v1", "x@y/deep@er"):
        (tmp_path / name).mkdir(parents=True)
        assert resolve_adapter_path(name) == tmp_path / name
    with pytest.raises(AdapterNotFound, match="deep@er is a directory, which has no revisions"):
        resolve_adapter_path("x@y/deep@er@main")
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterNotFound, match="'file' is a file"):
        resolve_adapter_path("file")
    assert hub == []


class _Hub(BaseHTTPRequestHandler):
    """Minimal Hub server for downloading two files; `files` maps paths in the repository to content."""

    files: dict[str, bytes] = {}
    asked: list[str] = []

    @property
    def listed(self) -> list[str]:
        return [*self.files, "other/model.bin"]

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.asked.append(self.path)
        name = self.path.partition(f"/resolve/{COMMIT}/")[2]
        content, kind = self.files.get(name), "application/octet-stream"
        if self.path.startswith(("/api/models/org/many/revision/v2", f"/api/models/org/many/tree/{COMMIT}")):
            entries: Any = [{"type": "file", "path": name, "size": 1, "oid": "0"} for name in self.listed]
            if "/tree/" not in self.path:
                siblings = [{"rfilename": name} for name in self.listed]
                entries = {"id": "org/many", "sha": COMMIT, "siblings": siblings}
            content, kind = json.dumps(entries).encode(), "application/json"
        self.send_response(200 if content is not None else 404)
        content = content or b"{}"
        for key, value in {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            "ETag": f'"{sha256(content).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub_server(adapter: Path) -> Iterator[ThreadingHTTPServer]:
    _Hub.files = {f"sub/{file.name}": file.read_bytes() for file in adapter.iterdir() if file.suffix != ".md"}
    with ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_subfolder_at_a_revision_is_downloaded_over_http(hub_server: Any, adapter: Path, tmp_path: Path) -> None:
    code = (
        "from mmlora.lora.loading.files import read_adapter, resolve_adapter_path as resolve\n"
        "files = read_adapter(resolve('org/many/sub@v2'))\n"
        "print(files.path, len(files.tensors), files.config['r'])"
    )
    environment = {
        **{key: value for key, value in os.environ.items() if key.lower() not in ("http_proxy", "all_proxy")},
        "HF_ENDPOINT": f"http://127.0.0.1:{hub_server.server_address[1]}",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "0",
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    directory, num_tensors, rank = done.stdout.split()
    assert directory == f"{tmp_path}/hf/hub/models--org--many/snapshots/{COMMIT}/sub"
    assert (int(num_tensors), rank) == (len(read_adapter(adapter).tensors), "4")
    assert not any("model.bin" in path for path in _Hub.asked), "only the adapter's files are fetched"


def test_loaded_tensors_do_not_change_with_the_files(adapter: Path) -> None:
    files = read_adapter(adapter)
    before = {key: tensor.clone() for key, tensor in files.tensors.items()}
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(b"\xff" * weights.stat().st_size)
    assert all(torch.equal(files.tensors[key], before[key]) for key in before)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda path: (path / "adapter_config.json").unlink(), AdapterNotFound, "no adapter_config.json"),
        (lambda path: (path / "adapter_config.json").write_text("["), AdapterMismatch, "cannot be read as JSON"),
        (lambda path: (path / "adapter_config.json").write_text("[]"), AdapterMismatch, "contains a list"),
        (lambda path: (path / "adapter_model.safetensors").unlink(), AdapterNotFound, "no adapter_model.safetensors"),
        (lambda path: _cut(path, 0), AdapterError, r"\(0 bytes\) is not a valid safetensors file"),
        (lambda path: _cut(path, 200), AdapterError, r"\(200 bytes\) is not a valid safetensors file"),
        (lambda path: _cut(path, -1), AdapterError, "is not a valid safetensors file"),
    ],
    ids=["no-config", "bad-config", "list-config", "no-tensors", "empty", "cut-header", "one-byte-short"],
)
def test_files_that_cannot_be_read_are_named(adapter: Path, change: Any, kind: Any, message: str) -> None:
    change(adapter)
    with pytest.raises(kind, match=message):
        read_adapter(adapter)


def _cut(path: Path, length: int) -> None:
    file = path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:length])


def test_a_disk_that_disappears_between_two_accesses_is_named(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> bytes:
        path.unlink()
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(AdapterError, match="Input/output error"):
        _ = read_adapter(adapter).tensors


def test_an_adapter_from_memory_is_a_copy_with_pefts_own_configuration(adapter: Path) -> None:
    from peft import LoraConfig

    tensors = dict(read_adapter(adapter).tensors)
    key = next(iter(tensors))
    config = LoraConfig.from_pretrained(adapter)
    assert isinstance(config.target_modules, set)
    files = files_from_memory(config, tensors)
    before = tensors[key].clone()
    tensors[key].zero_()
    assert torch.equal(files.tensors[key], before) and (files.path, files.origin) == (None, "memory")
    assert files.config["target_modules"] == ["down_proj", "q_proj"] and files.config["peft_type"] == "LORA"


@pytest.mark.parametrize(
    "path",
    [
        "rel",
        "./rel",
        "sub/../rel",
        "rel@v1",
        "link",
        "~/rel",
        "nowhere/at/all/deep",
        "../nowhere",
        "rel/a.txt",
        "x" * 300,
    ],
    ids=lambda path: path[:20],
)
def test_errors_name_the_path_as_it_was_given(
    hub: Any, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: Path
) -> None:
    """Clients that load adapters must not learn the working or home directory of the server."""
    home = tmp_path / "secret-place"
    for folder in ("rel", "sub"):
        (home / folder).mkdir(parents=True)
    (home / "rel/a.txt").write_text("x")
    (home / "link").symlink_to(home / "rel")
    monkeypatch.chdir(home)
    monkeypatch.setenv("HOME", str(home))
    messages = []
    changes: list[Any] = [
        lambda: None,
        lambda: shutil.copytree(adapter, home / "rel", dirs_exist_ok=True),
        lambda: (home / "rel/adapter_model.safetensors").write_bytes(b"x"),
        lambda: (home / "rel/adapter_model.safetensors").unlink(),
        lambda: (home / "rel/adapter_config.json").write_text('{"peft_type": "VERA"}'),
        lambda: (home / "rel/adapter_config.json").write_text("[]"),
        lambda: (home / "rel/adapter_config.json").write_text("["),
    ]
    for change in changes:
        change()
        try:
            files = read_adapter(resolve_adapter_path(path), path)
            assert files.origin == path
        except AdapterError as error:
            messages.append(str(error))
    assert len(messages) >= 6 and all(path[:9] in message for message in messages)
    assert not any("secret" in message for message in messages)


def test_reasons_of_the_operating_system_have_no_file_name(tmp_path: Path) -> None:
    with pytest.raises(OSError) as missing:
        (tmp_path / "a").read_bytes()
    assert reason_of(missing.value) == "No such file or directory" and str(tmp_path) in str(missing.value)
    assert reason_of(ValueError("x")) == "x" and reason_of(OSError("only text")) == "only text"


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        (None, {}, "config is a NoneType"),
        ({"r": 1}, None, "tensors is a NoneType"),
        ({"r": 1}, {"a": [1.0]}, r"tensors\['a'\] is a list"),
        ({"r": 1}, {1: torch.zeros(1)}, r"tensors\[1\] is a Tensor"),
        ({"r": object()}, {}, "config cannot be written as JSON: .* has no JSON form"),
    ],
)
def test_an_invalid_adapter_from_memory_is_named(config: object, tensors: object, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        files_from_memory(config, tensors)
