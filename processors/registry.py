"""Find the processor of a model by its `model_type`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from mmlora.processors.base import MultiModalProcessor
from mmlora.processors.general import GeneralProcessor
from mmlora.processors.granite_speech import GraniteSpeechProcessor
from mmlora.processors.phi4_multimodal import Phi4MultimodalProcessor

_PROCESSORS: dict[str, Callable[[PretrainedConfig, Path, Any], MultiModalProcessor]] = {
    "phi4_multimodal": Phi4MultimodalProcessor,
    "audioflamingo3": GeneralProcessor,
    "granite_speech": GraniteSpeechProcessor,
    "llava": GeneralProcessor,
    "llava_next": GeneralProcessor,
    "idefics3": GeneralProcessor,
}


def get_processor(config: PretrainedConfig, model_path: str | Path, tokenizer: Any) -> MultiModalProcessor | None:
    """Build the processor of a model, or return None for one that takes only text.

    Args:
        config: the model's configuration.
        model_path: its local directory (for a Hub id, the snapshot folder).
        tokenizer: its tokenizer, which must know the placeholder tokens.

    Raises:
        ConfigError: the preprocessor files or the tokenizer do not fit the model.
    """
    factory = _PROCESSORS.get(config.model_type)
    return None if factory is None else factory(config, Path(model_path), tokenizer)
