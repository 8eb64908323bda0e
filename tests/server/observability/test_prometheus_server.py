"""Prometheus itself scrapes a server and answers each query of the dashboard; skipped where it is not installed."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from mmlora.server.args import LoRAModule
from tests.server.conftest import RunningServer, ServerFactory, input_audio_part, text_part

PROMETHEUS = shutil.which("prometheus")
GRAFANA = Path(__file__).resolve().parents[3] / "docs" / "grafana.json"
PROTOBUF = "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited"
# `Accept` as sent by Prometheus, by version and setting.
ACCEPT = {
    "2.40": "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
    "2.40 native histograms": f"{PROTOBUF},application/openmetrics-text;version=1.0.0;q=0.8,"
    "application/openmetrics-text;version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
    "2.49": "application/openmetrics-text;version=1.0.0;q=0.5,application/openmetrics-text;version=0.0.1;q=0.4,"
    "text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
    "2.55 utf8": "application/openmetrics-text;version=1.0.0;validchars=utf8;q=0.5,"
    "application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
    "3.0": "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,"
    "application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,"
    "text/plain;version=0.0.4;q=0.2,*/*;q=0.1",
    "3 underscores": "application/openmetrics-text;version=1.0.0;escaping=underscores;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=underscores;q=0.4,"
    "text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
    "3 native histograms, dots": f"{PROTOBUF};q=0.6,application/openmetrics-text;version=1.0.0;escaping=dots;q=0.5,"
    "application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=1.0.0;escaping=dots;q=0.3,"
    "text/plain;version=0.0.4;q=0.2,*/*;q=0.1",
    "3 values": "application/openmetrics-text;version=1.0.0;escaping=values;q=0.6,*/*;q=0.2",
    "3.14": "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.6,text/plain;version=0.0.4;q=0.5,"
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.4,*/*;q=0.3",
    "text first, underscores": "text/plain;version=1.0.0;escaping=underscores;q=0.6,*/*;q=0.3",
    "text first, dots": "text/plain;version=1.0.0;escaping=dots;q=0.6,*/*;q=0.3",
    "classic": "text/plain;version=0.0.4;q=0.6,*/*;q=0.3",
    "protobuf only": PROTOBUF,
    "openmetrics without a version": "application/openmetrics-text",
    "anything": "*/*",
    "nothing": "",
}


@pytest.fixture(scope="module")
def server(start_server: ServerFactory, adapters: dict[str, str]) -> RunningServer:
    return start_server(LoRAModule("words", adapters["words"]), default_mm_loras={"audio": adapters["speech"]})


@pytest.mark.parametrize("accept", ACCEPT.values(), ids=ACCEPT)
def test_names_arrive_whole_for_every_version(server: RunningServer, accept: str) -> None:
    page = httpx.get(f"{server.address}/metrics", headers={"accept": accept})
    kind = page.headers["content-type"]
    is_openmetrics = kind.startswith("application/openmetrics-text; version=1.0.0")
    assert is_openmetrics or kind.startswith("text/plain; version=")
    assert is_openmetrics == page.text.endswith("# EOF\n") and "escaping" not in kind
    families = list((parse_openmetrics if is_openmetrics else parse_text)(page.text))
    names = {sample.name for family in families for sample in family.samples}
    assert all(name.startswith("mmlora:") for name in names)
    assert {"mmlora:num_requests_running", "mmlora:prompt_tokens_total", "mmlora:request_prompt_tokens_bucket"} <= names
    assert not re.search(r"mmlora_|__", page.text)


@contextmanager
def run_prometheus(directory: Path, target: str, settings: dict[str, Any]) -> Iterator[httpx.Client]:
    """Run Prometheus, which scrapes a server twice a second; yield a client of its API."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    job = {"job_name": "mmlora", "scrape_interval": "500ms", "scrape_timeout": "500ms", **settings}
    job["static_configs"] = [{"targets": [target]}]
    config = directory / "prometheus.yml"
    config.write_text(json.dumps({"scrape_configs": [job]}))  # YAML contains JSON
    options = [
        f"--config.file={config}",
        f"--storage.tsdb.path={directory / 'data'}",
        f"--web.listen-address={address}",
    ]
    with (directory / "log").open("w") as log:
        process = subprocess.Popen([str(PROMETHEUS), *options], stdout=log, stderr=log, cwd=directory)
        try:
            with httpx.Client(base_url=f"http://{address}/api/v1", timeout=30) as client:
                yield client
        finally:
            process.terminate()
            process.wait(30)


def query(client: httpx.Client, expression: str) -> list[Any]:
    answer = client.get("/query", params={"query": expression}).raise_for_status().json()
    assert answer["status"] == "success", answer
    return list(answer["data"]["result"])


def wait_for_scrapes(client: httpx.Client, expression: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            if query(client, expression):
                return
        except httpx.TransportError:  # it is starting
            pass
        assert time.monotonic() < deadline, f"{expression} has no result"
        time.sleep(0.2)


@pytest.mark.skipif(PROMETHEUS is None, reason="Prometheus is not installed")
def test_each_query_of_the_dashboard_has_a_result(server: RunningServer, tmp_path: Path, wav: bytes) -> None:
    dashboard = json.loads(GRAFANA.read_text(encoding="utf-8"))
    panels = {panel["title"]: [target["expr"] for target in panel["targets"]] for panel in dashboard["panels"]}
    assert len(panels) > 15
    with run_prometheus(tmp_path, server.address.removeprefix("http://"), {}) as client:
        wait_for_scrapes(client, "count_over_time(mmlora:num_requests_running[1m]) > 1")
        server.ask(input_audio_part(wav), text_part("hi"), n=2)
        wait_for_scrapes(client, "count_over_time(mmlora:lora_decisions_total[1m]) > 1")
        wait_for_scrapes(client, "increase(mmlora:generation_tokens_total[1m]) > 0")
        empty = {}
        for title, expressions in panels.items():
            for expression in expressions:
                asked = expression.replace("$__rate_interval", "1m").replace("$model", ".*")
                assert "$" not in asked
                if not query(client, asked):
                    empty[expression] = title
        # Nothing was refused by admission, so this counter has no series yet.
        assert [name for name in empty if "requests_refused_total" not in name] == []
        (variable,) = [entry for entry in dashboard["templating"]["list"] if entry["type"] == "query"]
        metric, label = re.fullmatch(r"label_values\((\S+), (\w+)\)", variable["definition"]).groups()  # type: ignore[union-attr]
        assert [found["metric"][label] for found in query(client, metric)] == ["tiny"]
        (target,) = client.get("/targets").json()["data"]["activeTargets"]
        assert (target["health"], target["lastError"]) == ("up", "")
