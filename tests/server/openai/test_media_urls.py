"""Media by URL and by uuid on every endpoint that takes media, and the options that limit them."""

from __future__ import annotations

import base64
import itertools
import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import BadRequestError
from PIL import Image

from mmlora.errors import MediaError
from mmlora.llm import LLM
from tests.server.conftest import (
    RunningServer,
    ServerFactory,
    post_json,
    text_part,
    url_part,
    wait_for,
    wait_until_idle,
)
from tests.web_server import WebServer, http_response, run_web_server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, png: bytes, wav: bytes) -> Path:
    folder = tmp_path_factory.mktemp("media")
    (folder / "a.png").write_bytes(png)
    (folder / "a.wav").write_bytes(wav)
    return folder


@pytest.fixture(scope="module")
def server(start_server: ServerFactory, folder: Path) -> RunningServer:
    return start_server(
        allowed_media_networks=["127.0.0.1"],
        allowed_local_media_path=str(folder),
        limit_mm_per_prompt={"image": 2},
        media_fetch_timeout=60,
    )


@pytest.fixture
def web(png: bytes, wav: bytes) -> Iterator[WebServer]:
    with run_web_server({"/a.png": http_response(png), "/a.wav": http_response(wav)}) as server:
        yield server


def image_part(url: str | None, **fields: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url} if url is not None else None, **fields}


def content_of(answer: dict[str, Any]) -> tuple[str, int]:
    return answer["choices"][0]["message"]["content"], answer["usage"]["prompt_tokens"]


def data_url(data: bytes) -> str:
    return f"data:;base64,{base64.b64encode(data).decode()}"


@pytest.mark.parametrize("kind", ["image", "audio"])
@pytest.mark.parametrize("where", ["http", "file"])
def test_a_url_is_equivalent_to_its_content(
    server: RunningServer, web: WebServer, folder: Path, png: bytes, wav: bytes, kind: str, where: str
) -> None:
    path = {"image": "/a.png", "audio": "/a.wav"}[kind]
    url = web.url(path) if where == "http" else f"file://{folder}{path}"
    data = {"image": png, "audio": wav}[kind]
    question = text_part("what is it?")
    expected = server.ask(url_part(f"{kind}_url", data, "x/y"), question)
    assert content_of(server.ask({"type": f"{kind}_url", f"{kind}_url": {"url": url}}, question)) == content_of(
        expected
    )
    options: dict[str, Any] = {"model": "tiny", "prompt": f"<|{kind}|>x", "max_tokens": 4, "temperature": 0}
    with server.client as client:
        texts = [
            client.completions.create(**options, extra_body={"multi_modal_data": {kind: content}}).choices[0].text
            for content in (url, data_url(data))
        ]
        assert texts[0] == texts[1]
        if kind == "image":
            answer = client.responses.create(
                model="tiny",
                input=[{"role": "user", "content": [{"type": "input_image", "image_url": url, "detail": "auto"}]}],
                max_output_tokens=4,
            )
            assert answer.usage is not None and answer.usage.input_tokens > 4


def test_offline_inference_fetches_urls(tiny_phi4: Path, web: WebServer, folder: Path, png: bytes) -> None:
    llm = LLM(str(tiny_phi4), allowed_media_networks=["127.0.0.1"], allowed_local_media_path=str(folder), device="cpu")
    urls = [web.url("/a.png"), f"file://{folder}/a.png", data_url(png)]
    conversations = [[{"role": "user", "content": [image_part(url), text_part("x")]}] for url in urls]
    outputs = llm.chat(conversations, use_tqdm=False)  # type: ignore[arg-type]
    assert len({tuple(output.prompt_token_ids) for output in outputs}) == 1
    keyed = [{"role": "user", "content": [image_part(urls[0], uuid="x"), image_part(None, uuid="x")]}]
    assert len(llm.chat(keyed, use_tqdm=False)) == 1 and len(web.requests) == 2  # type: ignore[arg-type]


def test_a_uuid_refers_to_the_content_sent_with_it(server: RunningServer, web: WebServer) -> None:
    question = text_part("what is it?")
    first = server.ask(image_part(web.url("/a.png"), uuid="sent once"), question)
    again = [
        server.ask(part, question)
        for part in (
            image_part(None, uuid="sent once"),
            {"type": "image_url", "uuid": "sent once"},
            image_part(web.url("/a.png"), uuid="sent once"),
        )
    ]
    assert [content_of(answer) for answer in again] == [content_of(first)] * 3 and len(web.requests) == 1
    server.ask(image_part(web.url("/a.png"), uuid="another"), question)
    assert len(web.requests) == 2


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_a_uuid_refers_to_media_in_responses(server: RunningServer, png: bytes, wav: bytes, kind: str) -> None:
    fields: dict[str, Any] = {"image_url": data_url(png)}
    if kind == "audio":
        fields = {"input_audio": {"data": base64.b64encode(wav).decode(), "format": "wav"}}

    def ask(**fields: Any) -> httpx.Response:
        part = {"type": f"input_{kind}", "uuid": f"response's {kind}", **fields}
        body = {"input": [{"role": "user", "content": [part]}], "max_output_tokens": 4, "temperature": 0}
        return httpx.post(f"{server.address}/v1/responses", json=body, timeout=60)

    assert ask().status_code == 400
    sent, held = ask(**fields).json(), ask().json()
    assert [item["content"] for item in held["output"]] == [item["content"] for item in sent["output"]]


