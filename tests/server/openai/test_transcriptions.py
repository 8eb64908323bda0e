"""Transcriptions and translations with the `openai` client, on a tiny model with random weights."""

from __future__ import annotations

import io
import json
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile
from openai import APIStatusError, BadRequestError, NotFoundError
from openai.types.audio import Transcription, TranscriptionVerbose, TranslationVerbose

from mmlora.outputs import RequestOutput
from mmlora.server.api import build_app
from mmlora.server.args import LoRAModule
from mmlora.server.launch import load_served_models
from mmlora.server.openai.transcriptions.form import MAX_FORM_FIELDS
from tests.server.conftest import RunningServer, ServerFactory, input_audio_part, run_app, text_part, wait_until_idle

TRANSCRIBE = "Transcribe the audio clip into text."
LIMIT = 12  # output tokens
FORMATS = {"WAV": None, "FLAC": None, "OGG": "VORBIS", "MP3": None}

pytestmark = pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")  # the openai client's translations API


@pytest.fixture(scope="module")
def server(start_server: ServerFactory, adapters: dict[str, str]) -> RunningServer:
    return start_server(LoRAModule("words", adapters["words"]), default_mm_loras={"audio": adapters["speech"]})


def transcribe(server: RunningServer, data: bytes, **options: Any) -> Any:
    """Request a short transcription; return a stream as the list of its events."""
    extra = {"max_tokens": LIMIT, **options.pop("extra", {})}
    with server.client as client:
        answer = client.audio.transcriptions.create(
            file=("clip", data), extra_body=extra, **{"model": "tiny", **options}
        )
        return list(answer) if options.get("stream") else answer


def translate(server: RunningServer, data: bytes, **options: Any) -> Any:
    extra = {"max_tokens": LIMIT, **options.pop("extra", {})}
    with server.client as client:
        return client.audio.translations.create(file=("clip", data), model="tiny", extra_body=extra, **options)


def chat(server: RunningServer, data: bytes, text: str, **options: Any) -> dict[str, Any]:
    return server.ask(input_audio_part(data), text_part(text), **{"max_tokens": LIMIT, **options})


def post(server: RunningServer, body: bytes, content_type: str, path: str = "transcriptions") -> httpx.Response:
    headers = {"content-type": content_type}
    return httpx.post(f"{server.address}/v1/audio/{path}", content=body, headers=headers, timeout=60)


