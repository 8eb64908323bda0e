"""Registry file: content after a restart, concurrent writers, and damaged files."""

import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from mmlora.errors import AdapterError, ConfigError, RegistryError
from mmlora.lora.store import registry as registry_module
from mmlora.lora.store.registry import AdapterRecord, AdapterRegistry

RECORD = AdapterRecord("sql", 7, "/adapters/sql", None, "d1", False)
OTHER = AdapterRecord("it's; DROP TABLE adapters --", 2**63 - 1, "org/x@v1", "base", "d2", True)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "registry.sqlite"


def test_records_are_read_in_order_and_replaced_by_name(file: Path) -> None:
    registry = AdapterRegistry(file)
    assert registry.records() == []
    registry.save(RECORD)
    registry.save(OTHER)
    changed = replace(RECORD, digest="d3", path="/elsewhere", lora_int_id=8, base_model_name="b")
    registry.save(changed)
    assert AdapterRegistry(file).records() == [changed, OTHER]
    assert (OTHER.request.lora_name, OTHER.request.lora_int_id) == (OTHER.name, OTHER.lora_int_id)
    registry.remove("sql")
    registry.remove("never seen")
    assert AdapterRegistry(file).records() == [OTHER]


def test_pins_are_updated_separately(file: Path) -> None:
    registry = AdapterRegistry(file)
    registry.save(RECORD)
    registry.mark_pinned("sql", True)
    registry.mark_pinned("never seen", True)
    registry.save(replace(RECORD, digest="d3"))  # by a process that has not seen the pin
    assert registry.records() == [replace(RECORD, digest="d3", is_pinned=True)]
    registry.mark_pinned("sql", False)
    assert not registry.records()[0].is_pinned


@pytest.mark.parametrize("wrong", [{"name": "\ud800"}, {"path": "/dir\udcff"}], ids=["name", "path"])
def test_invalid_unicode_is_a_named_error(file: Path, wrong: dict[str, str]) -> None:
    registry = AdapterRegistry(file)
    with pytest.raises(AdapterError, match="the adapter registry .* cannot be written: .*surrogates not allowed"):
        registry.save(replace(RECORD, **wrong))
    assert registry.records() == []


def test_a_column_of_another_version_is_kept(file: Path) -> None:
    AdapterRegistry(file).save(RECORD)
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("ALTER TABLE adapters ADD COLUMN note TEXT")
    registry = AdapterRegistry(file)
    registry.save(OTHER)
    assert registry.records() == [RECORD, OTHER]


def test_threads_and_another_process_write_at_once(file: Path) -> None:
    registry = AdapterRegistry(file)
    code = (
        "import sys; from mmlora.lora.store.registry import *\n"
        "registry = AdapterRegistry(sys.argv[1]); print(flush=True)\n"
        "for i in range(15): registry.save(AdapterRecord(f'p{i}', i + 1, 'x', None, 'd', False))"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(file)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"\n"
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda i: registry.save(replace(RECORD, name=f"t{i}")), range(15)))
    assert other.returncode == 0
    names = {record.name for record in registry.records()}
    assert names == {f"{writer}{i}" for writer in "tp" for i in range(15)}


@pytest.mark.parametrize(
    "content", [b"not a database, but a long enough text " * 100, b"SQLite format 3\0" + b"\1" * 4096]
)
def test_a_damaged_file_is_a_named_error_and_is_not_changed(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=f"lora_registry='{file}'.*(not a database|malformed)"):
        AdapterRegistry(file)
    assert file.read_bytes() == content


def test_the_file_of_another_program_is_not_changed(file: Path) -> None:
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("CREATE TABLE adapters (name TEXT)")
    with pytest.raises(ConfigError, match="application_id 0 and user_version 0; a registry of this version has"):
        AdapterRegistry(file)


def test_paths_that_cannot_be_opened_are_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "no" / "such" / "directory"):
        with pytest.raises(ConfigError, match="unable to open database file"):
            AdapterRegistry(path)


def test_a_record_with_invalid_values_is_named_at_startup(file: Path) -> None:
    AdapterRegistry(file).save(replace(RECORD, lora_int_id=0))
    with pytest.raises(ConfigError, match="lora_int_id is 0"):
        AdapterRegistry(file)


def test_a_file_damaged_later_is_an_adapter_error(file: Path) -> None:
    registry = AdapterRegistry(file)
    file.write_bytes(b"gone " * 1000)
    with pytest.raises(AdapterError, match=f"the adapter registry {file} cannot be written"):
        registry.save(RECORD)
    with pytest.raises(AdapterError, match="cannot be read"):
        registry.records()


def test_a_deleted_file_is_an_error_and_is_not_created_again(file: Path) -> None:
    registry = AdapterRegistry(file)
    file.unlink()
    for change in (lambda: registry.save(RECORD), lambda: registry.remove("sql"), registry.records):
        with pytest.raises(RegistryError, match=str(file)) as failed:
            change()
        assert not failed.value.is_temporary and str(file.parent) not in failed.value.reason
    assert not file.exists()


def test_a_locked_file_is_a_temporary_error_after_a_while(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = AdapterRegistry(file)
    monkeypatch.setattr(registry_module, "BUSY_TIMEOUT_S", 0.2)
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(RegistryError, match="locked") as failed:
            registry.save(RECORD)
        assert failed.value.is_temporary and str(file.parent) not in failed.value.reason
        with pytest.raises(ConfigError, match=f"lora_registry='{file}' cannot be used: database is locked"):
            AdapterRegistry(file)
    registry.save(RECORD)
    assert registry.records() == [RECORD]


def test_a_relative_path_is_that_of_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    registry = AdapterRegistry("a registry?#%41.sqlite")
    monkeypatch.chdir("/")
    registry.save(RECORD)
    assert [path.name for path in tmp_path.iterdir()] == ["a registry?#%41.sqlite"]


@pytest.mark.parametrize("name", [":memory:", "a\0b", "caf\udce9"], ids=ascii)
def test_special_names_are_files_or_errors(tmp_path: Path, name: str) -> None:
    try:
        AdapterRegistry(tmp_path / name).save(RECORD)
    except ConfigError as error:
        assert "\0" in name and "lora_registry=" in str(error)
    assert [path.name for path in tmp_path.iterdir()] == ([] if "\0" in name else [name])
