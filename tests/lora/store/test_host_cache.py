"""Identity, eviction, reload and concurrency of the host cache."""

import gc
import shutil
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mmlora.errors import AdapterError, AdapterMismatch, AdapterNotFound
from mmlora.lora.adapter import Adapter
from mmlora.lora.loading.files import AdapterFiles, files_from_memory, read_adapter
from mmlora.lora.loading.load import load_adapter
from mmlora.lora.loading.module_index import ModuleIndex
from mmlora.lora.request import LoRARequest
from mmlora.lora.store.host_cache import HostCache
from mmlora.lora.store.registry import AdapterRegistry


@pytest.fixture
def loads() -> list[str]:
    """Names of the loaded adapters, of all caches."""
    return []


@pytest.fixture
def make_cache(tiny_llama: nn.Module, loads: list[str]) -> Callable[..., HostCache]:
    index = ModuleIndex(tiny_llama)

    def make(max_lora_rank: int | None = None, hook: Callable[[], object] = lambda: None, **options: Any):
        def load(files: AdapterFiles, name: str) -> Adapter:
            loads.append(name)
            hook()
            return load_adapter(files, name, index, dtype=torch.float32, max_lora_rank=max_lora_rank)

        return HostCache(load, **options)

    return make


@pytest.fixture
def requests(tiny_llama: nn.Module, save_adapter: Any) -> list[LoRARequest]:
    return [LoRARequest(f"a{i}", i, str(save_adapter(tiny_llama, f"a{i}", seed=i))) for i in (1, 2, 3)]


def on_host(cache: HostCache) -> list[str]:
    return [adapter.name for adapter in cache.adapters]


def in_memory(request: LoRARequest) -> AdapterFiles:
    """Return the same adapter as tensors."""
    files = read_adapter(Path(request.lora_path))
    return files_from_memory(files.config, files.tensors)


def test_an_adapter_loads_once_and_identities_differ(make_cache: Any, requests: Any, loads: list[str]) -> None:
    cache = make_cache()
    first = cache.get(requests[0])
    assert cache.get(requests[0]) is first and loads == ["a1"]
    assert first.uid > 0 and first.generation == 0
    assert cache.get(requests[1]).uid != first.uid
    assert make_cache().get(requests[0]).uid != first.uid


def test_the_same_weights_under_two_ids_are_two_adapters(make_cache: Any, requests: Any) -> None:
    cache, path = make_cache(), requests[0].lora_path
    one, two = cache.get(requests[0]), cache.get(LoRARequest("other", 9, path))
    assert one.digest == two.digest and one.identity != two.identity


@pytest.mark.parametrize(
    ("name", "int_id", "remedy"),
    [("a1", 1, "load_inplace=True"), ("a1", 9, "load_inplace=True"), ("x", 1, "choose another id")],
    ids=["both", "same-name", "same-id"],
)
def test_a_name_or_id_with_another_path_is_refused(
    make_cache: Any, requests: Any, name: str, int_id: int, remedy: str
) -> None:
    cache = make_cache()
    cache.get(requests[0])
    with pytest.raises(AdapterError, match=remedy) as refused:
        cache.get(LoRARequest(name, int_id, requests[1].lora_path))
    assert requests[0].lora_path in str(refused.value) and requests[1].lora_path in str(refused.value)


def test_the_least_recently_used_is_evicted_and_reloaded_with_its_identity(
    make_cache: Any, requests: Any, loads: Any
) -> None:
    cache = make_cache(max_cpu_loras=2)
    one, two, three = requests
    before = cache.get(one)
    cache.get(two)
    cache.get(one)
    cache.get(three)
    assert on_host(cache) == ["a1", "a3"]
    cache.get(two)
    assert on_host(cache) == ["a3", "a2"] and cache.num_evictions == 2
    identity = before.identity
    del before
    assert cache.get(one).identity == identity
    assert loads == ["a1", "a2", "a3", "a2", "a1"]


def test_an_evicted_version_in_use_is_counted_and_reused_without_a_load(
    make_cache: Any, requests: Any, loads: Any
) -> None:
    cache = make_cache(max_cpu_loras=1)
    held = cache.get(requests[0])
    num_bytes = held.num_bytes + cache.get(requests[1]).num_bytes
    assert on_host(cache) == ["a2"] and cache.num_bytes == num_bytes
    assert cache.get(requests[0]) is held and loads == ["a1", "a2"]
    assert cache.num_bytes == held.num_bytes, "a2 is gone"


