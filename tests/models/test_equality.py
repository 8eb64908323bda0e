"""Each kind of request equals transformers + PEFT: greedy tokens, and logits within 1e-4 in float32."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mmlora import LLM
from mmlora.outputs import TokenLogprobs
from tests.checkpoints import TEXT_FAMILIES, VOCAB_SIZE
from tests.equality import LOGIT_TOLERANCE, Case, Checkpoint, check_cases, check_equal, run_cases
from tests.media import clip, picture
from tests.reference import Media

AUDIO = Media(audios=[clip(0.7, 1)])
IMAGE = Media(images=[picture(40, 42, 2)])
BOTH = Media(audios=[clip(0.55, 3)], images=[picture(90, 50, 4)])
# Both pictures fill their crops. transformers' vision tower is causal (`is_causal` is True) unless some picture of the
# batch needs a mask, so a picture that fills its crop would depend on the other pictures of its prompt.
MANY = Media(audios=[clip(0.4, 5), clip(0.4, 6)], images=[picture(30, 30, 7), picture(84, 42, 8)])

TEXT_PROMPT = "<|user|>How many dogs can you count?<|end|><|assistant|>"
AUDIO_PROMPT = "<|user|>Write down:<|audio|><|end|><|assistant|>"
IMAGE_PROMPT = "<|user|><|image|>What is it?<|end|><|assistant|>"
BOTH_PROMPT = "<|user|>See<|image|>and hear <|audio|>!<|end|><|assistant|>"
MANY_PROMPT = "<|user|><|audio|>first<|image|><|image|>then <|audio|>and?<|end|><|assistant|>"

CASES = [
    Case("text, base", TEXT_PROMPT),
    Case("text, text", TEXT_PROMPT, adapter="text"),
    Case("text, rslora", "<|user|>one two<|end|><|assistant|>", adapter="rslora"),
    Case("text, everything", TEXT_PROMPT, adapter="everything"),
    Case("audio, base", AUDIO_PROMPT, AUDIO),
    Case("audio, text", AUDIO_PROMPT, AUDIO, "text"),
    Case("audio, connector", AUDIO_PROMPT, AUDIO, "connector"),
    Case("audio, audio", AUDIO_PROMPT, AUDIO, "audio"),
    Case("audio, everything", AUDIO_PROMPT, AUDIO, "everything"),
    Case("longer audio, audio", AUDIO_PROMPT, Media(audios=[clip(1.1, 9)]), "audio"),
    Case("image, base", IMAGE_PROMPT, IMAGE),
    Case("image, rslora", IMAGE_PROMPT, IMAGE, "rslora"),
    Case("image, connector", IMAGE_PROMPT, IMAGE, "connector"),
    Case("image, vision", IMAGE_PROMPT, IMAGE, "vision"),
    Case("image, everything", IMAGE_PROMPT, IMAGE, "everything"),
    Case("wide image, vision", IMAGE_PROMPT, Media(images=[picture(120, 41, 10)]), "vision"),
    Case("audio + image, base", BOTH_PROMPT, BOTH),
    Case("audio + image, connector", BOTH_PROMPT, BOTH, "connector"),
    Case("audio + image, everything", BOTH_PROMPT, BOTH, "everything"),
    Case("two of each, base", MANY_PROMPT, MANY),
    Case("two of each, everything", MANY_PROMPT, MANY, "everything"),
]


def load(checkpoint: Checkpoint, **options: Any) -> LLM:
    defaults = {"enable_lora": True, "max_logprobs": -1, "max_num_batched_tokens": 16, "max_model_len": 256}
    return LLM(str(checkpoint.path), **{**defaults, "dtype": "float32", "device": "cpu", **options})


@pytest.fixture(scope="module")
def llm(phi4_checkpoint: Checkpoint) -> LLM:
    """An engine with chunks of 16 tokens, which split each picture and most clips."""
    return load(phi4_checkpoint)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_alone(llm: LLM, phi4_checkpoint: Checkpoint, case: Case) -> None:
    llm.llm_engine.runner.encoder.clear()
    check_cases(llm, phi4_checkpoint, [case])


@pytest.mark.parametrize("max_num_batched_tokens", [16, 2048])
def test_mixed(phi4_checkpoint: Checkpoint, max_num_batched_tokens: int) -> None:
    check_cases(load(phi4_checkpoint, max_num_batched_tokens=max_num_batched_tokens), phi4_checkpoint, CASES)


def test_fewer_slots_than_adapters(phi4_checkpoint: Checkpoint) -> None:
    check_cases(load(phi4_checkpoint, max_loras=2, max_cpu_loras=8), phi4_checkpoint, CASES[::-1])


def test_cases_depend_on_their_adapters(phi4_checkpoint: Checkpoint) -> None:
    """A case whose output does not depend on its adapter would prove nothing."""
    answers: dict[str, list[list[int]]] = {}
    for case in CASES:
        answers.setdefault(case.prompt + str(id(case.media)), []).append(phi4_checkpoint.expected(case).token_ids)
    assert all(a != b for same in answers.values() for i, a in enumerate(same) for b in same[:i])
    tokens = [token for same in answers.values() for answer in same for token in answer]
    assert len(set(tokens)) > 50


DEFAULT_REASONS = {
    "text": "none",
    "audio": "default:audio",
    "image": "default:image",
    "audio + image": "conflict:audio+image",
}


@pytest.mark.parametrize("combination", [None, "connector"])
def test_defaults(phi4_checkpoint: Checkpoint, combination: str | None) -> None:
    """Media select their default adapter; audio and images need the key `audio+image`, else the base model is used."""
    adapters, reasons = phi4_checkpoint.adapters, dict(DEFAULT_REASONS)
    defaults = {"audio": str(adapters["audio"]), "image": str(adapters["everything"])}
    if combination is not None:
        defaults["audio+image"] = str(adapters[combination])
        reasons["audio + image"] = "default:audio+image"
    cases = [
        Case("text", TEXT_PROMPT),
        Case("audio", AUDIO_PROMPT, AUDIO, "audio"),
        Case("image", IMAGE_PROMPT, IMAGE, "everything"),
        Case("audio + image", BOTH_PROMPT, BOTH, combination),
    ]
    llm = load(phi4_checkpoint, default_mm_loras=defaults, max_loras=1)
    outputs = check_cases(llm, phi4_checkpoint, cases, is_automatic=True)
    assert {case.name: output.lora.reason for case, output in zip(cases, outputs, strict=True)} == reasons


def dense(entries: list[TokenLogprobs]) -> torch.Tensor:
    """Return log probabilities `[len(entries), vocab_size]`."""
    return torch.tensor([[entry[token].logprob for token in range(VOCAB_SIZE)] for entry in entries])


def test_logprobs_over_the_vocabulary(llm: LLM, phi4_checkpoint: Checkpoint) -> None:
    cases = [CASES[0], CASES[8], CASES[18]]
    results = run_cases(llm, phi4_checkpoint, cases, logprobs=-1, prompt_logprobs=-1)
    for case, (output, _) in zip(cases, results, strict=True):
        expected = phi4_checkpoint.expected(case)
        assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
        assert output.outputs[0].token_ids == expected.token_ids
        found = dense([*output.prompt_logprobs[1:], *output.outputs[0].logprobs])
        torch.testing.assert_close(found, expected.logits.log_softmax(-1), rtol=0, atol=LOGIT_TOLERANCE)


@pytest.mark.parametrize("case", [CASES[1], CASES[8], CASES[18]], ids=lambda case: case.name)
def test_prefix_cache_hit(phi4_checkpoint: Checkpoint, case: Case) -> None:
    llm = load(phi4_checkpoint, block_size=8)
    for is_hit in (False, True):
        ((output, logits),) = run_cases(llm, phi4_checkpoint, [case], prompt_logprobs=None)
        assert (output.num_cached_tokens > 0) is is_hit
        check_equal(output, logits, phi4_checkpoint.expected(case), case.name)
    assert output.num_cached_tokens == (len(output.prompt_token_ids) - 1) // 8 * 8


def test_several_outputs(llm: LLM, phi4_checkpoint: Checkpoint) -> None:
    case = CASES[18]
    ((output, logits),) = run_cases(llm, phi4_checkpoint, [case], n=3)
    check_equal(output, logits, phi4_checkpoint.expected(case), case.name)
    assert [answer.token_ids for answer in output.outputs] == [output.outputs[0].token_ids] * 3


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_text_families(text_checkpoint: Callable[[str], Checkpoint], family: str) -> None:
    checkpoint = text_checkpoint(family)
    cases = [
        Case("base", "<|user|>How many dogs can you count?<|end|><|assistant|>"),
        Case("lora", "<|user|>How many dogs can you count?<|end|><|assistant|>", adapter="lora"),
        Case("short, base", "a"),
        Case("long, lora", "Mary had a little lamb, its fleece was white as snow.", adapter="lora"),
    ]
    llm = load(checkpoint)
    check_cases(llm, checkpoint, cases)
    check_cases(llm, checkpoint, cases[-1:])


def test_pictures_encoded_together(phi4_checkpoint: Checkpoint) -> None:
    """A picture that fills its crop and one that does not have equal shapes, and do not influence each other."""
    sizes = {"full": (42, 42), "narrow": (20, 42), "flat": (42, 25)}
    cases = [Case(name, IMAGE_PROMPT, Media(images=[picture(*size, 50)])) for name, size in sizes.items()]
    check_cases(load(phi4_checkpoint, max_num_batched_tokens=2048), phi4_checkpoint, cases)