def form(*parts: tuple[str, bytes], boundary: str = "b") -> bytes:
    heads = [f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'.encode() for name, _ in parts]
    middle = b"".join(head + content + b"\r\n" for head, (_, content) in zip(heads, parts, strict=True))
    return middle + f"--{boundary}--\r\n".encode()


def encoded(audio_format: str) -> bytes:
    buffer = io.BytesIO()
    samples = 0.3 * np.sin(np.arange(16000) * np.linspace(0.05, 0.3, 16000))
    soundfile.write(buffer, samples, 16000, format=audio_format, subtype=FORMATS[audio_format])
    return buffer.getvalue()


@pytest.mark.parametrize("audio_format", FORMATS)
def test_every_format_equals_a_chat_with_the_same_prompt(server: RunningServer, audio_format: str) -> None:
    data = encoded(audio_format)
    found = transcribe(server, data)
    assert isinstance(found, Transcription)
    expected = chat(server, data, TRANSCRIBE)
    assert found.text == expected["choices"][0]["message"]["content"] != ""
    assert found.usage is not None and found.usage.type == "tokens"
    usage, details = expected["usage"], found.usage.input_token_details
    counted = found.usage.input_tokens, found.usage.output_tokens, found.usage.total_tokens
    assert counted == (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"])
    text_only = server.ask(text_part(TRANSCRIBE), max_tokens=1)["usage"]["prompt_tokens"]
    assert details is not None and (details.text_tokens, details.audio_tokens) == (text_only, counted[0] - text_only)


def test_the_other_response_formats(server: RunningServer, wav: bytes) -> None:
    found = transcribe(server, wav)
    assert transcribe(server, wav, response_format="text") == found.text
    verbose = transcribe(server, wav, response_format="verbose_json")
    assert isinstance(verbose, TranscriptionVerbose)
    assert (verbose.text, verbose.duration, verbose.language) == (found.text, 0.5, "unknown")
    assert verbose.segments is None and verbose.words is None
    assert verbose.usage is not None and (verbose.usage.type, verbose.usage.seconds) == ("duration", 0.5)
    french = transcribe(server, wav, response_format="verbose_json", language="FR")
    assert (french.text, french.language) == (found.text, "french")
    assert found.to_dict()["finish_reason"] == "length"


def test_a_stream_adds_up_to_the_whole_response(server: RunningServer, wav: bytes) -> None:
    whole = transcribe(server, wav, include=["logprobs"])
    events = transcribe(server, wav, include=["logprobs"], stream=True)
    assert [event.type for event in events] == ["transcript.text.delta"] * (len(events) - 1) + ["transcript.text.done"]
    assert len(events) > 3
    assert "".join(event.delta for event in events[:-1]) == events[-1].text == whole.text
    entries = [entry.to_dict() for event in events[:-1] for entry in event.logprobs]
    assert entries == [entry.to_dict() for entry in events[-1].logprobs] != []
    assert events[-1].usage.to_dict() == whole.usage.to_dict()
    first, last = events[0].to_dict(), events[-1].to_dict()
    assert first["lora"] == last["lora"] == whole.to_dict()["lora"]
    assert "lora" not in events[1].to_dict() and last["finish_reason"] == "length"
    as_text = transcribe(server, wav, response_format="text", stream=True, extra={"stream_include_usage": "true"})
    assert as_text[-1].text == whole.text and as_text[0].logprobs is None


def test_log_probabilities_equal_those_of_a_chat(server: RunningServer, wav: bytes) -> None:
    found = transcribe(server, wav, include=["logprobs"])
    entries = chat(server, wav, TRANSCRIBE, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert [entry.token for entry in found.logprobs] == [entry["token"] for entry in entries]
    assert [entry.logprob for entry in found.logprobs] == pytest.approx(
        [entry["logprob"] for entry in entries], abs=1e-4
    )
    assert transcribe(server, wav).logprobs is None


def test_adapters_are_chosen_and_reported_as_in_chats(server: RunningServer, wav: bytes) -> None:
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {}),
        ({"model": "audio"}, {"model": "audio"}),
        ({"model": "words"}, {"model": "words"}),
        ({"extra": {"lora": "words"}}, {"lora": "words"}),
        ({"extra": {"lora": "[]"}}, {"lora": []}),
        ({"extra": {"lora": '[{"name": "words", "scale": 0.5}]'}}, {"lora": [{"name": "words", "scale": 0.5}]}),
    ]
    texts = []
    for options, chat_options in cases:
        found, expected = transcribe(server, wav, **options), chat(server, wav, TRANSCRIBE, **chat_options)
        assert found.to_dict()["lora"] == expected["lora"]
        assert found.text == expected["choices"][0]["message"]["content"]
        texts.append(found.text)
    assert len(set(texts)) >= 4
    assert transcribe(server, wav).to_dict()["lora"]["reason"] == "default:audio"


@pytest.mark.parametrize(
    ("fields", "is_counted"),
    [
        ({"stream_continuous_usage_stats": "true", "stream_include_usage": "true"}, True),
        ({"stream_continuous_usage_stats": "true"}, True),
        ({"stream_continuous_usage_stats": "true", "stream_include_usage": "false"}, False),
        ({"stream_include_usage": "true"}, False),
    ],
)
def test_each_event_can_count_tokens(
    server: RunningServer, wav: bytes, fields: dict[str, str], is_counted: bool
) -> None:
    *deltas, last = transcribe(server, wav, stream=True, extra={**fields, "ignore_eos": "true"})
    assert [hasattr(event, "usage") for event in deltas] == [is_counted] * len(deltas)
    if is_counted:
        counts = [event.usage["output_tokens"] for event in deltas]
        assert counts == sorted(counts) and len(set(counts)) > 2 and counts[-1] <= last.usage.output_tokens == LIMIT
        assert {event.usage["input_tokens"] for event in deltas} == {last.usage.input_tokens}


def test_unknown_fields_without_a_value_are_ignored(server: RunningServer, wav: bytes) -> None:
    empty = {f"future_{index}": text for index, text in enumerate(("", "null", "false", "False", "[]", "{}"))}
    assert transcribe(server, wav, extra=empty).text == transcribe(server, wav).text


@pytest.mark.parametrize("options", [{}, {"stream": True}, {"response_format": "text"}])
def test_headers_name_the_adapter_and_the_reason(server: RunningServer, wav: bytes, options: dict[str, Any]) -> None:
    with (
        server.client as client,
        client.audio.transcriptions.with_streaming_response.create(
            file=("a.wav", wav), model="tiny", extra_body={"max_tokens": 1}, **options
        ) as response,
    ):
        assert response.headers["x-mmlora-adapter"] == "audio"
        assert response.headers["x-mmlora-reason"] == "default:audio"
        response.read()


def test_a_translation_prompt_names_the_language(server: RunningServer, wav: bytes) -> None:
    found = translate(server, wav)
    expected = chat(server, wav, "Translate the audio to English.")["choices"][0]["message"]["content"]
    assert found.text == expected != transcribe(server, wav).text
    german = translate(server, wav, extra={"to_language": "de", "language": "fr"}, response_format="verbose_json")
    assert isinstance(german, TranslationVerbose)
    assert german.text == chat(server, wav, "Translate the audio to German.")["choices"][0]["message"]["content"]
    assert (german.language, german.duration) == ("german", 0.5)


def test_context_goes_into_the_prompt(server: RunningServer, wav: bytes) -> None:
    found = transcribe(server, wav, prompt="It is about Zürich.")
    expected = chat(server, wav, f"{TRANSCRIBE}\nIt is about Zürich.")
    assert found.text == expected["choices"][0]["message"]["content"] != transcribe(server, wav).text
    assert found.usage.input_tokens == expected["usage"]["prompt_tokens"]


def test_sampling_fields_reach_the_engine(server: RunningServer, wav: bytes) -> None:
    greedy = transcribe(server, wav).text
    hot = [transcribe(server, wav, temperature=5, extra={"seed": seed}).text for seed in (7, 7, 8)]
    assert hot[0] == hot[1] and len({greedy, *hot}) == 3
    assert transcribe(server, wav, temperature=5, extra={"top_k": 1}).text == greedy
    for fields in ({"max_completion_tokens": 3, "max_tokens": ""}, {"max_completion_tokens": 3, "max_tokens": 3}):
        assert transcribe(server, wav, extra=fields).usage.output_tokens == 3


def test_a_salt_reaches_the_engine(server: RunningServer, wav: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    salts, process = [], server.llm.engine.process_input

    def record(request_id: str, prompt: Any, *rest: Any) -> Any:
        ready = process(request_id, prompt, *rest)
        salts.append(ready.cache_salt)
        return ready

    monkeypatch.setattr(server.llm.engine, "process_input", record)
    transcribe(server, wav, extra={"cache_salt": "mine", "priority": 0})
    transcribe(server, wav)
    assert salts == ["mine", None]


def test_empty_fields_and_fields_without_effect_are_ignored(server: RunningServer, wav: bytes) -> None:
    extra = {"lora": "", "temperature": "", "chunking_strategy": "", "n": 1, "user": "me"}
    found = transcribe(server, wav, language="", prompt="", extra=extra)
    assert found.text == transcribe(server, wav, chunking_strategy="auto").text


@pytest.mark.parametrize(
    ("options", "param", "named"),
    [
        ({"response_format": "srt"}, "response_format", "'json', 'text' or 'verbose_json'; received \"srt\""),
        ({"response_format": "vtt"}, "response_format", '"vtt"'),
        ({"response_format": "diarized_json"}, "response_format", "diarized_json"),
        ({"response_format": "verbose_json", "stream": True}, "response_format", "stream=false"),
        ({"timestamp_granularities": ["word"]}, "timestamp_granularities", "word"),
        ({"include": ["logprobs", "other"]}, "include", "'logprobs'; received \"other\""),
        ({"include": ["logprobs"], "response_format": "text"}, "include", "response_format=json"),
        ({"chunking_strategy": {"type": "server_vad"}}, "chunking_strategy[type]", "chunking_strategy"),
        ({"language": "xx"}, "language", "ISO 639-1"),
        ({"language": "ru"}, "language", "it must be one of en, zh"),
        ({"temperature": "warm"}, "temperature", "number"),
        ({"temperature": "nan"}, "temperature", "temperature"),
        ({"temperature": -1}, "temperature", "temperature"),
        ({"extra": {"seed": "1.5"}}, "seed", "integer"),
        ({"extra": {"max_tokens": 2, "max_completion_tokens": 3}}, "max_completion_tokens", "differ"),
        ({"extra": {"n": 2}}, "n", '"2"'),
        ({"extra": {"priority": 2}}, "priority", "priority=2"),
        ({"extra": {"stop": "x"}}, "stop", "does not support"),
        ({"extra": {"to_language": "de"}}, "to_language", "does not support"),
        ({"extra": {"hotwords": "x"}}, "hotwords", "does not support"),
        ({"known_speaker_names": ["a"]}, "known_speaker_names", "does not support"),
        ({"extra": {"lora": "[1"}}, "lora", "JSON"),
        ({"extra": {"lora": "[1]"}}, "lora", "received [1]"),
        ({"model": "words", "extra": {"lora": "audio"}}, "lora", "contradict"),
    ],
)
def test_unsupported_fields_are_refused_by_name(
    server: RunningServer, wav: bytes, options: dict[str, Any], param: str, named: str
) -> None:
    with pytest.raises(BadRequestError) as refused:
        transcribe(server, wav, **options)
    assert refused.value.param == param
    assert named in refused.value.message and refused.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("extra", "param"),
    [({"include[]": "logprobs"}, "include"), ({"to_language": "xx"}, "to_language"), ({"stream": "maybe"}, "stream")],
)
def test_unsupported_fields_of_a_translation_are_refused_by_name(
    server: RunningServer, wav: bytes, extra: dict[str, str], param: str
) -> None:
    with pytest.raises(BadRequestError) as refused:
        translate(server, wav, extra=extra)
    assert refused.value.param == param


def test_an_unknown_model_is_not_found(server: RunningServer, wav: bytes) -> None:
    for options in ({"model": "whisper-1"}, {"extra": {"lora": "nobody"}}):
        with pytest.raises(NotFoundError):
            transcribe(server, wav, **options)


def test_content_that_is_not_audio_is_refused(server: RunningServer, wav: bytes, png: bytes) -> None:
    for data, named in ((png, "image"), (b"", "0 bytes"), (b"text", "neither audio"), (wav[:30], "truncated")):
        with pytest.raises(BadRequestError, match=named):
            transcribe(server, data)


def test_unusual_forms_are_parsed_and_malformed_ones_refused(server: RunningServer, wav: bytes) -> None:
    kind = "multipart/form-data; boundary=b"
    text = transcribe(server, wav).text
    few = ("max_tokens", str(LIMIT).encode())
    assert post(server, form(("file", wav), few, ("stream", b"False")), kind).json()["text"] == text
    assert post(server, b"\r\n" + form(("file", wav), few) + b"epilogue", kind).json()["text"] == text
    refused = [
        (form(("file", wav), ("file", wav)), kind, "'file' is given 2 times"),
        (form(("file", wav), ("prompt", b"a"), ("prompt", b"b")), kind, "'prompt' is given 2 times"),
        (form(("model", b"tiny")), kind, "file is required"),
        (form(("file", wav), ("prompt", b"\xff")), kind, "'prompt' is not UTF-8"),
        (form(("file", wav), ("", b"x")), kind, "no name"),
        (form(("file", wav), ("x" * 999, b"x")), kind, "too long"),
        (form(("file", wav), *[("prompt", b"x")] * MAX_FORM_FIELDS), kind, f"more than {MAX_FORM_FIELDS} fields"),
        (form(("file", wav))[:-6], kind, "without its last boundary"),
        (form(("file", wav), boundary="other"), kind, "not valid multipart"),
        (b"", kind, "without its last boundary"),
        (form(("file", wav)), "multipart/form-data", "content-type"),
        (b'{"file": "x"}', "application/json", "must be multipart/form-data"),
        (b"file=x", "application/x-www-form-urlencoded", "must be multipart/form-data"),
        (form(("file", wav)), f"multipart/form-data; boundary={'b' * 999}", "oundary"),
    ]
    for body, content_type, named in refused:
        response = post(server, body, content_type)
        assert response.status_code == 400, (named, response.text)
        assert named in response.json()["error"]["message"]


def test_malformed_forms_are_never_a_server_error(server: RunningServer, wav: bytes) -> None:
    rng = random.Random(0)
    good = form(("model", b"tiny"), ("file", wav[:400]), ("max_tokens", b"1"), ("include[]", b"logprobs"))
    marks = [b"\r\n", b"--b", b"--b--\r\n", b'"', b";", b":", b"\x00", b"Content-Disposition: x", b"name=", b"\xff\xfe"]
    statuses = set()
    for _ in range(300):
        body = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            start = rng.randrange(len(body))
            body[start : start + rng.choice((0, 1, 5, 60))] = rng.choice([*marks, b"", rng.randbytes(4)])
        response = post(server, bytes(body), rng.choice(("multipart/form-data; boundary=b", "multipart/form-data;b")))
        assert response.status_code in (200, 400, 404), (bytes(body), response.text)
        assert "error" in response.json() or response.status_code == 200
        statuses.add(response.status_code)
    assert 400 in statuses
    assert transcribe(server, wav).text


def test_a_clip_over_the_body_limit_is_refused(server: RunningServer, wav: bytes) -> None:
    app = build_app(server.llm, load_served_models(server.llm), max_request_bytes=1000)
    with run_app(app) as address:
        small = RunningServer(server.llm, address)
        for options in ({}, {"stream": True}):
            with pytest.raises(APIStatusError) as refused:
                transcribe(small, wav, **options)
            assert refused.value.status_code == 413


def test_a_client_that_disconnects_from_a_stream_aborts_its_request(
    server: RunningServer, wav: bytes, aborted: list[RequestOutput]
) -> None:
    with server.client as client:
        events = client.audio.transcriptions.create(
            model="tiny", file=("clip", wav), stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(events))
        events.close()
    wait_until_idle(server)
    assert [output.outputs[0].finish_reason for output in aborted] == ["abort"]


def test_concurrent_transcriptions_are_independent(server: RunningServer) -> None:
    clips = {name: encoded(name) for name in FORMATS}
    alone = {name: transcribe(server, data).text for name, data in clips.items()}
    order = [*clips] * 3
    with ThreadPoolExecutor(len(order)) as pool:
        texts = list(pool.map(lambda name: transcribe(server, clips[name]).text, order))
    assert texts == [alone[name] for name in order]


def test_forms_are_in_the_openapi_document(server: RunningServer) -> None:
    document = httpx.get(f"{server.address}/openapi.json").json()
    for path, own in (("transcriptions", "include"), ("translations", "to_language")):
        content = document["paths"][f"/v1/audio/{path}"]["post"]["requestBody"]["content"]
        schema = content["multipart/form-data"]["schema"]
        assert schema["properties"]["file"] == {"format": "binary", "title": "File", "type": "string"}
        assert schema["required"] == ["file"] and own in schema["properties"]
        assert "$ref" not in json.dumps(schema)
