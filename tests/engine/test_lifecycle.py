"""Life cycle of adapters while requests run: draining, reloads, pins, and memory."""

import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from mmlora import LLM, LLMEngine, LoRAMix, LoRARequest, SamplingParams
from mmlora.errors import AdapterError, AdapterNotFound, RequestError
from tests.engine.lifecycle import PROMPT, Contents, finish, make_contents, start, tokens

LONG = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def contents(text_checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Contents:
    return make_contents(text_checkpoint("llama"), tmp_path_factory.mktemp("contents"))


@pytest.fixture(scope="module")
def engine(contents: Contents) -> LLMEngine:
    return start(contents.model).llm_engine


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Any:
    """Remove all adapters after each test on the shared engine, and check that their bytes are freed."""
    yield
    if "engine" in request.fixturenames:
        engine: LLMEngine = request.getfixturevalue("engine")
        assert not engine.has_unfinished_requests
        for info in engine.list_loras():
            engine.remove_lora(info.name)
        assert (engine.lora.cache.num_bytes, engine.lora.num_device_bytes) == (0, 0)


def test_unloading_refuses_at_once_and_frees_with_the_last_request(engine: LLMEngine, contents: Contents) -> None:
    a = engine.add_lora("a", str(contents.paths[0]))
    gc.collect()
    gc.disable()  # the bytes are freed without the cyclic collector
    try:
        engine.add_request("one", PROMPT, LONG, a)
        engine.add_request("two", PROMPT, LONG, a)
        engine.step()
        assert engine.list_loras()[0].num_requests == 2
        engine.remove_lora("a")
        assert engine.list_loras() == []
        with pytest.raises(AdapterNotFound, match="'a' is being unloaded"):
            engine.add_request("late", PROMPT, LONG, a)
        assert engine.lora.cache.num_bytes == engine.lora.num_device_bytes == contents.sizes[0]
        engine.abort_request("two")
        assert engine.lora.num_device_bytes == contents.sizes[0]
        assert finish(engine) == {"one": contents.answers[0]}
        assert (engine.lora.cache.num_bytes, engine.lora.num_device_bytes) == (0, 0)
    finally:
        gc.enable()
    engine.add_request("again", PROMPT, LONG, a)  # drained: a request with a path loads it again
    assert finish(engine) == {"again": contents.answers[0]}


def test_a_version_keeps_its_slot_while_requests_for_it_wait(contents: Contents, monkeypatch: Any) -> None:
    engine = start(contents.model, max_num_seqs=1).llm_engine
    a = engine.add_lora("a", str(contents.paths[0]))
    slots: Any = engine.slots
    loads: list[str] = []
    load = slots._load
    monkeypatch.setattr(slots, "_load", lambda slot, adapter: (loads.append(adapter.name), load(slot, adapter)))
    for request_id in ("one", "two", "three"):
        engine.add_request(request_id, PROMPT, LONG, a)
    engine.remove_lora("a")
    assert list(finish(engine).values()) == [contents.answers[0]] * 3
    assert loads == ["a"] and engine.lora.num_device_bytes == 0


def test_a_name_can_be_added_again_while_its_old_version_drains(engine: LLMEngine, contents: Contents) -> None:
    old = engine.add_lora("a", str(contents.paths[0]))
    engine.add_request("old", PROMPT, LONG, old)
    engine.step()
    engine.remove_lora("a")
    new = engine.add_lora("a", str(contents.paths[1]))
    engine.add_request("new", PROMPT, LONG, new)
    assert finish(engine) == {"old": contents.answers[0], "new": contents.answers[1]}
    assert engine.lora.cache.num_bytes == engine.lora.num_device_bytes == contents.sizes[1]


@pytest.mark.parametrize("max_loras", [1, 2])
def test_requests_finish_on_the_version_they_started_with(contents: Contents, max_loras: int, tmp_path: Path) -> None:
    engine = start(contents.model, max_loras=max_loras).llm_engine
    path = contents.write(tmp_path / "a", 0)
    engine.add_request("zero", PROMPT, LONG, engine.add_lora("a", str(path)))
    engine.step()
    for content, name in ((1, "one"), (2, "two")):
        contents.write(path, content)
        engine.add_request(name, PROMPT, LONG, engine.reload_lora("a"))
        engine.step()
    info = engine.list_loras()[0]
    assert (info.generation, info.num_requests, info.num_bytes) == (2, 3, contents.sizes[2])
    assert engine.lora.cache.num_bytes == sum(contents.sizes[:3])
    assert finish(engine) == {"zero": contents.answers[0], "one": contents.answers[1], "two": contents.answers[2]}
    assert engine.lora.cache.num_bytes == engine.lora.num_device_bytes == contents.sizes[2]


def test_pinned_adapters_keep_their_slots_and_leave_one(contents: Contents) -> None:
    llm = start(contents.model, max_loras=3, max_cpu_loras=4)
    requests = [llm.add_lora(f"a{i}", str(path)) for i, path in enumerate(contents.paths[:4])]
    llm.pin_lora("a0")
    llm.pin_lora(requests[1].lora_int_id)
    with pytest.raises(AdapterError, match="'a2' cannot be pinned: at most 2 .*; pinned are a0, a1"):
        llm.pin_lora("a2")
    extra = LoRARequest("extra", 9, str(contents.paths[4]))
    for request, answer in zip([*requests, extra], contents.answers, strict=False):
        assert tokens(llm, request) == answer
        assert {info.name for info in llm.list_loras() if info.is_on_device} >= {"a0", "a1"}
    assert {info.name for info in llm.list_loras() if info.is_on_host} == {"a0", "a1", "a3", "extra"}
    llm.reload_lora("a0", str(contents.paths[5]))
    assert tokens(llm, llm.list_loras()[0].request) == contents.answers[5], "the new version is pinned, too"
    tokens(llm, requests[2])
    tokens(llm, requests[3])
    assert {info.name for info in llm.list_loras() if info.is_on_device} == {"a0", "a1", "a3"}
    llm.pin_lora("a0", is_pinned=False)
    llm.pin_lora("a2")
    tokens(llm, requests[3])
    assert {info.name for info in llm.list_loras() if info.is_on_device} == {"a1", "a2", "a3"}


def test_a_pin_waits_for_a_slot_that_is_in_use(engine: LLMEngine, contents: Contents) -> None:
    for name, path in zip("abc", contents.paths, strict=False):
        engine.add_request(name, PROMPT, LONG, engine.add_lora(name, str(path)))
    engine.step()
    engine.pin_lora("c")
    assert not next(info for info in engine.list_loras() if info.name == "c").is_on_device
    assert finish(engine) == dict(zip("abc", contents.answers, strict=False))
    engine.add_request("a", PROMPT, LONG, engine.list_loras()[0].request)
    engine.add_request("b", PROMPT, LONG, engine.list_loras()[1].request)
    assert len(finish(engine)) == 2
    assert next(info for info in engine.list_loras() if info.name == "c").is_on_device


def test_with_one_slot_pins_hold_the_host_only(contents: Contents) -> None:
    llm = start(contents.model, max_loras=1, max_cpu_loras=2)
    a = llm.add_lora("a", str(contents.paths[0]))
    llm.pin_lora("a")
    b = llm.add_lora("b", str(contents.paths[1]))
    assert [tokens(llm, request) for request in (a, b, a)] == [contents.answers[i] for i in (0, 1, 0)]
    llm.add_lora("c", str(contents.paths[2]))
    assert [(info.name, info.is_on_host) for info in llm.list_loras()] == [("a", True), ("b", False), ("c", True)]
    with pytest.raises(AdapterError, match="at most 1 may be"):
        llm.pin_lora("b")


def test_tensors_in_memory_act_like_files_and_are_copied(contents: Contents) -> None:
    llm = start(contents.model, max_cpu_loras=2)
    given = contents.tensors(0)
    given["tensors"] = {key: tensor.requires_grad_() for key, tensor in given["tensors"].items()}
    policy = llm.add_lora("policy", **given)
    with torch.no_grad():
        for tensor in given["tensors"].values():
            tensor.zero_()  # as a training loop does
    assert tokens(llm, policy) == contents.answers[0]
    for i in (1, 2, 3):
        tokens(llm, LoRARequest(f"other{i}", i, str(contents.paths[i])))
    assert llm.list_loras()[0].is_on_host, "it cannot come back, so it does not leave"
    for step in (1, 2, 3):
        assert llm.add_lora("policy", **contents.tensors(step)) == policy
        assert tokens(llm, policy) == contents.answers[step]
    assert llm.list_loras()[0].generation == 3


def test_tensors_are_swapped_in_between_two_steps(engine: LLMEngine, contents: Contents) -> None:
    policy = engine.add_lora("policy", **contents.tensors(0))
    engine.add_request("before", PROMPT, LONG, policy)
    engine.step()
    engine.add_lora("policy", **contents.tensors(1))
    engine.add_request("after", PROMPT, LONG, policy)
    assert finish(engine) == {"before": contents.answers[0], "after": contents.answers[1]}
    engine.add_lora("policy", **contents.tensors(2))
    assert engine.lora.cache.num_bytes == contents.sizes[2] and engine.lora.num_device_bytes == 0


def test_the_digest_of_a_mix_depends_only_on_its_contents(engine: LLMEngine, contents: Contents) -> None:
    """It does not depend on earlier loads, so it is the same in every process."""
    digests = []
    for names in (("a", "b"), ("other", "another")):
        a, b = (engine.add_lora(name, str(path)) for name, path in zip(names, contents.paths, strict=False))
        mix = LoRAMix([(a, 1.0), (b, 0.5)])
        digests.append(engine.process_input("x", PROMPT, LONG, mix).lora.digest)
        digests.append(engine.process_input("x", PROMPT, LONG, LoRAMix([(a, 1.0), (b, 0.25)])).lora.digest)
    assert digests[0] == digests[2] != digests[1] == digests[3]


def test_an_adapter_of_a_mix_may_be_removed_while_the_mix_runs(engine: LLMEngine, contents: Contents) -> None:
    a, b = (engine.add_lora(name, str(contents.paths[i])) for i, name in enumerate("ab"))
    engine.add_request("mix", PROMPT, LONG, LoRAMix([(a, 1.0), (b, 0.5)]))
    engine.step()
    assert engine.lora.num_device_bytes == sum(contents.sizes[:2])
    assert engine.lora.cache.num_bytes == 2 * sum(contents.sizes[:2]), "the mix has its own matrices"
    engine.remove_lora("a")
    engine.remove_lora("b")
    assert len(finish(engine)) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a",), "takes a LoRARequest alone, or a name"),
        (("a", "path", {"r": 1}), "takes a LoRARequest alone, or a name"),
        ((LoRARequest("a", 1, "x"), "path"), "takes a LoRARequest alone, or a name"),
        ((5, "path"), "lora_name is 5"),
        (("", "path"), "lora_name is ''"),
        (("a", None, {"r": 1}), "tensors is a NoneType"),
    ],
)
def test_wrong_arguments_are_named(engine: LLMEngine, arguments: Any, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        engine.add_lora(*arguments[:2], config=arguments[2] if len(arguments) > 2 else None)
    for change in (engine.remove_lora, engine.pin_lora, engine.reload_lora):
        with pytest.raises(AdapterNotFound, match="no adapter 'a' is loaded; loaded adapters: none"):
            change("a")


def test_an_engine_without_lora_refuses_life_cycle_calls(contents: Contents) -> None:
    llm = LLM(str(contents.model), max_model_len=64)
    with pytest.raises(RequestError, match="adapters cannot be managed: the engine has enable_lora=False"):
        llm.add_lora("a", str(contents.paths[0]))


def test_a_batch_loads_its_adapters_concurrently(contents: Contents, monkeypatch: Any) -> None:
    llm = start(contents.model)
    meeting = threading.Barrier(3, timeout=30)
    load = llm.llm_engine.host_cache._load_adapter
    monkeypatch.setattr(llm.llm_engine.host_cache, "_load_adapter", lambda *args: (meeting.wait(), load(*args))[1])
    requests = [LoRARequest(f"a{i}", 1 + i, str(contents.paths[i])) for i in range(3)]
    missing = LoRARequest("missing", 9, "/no/such/adapter")
    with pytest.raises(AdapterNotFound, match="/no/such/adapter"):
        llm.generate([PROMPT] * 7, LONG, [*requests, *requests, missing], use_tqdm=False)
    outputs = llm.generate([PROMPT] * 6, LONG, [*requests, *requests], use_tqdm=False)
    assert [output.outputs[0].token_ids[:4] for output in outputs] == contents.answers[:3] * 2


def test_more_adapters_in_a_batch_than_the_host_keeps_load_once_each(contents: Contents) -> None:
    llm = start(contents.model, max_loras=1, max_cpu_loras=2)
    requests = [LoRARequest(f"a{i}", 1 + i, str(path)) for i, path in enumerate(contents.paths)]
    outputs = llm.generate([PROMPT] * 24, LONG, requests * 4, use_tqdm=False)
    assert [output.outputs[0].token_ids[:4] for output in outputs] == contents.answers * 4
    assert llm.llm_engine.metrics.total_adapter_loads == len(requests)
