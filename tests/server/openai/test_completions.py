"""Legacy completions with the `openai` client: whole and streamed outputs equal those of the engine."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openai.types import Completion
from PIL import Image

from mmlora import BASE, LLM, SamplingParams
from mmlora.lora.request import LoRARequest
from mmlora.outputs import CompletionOutput, LoRAChoice, RequestOutput
from mmlora.processors.media.loader import load_base64
from mmlora.server.args import LoRAModule
from mmlora.server.openai.completions.output import CompletionBuilder
from mmlora.server.openai.completions.protocol import CompletionRequest
from mmlora.server.openai.logprobs import prompt_offsets
from tests.server.conftest import RunningServer, ServerFactory

TEXTS = ["tell me a story", "what is two plus three?", "héllo wörld, 日本 ✓"]
EXTRAS = frozenset(
    "lora multi_modal_data top_k min_p repetition_penalty stop_token_ids ignore_eos min_tokens skip_special_tokens "
    "allowed_token_ids bad_words truncate_prompt_tokens detokenize return_token_ids "
    "prompt_logprobs add_special_tokens mm_processor_kwargs include_stop_str_in_output".split()
)


@pytest.fixture(scope="module")
def server(start_server: ServerFactory, adapters: dict[str, str]) -> RunningServer:
    defaults = {"audio": adapters["speech"], "image": adapters["vision"]}
    return start_server(LoRAModule("words", adapters["words"]), default_mm_loras=defaults)


@pytest.fixture(scope="module")
def llm(tiny_phi4: Path, adapters: dict[str, str]) -> LLM:
    """An engine with the options of the server's."""
    defaults = {"audio": adapters["speech"], "image": adapters["vision"]}
    return LLM(str(tiny_phi4), enable_lora=True, max_loras=2, device="cpu", default_mm_loras=defaults)


def data_url(data: bytes) -> str:
    return f"data:application/octet-stream;base64,{base64.b64encode(data).decode()}"


def split(options: dict[str, Any]) -> dict[str, Any]:
    extra = {name: options.pop(name) for name in list(options) if name in EXTRAS}
    return {"model": "tiny", "temperature": 0, **options, "extra_body": extra}


def complete(server: RunningServer, prompt: Any, **options: Any) -> Completion:
    with server.client as client:
        completion: Completion = client.completions.create(prompt=prompt, **split(options))
    Completion.model_validate(completion.to_dict() if not completion.choices[0].logprobs else without_gaps(completion))
    return completion


def without_gaps(completion: Completion) -> dict[str, Any]:
    """Remove nulls: the client's types do not allow a first prompt token without a log probability."""
    found: dict[str, Any] = completion.to_dict()
    for choice in found["choices"]:
        for column in ("token_logprobs", "top_logprobs"):
            choice["logprobs"][column] = [value for value in choice["logprobs"][column] if value is not None]
    return found


def stream(server: RunningServer, prompt: Any, **options: Any) -> list[Completion]:
    with server.client as client:
        return list(client.completions.create(prompt=prompt, stream=True, **split(options)))


def generate(llm: LLM, *prompts: Any, lora: Any = None, **options: Any) -> list[RequestOutput]:
    return llm.generate(list(prompts), SamplingParams(**{"temperature": 0, **options}), lora, use_tqdm=False)


def texts(outputs: list[RequestOutput]) -> list[str]:
    return [completion.text for output in outputs for completion in output.outputs]


def test_one_prompt_is_completed_as_the_engine_does(server: RunningServer, llm: LLM) -> None:
    completion = complete(server, TEXTS[0])
    own = generate(llm, TEXTS[0])[0]
    assert completion.object == "text_completion" and completion.id.startswith("cmpl-") and completion.model == "tiny"
    assert [(c.index, c.text, c.finish_reason) for c in completion.choices] == [(0, own.outputs[0].text, "length")]
    assert len(own.outputs[0].token_ids) == 16  # OpenAI's default
    assert completion.usage is not None
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (len(own.prompt_token_ids), 16)
    assert completion.usage.total_tokens == len(own.prompt_token_ids) + 16