def test_pinned_adapters_stay_until_they_are_unpinned(make_cache: Any, requests: Any) -> None:
    cache = make_cache(max_cpu_loras=2, max_pinned=1)
    cache.get(requests[0])
    pinned = cache.pin("a1")
    for request in (*requests[1:], *requests[1:]):
        cache.get(request)
    assert cache.get(requests[0]) is pinned
    with pytest.raises(AdapterError, match="'a3' cannot be pinned: at most 1 may be pinned, .*; pinned are a1"):
        cache.pin("a3")
    assert not cache.find("a3").is_pinned
    cache.unpin(1)
    assert cache.pin("a3").name == "a3"
    cache.get(requests[1])
    assert on_host(cache) == ["a3", "a2"]


def test_adapters_from_memory_are_never_evicted_and_fill_the_cache(make_cache: Any, requests: Any) -> None:
    cache = make_cache(max_cpu_loras=2)
    one, two, three = requests
    cache.add(LoRARequest("m1", 11, "memory:m1"), in_memory(one))
    cache.get(two)
    cache.add(LoRARequest("m2", 12, "memory:m2"), in_memory(three))
    assert on_host(cache) == ["m1", "m2"]
    with pytest.raises(AdapterError, match=r"'a2' cannot be loaded: .* max_cpu_loras=2 .*\(m1, m2\)"):
        cache.get(two)
    cache.remove("m1")
    assert cache.get(two).name == "a2" and on_host(cache) == ["m2", "a2"]
    cache.forget_drained(set())
    with pytest.raises(AdapterNotFound, match="'m1' was given in memory and is not loaded"):
        cache.get(LoRARequest("m1", 11, "memory:m1"))


def test_tensors_replace_those_of_the_same_name(make_cache: Any, requests: Any) -> None:
    cache = make_cache()
    request = LoRARequest("m", 9, "memory:m")
    old = cache.add(request, in_memory(requests[0]))
    new = cache.add(request, in_memory(requests[1]))
    assert (new.uid, new.generation) == (old.uid, 1) and new.digest != old.digest
    assert cache.get(request) is new
    cache.get(requests[0])
    with pytest.raises(AdapterError, match=r"'a1' .* from 'memory:a1', but 'a1' .*; .*as does reload_lora"):
        cache.add(LoRARequest("a1", 1, "memory:a1"), in_memory(requests[1]))
    changed = cache.reload("a1", files=in_memory(requests[1]))
    assert changed == LoRARequest("a1", 1, "memory:a1") and cache.get(changed).digest == new.digest
    with pytest.raises(AdapterNotFound, match="with tensors"):
        cache.reload("a1")
    assert cache.reload("a1", requests[2].lora_path).lora_path == requests[2].lora_path


def test_files_that_changed_after_an_eviction_are_refused(make_cache: Any, requests: Any) -> None:
    cache = make_cache(max_cpu_loras=1)
    one, two, three = requests
    cache.get(one)
    cache.get(two)
    shutil.copytree(three.lora_path, one.lora_path, dirs_exist_ok=True)
    for _ in range(2):
        with pytest.raises(AdapterError, match="changed since it was loaded"):
            cache.get(one)
    assert "changed since" in cache.find("a1").problem
    new = cache.get(LoRARequest("a1", 1, one.lora_path, load_inplace=True))
    assert new.generation == 1 and cache.get(one) is new and cache.find("a1").problem is None


def test_reload_swaps_once_per_request_object(make_cache: Any, requests: Any, loads: list[str]) -> None:
    cache = make_cache()
    one, two, _ = requests
    old = cache.get(one)
    reload = LoRARequest("a1", 1, two.lora_path, load_inplace=True)
    new = cache.get(reload)
    assert cache.get(reload) is new and loads == ["a1", "a1"]
    assert (new.uid, new.generation) == (old.uid, 1) and new.digest != old.digest
    assert cache.get(LoRARequest("a1", 1, two.lora_path)) is new
    assert cache.get(LoRARequest("a1", 1, two.lora_path, load_inplace=True)).generation == 2
    assert old.modules  # running requests keep the old version


