"""Microsoft's own layout of Phi-4-multimodal (`model_type: "phi4mm"`), read as `Phi4MultimodalForCausalLM`.

Its configuration is nested where that of `transformers` is flat, its modules have other names, and its weight files
contain two adapters as well. All of this is converted in memory; the code in such a repository never runs.
Source: https://huggingface.co/microsoft/Phi-4-multimodal-instruct
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from safetensors import safe_open
from safetensors.torch import save_file
from transformers import Phi4MultimodalConfig, PretrainedConfig, PreTrainedTokenizerFast

from mmlora.errors import ConfigError
from mmlora.lora.loading.files import CONFIG_FILE, WEIGHTS_FILE, AdapterFiles
from mmlora.models.layouts.base import Layout

KEY_MAPPING: Mapping[str, str] = {
    r"\.base_layer\.": ".",
    r"img_projection\.0\.": "img_projection_up.",
    r"img_projection\.2\.": "img_projection_down.",
    r"image_embed\.glb_GN$": "image_embed.global_img_feature_extensor",
    r"image_embed\.sub_GN$": "image_embed.sub_img_feature_extensor",
    r"audio_projection\.speech\.0\.": "up_proj_for_speech.",
    r"audio_projection\.speech\.2\.": "down_proj_for_speech.",
    r"audio_projection\.vision\.0\.": "up_proj_for_vision_speech.",
    r"audio_projection\.vision\.2\.": "down_proj_for_vision_speech.",
    r"feed_forward_(in|out)\.net\.0\.linear\.": r"feed_forward_\1.gate_up_proj.",
    r"feed_forward_(in|out)\.net\.2\.": r"feed_forward_\1.down_proj.",
    r"self_attn\.linear_(q|k|v)\.": r"self_attn.\1_proj.",
    r"self_attn\.linear_out\.": "self_attn.o_proj.",
}
"""Regular expressions in the names of Microsoft's modules, and their replacements."""

# Constants of Microsoft's code that config.json lacks: SigLIP, and the ids of two tokens.
VISION_CONSTANTS: Mapping[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 448,
    "patch_size": 14,
    "image_token_id": 200010,
}
AUDIO_CONSTANTS: Mapping[str, Any] = {"audio_token_id": 200011}

# Options of Microsoft's code that are fixed in `transformers`; most would not change the shape of a tensor.
_FIXED: Final[Mapping[str, Any]] = {
    "embd_layer.image_embd_layer.use_hd_transform": True,
    "embd_layer.image_embd_layer.with_learnable_separator": True,
    "embd_layer.image_embd_layer.hd_transform_order": "sub_glb",
    "embd_layer.image_embd_layer.image_token_compression_cls": "avg_pool_2d",
    "embd_layer.image_embd_layer.projection_cls": "mlp",
    "embd_layer.audio_embd_layer.projection_cls": "mlp",
    "audio_processor.name": "cascades",
    "audio_processor.config.input_layer": "nemo_conv",
    "audio_processor.config.causal": True,
    "audio_processor.config.batch_norm": False,
    "audio_processor.config.cnn_layer_norm": True,
    "audio_processor.config.bias_in_glu": True,
    "audio_processor.config.ext_pw_kernel_size": 1,
    "audio_processor.config.relative_attention_bias_args.type": "t5",
}
_AUDIO_NAMES: Final = {
    "attention_dim": "hidden_size",
    "attention_heads": "num_attention_heads",
    "linear_units": "intermediate_size",
    "depthwise_seperable_out_channel": "depthwise_separable_out_channel",
}
_DROPPED: Final = (
    *("model_type", "architectures", "auto_map", "transformers_version", "_name_or_path", "_attn_implementation"),
    *("embd_layer", "audio_processor", "img_processor", "speech_lora", "vision_lora"),
)
_EMBEDDED_LORA: Final = re.compile(r"(?P<module>.+)\.(?P<matrix>lora_[AB])\.(?P<name>speech|vision)\.weight")


