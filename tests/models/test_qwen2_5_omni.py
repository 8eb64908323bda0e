"""A complete Qwen2.5-Omni checkpoint: the output equals that of its thinker, and adapters of both apply."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmlora import BASE, LLM, LoRARequest
from mmlora.errors import ConfigError, MediaError
from mmlora.processors.media.audio import AudioItem
from tests.checkpoints import save_adapter
from tests.equality import greedy
from tests.families.reference import FamilyReference
from tests.families.table import FAMILIES, adapter_of, save_family
from tests.media import clip, picture
from tests.reference import Media

PROMPT = {
    "prompt": "<|user|><|vision_bos|><|IMAGE|><|vision_eos|><|audio_bos|><|AUDIO|><|audio_eos|>?<|end|><|assistant|>",
    "multi_modal_data": {"image": picture(60, 44, 2), "audio": clip(0.4, 1)},
}


def with_prefix(tensors: dict[str, torch.Tensor], start: str, prefix: str) -> dict[str, torch.Tensor]:
    return {f"{start}{prefix}{key.removeprefix(start)}": tensor for key, tensor in tensors.items()}


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(tmp_path_factory.mktemp("omni") / "thinker", "qwen2_5_omni_thinker")


@pytest.fixture(scope="module")
def whole(thinker: Path) -> Path:
    path = Path(shutil.copytree(thinker, thinker.parent / "whole"))
    config = json.loads((path / "config.json").read_text())
    config = {"model_type": "qwen2_5_omni", "architectures": ["Qwen2_5OmniModel"], "thinker_config": config}
    (path / "config.json").write_text(json.dumps(config))
    write_weights(path, load_file(thinker / "model.safetensors"), "talker.model.norm.weight", "token2wav.dit.weight")
    return path


def write_weights(path: Path, tensors: dict[str, torch.Tensor], *others: str) -> None:
    more = {name: torch.ones(2) for name in others}
    save_file({**with_prefix(tensors, "", "thinker."), **more}, path / "model.safetensors", {"format": "pt"})


def load(path: Path) -> LLM:
    return LLM(str(path), enable_lora=True, dtype="float32", device="cpu", max_model_len=512)


def test_a_complete_model_equals_its_thinker(thinker: Path, whole: Path) -> None:
    adapter = save_adapter(thinker, thinker.parent / "lora", adapter_of("qwen2_5_omni_thinker", seed=3, r=3))
    renamed = Path(shutil.copytree(adapter, thinker.parent / "renamed"))
    weights = renamed / "adapter_model.safetensors"
    save_file(with_prefix(load_file(weights), "base_model.model.", "thinker."), weights, {"format": "pt"})
    answers = {}
    for path, lora in ((thinker, adapter), (whole, renamed)):
        llm = load(path)
        loras = [BASE, LoRARequest("lora", 1, str(lora))]
        outputs = llm.generate([PROMPT, PROMPT], greedy(prompt_logprobs=0, logprobs=0), loras, use_tqdm=False)
        answers[path] = [(output.outputs[0].token_ids, output.outputs[0].cumulative_logprob) for output in outputs]
    assert answers[thinker] == answers[whole]
    assert answers[whole][0] != answers[whole][1]


@pytest.mark.parametrize("text", ["say <|audio_bos|> please", "<|vision_bos|>"])
def test_a_prompt_without_valid_positions_is_refused(thinker: Path, text: str) -> None:
    llm = load(thinker)
    prompt = {
        "prompt": f"<|vision_bos|><|IMAGE|><|vision_eos|>{text}",
        "multi_modal_data": {"image": picture(60, 44, 2)},
    }
    with pytest.raises(MediaError, match="cannot compute positions for the media of this prompt"):
        llm.generate(prompt, use_tqdm=False)
    assert llm.generate(PROMPT, greedy(), use_tqdm=False)[0].error is None


def test_clips_of_different_lengths_equal_transformers(thinker: Path) -> None:
    clips = [clip(0.5, 7), clip(1.3, 8), clip(0.3, 9)]
    text = "<|user|>A <|audio_bos|><|AUDIO|><|audio_eos|>, " + 2 * "<|audio_bos|><|AUDIO|><|audio_eos|>" + "<|end|>"
    expected = FamilyReference(thinker, FAMILIES["qwen2_5_omni_thinker"]).generate(text, Media(audios=clips))
    prompt = {"prompt": text, "multi_modal_data": {"audio": clips}}
    output = load(thinker).generate(prompt, greedy(), use_tqdm=False)[0]
    assert list(output.prompt_token_ids) == expected.prompt_ids
    assert list(output.outputs[0].token_ids) == expected.token_ids


def test_a_short_clip_is_small(thinker: Path) -> None:
    processor = load(thinker).llm_engine.input_processor.processor
    assert processor is not None
    item = AudioItem.from_samples(*clip(0.25, 1))
    assert sum(tensor.nbytes for tensor in processor.process(item).tensors.values()) < 20_000


def test_a_tensor_of_an_unknown_part_is_refused(whole: Path, thinker: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(whole, tmp_path / "model"))
    write_weights(path, load_file(thinker / "model.safetensors"), "listener.weight")
    with pytest.raises(ConfigError, match=r"1 tensor\(s\) of a qwen2_5_omni checkpoint are unknown: listener.weight"):
        load(path)