@pytest.mark.parametrize("form", ["texts", "token ids", "one list of token ids", "one text in a list"])
def test_every_form_of_prompt(server: RunningServer, llm: LLM, form: str) -> None:
    """With several prompts and n, choices are ordered by prompt, then by index."""
    ids = [llm.get_tokenizer()(text).input_ids for text in TEXTS]
    sent: Any = {"texts": TEXTS, "token ids": ids, "one list of token ids": ids[0]}.get(form, [TEXTS[0]])
    own = generate(llm, *(TEXTS if form in ("texts", "token ids") else TEXTS[:1]), n=2, temperature=2.0, seed=5)
    completion = complete(server, sent, n=2, temperature=2.0, seed=5, best_of=2)
    assert [choice.index for choice in completion.choices] == list(range(2 * len(own)))
    assert [choice.text for choice in completion.choices] == texts(own)
    assert len(set(texts(own))) == len(texts(own))  # else their order would not be tested
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == sum(len(output.prompt_token_ids) for output in own)
    assert completion.usage.completion_tokens == sum(len(c.token_ids) for output in own for c in output.outputs)


def test_usage_counts_cached_tokens(server: RunningServer) -> None:
    prompts = ["again and again " * 12, "another one " * 12]
    complete(server, prompts, max_tokens=1)
    usage = complete(server, prompts, max_tokens=1).usage
    alone = [complete(server, prompt, max_tokens=1).usage for prompt in prompts]
    assert usage is not None and usage.prompt_tokens_details is not None
    cached = [u.prompt_tokens_details.cached_tokens for u in alone if u and u.prompt_tokens_details]
    assert usage.prompt_tokens_details.cached_tokens == sum(n or 0 for n in cached) > 16


def test_text_can_be_left_out(server: RunningServer, llm: LLM) -> None:
    own = generate(llm, TEXTS[0])[0].outputs[0]
    completion: Any = complete(server, TEXTS[0], detokenize=False, return_token_ids=True)
    assert (completion.choices[0].text, completion.choices[0].token_ids) == ("", own.token_ids)
    chunks: list[Any] = stream(server, TEXTS[0], detokenize=False, return_token_ids=True)
    assert [token for chunk in chunks for choice in chunk.choices for token in choice.token_ids or ()] == own.token_ids
    assert all(choice.text == "" for chunk in chunks for choice in chunk.choices)


