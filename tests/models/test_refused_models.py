"""A model that cannot be served is refused with one sentence before weights are read; `mmlora serve` exits with 2."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mmlora.cli import commands as cli
from mmlora.errors import ConfigError
from mmlora.models.config import check_config, load_config
from tests.checkpoints import save_text_model
from tests.families.table import save_family

TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
LLAMA = {**TEXT, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 64}


def composite(name: str, **options: Any) -> dict[str, Any]:
    """Return the configuration of a model with towers."""
    config = getattr(transformers, f"{name}Config")(text_config={**TEXT, "model_type": "qwen2"}, **options)
    return {**config.to_dict(), "architectures": [f"{name}ForConditionalGeneration"]}


def of_class(name: str, config: str, **options: Any) -> dict[str, Any]:
    return {**getattr(transformers, config)(**options).to_dict(), "architectures": [name]}


REFUSED: Mapping[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "no class": (
        lambda: {**LLAMA, "architectures": ["BrandNewForCausalLM"]},
        "has no model class 'BrandNewForCausalLM'",
    ),
    "no model": (lambda: {**LLAMA, "architectures": ["AutoConfig"]}, "has no model class 'AutoConfig'"),
    "nothing named": (lambda: {**LLAMA, "architectures": None}, "has no model class None"),
    "unknown": (lambda: {"model_type": "brand_new"}, "no configuration that transformers understands"),
    "code": (
        lambda: {"model_type": "brand_new", "auto_map": {"AutoConfig": "evil.Config"}},
        "no configuration that transformers understands",
    ),
    "no text": (lambda: {**LLAMA, "architectures": ["LlamaModel"]}, "LlamaModel does not generate text"),
    "attention": (
        lambda: of_class("BloomForCausalLM", "BloomConfig", hidden_size=32, n_layer=2, n_head=4),
        "the attention of BloomForCausalLM cannot be replaced",
    ),
    "quantized": (
        lambda: {**LLAMA, "quantization_config": {"quant_method": "gptq", "bits": 4}},
        "the checkpoint is quantized (gptq); only weights that are not quantized are supported",
    ),
    "encoder": (lambda: of_class("T5ForConditionalGeneration", "T5Config"), "t5 is an encoder-decoder model"),
    "layers": (
        lambda: of_class("Lfm2ForCausalLM", "Lfm2Config", num_hidden_layers=2, layer_types=["conv", "full_attention"]),
        "lfm2 has layers of type conv",
    ),
    "video": (
        lambda: composite("LlavaOnevision"),
        "LlavaOnevisionForConditionalGeneration takes image and video in addition to text, but llava_onevision is not",
    ),
    "image": (
        lambda: composite("VipLlava"),
        "VipLlavaForConditionalGeneration takes image in addition to text, but vipllava is not among the "
        "families with supported media (`mmlora models` lists them)",
    ),
    "audio": (
        lambda: composite("GlmAsr"),
        "GlmAsrForConditionalGeneration takes audio in addition to text, but glmasr is",
    ),
}


def save_config(path: Path, config: object) -> Path:
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("case", REFUSED)
def test_the_command_prints_the_reason_and_exits_with_2(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build, reason = REFUSED[case]
    path = save_config(tmp_path, build())
    assert cli.main(["serve", str(path), "--port", "0", "--device", "cpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mmlora serve: error: ") and reason in line


@pytest.mark.parametrize("content", [None, b"", b"\xff" * 100, b"whole"], ids=["none", "empty", "noise", "cut"])
def test_weights_that_do_not_load(content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_text_model(tmp_path / "llama", "llama")
    file = path / "model.safetensors"
    whole = file.read_bytes()
    file.unlink()
    if content is not None:
        file.write_bytes(whole[:-100] if content == b"whole" else content)
    assert cli.main(["serve", str(path), "--port", "0", "--device", "cpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"the weights of {str(path)!r} cannot be loaded: " in line


HOSTILE: Mapping[str, object] = {
    "a list": [1],
    "no object": "text",
    "a list of types": {"model_type": ["llama"]},
    "no heads": {**LLAMA, "num_attention_heads": 0},
    "heads": {**LLAMA, "num_attention_heads": "four"},
    "negative": {**LLAMA, "hidden_size": -4},
    "endless": {**LLAMA, "num_hidden_layers": 10**9},
    "layers": {**LLAMA, "layer_types": [1, {}]},
    "a dtype": {**LLAMA, "dtype": "nope"},
    "a class": {**LLAMA, "architectures": {"a": 1}},
    "escapes": {**LLAMA, "architectures": ["\x1b[2J\nforged"]},
    "a text config": {**LLAMA, "text_config": 3},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_configuration_is_refused_in_one_line(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_config(tmp_path, HOSTILE[case])
    with pytest.raises(ConfigError):
        load_config(path)
    assert cli.main(["serve", str(path), "--port", "0", "--device", "cpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "\x1b" not in line and line.isprintable()


def test_a_file_that_is_not_json(tmp_path: Path) -> None:
    for content in (b"", b"{", b"\xff\xfe{", b"[" * 100_000):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(ConfigError, match="no configuration"):
            load_config(tmp_path)


RECURRENT = (
    *(
        "bailing_hybrid",
        "bamba",
        "falcon_h1",
        "falcon_mamba",
        "granitemoehybrid",
        "jamba",
        "kimi_linear",
        "lfm3",
        "mamba",
    ),
    *("mamba2", "minimax", "nemotron_h", "olmo_hybrid", "qwen3_5", "qwen3_5_text", "qwen3_next", "recurrent_gemma"),
    *("rwkv", "xlstm", "zamba", "zamba2"),
)


@pytest.mark.parametrize("model_type", [name for name in RECURRENT if name in transformers.CONFIG_MAPPING])
def test_recurrent_state_is_refused_by_name(model_type: str) -> None:
    config = transformers.CONFIG_MAPPING[model_type]()
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]]
    with pytest.raises(ConfigError) as found:
        check_config(config)
    message = str(found.value)
    assert "has layers of type" in message or "keeps recurrent state" in message
    assert model_type in message or config.architectures[0] in message


# Configurations with contradictory defaults.
WITHOUT_DEFAULTS: Mapping[str, dict[str, Any]] = {
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}}
}


@pytest.mark.parametrize("model_type", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_every_decoder_of_transformers_is_accepted_or_refused_with_a_reason(model_type: str) -> None:
    """A class with recurrent state is never accepted."""
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    config = transformers.CONFIG_MAPPING[model_type](**WITHOUT_DEFAULTS.get(model_type, {}))
    config.architectures = [name]
    try:
        check_config(config)
    except ConfigError:
        return
    assert not getattr(transformers, name)._is_stateful


def test_gemma3n_without_timm(tmp_path: Path) -> None:
    path = save_family(tmp_path / "model", "gemma3n")
    command = [sys.executable, "-m", "mmlora.cli", "serve", str(path), "--port", "0", "--device", "cpu"]
    result = subprocess.run(command, capture_output=True, text=True)
    (line,) = result.stderr.strip().splitlines()
    assert result.returncode == 2
    assert line.startswith("mmlora serve: error: ") and "requires the timm library" in line


@pytest.mark.parametrize("name", ["Gemma3", "Llama4", "Gemma4", "Emu3"])
def test_the_text_decoder_of_a_family_with_media_is_accepted(name: str) -> None:
    """Such a class inherits `input_modalities`, but its configuration has no towers."""
    config = getattr(transformers, f"{name}TextConfig")(**TEXT)
    config.architectures = [f"{name}ForCausalLM"]
    config.layer_types = ["full_attention"] * 2
    assert "image" in getattr(transformers, f"{name}ForCausalLM").input_modalities
    check_config(config)
