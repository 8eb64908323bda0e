"""`/metrics`, scraped and parsed as Prometheus does: each sample has the value that known requests imply."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from mmlora.errors import ConfigError
from mmlora.server.api import build_app
from mmlora.server.args import LoRAModule, ServerArgs
from mmlora.server.launch import load_served_models
from tests.server.conftest import (
    RunningServer,
    ServerFactory,
    input_audio_part,
    run_app,
    text_part,
    url_part,
    wait_for,
)

GRAFANA = Path(__file__).resolve().parents[3] / "docs" / "grafana.json"
QUESTION = text_part("what is it?")
CHAT = "/v1/chat/completions"
LONG = {"max_tokens": 300, "ignore_eos": True}


class Scrape(dict[tuple[str, frozenset[tuple[str, str]]], float]):
    """Samples by name (without the prefix) and labels (without `model_name`)."""

    def __call__(self, name: str, **labels: str) -> float | None:
        return self.get((name, frozenset(labels.items())))

    def by(self, name: str, label: str) -> dict[str, float]:
        """Return the nonzero values of a metric by one of its labels."""
        return {dict(labels)[label]: value for (found, labels), value in self.items() if found == name and value}


def scrape(server: RunningServer | str, model: str = "tiny") -> Scrape:
    address = server if isinstance(server, str) else server.address
    response = httpx.get(f"{address}/metrics", timeout=30)
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/plain; version=")
    found = Scrape()
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name") == model
            key = sample.name.removeprefix("mmlora:"), frozenset(labels.items())
            assert sample.name.startswith("mmlora:") and key not in found
            found[key] = sample.value
    return found


def post(server: RunningServer, text: str = "hello", **fields: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 4, "temperature": 0, **fields}
    return httpx.post(server.address + CHAT, json=body, timeout=60)


@pytest.fixture
def server(start_server: ServerFactory, adapters: dict[str, str]) -> RunningServer:
    defaults = {"audio": adapters["speech"], "image": adapters["vision"]}
    return start_server(LoRAModule("words", adapters["words"]), default_mm_loras=defaults)


def test_every_request_is_counted_once(server: RunningServer, wav: bytes, png: bytes) -> None:
    audio, image = input_audio_part(wav), url_part("image_url", png, "image/png")
    before = scrape(server)
    assert before.by("request_success_total", "finished_reason") == {} and before("prompt_tokens_total") == 0
    assert before("request_success_total", finished_reason="stop") == 0, (
        "counters start at 0, so that rates are defined"
    )
    answers = [
        server.ask(QUESTION, n=2),
        server.ask(audio, QUESTION),
        server.ask(audio, QUESTION),
        server.ask(image, QUESTION),
        server.ask(image, audio, QUESTION),
        server.ask(QUESTION, model="words"),
        server.ask(QUESTION, lora=[]),
        server.ask(QUESTION, lora=[{"name": "words", "scale": 0.5}]),
    ]
    assert post(server, model="no-such").status_code == 404
    assert post(server, temprature=1).status_code == 400
    assert httpx.get(f"{server.address}/some/path").status_code == 404
    assert httpx.get(f"{server.address}/v1/models/words").status_code == 200
    found = scrape(server)

    usage = [answer["usage"] for answer in answers]
    num_output = sum(entry["completion_tokens"] for entry in usage)
    num_prompt = sum(entry["prompt_tokens"] for entry in usage)
    num_cached = sum(entry["prompt_tokens_details"]["cached_tokens"] for entry in usage)
    reasons: dict[str, float] = {}
    for choice in (choice for answer in answers for choice in answer["choices"]):
        reasons[choice["finish_reason"]] = reasons.get(choice["finish_reason"], 0) + 1
    assert found.by("request_success_total", "finished_reason") == reasons
    assert found("generation_tokens_total") == found("request_generation_tokens_sum") == num_output
    assert found("prompt_tokens_total") == found("request_prompt_tokens_sum") == num_prompt
    assert found("prefix_cache_queries_total") == num_prompt
    assert found("prefix_cache_hits_total") == num_cached > 0
    assert (found("num_requests_running"), found("num_requests_waiting"), found("kv_cache_usage_perc")) == (0, 0, 0)
    assert found.by("lora_decisions_total", "reason") == {
        "none": 1,
        "default:audio": 2,
        "default:image": 1,
        "conflict:audio+image": 1,
        "explicit": 2,
        "explicit:base": 1,
    }
    for name in ("e2e_request_latency", "time_to_first_token", "request_queue_time"):
        assert found(f"{name}_seconds_count") == found(f"{name}_seconds_bucket", le="+Inf") == len(answers)
    assert found("request_prompt_tokens_count") == found("request_generation_tokens_count") == len(answers)
    num_answers = sum(len(answer["choices"]) for answer in answers)
    assert found("inter_token_latency_seconds_count") == num_output - num_answers
    first_s, total_s = found("time_to_first_token_seconds_sum"), found("e2e_request_latency_seconds_sum")
    assert 0 <= (found("request_queue_time_seconds_sum") or 0) < (first_s or 0) < (total_s or 0)
    assert found("http_requests_total", route=CHAT, status="200") == len(answers)
    assert found("http_requests_total", route=CHAT, status="404") == 1
    assert found("http_requests_total", route=CHAT, status="400") == 1
    assert found("http_requests_total", route="other", status="404") == 1
    assert found("http_requests_total", route="/v1/models/{name:path}", status="200") == 1
    assert found("http_requests_total", route="/metrics", status="200") == 1, "this scrape has not ended"
    assert (found("media_decode_seconds_total") or 0) > 0
    assert [found("media_decoders_lost_total", reason=reason) for reason in ("timeout", "crashed")] == [0, 0]
    # The audio was encoded with its adapter, and next to the image without one; the image's adapter has no towers.
    assert (found("encoder_cache_queries_total"), found("encoder_cache_bytes")) == (
        (found("encoder_cache_hits_total") or 0) + server.llm.engine.metrics.total_encoder_misses,
        server.llm.engine.metrics.num_encoder_cache_bytes,
    )


def test_adapters_have_separate_series_that_end_when_unloaded(
    start_server: ServerFactory, adapters: dict[str, str], wav: bytes
) -> None:
    odd = 'o"dd\n\\name'
    server = start_server(
        LoRAModule("audio2", adapters["vision"]),
        LoRAModule(odd, adapters["words"]),
        default_mm_loras={"audio": adapters["speech"]},
    )
    server.ask(input_audio_part(wav))
    found = scrape(server)
    places = {
        (name, place): found("lora_resident", adapter=name, kind=kind, place=place)
        for name, kind in (("audio", "default"), ("audio2", "adapter"), (odd, "adapter"))
        for place in ("host", "slot")
    }
    assert places == {
        ("audio", "host"): 1,
        ("audio", "slot"): 1,
        ("audio2", "host"): 1,
        ("audio2", "slot"): 0,
        (odd, "host"): 1,
        (odd, "slot"): 0,
    }
    assert found.by("lora_loads_total", "adapter") == {"audio": 1, "audio2": 1, odd: 1}
    assert all(seconds > 0 for seconds in found.by("lora_load_seconds_total", "adapter").values())
    assert found.by("lora_load_seconds_total", "adapter").keys() == {"audio", "audio2", odd}
    assert (found("lora_bytes", place="host") or 0) > (found("lora_bytes", place="slot") or 0) > 0
    asyncio.run(server.llm.remove_lora(odd))
    assert {dict(labels).get("adapter") for _, labels in scrape(server)} == {"audio", "audio2", None}


def loaded(found: Scrape) -> dict[str, tuple[str, str, str]]:
    """Return level, pinned and rank of each loaded adapter."""
    labels = [dict(labels) for (name, labels), value in found.items() if name == "lora_adapter_loaded" and value == 1]
    assert len({entry["adapter_name"] for entry in labels}) == len(labels)
    return {entry["adapter_name"]: (entry["level"], entry["pinned"], entry["rank"]) for entry in labels}


def counts(found: Scrape) -> list[float | None]:
    names = ("num_gpu_loaded_lora_adapters", "num_cpu_loaded_lora_adapters", "max_gpu_lora_adapters")
    return [found(name) for name in names]


def test_where_adapters_are_loaded(start_server: ServerFactory, adapters: dict[str, str], wav: bytes) -> None:
    """As the Kubernetes inference gateway expects it: one series per adapter that is loaded, with its place."""
    modules = LoRAModule("vision", adapters["vision"]), LoRAModule("words", adapters["words"])
    server = start_server(*modules, default_mm_loras={"audio": adapters["speech"]}, max_cpu_loras=2)
    ranks = {name: str(adapter.report.max_rank) for name, adapter in cached_adapters(server).items()}
    found = scrape(server)
    assert loaded(found) == {name: ("cpu", "false", ranks[name]) for name in ("audio", "vision", "words")}
    assert counts(found) == [0, 3, 2] and all(int(rank) > 0 for rank in ranks.values())
    server.ask(input_audio_part(wav))
    server.ask(QUESTION, model="words")
    server.ask(QUESTION, lora=[{"name": "vision", "scale": 0.5}])  # a mix needs a slot but is not an adapter
    found = scrape(server)
    levels = {name: level for name, (level, _, _) in loaded(found).items()}
    assert levels["vision"] == "cpu" and list(levels.values()).count("gpu") == 1 == counts(found)[0]
    asyncio.run(server.llm.pin_lora("words"))
    found = scrape(server)
    assert loaded(found)["words"] == ("gpu", "true", ranks["words"])
    asyncio.run(server.llm.add_lora("third", adapters["speech"]))  # evicts the adapter that is not pinned
    found = scrape(server)
    assert set(loaded(found)) == {"audio", "words", "third"} and counts(found)[1] == 3
    asyncio.run(server.llm.remove_lora("third"))
    assert set(loaded(scrape(server))) == {"audio", "words"}


def cached_adapters(server: RunningServer) -> dict[str, Any]:
    assert server.llm.host_cache is not None
    cached = {entry.name: entry.adapter for entry in server.llm.host_cache.entries}
    return cached | {key: adapter for key, (_, adapter) in server.llm.input_processor._defaults.items()}


def test_a_server_without_adapters_reports_no_slots(start_server: ServerFactory) -> None:
    found = scrape(start_server(enable_lora=False))
    assert loaded(found) == {} and counts(found) == [0, 0, 0]


def test_the_prefix_renames_all_metrics(server: RunningServer) -> None:
    with run_app(build_app(server.llm, load_served_models(server.llm), metrics_prefix="vllm")) as address:
        page = httpx.get(f"{address}/metrics").text
    names = {sample.name for family in text_string_to_metric_families(page) for sample in family.samples}
    own = {name for name, _ in scrape(server)}
    assert {name.removeprefix("vllm:") for name in names} >= own - {"http_requests_total"}
    assert all(name.startswith("vllm:") for name in names) and "mmlora" not in page
    blocks = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
    (info,) = [sample.labels for sample in blocks if sample.name == "vllm:cache_config_info"]
    metrics = server.llm.metrics
    assert (info["block_size"], info["num_gpu_blocks"]) == (str(metrics.block_size), str(metrics.num_kv_blocks))


@pytest.mark.parametrize("prefix", ["", "1a", "a:b", "a b", "ä", "a-b"])
def test_a_prefix_that_is_no_metric_name_is_refused(prefix: str) -> None:
    with pytest.raises(ConfigError, match="metrics_prefix"):
        ServerArgs(metrics_prefix=prefix)


def test_a_scrape_does_not_wait_for_the_running_step(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scrape returns while the engine is blocked in a step."""
    runner, may_go = server.llm.engine.runner, threading.Event()
    run = runner.run
    monkeypatch.setattr(runner, "run", lambda scheduled: may_go.wait(60) and run(scheduled))
    threads = [threading.Thread(target=post, args=(server,), kwargs={"model": name}) for name in ("words", "audio")]
    try:
        for index, thread in enumerate(threads):  # the second one stays in the inbox: the engine is blocked
            thread.start()
            wait_for(lambda count=index: server.llm._inbox.qsize() + len(server.llm.engine._requests) > count)  # type: ignore[misc]
        wait_for(lambda: server.llm.engine.metrics.num_requests_running == 1)
        start = time.monotonic()
        found = scrape(server)
        assert time.monotonic() - start < 5
        assert (found("num_requests_running"), found("lora_requests_running", adapter="words", kind="adapter")) == (
            1,
            1,
        )
        metrics = server.llm.engine.metrics
        assert found("kv_cache_usage_perc") == metrics.num_kv_blocks_used / metrics.num_kv_blocks > 0
    finally:
        may_go.set()
        for thread in threads:
            thread.join()
    assert scrape(server)("num_requests_running") == 0


