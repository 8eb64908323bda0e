"""`ModelInput` is plain data: an unpickled copy gives the same tokens, and it refers to no live objects."""

import pickle
import pickletools
from pathlib import Path
from typing import Any

import pytest
import torch

from mmlora import LLM, LoRARequest, SamplingParams
from mmlora.engine.model_input import ModelInput
from mmlora.structured_outputs import StructuredOutputsParams
from tests.media import clip, picture

PLAIN_MODULES = (
    "mmlora.engine.model_input",
    "mmlora.attention.backend",
    "mmlora.towers.base",
    "torch",
    "collections",
    "_codecs",
)


def generate(llm: LLM, adapters: dict[str, Path]) -> list[list[tuple[int, ...]]]:
    """Return token ids of a varied batch: media, adapters, sampling, log probabilities, penalties and a constraint."""
    media = {"audio": [clip(0.6, 1)], "image": [picture(50, 42, 2)]}
    prompts: list[Any] = ["one two three", {"prompt": "see<|image|>hear<|audio|>!", "multi_modal_data": media}] * 2
    loras = [LoRARequest("everything", 1, str(adapters["everything"])), None, LoRARequest("a", 2, str(adapters["a"]))]
    words = StructuredOutputsParams(regex="[a-z ]+")
    params = [
        SamplingParams(max_tokens=8, temperature=0.8, seed=3, n=2, ignore_eos=True, logprobs=1),
        SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, prompt_logprobs=1),
        SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, frequency_penalty=1.0),
        SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, structured_outputs=words),
    ]
    outputs = llm.generate(prompts, params, [*loras, None], use_tqdm=False)
    assert all(output.error is None for output in outputs)
    return [[tuple(completion.token_ids) for completion in output.outputs] for output in outputs]


def test_an_unpickled_copy_gives_the_same_tokens(
    tiny_phi4: Path, tiny_adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"enable_lora": True, "max_loras": 2, "enable_prefix_caching": False}
    llm = LLM(str(tiny_phi4), device="cpu", max_model_len=128, max_num_batched_tokens=24, **options)
    expected = generate(llm, tiny_adapters)
    run, received = llm.llm_engine.runner.run, list[ModelInput]()

    def run_copy(model_input: ModelInput) -> torch.Tensor:
        received.append(model_input)
        return run(pickle.loads(pickle.dumps(model_input)))

    monkeypatch.setattr(llm.llm_engine.runner, "run", run_copy)
    assert generate(llm, tiny_adapters) == expected
    assert any(model_input.media for model_input in received)
    assert any(model_input.segments for model_input in received)
    assert any(model_input.segments is None for model_input in received)
    assert any(len(model_input.logit_rows) > len(model_input.spans) for model_input in received)
    for model_input in received:
        modules = {
            argument.split(" ")[0]
            for opcode, argument, _ in pickletools.genops(pickle.dumps(model_input, protocol=2))
            if opcode.name == "GLOBAL"
        }
        assert all(module.startswith(PLAIN_MODULES) for module in modules), modules
