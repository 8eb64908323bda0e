"""Every behavior in "Default LoRA Models For Multimodal Models" of the reference document, offline."""

import logging
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmlora import BASE, LLM, LoRARequest, SamplingParams
from mmlora.assets.models import assistant_adapters, assistant_path

PARAMS = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
AUDIO = (np.sin(np.arange(6000) / 15).astype(np.float32), 16000)
IMAGE = Image.new("RGB", (42, 42), "blue")
TEXT = "hello"
SPOKEN = {"prompt": "<|audio|>what?", "multi_modal_data": {"audio": AUDIO}}
SHOWN = {"prompt": "<|image|>what?", "multi_modal_data": {"image": IMAGE}}
BOTH = {"prompt": "<|audio|><|image|>?", "multi_modal_data": {"audio": AUDIO, "image": [IMAGE]}}


def load(model, defaults, **options):
    options = {"enable_lora": True, "max_model_len": 256, "max_loras": 1, **options}
    return LLM(str(model), default_mm_loras={key: str(path) for key, path in defaults.items()}, **options)


@pytest.fixture(scope="module")
def llm(tiny_phi4, tiny_adapters):
    """An engine with two defaults and one slot."""
    return load(tiny_phi4, {"audio": tiny_adapters["a"], "image": tiny_adapters["b"]})


@pytest.fixture(scope="module")
def answer(llm):
    """Return the tokens and the adapter choice for one prompt."""

    def run(prompt, lora_request=None):
        (output,) = llm.generate(prompt, PARAMS, lora_request, use_tqdm=False)
        return output.outputs[0].token_ids, output.lora

    return run


@pytest.fixture(scope="module")
def adapters(tiny_adapters):
    return {name: LoRARequest(name, index, str(path)) for index, (name, path) in enumerate(tiny_adapters.items(), 1)}


def test_a_default_is_applied_when_its_modality_is_present(answer, adapters):
    for prompt, key, name in ((SPOKEN, "audio", "a"), (SHOWN, "image", "b")):
        tokens, lora = answer(prompt)
        assert (lora.adapter, lora.reason, lora.warning) == (key, f"default:{key}", None)
        explicit_tokens, explicit = answer(prompt, adapters[name])
        assert tokens == explicit_tokens and lora.digest == explicit.digest
        assert tokens != answer(prompt, BASE)[0], "the default changes the answer"


def test_text_only_gets_no_adapter(answer):
    tokens, lora = answer(TEXT)
    assert (lora.adapter, lora.digest, lora.reason) == (None, None, "none")
    assert tokens == answer(TEXT, BASE)[0]


def test_several_mapped_modalities_get_no_adapter_and_one_warning(llm, answer, caplog):
    llm.llm_engine._warned.clear()
    with caplog.at_level(logging.WARNING, "mmlora"):
        tokens, lora = answer(BOTH)
        answer(BOTH)
    assert (lora.adapter, lora.reason) == (None, "conflict:audio+image")
    assert "audio and image" in lora.warning and "none was applied" in lora.warning
    assert tokens == answer(BOTH, BASE)[0]
    assert len([record for record in caplog.records if "none was applied" in record.getMessage()]) == 1


def test_an_explicit_adapter_wins(answer, adapters):
    for prompt in (SPOKEN, SHOWN, BOTH, TEXT):
        tokens, lora = answer(prompt, adapters["c"])
        assert (lora.adapter, lora.reason, lora.warning) == ("c", "explicit", None)
    assert tokens != answer(TEXT)[0]


def test_an_explicit_base_model_wins(answer):
    for prompt in (SPOKEN, SHOWN, BOTH, TEXT):
        lora = answer(prompt, BASE)[1]
        assert (lora.adapter, lora.reason, lora.warning) == (None, "explicit:base", None)


