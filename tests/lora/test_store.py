"""Identity, eviction, reload and concurrency of the host cache."""

import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mmlora.errors import AdapterError, AdapterMismatch, AdapterNotFound
from mmlora.lora import files, store
from mmlora.lora.module_index import ModuleIndex
from mmlora.lora.request import LoRARequest
from mmlora.lora.store import AdapterStore


@pytest.fixture
def make_store(tiny_llama: nn.Module) -> Callable[..., AdapterStore]:
    return lambda **arguments: AdapterStore(ModuleIndex(tiny_llama), dtype=torch.float32, **arguments)


@pytest.fixture
def requests(tiny_llama: nn.Module, save_adapter: Any) -> list[LoRARequest]:
    return [LoRARequest(f"a{i}", i, str(save_adapter(tiny_llama, f"a{i}", seed=i))) for i in (1, 2, 3)]


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    load = store.load_adapter

    def counted(path: Path, name: str, *arguments: Any, **keywords: Any) -> Any:
        names.append(name)
        return load(path, name, *arguments, **keywords)

    monkeypatch.setattr(store, "load_adapter", counted)
    return names


def test_an_adapter_loads_once_and_identities_differ(make_store: Any, requests: Any, loads: list[str]) -> None:
    adapters = make_store()
    first = adapters.get(requests[0])
    assert adapters.get(requests[0]) is first and loads == ["a1"]
    assert first.uid > 0 and first.generation == 0
    assert adapters.get(requests[1]).uid != first.uid
    assert make_store().get(requests[0]).uid != first.uid


def test_the_same_weights_under_two_ids_are_two_adapters(make_store: Any, requests: Any) -> None:
    adapters, path = make_store(), requests[0].lora_path
    one, two = adapters.get(requests[0]), adapters.get(LoRARequest("other", 9, path))
    assert one.digest == two.digest and one.identity != two.identity


@pytest.mark.parametrize(
    ("name", "int_id", "remedy"),
    [("a1", 1, "load_inplace=True"), ("a1", 9, "load_inplace=True"), ("x", 1, "choose another id")],
    ids=["both", "same-name", "same-id"],
)
def test_a_name_or_id_with_another_path_is_refused(
    make_store: Any, requests: Any, name: str, int_id: int, remedy: str
) -> None:
    adapters = make_store()
    adapters.get(requests[0])
    with pytest.raises(AdapterError, match=remedy) as refused:
        adapters.get(LoRARequest(name, int_id, requests[1].lora_path))
    assert requests[0].lora_path in str(refused.value) and requests[1].lora_path in str(refused.value)


def test_the_least_recently_used_leaves_and_comes_back_as_the_same(make_store: Any, requests: Any, loads: Any) -> None:
    adapters = make_store(max_cpu_loras=2)
    one, two, three = requests
    before = adapters.get(one)
    adapters.get(two)
    adapters.get(one)
    adapters.get(three)
    assert [adapter.name for adapter in adapters.adapters] == ["a1", "a3"]
    adapters.get(two)
    assert [adapter.name for adapter in adapters.adapters] == ["a3", "a2"]
    assert adapters.get(one).identity == before.identity
    assert loads == ["a1", "a2", "a3", "a2", "a1"]


def test_pinned_adapters_stay(make_store: Any, requests: Any) -> None:
    adapters = make_store(max_cpu_loras=1)
    pinned = adapters.pin(requests[0])
    for request in (*requests[1:], *requests[1:]):
        adapters.get(request)
    assert adapters.get(requests[0]) is pinned


def test_files_that_changed_behind_an_eviction_are_refused(make_store: Any, requests: Any) -> None:
    adapters = make_store(max_cpu_loras=1)
    one, two, three = requests
    adapters.get(one)
    adapters.get(two)
    shutil.copytree(three.lora_path, one.lora_path, dirs_exist_ok=True)
    for _ in range(2):
        with pytest.raises(AdapterError, match="changed since it was loaded"):
            adapters.get(one)
    new = adapters.get(LoRARequest("a1", 1, one.lora_path, load_inplace=True))
    assert new.generation == 1 and adapters.get(one) is new


def test_reload_swaps_once_per_request_object(make_store: Any, requests: Any, loads: list[str]) -> None:
    adapters = make_store()
    one, two, _ = requests
    old = adapters.get(one)
    reload = LoRARequest("a1", 1, two.lora_path, load_inplace=True)
    new = adapters.get(reload)
    assert adapters.get(reload) is new and loads == ["a1", "a1"]
    assert (new.uid, new.generation) == (old.uid, 1) and new.digest != old.digest
    assert adapters.get(LoRARequest("a1", 1, two.lora_path)) is new
    assert adapters.get(LoRARequest("a1", 1, two.lora_path, load_inplace=True)).generation == 2
    assert old.modules  # whoever runs with the old version keeps it


