"""`lora_filesystem_resolver`: directories under its root, and none outside of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmlora.errors import AdapterError, ConfigError
from mmlora.lora.loading.files import CONFIG_FILE, WEIGHTS_FILE
from mmlora.plugins.lora_filesystem_resolver import FilesystemResolver
from tests.plugins.conftest import FILES, resolve, write_adapter


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_adapter(tmp_path / "root" / "foobar")
    write_adapter(tmp_path / "root" / "org" / "repo")
    write_adapter(tmp_path / "outside")
    return tmp_path / "root"


@pytest.mark.parametrize("name", ["foobar", "org/repo"])
def test_an_adapter_is_the_directory_of_its_name(root: Path, name: str) -> None:
    request = resolve(FilesystemResolver(root), name)
    assert request is not None
    assert (request.lora_name, request.lora_path) == (name, str(root / name))


@pytest.mark.parametrize(
    "name",
    ["unknown", "org", "../outside", "foobar/../../outside", "", ".", "foobar\0", "/outside", "x" * 10_000, "foo*"],
    ids=repr,
)
def test_any_other_name_is_unknown(root: Path, name: str) -> None:
    assert resolve(FilesystemResolver(root), name) is None


def test_an_absolute_name_is_unknown(root: Path) -> None:
    assert resolve(FilesystemResolver(root), str(root.parent / "outside")) is None


@pytest.mark.parametrize("what", ["directory", CONFIG_FILE, WEIGHTS_FILE])
def test_a_link_out_of_the_root_is_refused(root: Path, what: str) -> None:
    linked = root / "linked"
    if what == "directory":
        linked.symlink_to(root.parent / "outside")
    else:
        write_adapter(linked, {name: content for name, content in FILES.items() if name != what})
        (linked / what).symlink_to(root.parent / "outside" / what)
    with pytest.raises(AdapterError, match="lies outside of"):
        resolve(FilesystemResolver(root), "linked")


@pytest.mark.parametrize("what", ["directory", WEIGHTS_FILE])
def test_a_circular_link_is_not_an_adapter(root: Path, what: str) -> None:
    circle = root / "circle"
    if what == "directory":
        circle.symlink_to("circle")
        assert resolve(FilesystemResolver(root), "circle") is None
    else:
        write_adapter(circle, {CONFIG_FILE: FILES[CONFIG_FILE]})
        (circle / what).symlink_to(what)
        with pytest.raises(AdapterError, match=f"{circle / what} cannot be followed: "):
            resolve(FilesystemResolver(root), "circle")


def test_links_within_the_root_are_followed(root: Path) -> None:
    """As in the Hub cache, where snapshots link to blobs and the root itself may be a link."""
    (root / "alias").symlink_to("foobar")
    (root.parent / "root link").symlink_to(root)
    request = resolve(FilesystemResolver(root.parent / "root link"), "alias")
    assert request is not None and request.lora_path == str(root / "foobar")


def test_a_directory_whose_path_starts_like_the_root_is_outside(root: Path) -> None:
    write_adapter(root.parent / "root2" / "foobar")
    (root / "near").symlink_to(root.parent / "root2" / "foobar")
    with pytest.raises(AdapterError, match="lies outside of"):
        resolve(FilesystemResolver(root), "near")


def test_a_root_must_be_a_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="MMLORA_LORA_RESOLVER_CACHE_DIR=.*must be a directory"):
        FilesystemResolver(tmp_path / "nothing")