def load_config(path: Path) -> PretrainedConfig:
    """Read a directory's configuration as that of `Phi4MultimodalForCausalLM`.

    Raises:
        ConfigError: a field is missing, or has a value that this class does not support.
        ValueError, StrictDataclassError: `transformers` rejects a value.
    """
    content = _read_content(path)
    for name, value in _FIXED.items():
        if (found := _value(content, name)) != value:
            raise ConfigError(f"config.json: {name} is {found!r}; only {value!r} is supported")
    conformer, bias = "audio_processor.config", "audio_processor.config.relative_attention_bias_args"
    flat = {key: value for key, value in _value(content, conformer).items() if not isinstance(value, dict)}
    audio = {
        **{_AUDIO_NAMES.get(key, key): value for key, value in flat.items()},
        "nemo_conv_channels": _value(content, f"{conformer}.nemo_conv_settings.conv_channels"),
        "bias_max_distance": _value(content, f"{bias}.t5_bias_max_distance"),
        "bias_symmetric": _value(content, bias).get("t5_bias_symmetric", False),
        "downsample_rate": _value(content, "embd_layer.audio_embd_layer.downsample_rate"),
        **AUDIO_CONSTANTS,
    }
    vision = {
        "crop_size": _value(content, "embd_layer.image_embd_layer.crop_size"),
        "feature_layer": (content.get("img_processor") or {}).get("layer_idx", -2),
        **VISION_CONSTANTS,
    }
    return Phi4MultimodalConfig(
        architectures=["Phi4MultimodalForCausalLM"],
        vision_config=vision,
        audio_config=audio,
        **{key: value for key, value in content.items() if key not in _DROPPED},
    )


def load_tokenizer(path: Path) -> Any:
    """Load `tokenizer.json` unchanged.

    The class that Microsoft names, GPT2TokenizerFast, would replace its pre-tokenizer by that of GPT-2.
    """
    return PreTrainedTokenizerFast.from_pretrained(path)


def find_adapters(source: Path) -> dict[str, Path]:
    """Return the adapters in a model's weight files by name, with their usual folders, which need not exist."""
    names = {match["name"] for _, _, match in _adapter_tensors(source)}
    return {name: source / f"{name}-lora" for name in sorted(names)}


def embedded_adapter(source: Path, path: str) -> AdapterFiles | None:
    """Read an adapter from a model's weight files, in the form in which PEFT would have saved it.

    Args:
        source: the directory of the model.
        path: the usual folder of the adapter.

    Returns:
        The adapter; None if the folder exists, or is not one of `find_adapters`.

    Raises:
        ConfigError: the configuration does not describe the adapter.
    """
    folder = Path(os.path.expanduser(path)).resolve()
    if folder.exists():
        return None
    found = {usual.resolve(): name for name, usual in find_adapters(source).items()}
    return _read_adapter(source, found[folder]) if folder in found else None


def extract_adapters(source: Path, folder: Path) -> dict[str, Path]:
    """Write the adapters in a model's weight files as PEFT directories.

    Args:
        source: the directory of the model.
        folder: the directory in which to create `speech-lora` and `vision-lora`.

    Returns:
        The new directories by name.

    Raises:
        ConfigError: a directory exists, or the configuration does not describe an adapter.
    """
    written = {}
    for name in find_adapters(source):
        files, path = _read_adapter(source, name), folder / f"{name}-lora"
        if path.exists():
            raise ConfigError(f"{path} exists; adapters are extracted into new directories only")
        path.mkdir(parents=True)
        (path / CONFIG_FILE).write_text(json.dumps(files.config, indent=2), encoding="utf-8")
        save_file(dict(files.tensors), path / WEIGHTS_FILE, {"format": "pt"})
        written[name] = path
    return written


def _read_adapter(source: Path, name: str) -> AdapterFiles:
    content, block = _read_content(source), f"{name}_lora"
    tensors, modules = {}, set()
    for file, key, match in _adapter_tensors(source):
        if match["name"] == name:
            modules.add(match["module"])
            tensors[f"base_model.model.{match['module']}.{match['matrix']}.weight"] = file.get_tensor(key)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": _value(content, f"{block}.r"),
        "lora_alpha": _value(content, f"{block}.lora_alpha"),
        "lora_dropout": _value(content, f"{block}.dp"),
        "target_modules": sorted(modules),
        "bias": "none",
        "inference_mode": True,
    }
    return AdapterFiles(config, tensors, source / f"{name}-lora")


def _adapter_tensors(source: Path) -> Iterator[tuple[Any, str, re.Match[str]]]:
    """Yield the open file, the key and the parsed key of each adapter tensor in the weight files."""
    for path in sorted(source.glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118  a safetensors file is not a mapping
                if match := _EMBEDDED_LORA.fullmatch(key):
                    yield file, key, match


def _read_content(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((path / "config.json").read_text(encoding="utf-8"))
    return content


def _value(content: Mapping[str, Any], name: str) -> Any:
    value: Any = content
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            raise ConfigError(f"config.json: {name} is missing; a phi4mm checkpoint must have it")
        value = value[part]
    return value


PHI4MM_LAYOUT = Layout(
    "phi4mm",
    load_config,
    KEY_MAPPING,
    left_out=_EMBEDDED_LORA,
    load_tokenizer=load_tokenizer,
    find_adapters=find_adapters,
    embedded_adapter=embedded_adapter,
)
