"""Identity, eviction, reload and concurrency of the host cache."""

import shutil
import threading
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
from mmlora.lora.store.registry import AdapterRegistry
from mmlora.lora.store.store import AdapterStore


@pytest.fixture
def loads() -> list[str]:
    """Names of the adapters that were loaded, by any store."""
    return []


@pytest.fixture
def make_store(tiny_llama: nn.Module, loads: list[str]) -> Callable[..., AdapterStore]:
    index = ModuleIndex(tiny_llama)

    def make(max_lora_rank: int | None = None, hook: Callable[[], object] = lambda: None, **options: Any):
        def load(files: AdapterFiles, name: str) -> Adapter:
            loads.append(name)
            hook()
            return load_adapter(files, name, index, dtype=torch.float32, max_lora_rank=max_lora_rank)

        return AdapterStore(load, **options)

    return make


@pytest.fixture
def requests(tiny_llama: nn.Module, save_adapter: Any) -> list[LoRARequest]:
    return [LoRARequest(f"a{i}", i, str(save_adapter(tiny_llama, f"a{i}", seed=i))) for i in (1, 2, 3)]


def on_host(adapters: AdapterStore) -> list[str]:
    return [adapter.name for adapter in adapters.host.adapters]


def in_memory(request: LoRARequest) -> AdapterFiles:
    """The same adapter as tensors."""
    files = read_adapter(Path(request.lora_path))
    return files_from_memory(files.config, files.tensors)


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
    assert on_host(adapters) == ["a1", "a3"]
    adapters.get(two)
    assert on_host(adapters) == ["a3", "a2"] and adapters.host.num_evictions == 2
    identity = before.identity
    del before
    assert adapters.get(one).identity == identity
    assert loads == ["a1", "a2", "a3", "a2", "a1"]


def test_a_version_that_somebody_holds_is_counted_and_comes_back_without_a_load(
    make_store: Any, requests: Any, loads: Any
) -> None:
    adapters = make_store(max_cpu_loras=1)
    held = adapters.get(requests[0])
    num_bytes = held.num_bytes + adapters.get(requests[1]).num_bytes
    assert on_host(adapters) == ["a2"] and adapters.host.num_bytes == num_bytes
    assert adapters.get(requests[0]) is held and loads == ["a1", "a2"]
    assert adapters.host.num_bytes == held.num_bytes, "a2 is gone"


def test_pinned_adapters_stay_until_they_are_unpinned(make_store: Any, requests: Any) -> None:
    adapters = make_store(max_cpu_loras=2, max_pinned=1)
    adapters.get(requests[0])
    pinned = adapters.pin("a1")
    for request in (*requests[1:], *requests[1:]):
        adapters.get(request)
    assert adapters.get(requests[0]) is pinned
    with pytest.raises(AdapterError, match="'a3' cannot be pinned: at most 1 may be, .*; pinned are a1"):
        adapters.pin("a3")
    assert not adapters.find("a3").is_pinned
    adapters.unpin(1)
    assert adapters.pin("a3").name == "a3"
    adapters.get(requests[1])
    assert on_host(adapters) == ["a3", "a2"]


def test_adapters_from_memory_never_leave_and_fill_the_host(make_store: Any, requests: Any) -> None:
    adapters = make_store(max_cpu_loras=2)
    one, two, three = requests
    adapters.add(LoRARequest("m1", 11, "memory:m1"), in_memory(one))
    adapters.get(two)
    adapters.add(LoRARequest("m2", 12, "memory:m2"), in_memory(three))
    assert on_host(adapters) == ["m1", "m2"]
    with pytest.raises(AdapterError, match=r"'a2' finds no place .* max_cpu_loras=2 .*\(m1, m2\)"):
        adapters.get(two)
    adapters.remove("m1")
    assert adapters.get(two).name == "a2" and on_host(adapters) == ["m2", "a2"]
    adapters.forget_drained(set())
    with pytest.raises(AdapterNotFound, match="'m1' was given in memory and is not loaded"):
        adapters.get(LoRARequest("m1", 11, "memory:m1"))


