"""A model's configuration: reading it, and what it tells of why a model cannot be served."""

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
    """Read a model's configuration and refuse what this engine cannot run.

    Raises:
        ConfigError: names what is unknown or unsupported.
    """
    config = read_config(path)
    check_config(config)
    return config


def read_config(path: Path) -> PretrainedConfig:
    """Read a model's configuration.

    Raises:
        ConfigError: there is none, or none that transformers understands.
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
    """Refuse what this engine cannot run, as far as the configuration tells.

    Raises:
        ConfigError: names what is unsupported.
    """
    model_class = find_model_class(config)
    try:
        text_config = config.get_text_config()
    except ValueError as error:
        raise ConfigError(f"{config.model_type} has more than one decoder: {error}") from None
    name = model_class.__name__
    if config.is_encoder_decoder:
        raise ConfigError(f"{config.model_type} is an encoder-decoder model; only decoders are supported")
    check_modalities(config, model_class)
    if not model_class.can_generate():
        raise ConfigError(f"{name} does not generate text")
    unsupported = set(getattr(text_config, "layer_types", None) or ()) - ATTENTION_LAYERS
    if unsupported:
        raise ConfigError(
            f"{config.model_type} has layers of type {', '.join(sorted(unsupported))}; "
            f"supported are {', '.join(sorted(ATTENTION_LAYERS))}"
        )
    if getattr(model_class, "_is_stateful", False):
        raise ConfigError(f"{name} keeps recurrent state between tokens, which has no place in a paged KV cache")
    for size, limit in (("num_hidden_layers", MAX_LAYERS), ("num_attention_heads", None), ("hidden_size", None)):
        value = getattr(text_config, size, None)
        if not isinstance(value, int) or not 1 <= value <= (limit or value):
            allowed = f"from 1 to {limit}" if limit is not None else "a positive integer"
            raise ConfigError(f"{name} has {size}={value!r}; it must be {allowed}")
    decoder_class: Any = MODEL_MAPPING.get(type(text_config), model_class)
    if not getattr(decoder_class, "_supports_attention_backend", False):
        raise ConfigError(f"the attention of {name} cannot be replaced, so it cannot run on a paged KV cache")


def find_model_class(config: PretrainedConfig) -> Any:
    """Return the class of transformers that a checkpoint names.

    Raises:
        ConfigError: there is no such class.
    """
    name = class_name(config)
    model_class = getattr(transformers, name, None) if isinstance(name, str) else None
    if not isinstance(model_class, type) or not issubclass(model_class, PreTrainedModel):
        raise ConfigError(f"transformers {transformers.__version__} has no model class {name!r}")
    return model_class


def class_name(config: PretrainedConfig) -> Any:
    """Return what a checkpoint says its class is called; it may be anything."""
    names: Any = config.architectures
    return names[0] if isinstance(names, list) and names else names