def test_a_uuid_sent_with_other_content_refers_to_that(server: RunningServer, web: WebServer, png: bytes) -> None:
    with run_web_server({"/b.png": http_response(png)}) as other:
        server.ask(image_part(web.url("/a.png"), uuid="moves"))
        server.ask(image_part(other.url("/b.png"), uuid="moves"))
        assert len(other.requests) == 1
        server.ask(image_part(data_url(png), uuid="moves"))
        server.ask(image_part(other.url("/b.png"), uuid="moves"))
        assert len(other.requests) == 2


def test_an_unknown_uuid_has_its_own_error_code(server: RunningServer) -> None:
    with server.client as client, pytest.raises(BadRequestError, match="no media item is held for the uuid") as refusal:
        client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": [image_part(None, uuid="never sent")]}],  # type: ignore[list-item]
        )
    assert refusal.value.code == "media_not_held"


def test_uuids_are_scoped_to_the_api_key(server: RunningServer, png: bytes) -> None:
    def status_of(key: str | None, part: dict[str, Any]) -> int:
        body = {"messages": [{"role": "user", "content": [part]}], "max_tokens": 1}
        headers = {"Authorization": f"Bearer {key}"} if key is not None else {}
        return httpx.post(f"{server.address}/v1/chat/completions", json=body, headers=headers, timeout=60).status_code

    assert status_of("alice", image_part(data_url(png), uuid="mine")) == 200
    statuses = [status_of(key, image_part(None, uuid="mine")) for key in ("alice", "bob", None, "alice")]
    assert statuses == [200, 400, 400, 200]


def test_completions_take_uuids(server: RunningServer, web: WebServer) -> None:
    def complete(data: Any, uuids: Any, prompt: str = "<|image|><|image|>x") -> httpx.Response:
        body = {"prompt": prompt, "max_tokens": 4, "temperature": 0, "multi_modal_data": data}
        return httpx.post(f"{server.address}/v1/completions", json={**body, "multi_modal_uuids": uuids}, timeout=60)

    url = web.url("/a.png")
    sent = complete({"image": [url, url]}, {"image": ["one", None]})
    assert sent.status_code == 200 and len(web.requests) == 1
    again = [complete({"image": [None, None]}, {"image": ["one", "one"]}), complete(None, {"image": ["one", "one"]})]
    texts = {response.json()["choices"][0]["text"] for response in (sent, *again)}
    assert len(texts) == 1 and len(web.requests) == 1
    for uuids, message in (
        ({"image": ["one"]}, "holds 1 for the 2 items of image"),
        ({"video": ["one"]}, "videos are not supported"),
        ({"image": [5, None]}, "must be text of 1 to 256"),
    ):
        refused = complete({"image": [url, url]}, uuids)
        assert refused.status_code == 400 and message in refused.json()["error"]["message"]
    assert complete({"image": [None]}, None, "<|image|>x").json()["error"]["code"] == "media_error"
    assert complete(None, {"image": "one"}, ["a", "b"]).status_code == 400  # type: ignore[arg-type]


def test_media_are_counted_before_any_is_fetched(server: RunningServer, web: WebServer) -> None:
    body = {"messages": [{"role": "user", "content": [image_part(web.url("/a.png"))] * 3}]}
    response = httpx.post(f"{server.address}/v1/chat/completions", json=body, timeout=60)
    assert response.status_code == 400 and "limit_mm_per_prompt allows 2" in response.text and not web.requests


@pytest.mark.parametrize("stream", [False, True])
def test_fetching_stops_when_the_client_disconnects(server: RunningServer, stream: bool) -> None:
    is_requested, left = threading.Event(), threading.Event()

    def never_end(connection: Any) -> None:
        is_requested.set()
        try:
            connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            while True:
                connection.sendall(b"x")
                time.sleep(0.05)
        finally:
            left.set()

    with run_web_server({"/": never_end}) as web, httpx.Client() as client:
        body = {"messages": [{"role": "user", "content": [image_part(web.url("/"))]}], "stream": stream}
        with pytest.raises(httpx.ReadTimeout):
            client.post(f"{server.address}/v1/chat/completions", json=body, timeout=httpx.Timeout(30, read=1))
        assert is_requested.is_set()
        client.close()
        assert left.wait(20)  # the fetch timeout is a minute
    wait_until_idle(server)


