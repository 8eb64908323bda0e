"""Shared by the tests of resolvers: adapter files, a registry that is restored, and the resolvers' event loop."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmlora.lora.loading.files import CONFIG_FILE, WEIGHTS_FILE
from mmlora.lora.request import LoRARequest
from mmlora.lora.resolver import LoRAResolver, LoRAResolverRegistry, resolver_loop

FILES = {CONFIG_FILE: json.dumps({"r": 4}).encode(), WEIGHTS_FILE: bytes(range(256)) * 40}


@pytest.fixture(autouse=True)
def clean_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(LoRAResolverRegistry, "_resolvers", {})
    for name in os.environ:
        if name.startswith(("MMLORA_", "AWS_", "HF_HUB_OFFLINE")):
            monkeypatch.delenv(name)
    yield


def write_adapter(directory: Path, files: dict[str, bytes] = FILES) -> Path:
    directory.mkdir(parents=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return directory


def read_files(directory: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def resolve(resolver: LoRAResolver, name: str, base: str = "base") -> LoRARequest | None:
    """Call a resolver on the event loop of all resolvers, as the server does."""
    return asyncio.run_coroutine_threadsafe(resolver.resolve_lora(base, name), resolver_loop()).result(60)