def test_request_objects_that_were_reloaded_for_stay_so_whoever_comes_between(make_store: Any, requests: Any) -> None:
    adapters = make_store()
    one, two, _ = requests
    adapters.get(one)
    to_one, to_two = (LoRARequest("a1", 1, request.lora_path, load_inplace=True) for request in (one, two))
    assert [adapters.get(to).generation for to in (to_one, to_two, to_one, to_two, to_one)] == [1, 2, 2, 2, 2]


def test_a_reload_does_not_take_the_id_of_another_name(make_store: Any, requests: Any) -> None:
    adapters = make_store()
    kept = adapters.get(requests[0])
    with pytest.raises(AdapterError, match="choose another id"):
        adapters.get(LoRARequest("other", 1, requests[1].lora_path, load_inplace=True))
    assert adapters.get(requests[0]) is kept


def test_a_first_load_in_place_is_no_reload(make_store: Any, requests: Any, loads: list[str]) -> None:
    adapters = make_store()
    request = LoRARequest("a1", 1, requests[0].lora_path, load_inplace=True)
    assert adapters.get(request).generation == 0 and adapters.get(request).generation == 0 and loads == ["a1"]


def test_a_failed_reload_keeps_the_old_version(make_store: Any, requests: Any, tmp_path: Path) -> None:
    adapters = make_store()
    old = adapters.get(requests[0])
    (tmp_path / "empty").mkdir()
    bad = LoRARequest("a1", 1, str(tmp_path / "empty"), load_inplace=True)
    for _ in range(2):
        with pytest.raises(AdapterNotFound):
            adapters.get(bad)
    assert adapters.get(requests[0]) is old


def test_a_failed_load_leaves_nothing_behind(make_store: Any, requests: Any) -> None:
    adapters = make_store(max_lora_rank=2)
    with pytest.raises(AdapterMismatch, match="max_lora_rank=2"):
        adapters.get(requests[0])
    assert adapters.adapters == () and not adapters.remove("a1")


def test_a_removed_name_may_take_another_path(make_store: Any, requests: Any) -> None:
    adapters = make_store()
    old = adapters.get(requests[0])
    assert adapters.remove("a1") and not adapters.remove("a1") and adapters.adapters == ()
    assert adapters.get(LoRARequest("a1", 1, requests[1].lora_path)).uid != old.uid


def test_threads_share_one_load(make_store: Any, requests: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All adapters are inside `load_adapter` at once, each exactly once."""
    adapters, names = make_store(), []
    meeting = threading.Barrier(len(requests), timeout=30)
    load = store.load_adapter

    def meet(path: Path, name: str, *arguments: Any, **keywords: Any) -> Any:
        names.append(name)
        meeting.wait()
        return load(path, name, *arguments, **keywords)

    monkeypatch.setattr(store, "load_adapter", meet)
    with ThreadPoolExecutor(12) as pool:
        loaded = list(pool.map(adapters.get, requests * 4))
    assert sorted(names) == ["a1", "a2", "a3"] and len({id(adapter) for adapter in loaded}) == 3


def test_threads_that_wait_for_a_failing_load_fail_alone(make_store: Any, requests: Any) -> None:
    adapters = make_store(max_lora_rank=2)
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(adapters.get, requests[0]) for _ in range(16)]
    assert all(isinstance(future.exception(), AdapterMismatch) for future in futures)


def test_home_and_relative_paths(make_store: Any, requests: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters, path = make_store(), Path(requests[0].lora_path)
    monkeypatch.setenv("HOME", str(path.parent))
    monkeypatch.chdir(path.parent)
    one = adapters.get(LoRARequest("a1", 1, f"~/{path.name}"))
    assert one.path == path and adapters.get(LoRARequest("a1", 1, path.name)) is one
    assert adapters.get(requests[0]) is one


def test_hub_ids_fetch_only_the_adapters_files(requests: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repo_id: str, allow_patterns: list[str]) -> str:
        assert allow_patterns == ["adapter_config.json", "adapter_model.safetensors"]
        if repo_id != "org/sql-lora":
            raise OSError(f"{repo_id} is offline")
        return str(requests[0].lora_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert files.resolve_adapter_path("org/sql-lora") == Path(requests[0].lora_path)
    with pytest.raises(AdapterNotFound, match=r"no directory .*org/other, and not on the Hub .*is offline"):
        files.resolve_adapter_path("org/other")


@pytest.mark.parametrize("path", ["/nowhere/at/all", "../x", "~nobody-here/x", "a/b/c", "a\0b", "./x"], ids=repr)
def test_paths_that_are_nothing(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))
    with pytest.raises(AdapterNotFound, match="adapter path"):
        files.resolve_adapter_path(path)


def test_a_name_is_never_a_path(make_store: Any, requests: Any) -> None:
    adapters = make_store()
    assert adapters.get(LoRARequest("../../etc/passwd", 5, requests[0].lora_path)).path == Path(requests[0].lora_path)