def test_slow_servers_do_not_delay_other_requests(server: RunningServer, png: bytes) -> None:
    """A dozen requests wait for media that never arrive; the input pool has four threads."""

    is_over = threading.Event()

    def silent(connection: Any) -> None:
        is_over.wait(30)

    body = lambda url: {"messages": [{"role": "user", "content": [image_part(url)]}], "max_tokens": 1}  # noqa: E731
    with run_web_server({"/": silent}) as web:
        statuses: list[int] = []

        def ask() -> None:
            response = httpx.post(f"{server.address}/v1/chat/completions", json=body(web.url("/")), timeout=60)
            statuses.append(response.status_code)

        threads = [threading.Thread(target=ask) for _ in range(12)]
        for thread in threads:
            thread.start()
        wait_for(lambda: len(web.requests) == 12)
        answered = httpx.post(f"{server.address}/v1/chat/completions", json=body(data_url(png)), timeout=60)
        assert answered.status_code == 200 and not statuses
        is_over.set()
        for thread in threads:
            thread.join()
    assert statuses == [400] * 12


def test_limits_and_allowed_sources_are_options(
    start_server: ServerFactory, web: WebServer, png: bytes, wav: bytes
) -> None:
    strict = start_server(
        max_media_bytes=len(wav), max_image_pixels=42 * 42 - 1, max_audio_seconds=0.1, max_decoded_media_bytes=3000,
        media_cache_memory_bytes=0,
        allowed_media_domains=["media.example"], allowed_media_networks=["127.0.0.1"],
    )  # fmt: skip
    cases = [
        (image_part(web.url("/a.png")), "--allowed-media-domains allows media.example"),
        (image_part("file:///etc/hosts"), "file: URLs are not allowed"),
        (image_part(data_url(png)), f"larger than the allowed {42 * 42 - 1} px"),
        (image_part(data_url(png + bytes(len(wav)))), f"more than the allowed {len(wav)} bytes"),
        ({"type": "audio_url", "audio_url": {"url": data_url(wav)}}, "more than the allowed 0.1 s"),
        (image_part(None, uuid="x"), "no media item is held"),
    ]
    for part, message in cases:
        body = {"messages": [{"role": "user", "content": [part]}]}
        response = httpx.post(f"{strict.address}/v1/chat/completions", json=body, timeout=60)
        assert response.status_code == 400 and message in response.json()["error"]["message"]
    form = httpx.post(f"{strict.address}/v1/audio/transcriptions", files={"file": wav}, timeout=60)
    assert form.status_code == 400 and "more than the allowed 0.1 s" in form.json()["error"]["message"]
    prompt = {"prompt": "<|audio|>x", "multi_modal_data": {"audio": wav}}
    with pytest.raises(MediaError, match="more than the allowed 0.1 s"):
        strict.llm.engine.process_input("x", prompt)
    pictures = [Image.new("RGB", (20, 20))] * 5
    with pytest.raises(MediaError, match="have 3600 bytes or more when decoded; allowed are 3000"):
        strict.llm.engine.process_input("x", {"prompt": "x", "multi_modal_data": {"image": pictures}})
    assert not web.requests


def other_forms(kind: str, data: bytes, path: str) -> list[dict[str, Any]]:
    """Return the parts that transformers, Qwen, vLLM and the Responses API use for the same content."""
    encoded, url = base64.b64encode(data).decode(), data_url(data)
    parts: list[dict[str, Any]] = [
        {"type": kind, field: form}
        for field in (kind, "url", "path")
        for form in (url, encoded, path, f"file://{path}")
    ]
    parts += [{"type": kind, "base64": form} for form in (url, encoded)]
    parts += [{"type": kind, f"{kind}_url": {"url": url}}, {f"{kind}_url": url}, {kind: url}, {kind: path}]
    parts += [{"type": f"{kind}_url", f"{kind}_url": form} for form in (url, {"url": url, "detail": "low"})]
    if kind == "image":
        return [*parts, {"type": "input_image", "image_url": url, "detail": "auto"}]
    return [*parts, {"type": "input_audio", "input_audio": {"data": encoded, "format": "wav"}}]


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_every_form_of_a_part_is_equivalent(
    server: RunningServer, folder: Path, png: bytes, wav: bytes, kind: str
) -> None:
    data, path = {"image": (png, f"{folder}/a.png"), "audio": (wav, f"{folder}/a.wav")}[kind]
    question = text_part("what is it?")
    expected = content_of(server.ask(url_part(f"{kind}_url", data, "x/y"), question))
    for part in other_forms(kind, data, path):
        assert content_of(server.ask(part, question)) == expected, part.keys()
        if str(part.get("type")).startswith("input_") or "type" not in part:
            continue
        with server.client as client:
            content: Any = [{"role": "user", "content": [part, {"type": "input_text", "text": "what is it?"}]}]
            answer = client.responses.create(model="tiny", input=content, max_output_tokens=4, temperature=0)
        assert (answer.output_text, answer.usage.input_tokens if answer.usage else 0) == expected


