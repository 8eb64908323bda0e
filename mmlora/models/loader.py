"""From a directory or Hub id to a `transformers` model that runs on this engine's attention."""

import json
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoTokenizer, PretrainedConfig
from transformers.utils import logging as transformers_logging

from mmlora.attention.backend import ATTENTION_NAME
from mmlora.config import EngineArgs
from mmlora.errors import ConfigError
from mmlora.models.config import find_model_class
from mmlora.models.families import find_layout
from mmlora.utils.library_errors import LIBRARY_ERRORS

CONFIG_FILES = ["*.json"]
MODEL_FILES = [*CONFIG_FILES, "*.safetensors", "*.txt", "*.model", "*.jinja"]


def resolve_model_path(model: str, revision: str | None, patterns: Sequence[str] = MODEL_FILES) -> Path:
    """The local directory of a model, downloaded from the Hub unless it is one.

    Args:
        model: the directory, or the Hub id.
        revision: on the Hub; None is the main branch.
        patterns: of the files that are downloaded.

    Raises:
        ConfigError: there is neither such a directory nor such a repository.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve()
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"model={model!r} is neither a directory nor a Hub repository within reach: {error}"
        ) from None


def load_tokenizer(args: EngineArgs, path: Path) -> Any:
    """The model's tokenizer, or the one that `tokenizer` names.

    Raises:
        ConfigError: it cannot be loaded.
    """
    source = path if args.tokenizer is None else resolve_model_path(args.tokenizer, args.revision)
    layout = find_layout(source)
    try:
        if layout is not None:
            tokenizer = layout.load_tokenizer(source)
        else:
            # A tekken.json is converted: the backend of mistral-common would not read placeholders in a text.
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, mistral_format=False)
        file = source / "chat_template.json"  # of older processors; it knows media, the tokenizer's own may not
        if file.is_file():
            tokenizer.chat_template = json.loads(file.read_text(encoding="utf-8"))["chat_template"]
    except LIBRARY_ERRORS as error:
        raise ConfigError(f"tokenizer={str(source)!r} cannot be loaded: {error}") from None
    return tokenizer


def load_model(config: PretrainedConfig, path: Path, *, dtype: torch.dtype, device: torch.device) -> Any:
    """Load the class that the checkpoint names, in eval mode, its decoder on paged attention.

    Raises:
        ConfigError: the weights do not load.
    """
    model_class = find_model_class(config)
    layout = find_layout(path)
    options = {"key_mapping": dict(layout.key_mapping)} if layout is not None else {}
    # `check_loaded` tells what does not fit; transformers would warn of all that is left out on purpose.
    with _view_without_adapter(path) as view, _errors_only() if layout is not None else nullcontext():
        try:
            model, info = model_class.from_pretrained(
                view, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
            )
        except LIBRARY_ERRORS as error:
            name = model_class.__name__
            raise ConfigError(f"the weights of {str(path)!r} cannot be loaded as {name}: {error}") from None
    if layout is not None:
        layout.check_loaded(info["missing_keys"], info["unexpected_keys"])
    leave_tf32(dtype, device)
    # On the decoder only: towers have masks of their own, which this attention would ignore.
    has_text_config = config.get_text_config() is not config
    model.set_attn_implementation({"text_config" if has_text_config else "": ATTENTION_NAME})
    return model.to(device).eval().requires_grad_(False)


def leave_tf32(dtype: torch.dtype, device: torch.device) -> None:
    """Convolve float32 in float32: cuDNN's default rounds to TF32, which moved logits by up to 5e-3 on an H100."""
    if device.type == "cuda" and dtype == torch.float32:
        torch.backends.cudnn.allow_tf32 = False


def load_meta_model(config: PretrainedConfig) -> Any:
    """Build the class that a checkpoint names on the meta device: modules and shapes, no weights.

    Raises:
        ConfigError: transformers lacks the class, or cannot build it.
    """
    model_class = find_model_class(config)
    try:
        with torch.device("meta"):
            return model_class(config)
    except LIBRARY_ERRORS as error:
        raise ConfigError(f"{model_class.__name__} cannot be built from its configuration: {error}") from None


def resolve_device(name: str) -> torch.device:
    """The device that `device` names; `auto` is CUDA where there is one.

    Raises:
        ConfigError: CUDA is asked for and missing.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device={name!r}: torch sees no CUDA device here; allowed are auto and cpu")
    return torch.device(name)


def resolve_dtype(dtype: str | torch.dtype, config: PretrainedConfig, device: torch.device) -> torch.dtype:
    """The type of weights and activations; `auto` takes the checkpoint's, and float32 for half precision on CPU."""
    if dtype != "auto":
        return _as_dtype(dtype)
    stored = config.dtype or config.get_text_config().dtype or torch.float32
    return torch.float32 if device.type == "cpu" else _as_dtype(stored)


def _as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    found: torch.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return found


def resolve_max_model_len(requested: int | None, config: PretrainedConfig) -> int:
    """The longest sequence in tokens: what is asked for, or what the model takes.

    Raises:
        ConfigError: the model takes less than what is asked for.
    """
    text_config = config.get_text_config()
    limit: Any = getattr(text_config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        raise ConfigError(f"{config.model_type} has max_position_embeddings={limit!r}; it must be a positive integer")
    rope = getattr(text_config, "rope_parameters", None) or {}
    for parameters in (value for value in rope.values() if isinstance(value, dict)):  # one set for each layer type
        if parameters.get("rope_type") == "longrope":
            # Beyond this length the factors of every position change; `LongRope` knows one set for all layers.
            original = parameters.get("original_max_position_embeddings")
            original = original or getattr(text_config, "original_max_position_embeddings", None)
            limit = min(limit, original or limit)
    if requested is not None and requested > limit:
        raise ConfigError(f"max_model_len={requested} exceeds the {limit} tokens that this model takes here")
    return requested or limit


@contextmanager
def _errors_only() -> Iterator[None]:
    """Keep warnings of `transformers` from the log."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


@contextmanager
def _view_without_adapter(path: Path) -> Iterator[Path]:
    """A directory that shows the model's files but no adapter.

    With PEFT installed, `from_pretrained` would merge an adapter it finds beside the weights into the base model.
    """
    if not (path / "adapter_config.json").exists():
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        for file in path.iterdir():
            if not file.name.startswith("adapter_"):
                os.symlink(file.resolve(), Path(folder) / file.name)
        yield Path(folder)
