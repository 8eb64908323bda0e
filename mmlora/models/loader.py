"""Load tokenizer and weights from a directory or the Hub, as a `transformers` model on this engine's attention."""

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoTokenizer, PretrainedConfig

from mmlora.attention.backend import ATTENTION_NAME
from mmlora.config import EngineArgs
from mmlora.errors import ConfigError
from mmlora.models.config import find_model_class
from mmlora.models.families import find_layout
from mmlora.models.weights import check_initialized, without_load_report
from mmlora.utils.library_errors import LIBRARY_ERRORS

CONFIG_FILES = ["*.json"]
MODEL_FILES = [*CONFIG_FILES, "*.safetensors", "*.txt", "*.model", "*.jinja"]


def resolve_model_path(model: str, revision: str | None, patterns: Sequence[str] = MODEL_FILES) -> Path:
    """Return the local directory of a model, after downloading it when `model` is a Hub id.

    Args:
        model: a directory or a Hub id.
        revision: on the Hub; None is the main branch.
        patterns: of the files to download.

    Raises:
        ConfigError: `model` is not a directory, and the Hub does not provide such a repository.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve()
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(f"model={model!r} is neither a directory nor a reachable Hub repository: {error}") from None


def load_tokenizer(args: EngineArgs, path: Path) -> Any:
    """Load the model's tokenizer, or the one that `args.tokenizer` names.

    Raises:
        ConfigError: the tokenizer cannot be loaded.
    """
    source = path if args.tokenizer is None else resolve_model_path(args.tokenizer, args.revision)
    layout = find_layout(source)
    try:
        if layout is not None:
            tokenizer = layout.load_tokenizer(source)
        else:
            # Convert a tekken.json: the mistral-common backend would not find placeholders in text.
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, mistral_format=False)
        file = source / "chat_template.json"  # of older processors; the tokenizer's own template may lack media
        if file.is_file():
            tokenizer.chat_template = json.loads(file.read_text(encoding="utf-8"))["chat_template"]
    except LIBRARY_ERRORS as error:
        raise ConfigError(f"tokenizer={str(source)!r} cannot be loaded: {error}") from None
    return tokenizer


def load_model(config: PretrainedConfig, path: Path, *, dtype: torch.dtype, device: torch.device) -> Any:
    """Load the class that the checkpoint names, in eval mode, with its decoder on paged attention.

    Raises:
        ConfigError: the weights cannot be loaded, or lack some of the class; `check_weights` finds more.
    """
    model_class = find_model_class(config)
    layout = find_layout(path)
    options = {"key_mapping": dict(layout.key_mapping)} if layout is not None else {}
    with _view_without_adapter(path) as view, without_load_report():
        try:
            model, info = model_class.from_pretrained(
                view, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
            )
        except LIBRARY_ERRORS as error:
            name = model_class.__name__
            raise ConfigError(f"the weights of {str(path)!r} cannot be loaded as {name}: {error}") from None
    check_initialized(info["missing_keys"])
    disable_tf32(dtype, device)
    # On the decoder only: towers use their own masks, which this attention would ignore.
    has_text_config = config.get_text_config() is not config
    model.set_attn_implementation({"text_config" if has_text_config else "": ATTENTION_NAME})
    return model.to(device).eval().requires_grad_(False)


def disable_tf32(dtype: torch.dtype, device: torch.device) -> None:
    """Run float32 convolutions in float32: TF32, cuDNN's default, changed logits by up to 5e-3 on an H100."""
    if device.type == "cuda" and dtype == torch.float32:
        torch.backends.cudnn.allow_tf32 = False


def load_meta_model(config: PretrainedConfig) -> Any:
    """Build the class that a checkpoint names on the meta device: modules and shapes without weights.

    Raises:
        ConfigError: transformers lacks the class or cannot build it.
    """
    model_class = find_model_class(config)
    try:
        with torch.device("meta"):
            return model_class(config)
    except LIBRARY_ERRORS as error:
        raise ConfigError(f"{model_class.__name__} cannot be built from its configuration: {error}") from None


def resolve_device(name: str) -> torch.device:
    """Return the device of the option `device`; `auto` is CUDA if available, else the CPU.

    Raises:
        ConfigError: CUDA is requested but not available.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device={name!r}: no CUDA device is available; use auto or cpu")
    return torch.device(name)


def resolve_dtype(dtype: str | torch.dtype, config: PretrainedConfig, device: torch.device) -> torch.dtype:
    """Return the dtype of weights and activations; `auto` is the checkpoint's on a GPU and float32 on a CPU."""
    if dtype != "auto":
        return _as_dtype(dtype)
    stored = config.dtype or config.get_text_config().dtype or torch.float32
    return torch.float32 if device.type == "cpu" else _as_dtype(stored)


def _as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    found: torch.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return found


def resolve_max_model_len(requested: int | None, config: PretrainedConfig) -> int:
    """Return the longest sequence in tokens: `requested`, or else the model's limit.

    Raises:
        ConfigError: `requested` exceeds the model's limit.
    """
    text_config = config.get_text_config()
    limit: Any = getattr(text_config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        raise ConfigError(f"{config.model_type} has max_position_embeddings={limit!r}; it must be a positive integer")
    rope = getattr(text_config, "rope_parameters", None) or {}
    for parameters in (value for value in rope.values() if isinstance(value, dict)):  # one set per layer type
        if parameters.get("rope_type") == "longrope":
            # `LongRope` handles one set of factors for all layers; with one per layer type, only short factors work.
            original = parameters.get("original_max_position_embeddings")
            original = original or getattr(text_config, "original_max_position_embeddings", None)
            limit = min(limit, original or limit)
    if requested is not None and requested > limit:
        raise ConfigError(f"max_model_len={requested} exceeds this model's limit of {limit} tokens")
    return requested or limit


@contextmanager
def _view_without_adapter(path: Path) -> Iterator[Path]:
    """Yield a directory with links to the model's files, without an adapter.

    With PEFT installed, `from_pretrained` merges an adapter in the same directory into the base model.
    """
    if not (path / "adapter_config.json").exists():
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        for file in path.iterdir():
            if not file.name.startswith("adapter_"):
                os.symlink(file.resolve(), Path(folder) / file.name)
        yield Path(folder)