def test_tensors_replace_those_of_the_same_name(make_store: Any, requests: Any) -> None:
    adapters = make_store()
    request = LoRARequest("m", 9, "memory:m")
    old = adapters.add(request, in_memory(requests[0]))
    new = adapters.add(request, in_memory(requests[1]))
    assert (new.uid, new.generation) == (old.uid, 1) and new.digest != old.digest
    assert adapters.get(request) is new
    adapters.get(requests[0])
    with pytest.raises(AdapterError, match=r"'a1' .* from 'memory:a1', but 'a1' .*; .*as does reload_lora"):
        adapters.add(LoRARequest("a1", 1, "memory:a1"), in_memory(requests[1]))
    changed = adapters.reload("a1", files=in_memory(requests[1]))
    assert changed == LoRARequest("a1", 1, "memory:a1") and adapters.get(changed).digest == new.digest
    with pytest.raises(AdapterNotFound, match="with tensors"):
        adapters.reload("a1")
    assert adapters.reload("a1", requests[2].lora_path).lora_path == requests[2].lora_path


def test_files_that_changed_behind_an_eviction_are_refused(make_store: Any, requests: Any) -> None:
    adapters = make_store(max_cpu_loras=1)
    one, two, three = requests
    adapters.get(one)
    adapters.get(two)
    shutil.copytree(three.lora_path, one.lora_path, dirs_exist_ok=True)
    for _ in range(2):
        with pytest.raises(AdapterError, match="changed since it was loaded"):
            adapters.get(one)
    assert "changed since" in adapters.find("a1").problem
    new = adapters.get(LoRARequest("a1", 1, one.lora_path, load_inplace=True))
    assert new.generation == 1 and adapters.get(one) is new and adapters.find("a1").problem is None


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
    assert adapters.host.adapters == () and adapters.entries == [] and adapters.host.num_bytes == 0


@pytest.mark.parametrize(
    "failure", [OSError("input/output error"), MemoryError(), RuntimeError("can't allocate memory")], ids=repr
)
def test_a_failure_of_the_machine_is_named_and_changes_nothing(make_store: Any, requests: Any, failure: Any) -> None:
    failures: list[BaseException] = []

    def hook() -> None:
        if failures:
            raise failures[0]

    adapters = make_store(hook=hook)
    old = adapters.get(requests[0])
    failures.append(failure)
    with pytest.raises(AdapterError, match="adapter 'a1' could not be loaded: .+"):
        adapters.reload("a1")
    with pytest.raises(AdapterError, match="adapter 'a2' could not be loaded"):
        adapters.get(requests[1])
    assert adapters.get(requests[0]) is old and [entry.name for entry in adapters.entries] == ["a1"]


def test_a_removed_name_is_refused_until_it_is_drained_or_added_again(make_store: Any, requests: Any) -> None:
    adapters = make_store()
    uid = adapters.get(requests[0]).uid
    adapters.remove("a1")
    with pytest.raises(AdapterNotFound, match="no adapter 'a1' is loaded; loaded are none"):
        adapters.remove("a1")
    for request in (requests[0], LoRARequest("a1", 1, requests[1].lora_path)):
        with pytest.raises(AdapterNotFound, match="'a1' is being unloaded"):
            adapters.get(request)
    adapters.forget_drained({uid})
    with pytest.raises(AdapterNotFound, match="'a1' is being unloaded"):
        adapters.get(requests[0])
    assert adapters.add(LoRARequest("a1", 1, requests[1].lora_path)).uid != uid
    adapters.remove(1)
    adapters.forget_drained(set())
    assert adapters.get(requests[0]).name == "a1" and adapters.host.num_bytes > 0


