"""Read a model's configuration and refuse models that this engine cannot run."""

from pathlib import Path
from typing import Any

import transformers
from transformers import MODEL_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel

from mmlora.errors import ConfigError
from mmlora.models.families import check_modalities, find_layout
from mmlora.utils.library_errors import LIBRARY_ERRORS

ATTENTION_LAYERS = {"full_attention", "sliding_attention"}
MAX_LAYERS = 1000


def load_config(path: Path) -> PretrainedConfig:
    """Read and check a model's configuration.

    Raises:
        ConfigError: the configuration is missing, unknown to transformers, or of an unsupported model.
    """
    config = read_config(path)
    check_config(config)
    return config


def read_config(path: Path) -> PretrainedConfig:
    """Read a model's configuration.

    Raises:
        ConfigError: the configuration is missing or unknown to transformers.
    """
    layout = find_layout(path)
    try:
        config: PretrainedConfig = (
            layout.load_config(path)
            if layout is not None
            else AutoConfig.from_pretrained(path, trust_remote_code=False)
        )
    except LIBRARY_ERRORS as error:
        raise ConfigError(f"model={str(path)!r} has no configuration that transformers understands: {error}") from None
    return config


def check_config(config: PretrainedConfig) -> None:
    """Check that the engine supports a model, as far as its configuration shows.

    Raises:
        ConfigError: names the unsupported feature.
    """
    model_class = find_model_class(config)
    try:
        text_config = config.get_text_config()
    except ValueError as error:
        raise ConfigError(f"{config.model_type} has more than one decoder: {error}") from None
    name = model_class.__name__
    if config.is_encoder_decoder:
        raise ConfigError(f"{config.model_type} is an encoder-decoder model; only decoders are supported")
    if (quantization := getattr(config, "quantization_config", None)) is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ConfigError(f"the checkpoint is quantized ({method}); only weights that are not quantized are supported")
    check_modalities(config, model_class)
    if not model_class.can_generate():
        raise ConfigError(f"{name} does not generate text")
    unsupported = set(getattr(text_config, "layer_types", None) or ()) - ATTENTION_LAYERS
    if unsupported:
        raise ConfigError(
            f"{config.model_type} has layers of type {', '.join(sorted(unsupported))}; "
            f"supported types: {', '.join(sorted(ATTENTION_LAYERS))}"
        )
    if getattr(model_class, "_is_stateful", False):
        raise ConfigError(f"{name} keeps recurrent state between tokens, which a paged KV cache cannot hold")
    for size, limit in (("num_hidden_layers", MAX_LAYERS), ("num_attention_heads", None), ("hidden_size", None)):
        value = getattr(text_config, size, None)
        if not isinstance(value, int) or not 1 <= value <= (limit or value):
            allowed = f"from 1 to {limit}" if limit is not None else "a positive integer"
            raise ConfigError(f"{name} has {size}={value!r}; it must be {allowed}")
    decoder_class: Any = MODEL_MAPPING.get(type(text_config), model_class)
    if not getattr(decoder_class, "_supports_attention_backend", False):
        raise ConfigError(f"the attention of {name} cannot be replaced, so it cannot run on a paged KV cache")


def find_model_class(config: PretrainedConfig) -> Any:
    """Return the transformers class that a checkpoint names under `architectures`.

    Raises:
        ConfigError: transformers has no such model class.
    """
    name = class_name(config)
    model_class = getattr(transformers, name, None) if isinstance(name, str) else None
    if not isinstance(model_class, type) or not issubclass(model_class, PreTrainedModel):
        raise ConfigError(f"transformers {transformers.__version__} has no model class {name!r}")
    return model_class


def class_name(config: PretrainedConfig) -> Any:
    """Return the class name in a checkpoint's `architectures`, unchecked: any JSON value."""
    names: Any = config.architectures
    return names[0] if isinstance(names, list) and names else names