def test_the_prompts_of_a_request_share_its_turns(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    add_input, groups = server.llm.engine.add_input, list[list[str | None]]()
    monkeypatch.setattr(
        server.llm.engine, "add_input", lambda value: (groups[-1].append(value.group), add_input(value))
    )
    for prompts in (TEXTS, TEXTS, TEXTS[:1]):
        groups.append([])
        complete(server, prompts, max_tokens=1)
    assert [len(group) for group in groups] == [3, 3, 1] and all(None not in group for group in groups)
    assert all(len(set(group)) == 1 for group in groups) and len({group[0] for group in groups}) == 3


def test_sampling_fields_reach_the_engine(server: RunningServer, llm: LLM) -> None:
    greedy = generate(llm, TEXTS[0])[0].outputs[0]
    fields: list[dict[str, Any]] = [
        {"temperature": 3.0, "seed": 1, "top_p": 0.9, "top_k": 40, "min_p": 0.01},
        {"presence_penalty": 2.0, "frequency_penalty": 2.0, "repetition_penalty": 1.5, "max_tokens": 24},
        {"logit_bias": {str(greedy.token_ids[0]): -100}},
        {"stop": greedy.text[3]},
        {"stop": [greedy.text[3]], "include_stop_str_in_output": True},
        {"stop_token_ids": [greedy.token_ids[3]]},
        {"ignore_eos": True, "min_tokens": 5, "max_tokens": 40, "skip_special_tokens": False},
        {"allowed_token_ids": list(range(100, 140))},
        {"bad_words": [greedy.text[1]]},
        {"truncate_prompt_tokens": 4},
    ]
    for options in fields:
        own = generate(llm, TEXTS[0], **options)[0].outputs[0]
        choice = complete(server, TEXTS[0], **options).choices[0]
        assert (choice.text, choice.finish_reason) == (own.text, own.finish_reason), options
        assert choice.to_dict()["stop_reason"] == own.stop_reason
        assert own.token_ids != greedy.token_ids


def test_special_tokens_are_added_by_default(server: RunningServer, monkeypatch: Any) -> None:
    seen: list[Any] = []
    tokenizer = type(server.llm.tokenizer)
    call = tokenizer.__call__

    def record(self: Any, *args: Any, **options: Any) -> Any:
        seen.append(options["add_special_tokens"])
        return call(self, *args, **options)

    monkeypatch.setattr(tokenizer, "__call__", record)
    for value in (None, True, False):
        complete(server, TEXTS[0], max_tokens=1, add_special_tokens=value)
    assert seen == [True, True, False]


@pytest.mark.parametrize("kind", ["audio", "image", "both"])
def test_media_use_their_default_adapter(server: RunningServer, llm: LLM, wav: bytes, png: bytes, kind: str) -> None:
    content = {"audio": wav, "image": png}
    kinds = list(content) if kind == "both" else [kind]
    prompt = "<|user|>" + "".join(f"<|{name}|>" for name in kinds) + "what is it?<|end|><|assistant|>"
    media = {name: load_base64(base64.b64encode(content[name])) for name in kinds}
    own = generate(llm, {"prompt": prompt, "multi_modal_data": media})[0]
    data: dict[str, Any] = {name: data_url(content[name]) for name in kinds}
    completion = complete(server, prompt, multi_modal_data=data)
    lists = complete(server, [prompt], multi_modal_data={name: [url] for name, url in data.items()})
    ids = llm.get_tokenizer()(prompt).input_ids
    assert complete(server, ids, multi_modal_data=data).choices[0].text == own.outputs[0].text
    assert completion.choices[0].text == lists.choices[0].text == own.outputs[0].text
    assert completion.usage and completion.usage.prompt_tokens == len(own.prompt_token_ids)
    lora: Any = completion.to_dict()["lora"]
    assert lora["reason"] == own.lora.reason == {"both": "conflict:audio+image"}.get(kind, f"default:{kind}")
    assert (lora["adapter"], lora["digest"]) == (own.lora.adapter, own.lora.digest)
    base: Any = complete(server, prompt, multi_modal_data=data, lora=[]).to_dict()
    assert base["lora"]["reason"] == "explicit:base"
    base_text = generate(llm, {"prompt": prompt, "multi_modal_data": media}, lora=BASE)[0].outputs[0].text
    assert base["choices"][0]["text"] == base_text
    assert (base_text != own.outputs[0].text) == (kind != "both")


def test_options_reach_the_media_processor(server: RunningServer, llm: LLM) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    used = []
    for options in ({}, {"dynamic_hd": 1}):
        data = {"image": data_url(buffer.getvalue())}
        completion = complete(server, "<|image|>", multi_modal_data=data, mm_processor_kwargs=options)
        prompt = {"prompt": "<|image|>", "multi_modal_data": {"image": pixels}, "mm_processor_kwargs": options}
        own = generate(llm, prompt)
        assert completion.usage and completion.usage.prompt_tokens == len(own[0].prompt_token_ids)
        used.append(completion.usage.prompt_tokens)
    assert used[0] != used[1]


def test_adapters_by_name(server: RunningServer, llm: LLM, adapters: dict[str, str]) -> None:
    words = LoRARequest("words", 1, adapters["words"])
    own = generate(llm, *TEXTS, lora=words)
    assert texts(own) != texts(generate(llm, *TEXTS))
    for options in ({"model": "words"}, {"lora": "words"}, {"lora": [{"name": "words"}]}):
        completion: Any = complete(server, TEXTS, **options).to_dict()
        assert [choice["text"] for choice in completion["choices"]] == texts(own)
        assert (completion["lora"]["adapter"], completion["lora"]["reason"]) == ("words", "explicit")


def test_headers_name_the_adapter(server: RunningServer, wav: bytes) -> None:
    for is_stream in (False, True):
        options = split({"multi_modal_data": {"audio": data_url(wav)}, "max_tokens": 1, "stream": is_stream})
        with (
            server.client as client,
            client.completions.with_streaming_response.create(prompt="<|audio|>", **options) as response,
        ):
            assert response.headers["x-mmlora-adapter"] == "audio"
            assert response.headers["x-mmlora-reason"] == "default:audio"
            response.read()


@pytest.mark.parametrize("options", [{}, {"logprobs": 3}, {"echo": True}, {"echo": True, "logprobs": 2}])
def test_a_stream_adds_up_to_the_whole_response(server: RunningServer, options: dict[str, Any]) -> None:
    whole = complete(server, TEXTS, n=2, stop=[" a"], **options)
    chunks = stream(server, TEXTS, n=2, stop=[" a"], stream_options={"include_usage": True}, **options)
    assert len({chunk.id for chunk in chunks}) == 1 and {chunk.object for chunk in chunks} == {"text_completion"}
    for choice in whole.choices:
        own = [(chunk, c) for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(c.text for _, c in own) == choice.text
        assert [c.finish_reason for _, c in own if c.finish_reason] == [choice.finish_reason]
        assert own[-1][1].finish_reason is not None
        assert ["lora" in chunk.to_dict() for chunk, _ in own] == [True, *[False] * (len(own) - 2), True]
        for column in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            parts = [getattr(c.logprobs, column) for _, c in own if c.logprobs]
            assert parts or "logprobs" not in options
            if parts and column in ("tokens", "text_offset"):
                assert [entry for part in parts for entry in part] == getattr(choice.logprobs, column)
            elif parts:
                assert len([entry for part in parts for entry in part]) == len(getattr(choice.logprobs, column))
    assert chunks[-1].choices == [] and chunks[-1].usage is not None and whole.usage is not None
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert getattr(chunks[-1].usage, name) == getattr(whole.usage, name)
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_stream_of_one_prompt_with_audio(server: RunningServer, wav: bytes) -> None:
    options = {"multi_modal_data": {"audio": data_url(wav)}}
    chunks = stream(server, "<|audio|>what is it?", **options)
    whole = complete(server, "<|audio|>what is it?", **options)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    loras: list[Any] = [chunk.to_dict().get("lora") for chunk in chunks]
    assert loras[0] == loras[-1] == whole.to_dict()["lora"] and not any(loras[1:-1])


def test_logprobs_are_the_engines(server: RunningServer, llm: LLM) -> None:
    own = generate(llm, TEXTS[2], logprobs=2)[0].outputs[0]
    assert own.logprobs is not None
    completion = complete(server, TEXTS[2], logprobs=2, top_k=0)
    found = completion.choices[0].logprobs
    assert found and found.tokens and found.token_logprobs and found.top_logprobs and found.text_offset
    chosen = [top[token] for token, top in zip(own.token_ids, own.logprobs, strict=True)]
    assert found.tokens == [entry.decoded_token for entry in chosen]
    assert found.token_logprobs == pytest.approx([entry.logprob for entry in chosen], abs=1e-4)
    for top, reported in zip(own.logprobs, found.top_logprobs, strict=True):
        assert set(reported) == {entry.decoded_token for entry in top.values()}
        assert max(reported.values()) == pytest.approx(max(entry.logprob for entry in top.values()), abs=1e-4)
    check_offsets(completion.choices[0].text, found.tokens, found.text_offset)
    assert complete(server, TEXTS[0]).choices[0].logprobs is None
    none = complete(server, TEXTS[0], logprobs=0).choices[0].logprobs
    assert none and [len(top) for top in none.top_logprobs or ()] == [1] * 16


def check_offsets(text: str, tokens: list[str], offsets: list[int]) -> None:
    """Check that each token starts at its offset; a token that is part of a character, at the character's."""
    assert offsets == sorted(offsets)
    num_checked = 0
    for token, offset in zip(tokens, offsets, strict=True):
        if "\ufffd" not in token:
            assert text[offset:].startswith(token)
            num_checked += 1
    assert num_checked > 5


@pytest.mark.parametrize("is_text", [True, False])
def test_echo_with_logprobs(server: RunningServer, llm: LLM, is_text: bool) -> None:
    prompt = "<|user|>" + TEXTS[2] + "<|end|>"
    ids = llm.get_tokenizer()(prompt).input_ids
    own = generate(llm, prompt, logprobs=2, prompt_logprobs=2)[0]
    completion = complete(server, prompt if is_text else ids, echo=True, logprobs=2)
    choice, found = completion.choices[0], completion.choices[0].logprobs
    assert choice.text == prompt + own.outputs[0].text
    assert found and found.tokens and found.token_logprobs and found.top_logprobs and found.text_offset
    assert own.prompt_logprobs and own.outputs[0].logprobs
    tokens, tops = ids + own.outputs[0].token_ids, own.prompt_logprobs + own.outputs[0].logprobs
    assert found.tokens == [llm.get_tokenizer().decode([token]) for token in tokens]
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
    expected = [top[token].logprob for token, top in zip(tokens, tops, strict=True) if top]
    assert found.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)
    for top, reported in zip(tops[1:], found.top_logprobs[1:], strict=True):
        assert top and set(reported) == {entry.decoded_token for entry in top.values()}
    check_offsets(choice.text, found.tokens, found.text_offset)


def test_echo_of_media_and_without_logprobs(server: RunningServer, png: bytes) -> None:
    prompt, data = "<|image|>a <|user|>b", {"image": data_url(png)}
    plain = complete(server, prompt, multi_modal_data=data)
    echoed = complete(server, prompt, multi_modal_data=data, echo=True)
    assert echoed.choices[0].text == prompt + plain.choices[0].text and echoed.choices[0].logprobs is None
    rich = complete(server, prompt, multi_modal_data=data, echo=True, logprobs=1).choices[0]
    assert rich.text == echoed.choices[0].text and rich.logprobs and plain.usage
    assert rich.logprobs.tokens and rich.logprobs.text_offset
    assert len(rich.logprobs.tokens) == plain.usage.total_tokens
    at_user = rich.logprobs.tokens.index("<|user|>")
    assert rich.logprobs.text_offset[at_user] == prompt.index("<|user|>")


def test_a_prompt_can_be_scored_without_an_output(server: RunningServer, llm: LLM) -> None:
    own = generate(llm, *TEXTS, prompt_logprobs=1)
    completion = complete(server, TEXTS, echo=True, logprobs=1, max_tokens=0)
    for choice, output in zip(completion.choices, own, strict=True):
        assert choice.text == output.prompt and choice.finish_reason == "length"
        assert choice.logprobs and len(choice.logprobs.tokens or ()) == len(output.prompt_token_ids)
    assert completion.usage and completion.usage.completion_tokens == 0
    chunks = stream(server, TEXTS[0], echo=True, max_tokens=0)
    assert "".join(chunk.choices[0].text for chunk in chunks) == TEXTS[0]


def test_prompt_logprobs_are_the_engines(server: RunningServer, llm: LLM) -> None:
    own = generate(llm, TEXTS[0], prompt_logprobs=2)[0].prompt_logprobs
    assert own is not None
    for options in ({}, {"echo": True, "logprobs": 4}):
        choice: Any = complete(server, TEXTS[0], prompt_logprobs=2, **options).choices[0].to_dict()
        found = choice["prompt_logprobs"]
        assert found[0] is None and len(found) == len(own)
        for expected, entry in zip(own[1:], found[1:], strict=True):
            assert expected and list(entry) == [str(token) for token in expected]
            for token, logprob in expected.items():
                assert entry[str(token)]["logprob"] == pytest.approx(logprob.logprob, abs=1e-4)
                assert entry[str(token)]["rank"] == logprob.rank
                assert entry[str(token)]["decoded_token"] == logprob.decoded_token


def test_choices_name_an_adapter_that_differs_from_the_first_prompts() -> None:
    """An activated LoRA applies only to prompts with its invocation tokens."""
    applied, not_applied = LoRAChoice("a", "1", "explicit"), LoRAChoice(None, None, "explicit", "not applied")
    request = CompletionRequest(prompt=["x", "y"])
    builder = CompletionBuilder("cmpl-1", "tiny", request, None)
    outputs = [
        RequestOutput(name, "", [1], [CompletionOutput(0, "z", [2], finish_reason="stop")], True, lora)
        for name, lora in zip(builder.request_ids, (applied, not_applied), strict=True)
    ]
    whole = builder.complete(outputs[::-1])
    assert whole["lora"]["adapter"] == "a" and builder.lora(outputs[::-1]) == applied
    assert "lora" not in whole["choices"][0]
    assert whole["choices"][1]["lora"]["warning"] == "not applied"


def test_offsets_when_the_tokens_decode_to_another_text(llm: LLM) -> None:
    """Numbered placeholders are tokenized as other text; offsets then are sums of token lengths."""
    tokenizer = llm.get_tokenizer()
    ids = tokenizer("<|image|>ab").input_ids
    assert prompt_offsets(tokenizer, ids, "<|image|>ab") == [0, 9, 10]
    assert prompt_offsets(tokenizer, [ids[0], *ids], "<|image|>ab") == [0, 9, 9, 10]
    assert prompt_offsets(tokenizer, ids, "<|image_1|>ab") == [0, 9, 10]