def test_two_defaults_in_one_batch_share_a_single_slot(llm, answer):
    prompts = [SPOKEN, SHOWN, TEXT, BOTH, SPOKEN, SHOWN]
    outputs = llm.generate(prompts, PARAMS, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == [answer(prompt)[0] for prompt in prompts]
    reasons = ["default:audio", "default:image", "none", "conflict:audio+image"]
    assert [output.lora.reason for output in outputs] == [*reasons, *reasons[:2]]
    assert outputs[0].lora_request == llm.llm_engine.default_loras["audio"]


def test_an_adapter_named_after_a_modality_is_not_a_default(llm, answer, tiny_adapters):
    named = LoRARequest("audio", 77, str(tiny_adapters["d"]))
    explicit_tokens, explicit = answer(TEXT, named)
    assert (explicit.adapter, explicit.reason) == ("audio", "explicit")
    assert explicit_tokens != answer(TEXT)[0]
    assert answer(SPOKEN)[1].digest != explicit.digest, "the default is still its own"
    assert answer(TEXT)[1].reason == "none"


def test_without_defaults_a_modality_selects_no_adapter(tiny_phi4, tiny_adapters):
    llm = load(tiny_phi4, {})
    llm.generate(TEXT, PARAMS, LoRARequest("audio", 1, str(tiny_adapters["d"])), use_tqdm=False)
    (output,) = llm.generate(SPOKEN, PARAMS, use_tqdm=False)
    assert (output.lora.adapter, output.lora.reason) == (None, "none")


@pytest.mark.parametrize("key", ["audio+image", "image+audio"])
def test_a_combination_key_matches_exactly_its_modalities(tiny_phi4, tiny_adapters, adapters, key):
    defaults = {"audio": tiny_adapters["a"], "image": tiny_adapters["b"], key: tiny_adapters["everything"]}
    llm = load(tiny_phi4, defaults)
    outputs = llm.generate([BOTH, SPOKEN, SHOWN, TEXT], PARAMS, use_tqdm=False)
    assert [output.lora.reason for output in outputs] == [
        "default:audio+image",
        "default:audio",
        "default:image",
        "none",
    ]
    assert outputs[0].lora.adapter == "audio+image" and outputs[0].lora.warning is None
    (explicit,) = llm.generate(BOTH, PARAMS, adapters["everything"], use_tqdm=False)
    assert outputs[0].outputs[0].token_ids == explicit.outputs[0].token_ids
    assert outputs[0].lora.digest == explicit.lora.digest


def test_only_the_mapped_one_of_two_modalities_counts(tiny_phi4, tiny_adapters):
    llm = load(tiny_phi4, {"audio": tiny_adapters["a"]})
    outputs = llm.generate([BOTH, SHOWN], PARAMS, use_tqdm=False)
    assert [output.lora.reason for output in outputs] == ["default:audio", "none"]


REFERENCE = '''
from transformers import AutoTokenizer
from vllm import LLM, SamplingParams
from vllm.assets.audio import AudioAsset

model_id = "ibm-granite/granite-speech-3.3-2b"
tokenizer = AutoTokenizer.from_pretrained(model_id)

def get_prompt(question: str, has_audio: bool):
    """Build the input prompt to send to vLLM."""
    if has_audio:
        question = f"<|audio|>{question}"
    chat = [
        {"role": "user", "content": question},
    ]
    return tokenizer.apply_chat_template(chat, tokenize=False)


llm = LLM(
    model=model_id,
    enable_lora=True,
    max_lora_rank=64,
    max_model_len=2048,
    limit_mm_per_prompt={"audio": 1},
    # Will always pass a `LoRARequest` with the `model_id`
    # whenever audio is contained in the request data.
    default_mm_loras = {"audio": model_id},
    enforce_eager=True,
)

question = "can you transcribe the speech into a written format?"
prompt_with_audio = get_prompt(
    question=question,
    has_audio=True,
)
audio = AudioAsset("mary_had_lamb").audio_and_sample_rate

inputs = {
    "prompt": prompt_with_audio,
    "multi_modal_data": {
        "audio": audio,
    }
}


outputs = llm.generate(
    inputs,
    sampling_params=SamplingParams(
        temperature=0.2,
        max_tokens=64,
    ),
)
'''


def test_the_offline_example_of_the_reference_document_runs():
    script = REFERENCE.replace("vllm", "mmlora").replace("ibm-granite/granite-speech-3.3-2b", assistant_path())
    script = script.replace('{"audio": model_id}', repr({"audio": assistant_adapters()["speech-lora"]}))
    assert len(re.findall(r"mmlora", script)) >= 2 and "vllm" not in script
    names: dict[str, object] = {}
    exec(compile(script, "reference example", "exec"), names)
    (output,) = names["outputs"]
    assert output.finished and output.error is None
    assert (output.lora.adapter, output.lora.reason) == ("audio", "default:audio")
    assert output.lora_request.lora_path == assistant_adapters()["speech-lora"]
    assert output.prompt.startswith("<|user|><|audio|>can you transcribe")
    assert 1 <= len(output.outputs[0].token_ids) <= 64
    assert Path(assistant_path()).is_dir()
