"""The log: one access line per request, as text or JSON, with content only if `log_requests` is set."""

from __future__ import annotations

import io
import json
import logging
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from mmlora.server.api import build_app
from mmlora.server.args import LoRAModule
from mmlora.server.launch import load_served_models
from mmlora.server.observability.access_log import ACCESS_LOGGER
from mmlora.server.observability.log_format import TEXT_FORMAT, JSONFormatter, TextFormatter
from tests.server.conftest import (
    RunningServer,
    ServerFactory,
    input_audio_part,
    run_app,
    text_part,
    url_part,
    wait_for,
)
from tests.server_process import run_serve

SECRET = "my secret question"
FIELDS = {"time", "level", "logger", "message"}


@pytest.fixture(scope="module")
def server(start_server: ServerFactory, adapters: dict[str, str]) -> RunningServer:
    odd = LoRAModule("od\nd", adapters["words"])
    return start_server(odd, default_mm_loras={"audio": adapters["speech"]})


class Log:
    """The log of the server in both formats."""

    def __init__(self) -> None:
        self._streams = {"text": io.StringIO(), "json": io.StringIO()}  # the text handler runs first: wait for JSON
        self.handlers = [logging.StreamHandler(stream) for stream in self._streams.values()]
        for handler, formatter in zip(self.handlers, (TextFormatter(TEXT_FORMAT), JSONFormatter()), strict=True):
            handler.setFormatter(formatter)

    @property
    def json(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._streams["json"].getvalue().splitlines()]

    @property
    def text(self) -> list[str]:
        return self._streams["text"].getvalue().splitlines()

    @property
    def everything(self) -> str:
        return "".join(stream.getvalue() for stream in self._streams.values())


@pytest.fixture
def log() -> Iterator[Log]:
    found, root, access = Log(), logging.getLogger(), logging.getLogger(ACCESS_LOGGER)
    level = access.level
    for handler in found.handlers:
        root.addHandler(handler)
    access.setLevel(logging.INFO)
    yield found
    access.setLevel(level)
    for handler in found.handlers:
        root.removeHandler(handler)


def access_lines(log: Log, count: int = 1) -> list[dict[str, Any]]:
    """Wait for the access lines, which are written after the responses, and return them."""

    def found() -> list[dict[str, Any]]:
        return [line for line in log.json if line["logger"] == ACCESS_LOGGER]

    wait_for(lambda: len(found()) >= count)
    assert len(found()) == count
    return found()


def test_an_access_line_has_no_content(server: RunningServer, log: Log, wav: bytes, png: bytes) -> None:
    picture = url_part("image_url", png, "image/png")
    answer = server.ask(input_audio_part(wav), picture, text_part(SECRET), n=2)
    (line,) = access_lines(log)
    usage = answer["usage"]
    expected = {
        "level": "info",
        "method": "POST",
        "path": "/v1/chat/completions",
        "status": 200,
        "request_id": answer["id"],
        "adapter": "audio",
        "reason": "default:audio",
        "prompt_tokens": usage["prompt_tokens"],
        "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
        "output_tokens": usage["completion_tokens"],
    }
    assert expected.items() <= line.items()
    reasons = {choice["finish_reason"] for choice in answer["choices"]}
    assert set(line["finish_reason"].split("+")) == reasons and 0 < line["seconds"] < 60
    assert line.keys() == {*FIELDS, *expected, "finish_reason", "seconds"}
    (text,) = log.text
    assert text == f"INFO {ACCESS_LOGGER}: {line['message']}"
    for expected_text in (
        "POST /v1/chat/completions 200",
        f"request_id={answer['id']}",
        "adapter=audio",
        "reason=default:audio",
    ):
        assert expected_text in text
    for message in (SECRET, input_audio_part(wav)["input_audio"]["data"][:40], "base64"):
        assert message not in log.everything
    assert all(choice["message"]["content"] not in log.everything for choice in answer["choices"])


def test_a_refused_request_is_logged_without_its_text(server: RunningServer, log: Log) -> None:
    body = {"messages": [{"role": "user", "content": SECRET * 200}], "model": "od\nd"}
    assert httpx.post(f"{server.address}/v1/chat/completions", json=body).status_code == 400
    body = {"messages": [{"role": "user", "content": SECRET}], "temprature": SECRET}
    assert httpx.post(f"{server.address}/v1/chat/completions", json=body).status_code == 400
    assert httpx.get(f"{server.address}/a%0Ab%1b[1m?{SECRET}").status_code == 404
    too_long, misspelt, lost = access_lines(log, 3)
    assert [line["status"] for line in (too_long, misspelt, lost)] == [400, 400, 404]
    assert too_long["request_id"].startswith("chatcmpl-") and "request_id" not in misspelt
    assert "finish_reason" not in too_long and "adapter" not in too_long
    assert lost["path"] == "/a%0Ab%1B%5B1m"
    assert "secret" not in log.everything and len(log.text) == 3