def test_a_request_object_reloads_once_even_if_others_reload_in_between(make_cache: Any, requests: Any) -> None:
    cache = make_cache()
    one, two, _ = requests
    cache.get(one)
    to_one, to_two = (LoRARequest("a1", 1, request.lora_path, load_inplace=True) for request in (one, two))
    assert [cache.get(to).generation for to in (to_one, to_two, to_one, to_two, to_one)] == [1, 2, 2, 2, 2]


def test_a_reload_does_not_take_the_id_of_another_name(make_cache: Any, requests: Any) -> None:
    cache = make_cache()
    kept = cache.get(requests[0])
    with pytest.raises(AdapterError, match="choose another id"):
        cache.get(LoRARequest("other", 1, requests[1].lora_path, load_inplace=True))
    assert cache.get(requests[0]) is kept


def test_a_first_load_in_place_is_not_a_reload(make_cache: Any, requests: Any, loads: list[str]) -> None:
    cache = make_cache()
    request = LoRARequest("a1", 1, requests[0].lora_path, load_inplace=True)
    assert cache.get(request).generation == 0 and cache.get(request).generation == 0 and loads == ["a1"]


def test_a_failed_reload_keeps_the_old_version(make_cache: Any, requests: Any, tmp_path: Path) -> None:
    cache = make_cache()
    old = cache.get(requests[0])
    (tmp_path / "empty").mkdir()
    bad = LoRARequest("a1", 1, str(tmp_path / "empty"), load_inplace=True)
    for _ in range(2):
        with pytest.raises(AdapterNotFound):
            cache.get(bad)
    assert cache.get(requests[0]) is old


def test_a_failed_load_leaves_nothing_behind(make_cache: Any, requests: Any) -> None:
    cache = make_cache(max_lora_rank=2)
    with pytest.raises(AdapterMismatch, match="max_lora_rank=2"):
        cache.get(requests[0])
    assert cache.adapters == () and cache.entries == [] and cache.num_bytes == 0


def test_the_error_of_a_failed_load_keeps_no_tensors(tiny_llama: nn.Module, requests: Any) -> None:
    """Errors live long: in futures, in logs, and in reference cycles that are collected late."""
    index, read = ModuleIndex(tiny_llama), list[weakref.ref[torch.Tensor]]()

    def load(files: AdapterFiles, name: str) -> Adapter:
        for tensor in files.tensors.values():
            read.append(weakref.ref(tensor.fill_(torch.nan)))
        return load_adapter(files, name, index, dtype=torch.float32)

    cache = HostCache(load)
    gc.disable()
    try:
        with pytest.raises(AdapterMismatch, match="contains NaN") as raised:
            cache.get(requests[0])
        assert raised.value.__traceback__ is not None and read and not any(tensor() is not None for tensor in read)
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "failure", [OSError("input/output error"), MemoryError(), RuntimeError("can't allocate memory")], ids=repr
)
def test_a_system_error_is_named_and_changes_nothing(make_cache: Any, requests: Any, failure: Any) -> None:
    failures: list[BaseException] = []

    def hook() -> None:
        if failures:
            raise failures[0]

    cache = make_cache(hook=hook)
    old = cache.get(requests[0])
    failures.append(failure)
    with pytest.raises(AdapterError, match="adapter 'a1' could not be loaded: .+"):
        cache.reload("a1")
    with pytest.raises(AdapterError, match="adapter 'a2' could not be loaded"):
        cache.get(requests[1])
    assert cache.get(requests[0]) is old and [entry.name for entry in cache.entries] == ["a1"]


def test_a_removed_name_is_refused_until_it_is_drained_or_added_again(make_cache: Any, requests: Any) -> None:
    cache = make_cache()
    uid = cache.get(requests[0]).uid
    cache.remove("a1")
    with pytest.raises(AdapterNotFound, match="no adapter 'a1' is loaded; loaded adapters: none"):
        cache.remove("a1")
    for request in (requests[0], LoRARequest("a1", 1, requests[1].lora_path)):
        with pytest.raises(AdapterNotFound, match="'a1' is being unloaded"):
            cache.get(request)
    cache.forget_drained({uid})
    with pytest.raises(AdapterNotFound, match="'a1' is being unloaded"):
        cache.get(requests[0])
    assert cache.add(LoRARequest("a1", 1, requests[1].lora_path)).uid != uid
    cache.remove(1)
    cache.forget_drained(set())
    assert cache.get(requests[0]).name == "a1" and cache.num_bytes > 0


