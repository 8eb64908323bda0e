"""Tiny models and random PEFT adapters for them; PEFT itself is the reference."""

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

AdapterFactory = Callable[..., Path]


@pytest.fixture(scope="session")
def tiny_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def tiny_phi4() -> nn.Module:
    from transformers import Phi4MultimodalConfig, Phi4MultimodalForCausalLM

    torch.manual_seed(0)
    audio_config = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_blocks": 1,
        "num_attention_heads": 2,
        "ext_pw_out_channel": 16,
        "depthwise_separable_out_channel": 16,
        "nemo_conv_channels": 8,
        "time_reduction": 4,
        "bias_max_distance": 20,
        "audio_token_id": 62,
    }
    vision_config = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "crop_size": 28,
        "feature_layer": -1,
        "image_token_id": 63,
    }
    config = Phi4MultimodalConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        original_max_position_embeddings=128,
        bos_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
        audio_config=audio_config,
        vision_config=vision_config,
    )
    model = Phi4MultimodalForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:  # the class leaves some weights uninitialised or large
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def llama(tiny_llama: nn.Module) -> nn.Module:
    return copy.deepcopy(tiny_llama)


@pytest.fixture
def phi4(tiny_phi4: nn.Module) -> nn.Module:
    return copy.deepcopy(tiny_phi4)


def randomize(path: Path, seed: int) -> None:
    """Overwrite an adapter's tensors with normally distributed values that are large enough to change the output."""
    generator = torch.Generator().manual_seed(seed)
    file = path / "adapter_model.safetensors"
    tensors = {key: torch.randn(tensor.shape, generator=generator) * 0.2 for key, tensor in load_file(file).items()}
    save_file(tensors, file)


@pytest.fixture
def save_adapter(tmp_path: Path) -> AdapterFactory:
    """`save_adapter(model, name="a", seed=0, **LoraConfig arguments)` saves a PEFT directory with PEFT."""

    def save(model: nn.Module, name: str = "a", seed: int = 0, **arguments: Any) -> Path:
        from peft import LoraConfig, get_peft_model

        arguments = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **arguments}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft_model = get_peft_model(copy.deepcopy(model), LoraConfig(**arguments))
            peft_model.save_pretrained(tmp_path / name)
        randomize(tmp_path / name, seed)
        return tmp_path / name

    return save


@pytest.fixture
def peft_reference() -> Callable[[nn.Module, Path], nn.Module]:
    """`peft_reference(model, path)` returns a copy of the model with the adapter applied by PEFT."""

    def load(model: nn.Module, path: Path) -> nn.Module:
        from peft import PeftModel

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return PeftModel.from_pretrained(copy.deepcopy(model), path).eval()

    return load


@pytest.fixture
def edit_config() -> Callable[..., None]:
    """`edit_config(path, key=value)` changes keys of adapter_config.json."""

    def edit(path: Path, **changes: Any) -> None:
        file = path / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return edit


@pytest.fixture
def edit_tensors() -> Callable[[Path, Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]], None]:
    """`edit_tensors(path, change)` passes the tensors through a function."""

    def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
        file = path / "adapter_model.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in change(load_file(file)).items()}, file)

    return edit
