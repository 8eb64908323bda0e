"""`/tokenize`, `/detokenize` and `/tokenizer_info`: the engine's tokens, and named errors."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from mmlora.inputs import input_processor
from mmlora.server.api import build_app
from mmlora.server.args import LoRAModule
from mmlora.server.launch import load_served_models
from tests.server.conftest import RunningServer, ServerFactory, input_audio_part, run_app, text_part, url_part
from tests.server.openai.tools.definitions import TEMPLATE

CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": [text_part("what is two plus three?")]}]


@pytest.fixture(scope="module")
def server(start_server: ServerFactory, adapters: dict[str, str]) -> RunningServer:
    return start_server(LoRAModule("words", adapters["words"]), default_mm_loras={"audio": adapters["speech"]})


def post(server: RunningServer, route: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.address}/{route}", json=body, timeout=60)


def tokenize(server: RunningServer, **body: Any) -> dict[str, Any]:
    response = post(server, "tokenize", **body)
    assert response.status_code == 200, response.text
    result = dict(response.json())
    assert result["count"] == len(result["tokens"]) and result["max_model_len"] == server.llm.engine.max_model_len
    assert set(result) == {"count", "max_model_len", "tokens", "token_strs"}
    return result


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and len(str(error)) < 800
    return dict(error)


@pytest.mark.parametrize("model", [None, "tiny", "words", "audio"])
def test_tokenize_returns_the_engines_tokens(server: RunningServer, model: str | None) -> None:
    result = tokenize(server, prompt="what is two plus three?", model=model)
    ready = server.llm.engine.process_input("r", "what is two plus three?")
    assert result["tokens"] == ready.prompt_token_ids and result["token_strs"] is None


def test_placeholders_are_not_expanded(server: RunningServer) -> None:
    tokens = tokenize(server, prompt="<|audio_1|>hi", add_special_tokens=False)["tokens"]
    assert (
        tokens == tokenize(server, prompt="<|audio|>hi", add_special_tokens=False)["tokens"]
    )  # as the engine normalizes it
    assert tokens == server.llm.tokenizer("<|audio|>hi", add_special_tokens=False).input_ids


def test_special_tokens_are_added_by_default(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    received = []

    def encode(*_: object, add_special_tokens: bool) -> list[int]:
        received.append(add_special_tokens)
        return [1]

    monkeypatch.setattr("mmlora.inputs.input_processor.encode_text", encode)
    for fields in ({}, {"add_special_tokens": None}, {"add_special_tokens": True}, {"add_special_tokens": False}):
        tokenize(server, prompt="hi", **fields)
    assert received == [True, True, True, False]


def test_token_strings_are_returned_on_request(server: RunningServer) -> None:
    result = tokenize(server, prompt="two plus three", return_token_strs=True)
    assert result["token_strs"] == server.llm.tokenizer.convert_ids_to_tokens(result["tokens"])
    assert tokenize(server, messages=CHAT, return_token_strs=True)["token_strs"][0].startswith("<|")
    assert tokenize(server, prompt="two", return_token_strs=False)["token_strs"] is None


def test_tokenizing_a_chat_matches_its_completions_usage(server: RunningServer) -> None:
    with server.client as client:
        completion = client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=1)  # type: ignore[arg-type]
    assert completion.usage is not None
    result = tokenize(server, messages=CHAT)
    assert result["count"] == completion.usage.prompt_tokens
    text = server.llm.tokenizer.decode(result["tokens"])
    assert text.endswith("<|assistant|>") and "two plus three" in text
    without = tokenize(server, messages=CHAT, add_generation_prompt=False, add_special_tokens=False)["tokens"]
    assert result["tokens"][: len(without)] == without and len(without) < result["count"]
    same = tokenize(server, messages=CHAT, chat_template_kwargs={"add_generation_prompt": False})
    assert same["tokens"] == without


def test_an_empty_text_has_only_special_tokens(server: RunningServer) -> None:
    assert tokenize(server, prompt="", add_special_tokens=False)["tokens"] == []


def test_a_text_over_the_context_length_is_still_tokenized(server: RunningServer) -> None:
    result = tokenize(server, prompt="two plus three " * 400)
    assert result["count"] > result["max_model_len"]


@pytest.mark.parametrize(
    ("body", "status", "param", "text"),
    [
        ({}, 400, "prompt", "one of prompt and messages is needed; received neither"),
        ({"prompt": "a", "messages": CHAT}, 400, "prompt", "received both"),
        ({"prompt": ["a"]}, 400, "prompt", '["a"]'),
        ({"prompt": "a", "truncate": 3}, 400, "truncate", "unknown field 'truncate'; allowed are model, prompt"),
        ({"prompt": "a", "model": "nobody"}, 404, "model", "'nobody' does not exist"),
        ({"prompt": "a", "add_generation_prompt": False}, 400, "add_generation_prompt", "needs messages"),
        ({"prompt": "a", "chat_template_kwargs": {}}, 400, "chat_template_kwargs", "needs messages"),
        ({"prompt": "a", "return_token_strs": "yes"}, 400, "return_token_strs", '"yes"'),
        ({"prompt": "a" * 200_000}, 400, "prompt", "200000 characters"),
        ({"messages": []}, 400, "messages", "messages"),
        ({"prompt": "a", "tools": [{}]}, 400, "tools", "needs messages"),
        ({"messages": [{"role": "<|banana|>", "content": "x"}]}, 400, "messages", "messages[0].role"),
        ({"messages": [{"role": "user"}]}, 400, "messages", "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "video_url"}]}]}, 400, None, "video"),
        ({"messages": [{"role": "user", "content": [3]}]}, 400, None, "content part"),
        ({"messages": CHAT, "chat_template_kwargs": {"tokenize": True}}, 400, "chat_template_kwargs", "tokenize"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_invalid_tokenize_request_gets_a_named_error(
    server: RunningServer, body: dict[str, Any], status: int, param: str | None, text: str
) -> None:
    error = error_of(post(server, "tokenize", **body), status)
    assert error["param"] == param and text in error["message"]


@pytest.mark.parametrize("case", ["audio", "image", "both", "urls"])
def test_media_count_as_in_a_completion(server: RunningServer, wav: bytes, png: bytes, case: str) -> None:
    parts = {
        "audio": [input_audio_part(wav)],
        "image": [url_part("image_url", png, "image/png"), text_part("and")],
        "both": [input_audio_part(wav), text_part("or"), url_part("image_url", png, "image/png")],
        "urls": [url_part("audio_url", wav, "audio/wav"), url_part("audio_url", wav, "audio/wav")],
    }[case]
    messages = [CHAT[0], {"role": "user", "content": [text_part("hi"), *parts]}]
    result = tokenize(server, messages=messages)
    body = {"messages": messages, "max_tokens": 1, "return_token_ids": True}
    completion = post(server, "v1/chat/completions", **body).json()
    assert result["tokens"] == completion["prompt_token_ids"]
    assert result["count"] == completion["usage"]["prompt_tokens"]
    without = [CHAT[0], {"role": "user", "content": [part for part in messages[1]["content"] if "text" in part]}]
    assert result["count"] >= tokenize(server, messages=without)["count"] + 8


def test_unusable_media_are_refused(server: RunningServer) -> None:
    for content, text in ((b"no image", "neither"), (b"\x89PNG\r\n\x1a\n cut", "image")):
        messages = [{"role": "user", "content": [url_part("image_url", content, "image/png")]}]
        error = error_of(post(server, "tokenize", messages=messages), 400)
        assert error["code"] == "media_error" and text in error["message"]


def test_unknown_fields_without_a_value_are_ignored(server: RunningServer) -> None:
    empty = {"chat_template": None, "future_1": False, "future_2": "", "future_3": [], "future_4": {}}
    assert tokenize(server, prompt="hi", **empty) == tokenize(server, prompt="hi")
    assert post(server, "detokenize", tokens=[100], **empty).status_code == 200
    for value in (0, True, "x", [None]):
        assert error_of(post(server, "tokenize", prompt="hi", future=value), 400)["param"] == "future"


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def test_tools_count_as_in_a_completion(start_server: ServerFactory) -> None:
    server = start_server(chat_template=TEMPLATE)
    plain = tokenize(server, messages=CHAT)["tokens"]
    assert tokenize(server, messages=CHAT, tools=[])["tokens"] == plain
    result = tokenize(server, messages=CHAT, tools=[TOOL])
    body = {"messages": CHAT, "tools": [TOOL], "max_tokens": 1, "return_token_ids": True}
    assert result["tokens"] == post(server, "v1/chat/completions", **body).json()["prompt_token_ids"] != plain
    error = error_of(post(server, "tokenize", messages=CHAT, tools=[{"type": "function"}]), 400)
    assert error["param"] == "tools"


def test_special_tokens_can_be_added_to_a_chat(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    received, encode = [], input_processor.encode_text

    def record(*arguments: Any, add_special_tokens: bool) -> list[int]:
        received.append(add_special_tokens)
        return encode(*arguments, add_special_tokens=add_special_tokens)

    monkeypatch.setattr("mmlora.inputs.input_processor.encode_text", record)
    for fields in ({}, {"add_special_tokens": False}, {"add_special_tokens": True}):
        tokenize(server, messages=CHAT, **fields)
        assert post(server, "v1/chat/completions", messages=CHAT, max_tokens=1, **fields).status_code == 200
    assert received == [False, False, False, False, True, True]


def test_the_tokenizer_is_described_without_paths(server: RunningServer) -> None:
    info = httpx.get(f"{server.address}/tokenizer_info").raise_for_status().json()
    tokenizer = server.llm.tokenizer
    assert info["chat_template"] == tokenizer.chat_template and info["eos_token"] == tokenizer.eos_token
    assert {"bos_token", "pad_token", "unk_token"} <= info.keys()
    assert (info["model_max_length"], info["tokenizer_class"]) == (512, type(tokenizer).__name__)
    for token_id, entry in info["added_tokens_decoder"].items():
        assert tokenizer.convert_ids_to_tokens(int(token_id)) == entry["content"]
    assert len(info["added_tokens_decoder"]) == len(tokenizer.added_tokens_decoder) > 0
    text = json.dumps(info)
    assert server.llm.args.model not in text and "/tmp" not in text and "_file" not in text


def test_an_empty_model_is_the_base_model(server: RunningServer, wav: bytes) -> None:
    assert tokenize(server, prompt="hi", model="")["tokens"] == tokenize(server, prompt="hi")["tokens"]
    audio = {"role": "user", "content": [input_audio_part(wav)]}
    answers = [post(server, "v1/chat/completions", messages=[audio], max_tokens=2, model=m).json() for m in ("", None)]
    for answer in answers:
        assert (answer["model"], answer["lora"]["reason"]) == ("tiny", "default:audio")
    assert post(server, "v1/completions", prompt="hi", max_tokens=2, model="").json()["model"] == "tiny"
    assert post(server, "v1/responses", input="hi", max_output_tokens=2, model="").json()["model"] == "tiny"
    assert post(server, "v1/completions", prompt="hi", max_tokens=2, model="", lora="words").status_code == 200


@pytest.mark.parametrize(
    "text", ["what is two plus three?", "  two  spaces ,  and . ", "<|user|>hi<|end|><|assistant|>", ""]
)
def test_detokenize_returns_the_text(server: RunningServer, text: str) -> None:
    tokens = tokenize(server, prompt=text, add_special_tokens=False)["tokens"]
    response = post(server, "detokenize", tokens=tokens, model="words")
    assert response.status_code == 200
    expected = server.llm.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert response.json() == {"prompt": expected}
    if text.startswith("<|user|>"):
        assert expected == text


def test_every_embedding_id_can_be_detokenized(server: RunningServer) -> None:
    last = server.llm.engine.input_processor.vocab_size - 1
    assert post(server, "detokenize", tokens=[0, last]).status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "param", "text"),
    [
        ({}, 400, "tokens", "tokens is required"),
        (
            {"tokens": [1, 2, 10**6]},
            400,
            "tokens",
            "tokens[2]=1000000 is outside the vocabulary; it must be from 0 to ",
        ),
        ({"tokens": [-1]}, 400, "tokens", "tokens[0]=-1"),
        ({"tokens": [10**400]}, 400, "tokens", "tokens[0]=1000"),
        ({"tokens": [1, True]}, 400, "tokens", "tokens.1: "),
        ({"tokens": [1.5]}, 400, "tokens", "1.5"),
        ({"tokens": "12"}, 400, "tokens", '"12"'),
        ({"tokens": [1] * 513}, 400, "tokens", "513 ids; the limit is max_model_len=512"),
        ({"tokens": [1], "text": "a"}, 400, "text", "unknown field 'text'"),
        ({"tokens": [1], "model": "nobody"}, 404, "model", "'nobody' does not exist"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_invalid_detokenize_request_gets_a_named_error(
    server: RunningServer, body: dict[str, Any], status: int, param: str, text: str
) -> None:
    error = error_of(post(server, "detokenize", **body), status)
    assert error["param"] == param and text in error["message"]


def test_both_need_the_api_key_and_limit_their_bodies(server: RunningServer) -> None:
    models = load_served_models(server.llm)
    with run_app(build_app(server.llm, models, api_key="key", max_request_bytes=200)) as address:
        headers = {"authorization": "Bearer key"}
        assert httpx.get(f"{address}/tokenizer_info").status_code == 401
        assert httpx.get(f"{address}/tokenizer_info", headers=headers).status_code == 200
        for route, body in (("tokenize", {"prompt": "a"}), ("detokenize", {"tokens": [1]})):
            assert httpx.post(f"{address}/{route}", json=body).status_code == 401
            assert httpx.post(f"{address}/{route}", json=body, headers=headers).status_code == 200
            large = {"prompt": "a" * 200} if "prompt" in body else {"tokens": [1] * 200}
            assert httpx.post(f"{address}/{route}", json=large, headers=headers).status_code == 413