def test_threads_share_one_load(make_cache: Any, requests: Any, loads: Any) -> None:
    """All adapters are being loaded at once, each exactly once."""
    meeting = threading.Barrier(len(requests), timeout=30)
    cache = make_cache(hook=meeting.wait)
    with ThreadPoolExecutor(12) as pool:
        loaded = list(pool.map(cache.get, requests * 4))
    assert sorted(loads) == ["a1", "a2", "a3"] and len({id(adapter) for adapter in loaded}) == 3
    assert cache.num_loads == 3 and cache.load_s > 0


def test_threads_that_wait_for_a_failing_load_fail_alone(make_cache: Any, requests: Any) -> None:
    cache = make_cache(max_lora_rank=2)
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(cache.get, requests[0]) for _ in range(16)]
    assert all(isinstance(future.exception(), AdapterMismatch) for future in futures)


def test_a_reload_does_not_block_requests_for_the_cached_version(make_cache: Any, requests: Any) -> None:
    may_go_on = threading.Event()
    may_go_on.set()
    cache = make_cache(hook=lambda: may_go_on.wait(30))
    old = cache.get(requests[0])
    may_go_on.clear()
    with ThreadPoolExecutor(2) as pool:
        reloading = pool.submit(cache.reload, "a1", requests[1].lora_path)
        try:
            assert pool.submit(cache.get, requests[0]).result(timeout=10) is old
        finally:
            may_go_on.set()
        assert reloading.result().lora_path == requests[1].lora_path


def test_a_request_that_waited_during_a_reload_from_another_path_is_refused(
    make_cache: Any, requests: Any, monkeypatch: Any
) -> None:
    may_go_on, has_asked = threading.Event(), threading.Event()
    may_go_on.set()
    cache = make_cache(max_cpu_loras=1, hook=lambda: may_go_on.wait(30))
    cache.get(requests[0])
    cache.get(requests[1])  # evicts a1
    look_up = cache._look_up
    monkeypatch.setattr(cache, "_look_up", lambda *args: (look_up(*args), has_asked.set())[0])
    may_go_on.clear()
    with ThreadPoolExecutor(2) as pool:
        reloading = pool.submit(cache.reload, "a1", requests[2].lora_path)
        while not cache.find("a1").lock.locked():
            pass
        asking = pool.submit(cache.get, requests[0])
        has_asked.wait(30)
        may_go_on.set()
        assert reloading.result().lora_path == requests[2].lora_path
        with pytest.raises(AdapterError, match="'a1' .* load_inplace=True replaces it"):
            asking.result()


def test_concurrent_adapters_from_memory_do_not_exceed_the_capacity(make_cache: Any, requests: Any) -> None:
    may_go_on = threading.Event()
    cache, files = make_cache(max_cpu_loras=2, hook=lambda: may_go_on.wait(30)), in_memory(requests[0])
    with ThreadPoolExecutor(5) as pool:
        adding = [pool.submit(cache.add, LoRARequest(f"m{i}", 11 + i, f"memory:m{i}"), files) for i in range(5)]
        wait(adding, timeout=10, return_when=FIRST_EXCEPTION)
        may_go_on.set()
    refused = [future.exception() for future in adding if future.exception() is not None]
    assert len(refused) == 3 and all("the host LoRA cache is full" in str(error) for error in refused)
    assert len(on_host(cache)) == len(cache.entries) == 2
    cache.remove(on_host(cache)[0])
    assert cache.get(requests[0]).name == "a1", "the reservations of refused adapters were released"