def test_an_empty_field_with_a_uuid_refers_to_the_cached_item(server: RunningServer, png: bytes) -> None:
    first = content_of(server.ask(image_part(data_url(png), uuid="empty")))
    for content in ({}, None, {"url": None}, {"url": None, "detail": "auto"}):
        assert content_of(server.ask({"type": "image_url", "image_url": content, "uuid": "empty"})) == first
        assert content_of(server.ask({"image_url": content, "uuid": "empty"})) == first
        with server.client as client:
            part: Any = {"type": "input_image", "image_url": content, "uuid": "empty"}
            answer = client.responses.create(
                model="tiny", input=[{"role": "user", "content": [part]}], max_output_tokens=4, temperature=0
            )
        assert answer.output_text == first[0]
    assert content_of(server.ask({"type": "image", "uuid": "empty"})) == first


@pytest.mark.parametrize("field", ["image", "url", "path", "image_url"])
def test_files_elsewhere_are_refused_in_every_field(server: RunningServer, folder: Path, field: str) -> None:
    for path in (
        "/etc/passwd",
        f"{folder}/\0",
        f"{folder}/../a.png",
        f"{folder}/missing.png",
        "/proc/self/environ",
        f"{folder}",
    ):
        for form in (path, f"file://{path}")[field == "image_url" :]:
            with pytest.raises(BadRequestError, match="leads to no regular file under --allowed-local-media-path"):
                server.ask({"type": "image", field: form})
    for url in ("http://127.0.0.2/a.png", "http://169.254.169.254/", "http://localhost:1/a.png"):
        with pytest.raises(BadRequestError, match="media URL|host"):
            server.ask({"type": "image", field: url})


@pytest.mark.parametrize(
    "text", ["/\ud800", "file:///\udc80", "\ud800", "http://\ud800/", "data:\ud800,x", "data:,\ud800"]
)
def test_lone_surrogates_are_refused(server: RunningServer, text: str) -> None:
    """JSON can contain them, UTF-8 cannot."""
    for field in ("image", "url", "path", "base64", "image_url", "uuid", "type", "text"):
        part = {"type": "image", "image_url": None, field: text}
        body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": [part]}]})
        response = post_json(f"{server.address}/v1/chat/completions", body)
        assert response.status_code == 400 or (field, response.status_code) == ("uuid", 404), response.text


def test_a_url_that_is_none_of_the_allowed_ones_is_refused_by_its_scheme(server: RunningServer) -> None:
    for part in ({"type": "image", "image": "ftp://a/b.png"}, {"type": "image_url", "image_url": "gopher://x"}):
        with pytest.raises(BadRequestError, match="allowed are data:, http:, https: and file: URLs"):
            server.ask(part)


def test_errors_of_parts_do_not_speak_of_python(server: RunningServer) -> None:
    """Send the field of every type with values that do not fit, to both endpoints."""
    values = (None, True, 5, "", "x", "/x", "data:,x", [], [[0.0], 16000], {}, {"url": 5}, {"data": "%"}, {"url": "x"})
    kinds = (
        "image",
        "image_url",
        "input_image",
        "audio",
        "audio_url",
        "input_audio",
        "text",
        "video_url",
        "image_pil",
        7,
    )
    messages = set()
    with httpx.Client(base_url=f"{server.address}/v1", timeout=60) as client:
        for kind, value in itertools.product(kinds, values):
            part = {"type": kind, "image_url" if kind == "input_image" else str(kind): value}
            content = [{"role": "user", "content": [part]}]
            for path, field in (("chat/completions", "messages"), ("responses", "input")):
                response = client.post(path, json={"model": "tiny", field: content})
                if response.status_code != 200:
                    assert response.status_code == 400, response.text
                    messages.add(response.json()["error"]["message"])
    assert len(messages) > 60
    python = re.compile(r"\b(dict|None|NoneType|tuple|PIL|array|bytes,|str|int|bool|float|load_\w+)\b")
    assert not [text for text in messages if python.search(text)]