def test_mixes_share_one_series_and_active_adapters_are_listed(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two slots, two adapters run and two wait."""
    engine = server.llm.engine
    runner, scrapes = engine.runner, []
    run = runner.run

    def run_and_scrape(scheduled: Any) -> Any:
        if len(engine._requests) + server.llm._inbox.qsize() == 4 and len(scrapes) < 40:
            scrapes.append(scrape(server))
        return run(scheduled)

    monkeypatch.setattr(runner, "run", run_and_scrape)
    fields = [
        {"model": "words"},
        {"lora": [{"name": "words", "scale": 0.5}]},
        {"lora": [{"name": "image", "scale": 2}]},
    ]
    fields.append({"model": "audio"})
    threads = [threading.Thread(target=post, args=(server,), kwargs={**entry, **LONG}) for entry in fields]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    full = [found for found in scrapes if (found("num_requests_running"), found("num_requests_waiting")) == (2, 2)]
    assert full
    for found in full:
        running, waiting = (found.by(f"lora_requests_{state}", "kind") for state in ("running", "waiting"))
        assert sum(running.values()) == sum(waiting.values()) == 2
        assert (running.get("mix", 0) + waiting.get("mix", 0), running.get("default", 0)) in ((2, 0), (2, 1))
        (info,) = (dict(labels) for name, labels in found if name == "lora_requests_info")
        named = [name for state in ("running", "waiting") for name in info[f"{state}_lora_adapters"].split(",") if name]
        assert (info["max_lora"], sorted(named)) == ("2", ["audio", "words"])


def test_aborts_errors_and_preemptions_are_counted(
    start_server: ServerFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = 3 * 2 * 4 * 3 * 12 * 4 * 70
    server = start_server(max_model_len=256, block_size=4, kv_cache_memory_bytes=blocks)
    assert post(server, "x" * 90, n=4, max_tokens=100, ignore_eos=True).status_code == 200
    found = scrape(server)
    assert found("num_preemptions_total") == server.llm.engine.scheduler.num_preemptions > 0
    assert found.by("request_success_total", "finished_reason") == {"length": 4}
    assert found("inter_token_latency_seconds_count") == 4 * 99

    with server.client as client:
        messages: Any = [{"role": "user", "content": "a long story"}]
        stream = client.chat.completions.create(
            model="tiny", messages=messages, stream=True, max_tokens=200, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        stream.close()
    wait_for(lambda: not server.llm.engine.has_unfinished_requests)
    found = scrape(server)
    assert found.by("request_success_total", "finished_reason") == {"length": 4, "abort": 1}
    assert found("e2e_request_latency_seconds_count") == 2, "an aborted request ends, too"
    assert found("generation_tokens_total") == found("request_generation_tokens_sum")

    with monkeypatch.context() as patch:
        patch.setattr(server.llm.engine.runner, "run", lambda _: 1 / 0)
        assert post(server).status_code == 500
    found = scrape(server)
    assert found.by("request_success_total", "finished_reason") == {"length": 4, "abort": 1, "error": 1}
    assert found("http_requests_total", route=CHAT, status="500") == 1
    assert (found("e2e_request_latency_seconds_count"), found("time_to_first_token_seconds_count")) == (3, 2)


def test_two_servers_in_one_process_count_separately(server: RunningServer, start_server: ServerFactory) -> None:
    other = start_server(served_model_name="other", enable_lora=False)
    server.ask(QUESTION)
    found, foreign = scrape(server), scrape(other, "other")
    assert (found("lora_decisions_total", reason="none"), foreign("lora_decisions_total", reason="none")) == (1, None)
    assert found("http_requests_total", route=CHAT, status="200") == 1
    assert foreign("http_requests_total", route=CHAT, status="200") is None
    assert foreign("lora_requests_info", max_lora="0", running_lora_adapters="", waiting_lora_adapters="")


def test_metrics_need_the_api_key(server: RunningServer) -> None:
    """A second application around the same engine has a separate registry and HTTP counts."""
    with run_app(build_app(server.llm, load_served_models(server.llm), api_key="key")) as address:
        assert httpx.get(f"{address}/metrics").status_code == 401
        page = httpx.get(f"{address}/metrics", headers={"authorization": "Bearer key"})
        assert 'http_requests_total{model_name="tiny",route="other",status="401"} 1.0' in page.text
        assert "mmlora:num_requests_running" in page.text


def test_openmetrics_is_negotiated(server: RunningServer) -> None:
    server.ask(QUESTION)
    page = httpx.get(f"{server.address}/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert page.headers["content-type"].startswith("application/openmetrics-text")
    assert "mmlora:num_requests_running" in {family.name for family in parse_openmetrics(page.text)}


def test_the_dashboard_queries_exactly_the_exported_metrics(server: RunningServer, wav: bytes) -> None:
    server.ask(input_audio_part(wav))
    scrape(server)
    exported = {f"mmlora:{name}" for name, _ in scrape(server)}
    dashboard = json.loads(GRAFANA.read_text(encoding="utf-8"))
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    asked = {name for query in queries for name in re.findall(r"mmlora:\w+", query)}
    assert len(queries) > 10 and asked <= exported, asked - exported
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for name in asked}
    hidden = {re.sub(r"_(bucket|sum|count)$", "", name) for name in exported} - shown
    assert hidden <= {"mmlora:lora_requests_info", "mmlora:cache_config_info"}, "every metric has a panel"
    assert [variable["type"] for variable in dashboard["templating"]["list"]][0] == "datasource"
    sources = {target["datasource"]["uid"] for panel in dashboard["panels"] for target in panel.get("targets", ())}
    assert sources == {"${datasource}"}


def test_each_prompt_of_a_completion_counts_as_a_request(server: RunningServer) -> None:
    before = scrape(server)
    body = {"prompt": ["one", "two", "three"], "max_tokens": 3, "ignore_eos": True}
    answer = httpx.post(f"{server.address}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["choices"]) == 3
    after = scrape(server)

    def grew(name: str, **labels: str) -> float:
        return (after(name, **labels) or 0) - (before(name, **labels) or 0)

    assert grew("request_success_total", finished_reason="length") == 3
    assert grew("generation_tokens_total") == 9 == answer.json()["usage"]["completion_tokens"]
    assert grew("prompt_tokens_total") == answer.json()["usage"]["prompt_tokens"]
    assert grew("time_to_first_token_seconds_count") == grew("e2e_request_latency_seconds_count") == 3


def test_route_labels_are_those_of_the_openapi_document(start_server: ServerFactory) -> None:
    llm = start_server().llm
    with run_app(build_app(llm, load_served_models(llm), allow_lora_updates=True)) as address:
        document = httpx.get(f"{address}/openapi.json").json()
        for path in document["paths"]:
            if "{" not in path:
                httpx.post(address + path, json={})
                httpx.get(address + path)
        found = set(scrape(address).by("http_requests_total", "route"))
    assert {"/v1/load_lora_adapter", "/v1/completions"} <= found
    assert found <= {*document["paths"], "/openapi.json", "other"}
    assert "$ref" not in json.dumps(document["paths"]["/v1/chat/completions"]["post"]["requestBody"])