def test_an_adapter_that_lost_its_place_during_the_load_still_serves_its_request(
    make_cache: Any, requests: Any, loads: Any
) -> None:
    may_go_on = threading.Event()
    cache = make_cache(max_cpu_loras=1, hook=lambda: loads[-1] != "a1" or may_go_on.wait(30))
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(cache.get, requests[0])
        while not loads:
            pass
        cache.add(LoRARequest("m", 9, "memory:m"), in_memory(requests[1]))
        may_go_on.set()
        assert asking.result().name == "a1" and on_host(cache) == ["m"]


def test_concurrent_pins_do_not_exceed_the_limit(make_cache: Any, requests: Any, monkeypatch: Any) -> None:
    cache = make_cache(max_pinned=1)
    cache.get(requests[0])
    check = cache._check_pins  # runs under the lock of the cache

    def come() -> str:
        cache.get(requests[1])
        return cache.pin("a2").name

    def let_another_in(*args: Any) -> None:
        monkeypatch.undo()
        coming.append(pool.submit(come))
        wait(coming, timeout=0.5)
        check(*args)

    coming: list[Future[str]] = []
    monkeypatch.setattr(cache, "_check_pins", let_another_in)
    with ThreadPoolExecutor(1) as pool:
        cache.pin("a1")
    assert "at most 1 may be" in str(coming[0].exception())
    assert [entry.is_pinned for entry in cache.entries] == [True, False]


def test_added_adapters_are_recorded_while_they_have_files(make_cache: Any, requests: Any, tmp_path: Path) -> None:
    registry = AdapterRegistry(tmp_path / "registry.sqlite")
    cache, (one, two, three) = make_cache(registry=registry), requests

    def recorded() -> list[tuple[str, str]]:
        return [(record.name, record.path) for record in registry.records()]

    cache.add(one)
    cache.reload("a1", files=in_memory(two))
    assert recorded() == []
    cache.reload("a1", two.lora_path)
    cache.add(LoRARequest("m", 9, "memory:m"), in_memory(one))
    cache.reload("m", three.lora_path)
    cache.get(two)
    cache.reload("a2", three.lora_path)  # loaded by a request only, so it is not recorded
    assert recorded() == [("a1", two.lora_path), ("m", three.lora_path)]
    cache.remove("a1")
    cache.remove("a2")
    assert recorded() == [("m", three.lora_path)]


def test_caches_that_share_a_registry_keep_each_others_changes(make_cache: Any, requests: Any, tmp_path: Path) -> None:
    registry = AdapterRegistry(tmp_path / "registry.sqlite")
    one, other = make_cache(registry=registry), make_cache(registry=registry)
    for cache in (one, other):
        cache.add(requests[0])
    one.pin("a1")
    other.reload("a1", requests[1].lora_path)
    assert [(record.path, record.is_pinned) for record in registry.records()] == [(requests[1].lora_path, True)]
    other.unpin("a1")
    one.pin("a1")
    assert registry.records()[0].is_pinned
    other.remove("a1")
    one.add(requests[0])
    assert [(record.path, record.is_pinned) for record in registry.records()] == [(requests[0].lora_path, True)]


def test_home_and_relative_paths(make_cache: Any, requests: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, path = make_cache(), Path(requests[0].lora_path)
    monkeypatch.setenv("HOME", str(path.parent))
    monkeypatch.chdir(path.parent)
    one = cache.get(LoRARequest("a1", 1, f"~/{path.name}"))
    assert one.path == path and cache.get(LoRARequest("a1", 1, path.name)) is one
    assert cache.get(requests[0]) is one


def test_a_name_is_never_used_as_a_path(make_cache: Any, requests: Any) -> None:
    cache = make_cache()
    assert cache.get(LoRARequest("../../etc/passwd", 5, requests[0].lora_path)).path == Path(requests[0].lora_path)


def test_a_request_with_only_known_uses_any_version_and_never_loads(make_cache: Any, requests: Any) -> None:
    cache = make_cache()
    known = replace(requests[0], only_known=True)
    with pytest.raises(AdapterNotFound, match="adapter 'a1' is not loaded any more"):
        cache.get(known)
    cache.get(requests[0])
    cache.reload("a1", requests[1].lora_path)
    assert cache.get(known).generation == 1
    cache.remove("a1")
    cache.forget_drained(set())
    with pytest.raises(AdapterNotFound, match="adapter 'a1' is not loaded any more"):
        cache.get(known)
    assert cache.entries == []
