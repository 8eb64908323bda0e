"""A model's own `transformers` processor, built from its parts: without the video part, which needs torchvision."""

from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from mmlora.errors import ConfigError

FAILURES = (ValueError, TypeError, RuntimeError, OSError, ImportError, KeyError, AttributeError)


def load_processor(config: PretrainedConfig, path: Path, tokenizer: Any) -> Any:
    """Load the processor that a checkpoint comes with.

    Args:
        config: the model's.
        path: directory with the processor's files.
        tokenizer: the model's.

    Raises:
        ConfigError: there is none, or it does not run here.
    """
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    try:
        return _build(PROCESSOR_MAPPING[type(config)], path, tokenizer)
    except FAILURES as error:
        raise ConfigError(f"{path} has no processor that runs here: {error}") from error


def _build(processor_class: Any, path: Path, tokenizer: Any) -> Any:
    from transformers import AutoFeatureExtractor, AutoImageProcessor

    loaders: dict[str, Any] = {"image_processor": AutoImageProcessor, "feature_extractor": AutoFeatureExtractor}
    parts = {
        name: tokenizer if name == "tokenizer" else loaders[name].from_pretrained(path) if name in loaders else None
        for name in processor_class.get_attributes()
    }

    class WithoutVideo(processor_class):  # type: ignore[misc]
        """Takes None for the video part."""

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return None if argument is None else super().check_argument_for_proper_class(argument_name, argument)

    settings, _ = processor_class.get_processor_dict(path)
    return WithoutVideo.from_args_and_dict(list(parts.values()), settings)