def test_a_line_has_no_request_id_of_a_previous_request_on_its_connection(server: RunningServer, log: Log) -> None:
    message = {"role": "user", "content": [url_part("image_url", b"junk" * 100_000, "image/png")]}
    with httpx.Client(base_url=server.address) as client:
        assert client.post("/v1/chat/completions", json={"messages": [message]}).status_code == 400
        assert client.get("/missing").status_code == 404
    refused, missing = access_lines(log, 2)
    assert refused["request_id"].startswith("chatcmpl-")
    assert "request_id" not in missing


def test_a_name_cannot_forge_a_log_line(server: RunningServer, log: Log) -> None:
    server.ask(text_part(SECRET), model="od\nd")
    assert access_lines(log)[0]["adapter"] == "od\nd"
    assert len(log.text) == 1 and "adapter=od\\nd" in log.text[0]


def test_disconnected_and_failed_requests_are_logged(
    server: RunningServer, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"stream": True, "max_tokens": 480, "extra_body": {"ignore_eos": True}}
    messages: Any = [{"role": "user", "content": SECRET}]
    with server.client as client:
        stream = client.chat.completions.create(model="tiny", messages=messages, **options)
        chunk = next(iter(stream))
        stream.close()
        access_lines(log)
        monkeypatch.setattr(server.llm.engine.runner, "run", lambda _: 1 / 0)
        failed = httpx.post(f"{server.address}/v1/chat/completions", json={"messages": messages}, timeout=60)
    assert failed.status_code == 500
    left, broken = access_lines(log, 2)
    assert (left["request_id"], left["status"], left["finish_reason"]) == (chunk.id, 200, "abort")
    assert 0 < left["output_tokens"] < 480
    assert (broken["status"], broken["finish_reason"], broken["output_tokens"]) == (500, "error", 0)
    reported = [line for line in log.json if line["logger"] == "mmlora.server.openai.output"]
    assert [line["request_id"] for line in reported] == [broken["request_id"]], (
        "other log lines of a request have its id, too"
    )
    traced = [line for line in log.json if "exception" in line]
    assert traced and "ZeroDivisionError" in traced[0]["exception"]
    assert SECRET not in log.everything


def test_log_requests_adds_prompts_and_media_hashes(server: RunningServer, log: Log, wav: bytes) -> None:
    app = build_app(server.llm, load_served_models(server.llm), log_requests=True)
    with run_app(app) as address:
        answer = RunningServer(server.llm, address).ask(input_audio_part(wav), text_part(SECRET))
    (line,) = access_lines(log)
    (request,) = line["requests"]
    assert SECRET in request["prompt"]
    (media,) = request["media"]
    assert media["modality"] == "audio" and len(media["content_hash"]) == 64
    assert media["num_tokens"] > 0 and media["num_feature_bytes"] > 0
    assert log.text[0].endswith(f"requests={json.dumps(line['requests'])}")
    assert input_audio_part(wav)["input_audio"]["data"][:40] not in log.everything
    assert answer["choices"][0]["message"]["content"] not in log.everything


@pytest.mark.parametrize(("options", "is_prompt_logged"), [([], False), (["--log-requests"], True)])
def test_all_output_of_the_process_is_json(tiny_phi4: Path, options: list[str], is_prompt_logged: bool) -> None:
    options = ["--device", "cpu", "--log-format", "json", *options]
    with run_serve(str(tiny_phi4), *options, stderr=subprocess.PIPE) as process:
        body = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 2, "ignore_eos": True}
        httpx.post(f"{process.address}/v1/chat/completions", json=body, timeout=60).raise_for_status()
        _, errors = process.stop(signal.SIGINT)
    lines = [json.loads(line) for line in errors.splitlines()]
    assert all(line.keys() >= FIELDS for line in lines)
    (access,) = (line for line in lines if line["logger"] == ACCESS_LOGGER)
    assert (access["status"], access["reason"], access["output_tokens"]) == (200, "none", 2)
    assert any(line["logger"] == "uvicorn.error" for line in lines)
    assert (SECRET in errors) is is_prompt_logged
