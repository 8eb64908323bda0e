"""`engine.metrics`: each number after a scenario that determines it; snapshots do not change afterwards."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmlora import BASE, LLM, LoRARequest, SamplingParams
from mmlora.engine.metrics import AdapterMetrics, EngineMetrics, Histogram

GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
AUDIO = (np.sin(np.arange(8000) / 20).astype(np.float32), 16000)


@pytest.fixture
def make_llm(tiny_phi4: Path, tiny_adapters: dict[str, Path]) -> Callable[..., LLM]:
    def make(**options: Any) -> LLM:
        defaults = {"audio": str(tiny_adapters["everything"])}
        options = {"max_model_len": 256, "block_size": 4, "max_loras": 1, "default_mm_loras": defaults, **options}
        return LLM(str(tiny_phi4), enable_lora=True, **options)

    return make


def adapters_of(metrics: EngineMetrics) -> dict[str, AdapterMetrics]:
    return {adapter.name: adapter for adapter in metrics.adapters}


def test_running_requests_adapters_and_blocks_are_counted(make_llm: Any, tiny_adapters: dict[str, Path]) -> None:
    engine = make_llm().llm_engine
    a, b = (engine.add_lora(name, str(tiny_adapters[name])) for name in "ab")
    start = engine.metrics
    assert (start.num_requests_running, start.num_requests_waiting, start.num_kv_blocks_used) == (0, 0, 0)
    assert [(adapter.name, adapter.is_default) for adapter in start.adapters] == [
        ("a", False),
        ("b", False),
        ("audio", True),
    ]
    assert start.total_adapter_loads == 2 and start.total_adapter_load_s > 0
    for request_id, lora in (("a1", a), ("a2", a), ("b1", b), ("base", BASE)):
        engine.add_request(request_id, "one two three four", GREEDY, lora)
    assert engine.metrics.num_requests_waiting == 4
    engine.step()
    running = engine.metrics
    found = adapters_of(running)
    assert (running.num_requests_running, running.num_requests_waiting) == (3, 1)
    assert (found["a"].num_requests_running, found["a"].num_requests_waiting) == (2, 0)
    assert (found["b"].num_requests_running, found["b"].num_requests_waiting) == (0, 1)
    assert [found[name].is_on_device for name in ("a", "b", "audio")] == [True, False, False]
    assert all(adapter.is_on_host for adapter in running.adapters)
    assert running.num_kv_blocks_used == 3 * 5 and running.num_kv_blocks >= 128
    assert (running.total_prompt_tokens, running.total_output_tokens) == (3 * len("one two three four"), 3), "at once"
    assert (running.max_loras, found["audio"].num_loads) == (1, 1) and found["audio"].load_s > 0
    engine.remove_lora("a")
    draining = adapters_of(engine.metrics)["a"]
    assert (draining.num_requests_running, draining.is_on_host) == (2, False)
    while engine.has_unfinished_requests:
        engine.step()
    end = engine.metrics
    assert "a" not in adapters_of(end) and adapters_of(end)["b"].is_on_device
    assert (end.num_requests_running, end.num_kv_blocks_used, end.total_preemptions) == (0, 0, 0)
    assert end.total_requests == {"explicit": 3, "explicit:base": 1}
    assert end.total_finished == {"length": 4}
    assert (end.total_prompt_tokens, end.total_output_tokens) == (4 * len("one two three four"), 16)
    assert end.num_device_adapter_bytes == adapters_bytes(engine, "b")
    assert start.total_requests == {}, "a snapshot does not change"
    assert not any(value is None for value in asdict(end).values())


def adapters_bytes(engine: Any, name: str) -> int:
    return next(info.num_bytes for info in engine.list_loras() if info.name == name)


def test_the_reasons_of_choices_and_both_caches_are_counted(make_llm: Any) -> None:
    llm = make_llm()
    prompt = {"prompt": "<|audio|>what is said?", "multi_modal_data": {"audio": AUDIO}}
    for _ in range(2):
        llm.generate(["plain", prompt], GREEDY, use_tqdm=False)
    metrics = llm.llm_engine.metrics
    assert metrics.total_requests == {"none": 2, "default:audio": 2}
    assert (metrics.total_encoder_misses, metrics.num_encoder_cache_bytes > 0) == (1, True)
    (default,) = metrics.adapters
    assert default.is_default and default.is_on_host and default.is_on_device
    assert metrics.num_host_adapter_bytes == metrics.num_device_adapter_bytes > 0
    num_cached = sum(output.num_cached_tokens for output in llm.generate(["plain", prompt], GREEDY, use_tqdm=False))
    metrics = llm.llm_engine.metrics
    assert metrics.total_cached_tokens == 2 * num_cached > 0
    assert metrics.total_prefix_queries == metrics.total_prompt_tokens
    llm.generate("plain", SamplingParams(max_tokens=1, prompt_logprobs=1), use_tqdm=False)
    after = llm.llm_engine.metrics
    assert after.total_prefix_queries == metrics.total_prefix_queries, "nothing was looked for"
    assert after.total_prompt_tokens > metrics.total_prompt_tokens


def test_encoder_hits_are_counted_without_the_prefix_cache(make_llm: Any) -> None:
    llm = make_llm(enable_prefix_caching=False)
    prompt = {"prompt": "<|audio|>what is said?", "multi_modal_data": {"audio": AUDIO}}
    for _ in range(3):
        llm.generate(prompt, GREEDY, use_tqdm=False)
    metrics = llm.llm_engine.metrics
    assert (metrics.total_encoder_hits, metrics.total_encoder_misses, metrics.total_cached_tokens) == (2, 1, 0)
    assert metrics.total_prefix_queries == 0


def test_preemptions_evictions_and_failures_are_counted(
    make_llm: Any, tiny_adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_llm(max_cpu_loras=1, kv_cache_memory_bytes=3 * 2 * 4 * 3 * 12 * 4 * 70, default_mm_loras=None)
    llm.generate(["x" * 100] * 4, SamplingParams(max_tokens=100, ignore_eos=True), use_tqdm=False)
    assert llm.llm_engine.metrics.total_preemptions == llm.llm_engine.scheduler.num_preemptions > 0
    for i, name in enumerate("aba"):
        llm.generate("x", GREEDY, LoRARequest(name, 1 + i % 2, str(tiny_adapters[name])), use_tqdm=False)
    metrics = llm.llm_engine.metrics
    assert (metrics.total_adapter_evictions, metrics.total_adapter_loads) == (2, 3)
    assert {name: (found.num_loads, found.is_on_host) for name, found in adapters_of(metrics).items()} == {
        "a": (2, True),
        "b": (1, False),
    }
    monkeypatch.setattr(llm.llm_engine.runner, "run", lambda _: 1 / 0)
    llm.generate("x", GREEDY, use_tqdm=False)
    assert llm.llm_engine.metrics.total_finished["error"] == 1


def test_an_engine_without_lora_has_metrics(tiny_phi4: Path) -> None:
    llm = LLM(str(tiny_phi4), max_model_len=64)
    llm.generate("x", GREEDY, use_tqdm=False)
    metrics = llm.llm_engine.metrics
    assert metrics.adapters == () and metrics.total_requests == {"none": 1} and metrics.num_host_adapter_bytes == 0


def test_histogram_bounds_are_inclusive() -> None:
    histogram = Histogram((1, 2.5))
    for value in (0, 1, 1.1, 2.5, 7):
        histogram.observe(value)
    counts = histogram.counts()
    assert (counts.cumulative, counts.count, counts.total) == ((2, 4, 5), 5, 11.6)
    histogram.observe(0)
    assert counts.count == 5, "a snapshot does not change"
