"""Load a model's own `transformers` processor from its parts, without the video part, which needs torchvision."""

import inspect
import json
import logging
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import transformers
from transformers import PretrainedConfig

from mmlora.errors import ConfigError
from mmlora.processors.settings import find_settings
from mmlora.utils.library_errors import LIBRARY_ERRORS

logger = logging.getLogger(__name__)

SETTINGS_FILES = ("processor_config.json", "preprocessor_config.json")
# Of an image processor; PaliGemma's processor reads the last one from there.
IMAGE_SETTINGS: Final = ("patch_size", "merge_size", "temporal_patch_size", "image_grid_pinpoints", "image_seq_length")


def load_processor(config: PretrainedConfig, path: Path, tokenizer: Any) -> Any:
    """Load the processor of a checkpoint.

    Args:
        config: of the model.
        path: directory with the processor's files.
        tokenizer: of the model.

    Raises:
        ConfigError: there is no processor, or it cannot be loaded in this environment.
    """
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    try:
        named = getattr(transformers, named_class(path) or "none", None)
        return _build(named if named is not None else PROCESSOR_MAPPING[type(config)], config, path, tokenizer)
    except LIBRARY_ERRORS as error:
        raise ConfigError(f"{path} has no processor that can be loaded here: {error}") from error


def named_class(path: Path) -> str:
    """Return the processor class named in a checkpoint's files, or an empty string."""
    for name in SETTINGS_FILES:
        try:
            found = read_json(path / name).get("processor_class")
        except (OSError, ConfigError):
            continue
        if isinstance(found, str):
            return found
    return ""


def read_json(path: Path) -> dict[str, Any]:
    """Return the settings in a JSON file, without null values; empty if the file does not exist.

    Raises:
        ConfigError: the file is not a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path.name} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path.name} contains a {type(content).__name__}, not an object")
    return {key: value for key, value in content.items() if value is not None}


def load_part(name: str, path: Path) -> Any:
    """Load a part of a processor; images use the Pillow backend, so that results do not depend on torchvision.

    Args:
        name: `image_processor` or `feature_extractor`; None is returned for other parts.

    Raises:
        ConfigError: it cannot be loaded in this environment.
    """
    # From their modules: without torchvision, transformers 5.17 itself exports a dummy class that Pillow does not need.
    from transformers.models.auto.feature_extraction_auto import AutoFeatureExtractor
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    loaders: dict[str, Any] = {
        "image_processor": partial(AutoImageProcessor.from_pretrained, backend="pil"),
        "feature_extractor": AutoFeatureExtractor.from_pretrained,
    }
    try:
        return loaders[name](path) if name in loaders else None
    except LIBRARY_ERRORS as error:
        raise ConfigError(f"{path} has no {name} that can be loaded here: {error}") from error


def _build(processor_class: Any, config: PretrainedConfig, path: Path, tokenizer: Any) -> Any:
    names = processor_class.get_attributes()
    parts = [tokenizer if name == "tokenizer" else load_part(name, path) for name in names]
    for name, part in zip(names, parts, strict=True):
        if name == "image_processor" and part is not None:
            stored, _ = part.get_image_processor_dict(path)
            for setting, value in _missing_settings(IMAGE_SETTINGS, stored, config, tokenizer).items():
                setattr(part, setting, value)

    class WithoutVideo(processor_class):  # type: ignore[misc]
        """Processor that accepts None as its video part."""

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return None if argument is None else super().check_argument_for_proper_class(argument_name, argument)

    stored, _ = processor_class.get_processor_dict(path)
    parameters = inspect.signature(processor_class.__init__).parameters
    missing = _missing_settings(parameters, stored, config, tokenizer)
    return WithoutVideo.from_args_and_dict(parts, {**stored, **missing})


def _missing_settings(
    names: Iterable[str], stored: Mapping[str, Any], config: PretrainedConfig, tokenizer: Any
) -> dict[str, Any]:
    """Return the settings that a processor's files lack, from the model's configuration."""
    found = find_settings([name for name in names if stored.get(name) is None], config, tokenizer)
    if found:
        logger.info("taken from config.json, because the processor's files lack them: %s", ", ".join(sorted(found)))
    return found