def test_threads_share_one_load(make_store: Any, requests: Any, loads: Any) -> None:
    """All adapters are being loaded at once, each exactly once."""
    meeting = threading.Barrier(len(requests), timeout=30)
    adapters = make_store(hook=meeting.wait)
    with ThreadPoolExecutor(12) as pool:
        loaded = list(pool.map(adapters.get, requests * 4))
    assert sorted(loads) == ["a1", "a2", "a3"] and len({id(adapter) for adapter in loaded}) == 3
    assert adapters.num_loads == 3 and adapters.load_s > 0


def test_threads_that_wait_for_a_failing_load_fail_alone(make_store: Any, requests: Any) -> None:
    adapters = make_store(max_lora_rank=2)
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(adapters.get, requests[0]) for _ in range(16)]
    assert all(isinstance(future.exception(), AdapterMismatch) for future in futures)


def test_a_reload_holds_up_nobody_who_asks_for_what_is_there(make_store: Any, requests: Any) -> None:
    may_go_on = threading.Event()
    may_go_on.set()
    adapters = make_store(hook=lambda: may_go_on.wait(30))
    old = adapters.get(requests[0])
    may_go_on.clear()
    with ThreadPoolExecutor(2) as pool:
        reloading = pool.submit(adapters.reload, "a1", requests[1].lora_path)
        try:
            assert pool.submit(adapters.get, requests[0]).result(timeout=10) is old
        finally:
            may_go_on.set()
        assert reloading.result().lora_path == requests[1].lora_path


def test_whoever_waited_for_another_place_is_refused(make_store: Any, requests: Any, monkeypatch: Any) -> None:
    may_go_on, has_asked = threading.Event(), threading.Event()
    may_go_on.set()
    adapters = make_store(max_cpu_loras=1, hook=lambda: may_go_on.wait(30))
    adapters.get(requests[0])
    adapters.get(requests[1])  # a1 is not on the host any more
    use = adapters.host.use
    monkeypatch.setattr(adapters.host, "use", lambda *args: (use(*args), has_asked.set())[0])
    may_go_on.clear()
    with ThreadPoolExecutor(2) as pool:
        reloading = pool.submit(adapters.reload, "a1", requests[2].lora_path)
        while not adapters.find("a1").lock.locked():
            pass
        asking = pool.submit(adapters.get, requests[0])
        has_asked.wait(30)
        may_go_on.set()
        assert reloading.result().lora_path == requests[2].lora_path
        with pytest.raises(AdapterError, match="'a1' .* load_inplace=True replaces it"):
            asking.result()


def test_adapters_from_memory_that_come_at_once_fill_the_host_and_no_more(make_store: Any, requests: Any) -> None:
    may_go_on = threading.Event()
    adapters, files = make_store(max_cpu_loras=2, hook=lambda: may_go_on.wait(30)), in_memory(requests[0])
    with ThreadPoolExecutor(5) as pool:
        adding = [pool.submit(adapters.add, LoRARequest(f"m{i}", 11 + i, f"memory:m{i}"), files) for i in range(5)]
        wait(adding, timeout=10, return_when=FIRST_EXCEPTION)
        may_go_on.set()
    refused = [future.exception() for future in adding if future.exception() is not None]
    assert len(refused) == 3 and all("finds no place on the host" in str(error) for error in refused)
    assert len(on_host(adapters)) == len(adapters.entries) == 2
    adapters.remove(on_host(adapters)[0])
    assert adapters.get(requests[0]).name == "a1", "no place is held for those that were refused"


def test_what_the_host_has_no_room_for_any_more_serves_who_asked(make_store: Any, requests: Any, loads: Any) -> None:
    may_go_on = threading.Event()
    adapters = make_store(max_cpu_loras=1, hook=lambda: loads[-1] != "a1" or may_go_on.wait(30))
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(adapters.get, requests[0])
        while not loads:
            pass
        adapters.add(LoRARequest("m", 9, "memory:m"), in_memory(requests[1]))
        may_go_on.set()
        assert asking.result().name == "a1" and on_host(adapters) == ["m"]


