"""Plugins: only the listed ones are loaded, in that order; a failing one stops the start and is named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mmlora.errors import ConfigError
from mmlora.lora.resolver import LoRAResolverRegistry
from mmlora.plugins import GROUP, load_general_plugins

MODULE = """
from mmlora.lora.resolver import LoRAResolver, LoRAResolverRegistry

class Unaware(LoRAResolver):
    async def resolve_lora(self, base_model_name, lora_name):
        return None

def register_one():
    LoRAResolverRegistry.register_resolver("one", Unaware())

def register_two():
    LoRAResolverRegistry.register_resolver("two", Unaware())

def broken():
    raise OSError("no such service")
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install a package with plugins."""
    (tmp_path / "their_plugins.py").write_text(MODULE)
    metadata = tmp_path / "their_plugins-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: their-plugins\nVersion: 1.0\n")
    entries = "one = their_plugins:register_one\ntwo = their_plugins:register_two\nbroken = their_plugins:broken\n"
    (metadata / "entry_points.txt").write_text(f"[{GROUP}]\n{entries}missing = their_plugins:nothing\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "their_plugins", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("chosen", "loaded"), [("two,one", ["two", "one"]), (" one ,", ["one"]), ("", []), (None, [])], ids=str
)
def test_the_listed_plugins_are_loaded_in_order(package: Path, chosen: str | None, loaded: list[str]) -> None:
    environment = {} if chosen is None else {"MMLORA_PLUGINS": chosen}
    assert load_general_plugins(environment) == loaded
    assert list(LoRAResolverRegistry.get_supported_resolvers()) == loaded


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("three", "'three' is not installed; installed: .*lora_filesystem_resolver.*one, two"),
        ("broken", "'broken' failed: no such service"),
        ("missing", "'missing' failed: .*nothing"),
        ("lora_filesystem_resolver", "MMLORA_LORA_RESOLVER_CACHE_DIR is not set"),
        ("lora_hf_hub_resolver", "MMLORA_LORA_RESOLVER_HF_REPO_LIST is not set"),
        ("lora_fsspec_resolver", "MMLORA_LORA_RESOLVER_URL is not set"),
    ],
)
def test_a_plugin_that_cannot_be_loaded_is_named(package: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_general_plugins({"MMLORA_PLUGINS": name})


def test_the_bundled_plugins_register_themselves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MMLORA_LORA_RESOLVER_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("MMLORA_LORA_RESOLVER_HF_REPO_LIST", "org/repo, org/other@v1")
    monkeypatch.setenv("MMLORA_LORA_RESOLVER_URL", "memory://loras")
    names = ["lora_fsspec_resolver", "lora_filesystem_resolver", "lora_hf_hub_resolver"]
    load_general_plugins({"MMLORA_PLUGINS": ",".join(names)})
    assert list(LoRAResolverRegistry.get_supported_resolvers()) == names


def test_without_s3fs_the_plugin_names_what_to_install() -> None:
    code = """
import sys
sys.modules.update(dict.fromkeys(["fastapi", "uvicorn", "s3fs"]))  # None: not importable
import mmlora.lora.resolution, mmlora.plugins, mmlora.plugins.lora_fsspec_resolver
from mmlora.errors import ConfigError
from mmlora.plugins.lora_fsspec_resolver import FsspecResolver
from pathlib import Path
try:
    FsspecResolver("s3://bucket", Path("."))
except ConfigError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "a package is missing" in result.stdout and "mmlora[s3]" in result.stdout
