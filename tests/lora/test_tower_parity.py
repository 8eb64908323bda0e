"""Adapters of towers and connectors, including convolutions, equal PEFT on requests with media."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from mmlora import LLM, LoRAMix, LoRARequest
from mmlora.errors import RequestError
from tests.checkpoints import load_reference, save_phi4
from tests.equality import Case, Checkpoint, check_cases
from tests.media import clip, picture
from tests.reference import Media, Reference

AUDIO = Case("audio", "<|user|>Write down:<|audio|><|end|><|assistant|>", Media(audios=[clip(0.7, 1)]))
IMAGE = Case("image", "<|user|><|image|>What is it?<|end|><|assistant|>", Media(images=[picture(40, 42, 2)]))
CONVOLUTIONS = r".*(embed\.conv\.(0|3)|pw_conv|ext_pw_conv_1d|patch_embedding)"
EVERYWHERE = rf"{CONVOLUTIONS}|.*(img_projection_up|up_proj_for_speech|position_embedding|qkv_proj|linear_q|fc1)"
ADAPTERS: dict[str, dict[str, Any]] = {
    "convolutions": {"target_modules": CONVOLUTIONS},
    "depthwise": {"target_modules": r".*embed\.conv\.2", "r": 8},
    "position-embedding": {"target_modules": r".*(position_embedding|fc1)"},
    "dora": {"target_modules": EVERYWHERE, "use_dora": True},
    "lora-bias": {"target_modules": CONVOLUTIONS, "lora_bias": True},
    "biases": {"target_modules": EVERYWHERE, "bias": "all"},
    "dora-biases": {"target_modules": CONVOLUTIONS, "bias": "lora_only", "use_dora": True},
    "saved-modules": {
        "target_modules": ["qkv_proj"],
        "modules_to_save": ["img_projection_up", "patch_embedding", "layer_norm_att", "conv.0", "glu"],
    },
    "saved-embedder": {"target_modules": ["qkv_proj"], "modules_to_save": ["image_embed"]},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("towers")
    path = save_phi4(folder / "model")
    adapters = {
        name: _save(path, folder / name, seed, **options) for seed, (name, options) in enumerate(ADAPTERS.items())
    }
    return Checkpoint(path, adapters, Reference(path))


def _save(model: Path, path: Path, seed: int, **options: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(load_reference(model), LoraConfig(**{"r": 4, "lora_alpha": 8, **options})).save_pretrained(path)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, tensor in load_file(path / "adapter_model.safetensors").items():
        noise = torch.randn(tensor.shape, generator=generator)
        if ".lora_" in key and "magnitude" not in key:
            tensors[key] = noise * 0.3 * tensor[0].numel() ** -0.5
        else:
            tensors[key] = tensor * (1 + 0.3 * noise) + (0.1 * noise if "bias" in key else 0)
    save_file(tensors, path / "adapter_model.safetensors")
    return path


@pytest.fixture(scope="module")
def llm(checkpoint: Checkpoint) -> LLM:
    options: dict[str, Any] = {"enable_lora": True, "max_logprobs": -1, "max_model_len": 256, "device": "cpu"}
    return LLM(str(checkpoint.path), dtype="float32", max_loras=3, max_cpu_loras=16, **options)


def _with(case: Case, adapter: str | None) -> Case:
    return Case(f"{case.name}, {adapter}", case.prompt, case.media, adapter)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_alone(llm: LLM, checkpoint: Checkpoint, adapter: str) -> None:
    llm.llm_engine.runner.encoder.clear()
    cases = [_with(AUDIO, adapter), _with(IMAGE, adapter)]
    check_cases(llm, checkpoint, cases)
    base = [checkpoint.expected(_with(case, None)).logits for case in (AUDIO, IMAGE)]
    changed = [checkpoint.expected(case).logits for case in cases]
    assert max(float((one[:40] - other[:40]).abs().max()) for one, other in zip(base, changed, strict=True)) > 1e-2


def test_mixed(llm: LLM, checkpoint: Checkpoint) -> None:
    llm.llm_engine.runner.encoder.clear()
    check_cases(llm, checkpoint, [_with(case, adapter) for adapter in (None, *ADAPTERS) for case in (AUDIO, IMAGE)])


def test_adapters_by_groups_are_refused_in_a_mix(llm: LLM, checkpoint: Checkpoint) -> None:
    """Ranks of grouped convolutions cannot be concatenated, since they would be assigned to other groups."""
    names = ("depthwise", "convolutions")
    mix = LoRAMix([(LoRARequest(name, 70 + len(name), str(checkpoint.adapters[name])), 0.5) for name in names])
    with pytest.raises(RequestError, match="'depthwise' adapts .* by groups"):
        llm.generate("a", lora_request=mix)