def test_a_pin_does_not_overlook_one_that_comes_meanwhile(make_store: Any, requests: Any, monkeypatch: Any) -> None:
    adapters = make_store(max_pinned=1)
    adapters.get(requests[0])
    mark = adapters.host.mark_pinned

    def come() -> str:
        adapters.get(requests[1])
        return adapters.pin("a2").name

    def let_another_in(*args: Any) -> None:
        monkeypatch.undo()
        coming.append(pool.submit(come))
        wait(coming, timeout=0.5)
        mark(*args)

    coming: list[Future[str]] = []
    monkeypatch.setattr(adapters.host, "mark_pinned", let_another_in)
    with ThreadPoolExecutor(1) as pool:
        adapters.pin("a1")
    assert "at most 1 may be" in str(coming[0].exception())
    assert [entry.is_pinned for entry in adapters.entries] == [True, False]


def test_what_was_added_is_recorded_whenever_it_has_files(make_store: Any, requests: Any, tmp_path: Path) -> None:
    registry = AdapterRegistry(tmp_path / "registry.sqlite")
    adapters, (one, two, three) = make_store(registry=registry), requests

    def recorded() -> list[tuple[str, str]]:
        return [(record.name, record.path) for record in registry.records()]

    adapters.add(one)
    adapters.reload("a1", files=in_memory(two))
    assert recorded() == []
    adapters.reload("a1", two.lora_path)
    adapters.add(LoRARequest("m", 9, "memory:m"), in_memory(one))
    adapters.reload("m", three.lora_path)
    adapters.get(two)
    adapters.reload("a2", three.lora_path)  # a request brought it: it does not stay
    assert recorded() == [("a1", two.lora_path), ("m", three.lora_path)]
    adapters.remove("a1")
    adapters.remove("a2")
    assert recorded() == [("m", three.lora_path)]


def test_stores_that_share_a_registry_keep_what_the_other_wrote(make_store: Any, requests: Any, tmp_path: Path) -> None:
    registry = AdapterRegistry(tmp_path / "registry.sqlite")
    one, other = make_store(registry=registry), make_store(registry=registry)
    for adapters in (one, other):
        adapters.add(requests[0])
    one.pin("a1")
    other.reload("a1", requests[1].lora_path)
    assert [(record.path, record.is_pinned) for record in registry.records()] == [(requests[1].lora_path, True)]
    other.unpin("a1")
    one.pin("a1")
    assert registry.records()[0].is_pinned
    other.remove("a1")
    one.add(requests[0])
    assert [(record.path, record.is_pinned) for record in registry.records()] == [(requests[0].lora_path, True)]


def test_home_and_relative_paths(make_store: Any, requests: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters, path = make_store(), Path(requests[0].lora_path)
    monkeypatch.setenv("HOME", str(path.parent))
    monkeypatch.chdir(path.parent)
    one = adapters.get(LoRARequest("a1", 1, f"~/{path.name}"))
    assert one.path == path and adapters.get(LoRARequest("a1", 1, path.name)) is one
    assert adapters.get(requests[0]) is one


def test_a_name_is_never_a_path(make_store: Any, requests: Any) -> None:
    adapters = make_store()
    assert adapters.get(LoRARequest("../../etc/passwd", 5, requests[0].lora_path)).path == Path(requests[0].lora_path)


def test_a_request_for_what_is_known_takes_any_version_and_loads_nothing_new(make_store: Any, requests: Any) -> None:
    adapters = make_store()
    known = replace(requests[0], only_known=True)
    with pytest.raises(AdapterNotFound, match="adapter 'a1' is not loaded any more"):
        adapters.get(known)
    adapters.get(requests[0])
    adapters.reload("a1", requests[1].lora_path)
    assert adapters.get(known).generation == 1
    adapters.remove("a1")
    adapters.forget_drained(set())
    with pytest.raises(AdapterNotFound, match="adapter 'a1' is not loaded any more"):
        adapters.get(known)
    assert adapters.entries == []
