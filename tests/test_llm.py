"""`LLM`: its arguments, its outputs, and the effect of every sampling option."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmlora import (
    BASE,
    LLM,
    LLMEngine,
    LoRARequest,
    RequestOutputKind,
    SamplingParams,
    TextPrompt,
    TokensPrompt,
)
from mmlora.errors import ConfigError, MediaError, RequestError
from tests.checkpoints import AUDIO_ID, END_ID, END_OF_TEXT_ID, AdapterSpec, save_adapter, save_text_model

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
AUDIO = (np.sin(np.arange(8000) / 20).astype(np.float32), 16000)
IMAGE = Image.new("RGB", (42, 42), "red")


@pytest.fixture(scope="module")
def llm(tiny_phi4):
    return LLM(
        str(tiny_phi4),
        enable_lora=True,
        max_model_len=256,
        limit_mm_per_prompt={"audio": 2},
        enable_prefix_caching=False,
    )


@pytest.fixture(scope="module")
def adapter_a(tiny_adapters):
    return LoRARequest("a", 1, str(tiny_adapters["a"]))


@pytest.fixture(scope="module")
def adapter_b(tiny_adapters):
    return LoRARequest("b", 2, str(tiny_adapters["b"]))


def ids(outputs):
    return [output.outputs[0].token_ids for output in outputs]


def answer(llm, prompt="hello", **params):
    """Return the completion of one prompt, greedy by default."""
    params = SamplingParams(**{"temperature": 0, "max_tokens": 8, "ignore_eos": True, **params})
    return llm.generate(prompt, params, use_tqdm=False)[0].outputs[0]


def test_every_form_of_a_prompt_is_accepted(llm):
    text, token_ids = "hello", llm.get_tokenizer()("hello").input_ids
    forms = [text, token_ids, {"prompt": text}, {"prompt_token_ids": token_ids}]
    alone = [llm.generate(form, GREEDY, use_tqdm=False)[0] for form in forms]
    together = llm.generate(forms, GREEDY, use_tqdm=False)
    assert len({tuple(tokens) for tokens in ids(alone) + ids(together)}) == 1
    assert [output.prompt for output in together] == [text, None, text, None]
    assert all(output.prompt_token_ids == token_ids for output in together)
    assert llm.generate([], GREEDY, use_tqdm=False) == []


def test_the_fields_of_an_output(llm, adapter_a):
    output = llm.generate("hello", GREEDY, lora_request=adapter_a, use_tqdm=False)[0]
    (completion,) = output.outputs
    assert output.finished and output.error is None and output.lora_request is adapter_a
    assert (output.lora.adapter, output.lora.reason, output.lora.warning) == ("a", "explicit", None)
    assert len(output.lora.digest) == 64
    assert output.num_cached_tokens == 0 and output.prompt_logprobs is None
    assert min(output.metrics.queue_s, output.metrics.prefill_s, output.metrics.decode_s) >= 0
    assert (completion.index, completion.finish_reason, completion.stop_reason) == (0, "length", None)
    assert (completion.logprobs, completion.cumulative_logprob) == (None, None)
    assert completion.text == llm.get_tokenizer().decode(completion.token_ids, skip_special_tokens=True)


def test_params_are_one_for_all_or_one_per_prompt(llm):
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (1, 3)]
    assert [len(tokens) for tokens in ids(llm.generate(["a", "b"], params, use_tqdm=False))] == [1, 3]
    assert [len(tokens) for tokens in ids(llm.generate(["a", "b"], params[1], use_tqdm=False))] == [3, 3]
    with pytest.raises(RequestError, match="sampling_params has 2 entries for 1 prompts"):
        llm.generate(["a"], params, use_tqdm=False)


def test_adapters_are_one_for_all_or_one_per_prompt(llm, adapter_a, adapter_b):
    alone = {lora: llm.generate("hello", GREEDY, lora, use_tqdm=False)[0] for lora in (None, adapter_a, adapter_b)}
    assert len({tuple(output.outputs[0].token_ids) for output in alone.values()}) == 3, "adapters change the output"
    loras = [adapter_a, None, BASE, adapter_b]
    outputs = llm.generate(["hello"] * 4, GREEDY, loras, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs] == [
        alone[None if lora is BASE else lora].outputs[0].token_ids for lora in loras
    ]
    assert [o.lora.reason for o in outputs] == ["explicit", "none", "explicit:base", "explicit"]
    assert [o.lora.adapter for o in outputs] == ["a", None, None, "b"]
    assert ids(llm.generate(["hello"] * 2, GREEDY, adapter_a, use_tqdm=False)) == ids([alone[adapter_a]] * 2)
    with pytest.raises(RequestError, match="lora_request has 1 entries for 2 prompts"):
        llm.generate(["a", "b"], GREEDY, [adapter_a], use_tqdm=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": 5}, "prompts is a int"),
        ({"prompts": [5.0]}, "prompt is a number"),
        ({"prompts": ""}, "the prompt is empty"),
        ({"prompts": {"text": "x"}}, r"unknown key\(s\) text; allowed: prompt,"),
        ({"prompts": {"multi_modal_data": {}}}, "needs 'prompt' or 'prompt_token_ids'"),
        ({"prompts": {"prompt": 5}}, "'prompt' is a number"),
        ({"prompts": {"prompt_token_ids": ["x"]}}, "must be a list of integers"),
        ({"prompts": [999999]}, "token id 999999 is outside the vocabulary of 263"),
        ({"prompts": [-1]}, "token id -1"),
        ({"prompts": "x" * 256}, "256 tokens; .* max_model_len=256"),
        ({"prompts": "\ud800"}, "cannot be tokenized"),
        ({"prompts": "x", "sampling_params": {"temperature": 0}}, "sampling_params is a dict"),
        ({"prompts": "x", "lora_request": "a"}, "lora_request='a' must be a LoRARequest"),
        ({"prompts": "x", "sampling_params": SamplingParams(logprobs=21)}, "logprobs=21 exceeds max_logprobs=20"),
        ({"prompts": "x", "sampling_params": SamplingParams(logprobs=-1)}, "logprobs=-1 exceeds"),
        ({"prompts": "x", "sampling_params": SamplingParams(stop_token_ids=[263])}, "263 is outside the vocabulary"),
        ({"prompts": "x", "sampling_params": SamplingParams(logit_bias={300: 1})}, "300 is outside the vocabulary"),
        ({"prompts": {"prompt": "x", "multi_modal_data": [1]}}, "multi_modal_data is a list"),
        ({"prompts": {"prompt": "x", "multi_modal_data": np.zeros(9)}}, "_data is .*; it must map modalities"),
        ({"prompts": {"prompt": "x", "multi_modal_data": {"video": 1}}}, "holds video; videos are not supported"),
        ({"prompts": {"prompt": "x", "mm_processor_kwargs": 5}}, "mm_processor_kwargs is a number"),
        ({"prompts": {"prompt": "x", "cache_salt": ""}}, "cache_salt='' must be non-empty text"),
        ({"prompts": {"prompt": "x", "cache_salt": 5}}, "cache_salt=5 must be non-empty text"),
        ({"prompts": "x", "priority": True}, "priority=True must be an integer"),
        ({"prompts": "x", "priority": 2**63}, "priority=9223372036854775808 must be an integer"),
        ({"prompts": "x", "priority": -1}, "priority=-1 needs scheduling_policy='priority'; .* 'fcfs'"),
        ({"prompts": ["x", "y"], "priority": [0]}, "priority has 1 entries for 2 prompts"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(llm, arguments, message):
    with pytest.raises(RequestError, match=message):
        llm.generate(**arguments, use_tqdm=False)
    assert len(answer(llm).token_ids) == 8


def test_one_bad_prompt_starts_none(llm):
    with pytest.raises(RequestError, match="empty"):
        llm.generate(["good", ""], GREEDY, use_tqdm=False)
    assert not llm.llm_engine.has_unfinished_requests


def test_unknown_options_of_the_engine_are_refused(tiny_phi4):
    with pytest.raises(ConfigError, match=r"unknown option\(s\) max_lora; allowed: .*max_loras"):
        LLM(str(tiny_phi4), max_lora=2)
    with pytest.raises(ConfigError, match="max_model_len=513 exceeds this model's limit of 512 tokens"):
        LLM(str(tiny_phi4), max_model_len=513)
    with pytest.raises(ConfigError, match="KV cache of 1000 bytes"):
        LLM(str(tiny_phi4), kv_cache_memory_bytes=1000)
    with pytest.raises(ConfigError, match="neither a Jinja template nor a file"):
        LLM(str(tiny_phi4), chat_template="/no/such/file")
    with pytest.raises(ConfigError, match="is neither a directory nor"):
        LLM("/no/such/model")


def test_the_default_length_is_what_the_kv_cache_holds(tiny_phi4, caplog):
    llm = LLM(str(tiny_phi4), kv_cache_memory_bytes=100_000)
    tokens = llm.llm_engine.max_model_len
    assert (
        16 <= tokens < 512 and f"max_model_len={tokens}: the KV cache holds no more of the model's 512" in caplog.text
    )
    (output,) = llm.generate([[97] * (tokens - 4)], SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)
    assert output.error is None and len(output.outputs[0].token_ids) == 4
    with pytest.raises(RequestError, match=f"{tokens + 1} tokens"):
        llm.generate([[97] * (tokens + 1)], use_tqdm=False)
    with pytest.raises(ConfigError, match=f"holds {tokens} tokens, less than max_model_len=512"):
        LLM(str(tiny_phi4), kv_cache_memory_bytes=100_000, max_model_len=512)


def test_two_adapters_on_the_host_are_enough(tiny_phi4, adapter_a, adapter_b):
    llm = LLM(str(tiny_phi4), enable_lora=True, max_cpu_loras=2, max_model_len=64)
    assert llm.llm_engine.summary().num_lora_slots == 2
    assert [o.lora.adapter for o in llm.generate(["x", "x"], GREEDY, [adapter_a, adapter_b], use_tqdm=False)] == [
        "a",
        "b",
    ]


def test_adapters_need_enable_lora(tiny_phi4, adapter_a):
    engine = engine_of(tiny_phi4)
    with pytest.raises(RequestError, match="adapter 'a' is requested, but the engine has enable_lora=False"):
        engine.add_request("r", "x", GREEDY, adapter_a)


def engine_of(path, **options) -> LLMEngine:
    return LLM(str(path), **options).llm_engine


def test_n_completions_differ_and_the_first_equals_that_of_n_1(llm):
    params = {"temperature": 1.0, "seed": 7, "max_tokens": 12, "ignore_eos": True}
    several = llm.generate("hello", SamplingParams(n=3, **params), use_tqdm=False)[0].outputs
    assert [completion.index for completion in several] == [0, 1, 2]
    assert len({tuple(completion.token_ids) for completion in several}) == 3
    for index, completion in enumerate(several):
        alone = answer(llm, temperature=1.0, seed=7 + index, max_tokens=12)
        assert completion.token_ids == alone.token_ids


def test_outputs_repeat_with_a_seed_only(llm):
    def draw(**params):
        return tuple(answer(llm, temperature=1.0, max_tokens=12, **params).token_ids)

    assert draw(seed=1) == draw(seed=1) != draw(seed=2)
    assert draw() != draw()


def test_the_engine_seed_makes_a_whole_run_repeatable(tiny_phi4):
    def run(seed):
        params = SamplingParams(temperature=1.0, max_tokens=6, ignore_eos=True)
        return ids(LLM(str(tiny_phi4), seed=seed, max_model_len=64).generate(["a", "a"], params, use_tqdm=False))

    first = run(3)
    assert first == run(3) != run(4)
    assert first[0] != first[1]


def test_end_of_text_finishes_unless_ignored(llm):
    bias = {END_ID: 100}
    stopped = answer(llm, ignore_eos=False, logit_bias=bias)
    assert (stopped.token_ids, stopped.text, stopped.finish_reason) == ([END_ID], "", "stop")
    assert stopped.stop_reason is None
    assert answer(llm, ignore_eos=True, logit_bias=bias, max_tokens=3).token_ids == [END_ID] * 3
    assert answer(llm, ignore_eos=False, logit_bias={END_OF_TEXT_ID: 100}).finish_reason == "stop"


def test_min_tokens_delays_every_stop(llm):
    completion = answer(llm, ignore_eos=False, logit_bias={END_ID: 100}, min_tokens=3)
    assert len(completion.token_ids) == 4 and completion.token_ids[3] == END_ID
    assert END_ID not in completion.token_ids[:3]


def test_a_stop_token_is_the_stop_reason(llm):
    third = answer(llm).token_ids[2]
    completion = answer(llm, stop_token_ids=[third])
    assert completion.token_ids[-1] == third and completion.finish_reason == "stop"
    assert completion.stop_reason == third and len(completion.token_ids) <= 3


def test_a_stop_string_is_excluded_or_included(llm):
    bias = dict.fromkeys(llm.get_tokenizer()("ab").input_ids, 50)
    full = answer(llm, logit_bias=bias, max_tokens=12)
    assert set(full.text) <= set("ab") and len(full.text) == 12
    stop = full.text[4:7]
    cut = answer(llm, logit_bias=bias, max_tokens=12, stop=[stop, "zzz"])
    assert cut.text == full.text[: full.text.find(stop)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    kept = answer(llm, logit_bias=bias, max_tokens=12, stop=stop, include_stop_str_in_output=True)
    assert kept.text == cut.text + stop and kept.token_ids == cut.token_ids


def test_the_text_of_a_stop_token_is_excluded_or_included(llm):
    plain = answer(llm)
    stop = plain.token_ids[2]
    first = plain.token_ids.index(stop)
    for is_kept in (False, True):
        found = answer(llm, stop_token_ids=[stop], include_stop_str_in_output=is_kept)
        expected = plain.token_ids[: first + is_kept]
        assert found.text == llm.get_tokenizer().decode(expected) and found.token_ids == plain.token_ids[: first + 1]


def test_a_request_without_a_possible_token_fails_alone(llm):
    bad = SamplingParams(temperature=0, repetition_penalty=1e-40)
    good, failed = llm.generate(["hello", "hello"], [GREEDY, bad], use_tqdm=False)
    assert ids([good]) == ids(llm.generate("hello", GREEDY, use_tqdm=False)) and good.error is None
    assert isinstance(failed.error, RequestError) and failed.outputs[0].finish_reason == "error"


def test_text_that_cannot_fit_is_refused_before_it_is_tokenized(llm):
    text = "a" * (256 * 256 + 1)
    for ask in (lambda: llm.generate(text), lambda: llm.chat([{"role": "user", "content": text}])):
        with pytest.raises(RequestError, match=r"655\d\d characters, which cannot fit into max_model_len=256"):
            ask()


def test_cached_tokens_are_those_of_the_first_completion(tiny_phi4):
    llm = LLM(str(tiny_phi4), max_model_len=256, block_size=4)
    params = SamplingParams(n=3, seed=1, max_tokens=2, ignore_eos=True)
    fresh, again = (llm.generate("one two three four", params, use_tqdm=False)[0] for _ in range(2))
    assert fresh.num_cached_tokens == 0 < again.num_cached_tokens


def test_prompts_share_their_prefix_within_a_salt(tiny_phi4):
    llm = LLM(str(tiny_phi4), max_model_len=256, block_size=4)
    salts = ["a", None, "b", "a", None]
    prompts = [{"prompt": "one two three four", "cache_salt": salt} for salt in salts]
    outputs = [llm.generate(prompt, GREEDY, use_tqdm=False)[0] for prompt in prompts]
    assert [output.num_cached_tokens > 0 for output in outputs] == [False, False, False, True, True]
    assert ids(outputs) == [ids(outputs)[0]] * 5


def test_priorities_are_one_for_all_or_one_per_prompt(tiny_phi4, monkeypatch):
    llm = LLM(str(tiny_phi4), max_model_len=256, max_num_seqs=1, scheduling_policy="priority")
    schedule, ran = llm.llm_engine.scheduler.schedule, []

    def recorded():
        scheduled = schedule()
        ran.extend(item.seq.request.request_id for item in scheduled)
        return scheduled

    monkeypatch.setattr(llm.llm_engine.scheduler, "schedule", recorded)
    llm.generate(["a", "b", "c", "d"], GREEDY, use_tqdm=False, priority=[3, 1, 2, 1])
    assert list(dict.fromkeys(ran)) == ["1", "3", "2", "0"]
    chats = [[{"role": "user", "content": text}] for text in "ab"]
    llm.chat(chats, GREEDY, use_tqdm=False, priority=[1, 0])
    llm.generate(["a", "b"], GREEDY, use_tqdm=False, priority=7)
    assert list(dict.fromkeys(ran)) == ["1", "3", "2", "0", "5", "4", "6", "7"]


def test_only_allowed_tokens_are_generated(llm):
    free = answer(llm, max_tokens=12)
    allowed = sorted(set(range(100, 110)) - set(free.token_ids))
    assert set(answer(llm, max_tokens=12, allowed_token_ids=allowed).token_ids) <= set(allowed)
    stopped = answer(llm, ignore_eos=False, max_tokens=12, allowed_token_ids=[END_ID])
    assert (stopped.token_ids, stopped.finish_reason) == ([END_ID], "stop")
    with pytest.raises(RequestError, match="allowed_token_ids: token id 263 is outside the vocabulary") as caught:
        answer(llm, allowed_token_ids=[1, 263])
    assert caught.value.param == "allowed_token_ids"


def test_bad_words_are_not_generated(llm):
    bias = dict.fromkeys(llm.get_tokenizer()("ab ").input_ids, 50)
    free = answer(llm, logit_bias=bias, max_tokens=24).text
    for word in {free[3:4], free[3:5].strip(), free[5:8].strip()} - {""}:
        text = answer(llm, logit_bias=bias, max_tokens=24, bad_words=["zzz", word]).text
        assert word in free and word not in text and len(text) == 24, (word, text)
    with pytest.raises(RequestError, match="bad_words: .* cannot be tokenized"):
        answer(llm, bad_words=["\ud800"])


def test_bad_words_without_tokens_are_ignored(llm, monkeypatch):
    free = answer(llm, max_tokens=4).token_ids
    monkeypatch.setattr(llm.get_tokenizer(), "encode", lambda text, **_: [])  # as tokenizers that drop characters
    assert answer(llm, max_tokens=4, bad_words=["\u200b"]).token_ids == free


def test_a_prompt_is_truncated_from_the_left(llm):
    ids = llm.get_tokenizer()("one two three").input_ids
    for prompt in ("one two three", ids, {"prompt_token_ids": ids}):
        for limit, kept in ((4, ids[-4:]), (1, ids[-1:]), (len(ids), ids), (256, ids), (-1, ids)):
            params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, truncate_prompt_tokens=limit)
            (output,) = llm.generate([prompt], params, use_tqdm=False)
            assert output.prompt_token_ids == kept
            assert ids_of(output) == answer(llm, kept).token_ids
            if limit == 4:
                assert output.prompt == llm.get_tokenizer().decode(kept)
    long = SamplingParams(max_tokens=50, ignore_eos=True, truncate_prompt_tokens=-1)
    (output,) = llm.generate("x" * 1000, long, use_tqdm=False)
    assert (len(output.prompt_token_ids), len(ids_of(output))) == (256 - 50, 50)
    with pytest.raises(RequestError, match="truncate_prompt_tokens=257 exceeds max_model_len=256"):
        answer(llm, truncate_prompt_tokens=257)


def ids_of(output):
    return output.outputs[0].token_ids


def test_completions_without_text(llm):
    text, bare = answer(llm, stop_token_ids=[END_ID]), answer(llm, detokenize=False, stop_token_ids=[END_ID])
    assert (bare.text, bare.token_ids, bare.finish_reason) == ("", text.token_ids, text.finish_reason)
    assert answer(llm, detokenize=False, kept_special_token_ids=[END_ID], logit_bias={END_ID: 100}).text == ""


@pytest.mark.parametrize("kind", [None, *RequestOutputKind])
def test_outputs_hold_what_their_kind_says(llm, kind):
    engine, outputs = llm.llm_engine, []
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=0, output_kind=kind)
    whole = answer(llm, max_tokens=6)
    engine.add_request("r", "hello", params)
    while engine.has_unfinished_requests:
        outputs += engine.step()
    counts = [len(ids_of(output)) for output in outputs]
    expected = {None: list(range(1, 7)), RequestOutputKind.DELTA: [1] * 6, RequestOutputKind.FINAL_ONLY: [6]}
    assert counts == expected.get(kind, list(range(1, 7)))
    assert [len(output.outputs[0].logprobs) for output in outputs] == counts
    if kind is RequestOutputKind.DELTA:
        assert "".join(output.outputs[0].text for output in outputs) == whole.text
    else:
        assert outputs[-1].outputs[0].text == whole.text and ids_of(outputs[-1]) == whole.token_ids
    assert answer(llm, max_tokens=6, output_kind=kind).token_ids == whole.token_ids


def test_prompts_of_vllm(llm):
    ids = llm.get_tokenizer()("hello").input_ids
    own = answer(llm).token_ids
    for prompt in (
        TextPrompt(prompt="hello"),
        TokensPrompt(prompt_token_ids=ids),
        TokensPrompt(prompt_token_ids=ids, prompt="hello"),
    ):
        assert ids_of(llm.generate(prompt, GREEDY, use_tqdm=False)[0]) == own
    assert ids_of(llm.generate(prompt_token_ids=ids, sampling_params=GREEDY, use_tqdm=False)[0]) == own
    outputs = llm.generate(prompt_token_ids=[ids, ids], sampling_params=GREEDY, use_tqdm=False)
    assert [ids_of(output) for output in outputs] == [own, own]
    for arguments in ({}, {"prompts": "hello", "prompt_token_ids": ids}):
        with pytest.raises(RequestError, match="either prompts or prompt_token_ids"):
            llm.generate(**arguments)


def test_a_progress_bar_of_the_caller_is_used(llm):
    from tqdm import tqdm

    bars = []

    class Bar(tqdm):
        def __init__(self, *args, **kwargs):
            bars.append(self)
            super().__init__(*args, **kwargs)

    llm.generate(["a", "b"], GREEDY, use_tqdm=Bar)
    assert [bar.n for bar in bars] == [2]


def test_methods_of_vllm_that_are_missing_say_why(llm):
    for name in ("encode", "embed", "classify", "score", "beam_search", "sleep"):
        with pytest.raises(AttributeError, match=rf"LLM.{name} is not supported: "):
            getattr(llm, name)
    assert not hasattr(llm, "no_such_method")
    with pytest.raises(RequestError, match="chat_template_content_format='openai' must be 'auto'"):
        llm.chat([{"role": "user", "content": "x"}], chat_template_content_format="openai")


def test_errors_of_requests_are_value_errors(llm):
    for call in (lambda: llm.generate("", GREEDY), lambda: SamplingParams(n=0), lambda: llm.chat([])):
        with pytest.raises(ValueError, match="empty|n=0|at least one message"):
            call()


def test_penalties_keep_tokens_from_coming_back(llm):
    def num_distinct(**params):
        return len(set(answer(llm, max_tokens=60, **params).token_ids))

    plain = num_distinct()
    assert num_distinct(presence_penalty=2, frequency_penalty=2) > plain
    assert num_distinct(repetition_penalty=50.0) > plain
    assert num_distinct(frequency_penalty=-2) < plain


def test_logprobs_are_those_of_the_model(llm):
    completion = answer(llm, logprobs=3, max_tokens=4)
    assert len(completion.logprobs) == 4
    for token, entries in zip(completion.token_ids, completion.logprobs, strict=True):
        assert len(entries) == 3 and entries[token].rank == 1, "greedy takes the most likely"
        assert sorted(entries.values(), key=lambda e: e.rank) == sorted(entries.values(), key=lambda e: -e.logprob)
    chosen = sum(e[t].logprob for t, e in zip(completion.token_ids, completion.logprobs, strict=True))
    assert completion.cumulative_logprob == pytest.approx(chosen)


def test_prompt_logprobs_agree_with_generated_ones(llm):
    completion = answer(llm, logprobs=0, max_tokens=6)
    prompt_ids = llm.get_tokenizer()("hello").input_ids
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=2)
    output = llm.generate(prompt_ids + completion.token_ids, params, use_tqdm=False)[0]
    assert len(output.prompt_logprobs) == len(prompt_ids) + 6 and output.prompt_logprobs[0] is None
    for token, generated, prompted in zip(
        completion.token_ids, completion.logprobs, output.prompt_logprobs[len(prompt_ids) :], strict=True
    ):
        assert prompted[token].logprob == pytest.approx(generated[token].logprob, abs=1e-4)


def test_media_limits_hold_per_prompt(llm):
    def prompt(num_clips):
        return {"prompt": "<|audio|>" * num_clips + "x", "multi_modal_data": {"audio": [AUDIO] * num_clips}}

    output = llm.generate(prompt(2), GREEDY, use_tqdm=False)[0]
    assert output.prompt_token_ids.count(AUDIO_ID) > 2 and len(output.outputs[0].token_ids) == 8
    with pytest.raises(MediaError, match="the prompt has 3 audio items; limit_mm_per_prompt allows 2"):
        llm.generate(prompt(3), GREEDY, use_tqdm=False)


def test_processor_options_reach_the_processor(llm):
    prompt = {"prompt": "<|image|>x", "multi_modal_data": {"image": Image.new("RGB", (126, 84))}}
    lengths = [
        len(llm.generate({**prompt, "mm_processor_kwargs": options}, GREEDY, use_tqdm=False)[0].prompt_token_ids)
        for options in (None, {"dynamic_hd": 1}, {"dynamic_hd": 4})
    ]
    assert lengths[0] == lengths[2] > lengths[1]
    with pytest.raises(RequestError, match="unknown processor option size"):
        llm.generate({**prompt, "mm_processor_kwargs": {"size": 1}}, GREEDY, use_tqdm=False)


def test_chat_passes_tools_to_the_template(llm):
    tools = [{"type": "function", "function": {"name": "add"}}]
    template = "{% for tool in tools %}{{ tool.function.name }};{% endfor %}{{ messages[0].content }}"
    messages = [{"role": "user", "content": "go"}]
    assert llm.chat(messages, GREEDY, use_tqdm=False, chat_template=template, tools=tools)[0].prompt == "add;go"
    for wrong, text in ((tools, "does not support tools"), ([{"name": "add"}], r"tools\[0\]"), ("add", "list")):
        with pytest.raises(RequestError, match=text):
            llm.chat(messages, GREEDY, use_tqdm=False, tools=wrong)


def test_chat_equals_generate_on_the_rendered_prompt(llm, adapter_a):
    messages = [{"role": "user", "content": [{"type": "audio", "audio": AUDIO}, {"type": "text", "text": "what?"}]}]
    chat = llm.chat(messages, GREEDY, use_tqdm=False, lora_request=adapter_a)[0]
    prompt = {"prompt": "<|user|><|audio|>what?<|end|><|assistant|>", "multi_modal_data": {"audio": AUDIO}}
    generated = llm.generate(prompt, GREEDY, adapter_a, use_tqdm=False)[0]
    assert chat.prompt == prompt["prompt"]
    assert (chat.prompt_token_ids, chat.outputs[0].token_ids) == (generated.prompt_token_ids, ids([generated])[0])
    two = llm.chat([messages, [{"role": "user", "content": "hi"}]], GREEDY, use_tqdm=False)
    assert [output.prompt for output in two][1] == "<|user|>hi<|end|><|assistant|>"


def test_a_chat_continues_its_final_message(llm):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well, I"}]
    (output,) = llm.chat(messages, GREEDY, use_tqdm=False, continue_final_message=True)
    assert output.prompt == "<|user|>hi<|end|><|assistant|>Well, I"
    assert ids([output]) == ids(llm.generate(output.prompt, GREEDY, use_tqdm=False))
    with pytest.raises(RequestError, match="add_generation_prompt and continue_final_message are mutually exclusive"):
        llm.chat(messages, use_tqdm=False, continue_final_message=True, add_generation_prompt=True)


def test_an_interrupted_call_leaves_nothing_behind(llm, monkeypatch):
    step, calls = llm.llm_engine.step, []

    def interrupted():
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(llm.llm_engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b"], GREEDY, use_tqdm=False)
    monkeypatch.undo()
    assert not llm.llm_engine.has_unfinished_requests
    manager = llm.llm_engine.block_manager
    assert manager.num_free_blocks == manager.num_blocks
    assert len(answer(llm).token_ids) == 8


def test_defaults_come_from_generation_config(tiny_phi4, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for file in tiny_phi4.iterdir():
        (model / file.name).symlink_to(file)
    (model / "generation_config.json").unlink()
    (model / "generation_config.json").write_text(
        '{"temperature": 0.25, "top_k": 3, "top_p": 0.5, "repetition_penalty": 1.5, "eos_token_id": [104]}'
    )
    llm = LLM(str(model), max_model_len=64)
    params = llm.get_default_sampling_params()
    assert (params.temperature, params.top_k, params.top_p, params.repetition_penalty) == (0.25, 3, 0.5, 1.5)
    assert answer(llm, ignore_eos=False, logit_bias={104: 100}).finish_reason == "stop"
    plain = LLM(str(model), max_model_len=64, generation_config="none").get_default_sampling_params()
    assert (plain.temperature, plain.top_k) == (1.0, 0)


def test_siblings_of_a_failed_sequence_affect_no_other_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The first of two siblings fails to activate its adapter: both fail, and the base request continues."""
    path = save_text_model(tmp_path / "llama", "llama")
    adapters = {
        name: save_adapter(path, tmp_path / name, AdapterSpec(("q_proj",), seed)) for seed, name in enumerate("ab", 1)
    }
    llm = LLM(
        str(path), enable_lora=True, max_loras=1, max_cpu_loras=2, dtype="float32", device="cpu", max_model_len=64
    )
    engine, slots = llm.llm_engine, llm.llm_engine.slots
    requests = {name: llm.add_lora(name, str(adapters[name])) for name in adapters}
    params = SamplingParams(temperature=1.0, seed=1, n=3, max_tokens=1, ignore_eos=True)
    engine.add_request("siblings", "once upon", params, requests["a"])
    engine.add_request("base", "hello", SamplingParams(temperature=0, max_tokens=8, ignore_eos=True), BASE)
    load, failures = slots._load, iter([torch.OutOfMemoryError("once")])

    def fail_once(slot: int, adapter: object) -> None:
        for failure in failures:
            raise failure
        load(slot, adapter)

    outputs = engine.step()
    slots.evict(slots.resident[0].identity)
    monkeypatch.setattr(slots, "_load", fail_once)
    while engine.has_unfinished_requests:
        outputs += engine.step()
    ended = {output.request_id: output for output in outputs if output.finished}
    assert "could not be activated" in str(ended["siblings"].error)
    assert ended["base"].error is None and len(ended["base"].outputs[0].token_ids) == 8


SCRIPT = """
import sys
from mmlora import LLM, SamplingParams

print("script started")
llm = LLM(sys.argv[1], device="cpu", max_model_len=256)
prompt = {"prompt": "<|image|>hello", "multi_modal_data": {"image": open(sys.argv[2], "rb").read()}}
output, = llm.generate(prompt, SamplingParams(max_tokens=2, ignore_eos=True), use_tqdm=False)
print(len(output.outputs[0].token_ids))
"""


def test_a_script_without_a_main_guard_decodes_media(tiny_phi4, tmp_path):
    script, image = tmp_path / "script.py", tmp_path / "image.png"
    script.write_text(SCRIPT)
    Image.new("RGB", (42, 42), "red").save(image)
    command = [sys.executable, str(script), str(tiny_phi4), str(image)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.stdout.split("\n") == ["script started", "2", ""], run.stderr
