"""Helpers for life cycle tests: adapters that differ in rank and output, on disk and in memory."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmlora import LLM, LLMEngine, LoRARequest, SamplingParams
from mmlora.lora.loading.files import read_adapter
from tests.checkpoints import AdapterSpec, save_adapter

TARGETS = r".*layers\.\d+\.(self_attn|mlp)\.\w+_proj"
PROMPT = "once upon"
GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


@dataclass(frozen=True)
class Contents:
    """Adapters of one model: their `paths`, `sizes` in bytes, and `answers`, the reference's greedy tokens."""

    model: Path
    paths: list[Path]
    sizes: list[int]
    answers: list[list[int]]
    base_answer: list[int]

    def tensors(self, content: int) -> dict[str, Any]:
        """Return arguments of `add_lora` that pass an adapter from memory."""
        files = read_adapter(self.paths[content])
        return {"tensors": files.tensors, "config": files.config}

    def write(self, path: Path, content: int) -> Path:
        """Copy an adapter to a directory."""
        return Path(shutil.copytree(self.paths[content], path, dirs_exist_ok=True))


def make_contents(checkpoint: Any, folder: Path, num_contents: int = 6) -> Contents:
    """Save adapters of ranks 2, 3, … for a text model, and compute the reference output of each."""
    paths = [
        save_adapter(checkpoint.path, folder / f"content{i}", AdapterSpec(TARGETS, 50 + i, 2 + i))
        for i in range(num_contents)
    ]
    sizes = [sum(tensor.nbytes for tensor in read_adapter(path).tensors.values()) for path in paths]
    answers = [checkpoint.reference.generate(PROMPT, adapter=path).token_ids[:4] for path in [None, *paths]]
    assert len({*map(tuple, answers)}) == num_contents + 1, "each adapter has a different output"
    return Contents(checkpoint.path, paths, sizes, answers[1:], answers[0])


def start(model: Path, **options: Any) -> LLM:
    """Return an engine with few slots and a small host cache."""
    options = {"max_model_len": 128, "enable_lora": True, "max_loras": 2, "max_cpu_loras": 3, **options}
    return LLM(str(model), **options)


def tokens(llm: LLM, lora_request: LoRARequest | object | None) -> list[int]:
    """Return the output tokens for `PROMPT`."""
    return llm.generate(PROMPT, GREEDY, lora_request, use_tqdm=False)[0].outputs[0].token_ids


def outcome(function: Callable[[], Any]) -> Any:
    """Return the result of a call, or the name of its error."""
    try:
        return function()
    except Exception as error:
        return type(error).__name__


def bytes_of(llm: LLM) -> tuple[int, int]:
    """Return the adapter bytes on the host and on the device."""
    lora = llm.llm_engine.lora
    return lora.cache.num_bytes, lora.num_device_bytes


def finish(engine: LLMEngine) -> dict[str, list[int]]:
    """Run all requests to the end; return the first four output tokens by request id."""
    answers = {}
    while engine.has_unfinished_requests:
        for output in engine.step():
            if output.finished:
                assert output.error is None, output.error
                answers[output.request_id] = output.outputs[0].token_ids[:4]
    return answers
