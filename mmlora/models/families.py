"""The table of model families: the modalities, processor, towers and prompts of each.

No other module compares a `model_type` or the name of a model class.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from packaging.version import Version
from transformers import PretrainedConfig

from mmlora.errors import ConfigError
from mmlora.models import transcription as prompts
from mmlora.models.layouts.base import Layout
from mmlora.models.layouts.phi4mm import PHI4MM_LAYOUT
from mmlora.models.layouts.qwen2_5_omni import QWEN2_5_OMNI_LAYOUT
from mmlora.processors.base import MultiModalProcessor
from mmlora.processors.families.granite_speech import GraniteSpeechProcessor
from mmlora.processors.families.paligemma import PaliGemmaProcessor
from mmlora.processors.families.phi4_multimodal import Phi4MultimodalProcessor
from mmlora.processors.families.pixtral import PixtralProcessor
from mmlora.processors.families.qwen2_5_omni import Qwen25OmniProcessor
from mmlora.processors.families.voxtral import VoxtralProcessor
from mmlora.processors.general import GeneralProcessor
from mmlora.processors.pretrained import named_class
from mmlora.towers.base import Towers
from mmlora.towers.gemma3n import Gemma3nTowers
from mmlora.towers.general import GeneralTowers
from mmlora.towers.phi4_multimodal import Phi4MultimodalTowers
from mmlora.towers.qwen2_5_omni import Qwen25OmniTowers
from mmlora.towers.qwen2_audio import Qwen2AudioTowers
from mmlora.utils.library_errors import LIBRARY_ERRORS

ProcessorFactory = Callable[[PretrainedConfig, Path, Any], MultiModalProcessor]


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        name: for users.
        modalities: supported in addition to text.
        processor: builds the processor of its media.
        towers: builds the towers of a loaded model.
        default_adapters: folders of the adapters that its models come with, by their modalities joined with `+`. An
            empty folder is the model's own directory.
        transformers_since: the first version of `transformers` whose processor runs without torchvision.
        transcription: prompts for transcription and translation; None if the family has none.
    """

    name: str
    modalities: tuple[str, ...] = ()
    processor: ProcessorFactory = GeneralProcessor
    towers: Callable[[Any], Towers] = GeneralTowers
    default_adapters: Mapping[str, str] = field(default_factory=dict)
    transformers_since: str = "5.17"
    transcription: prompts.TranscriptionPrompt | None = None


FAMILIES: Mapping[str, Family] = {
    "llama": Family("Llama"),
    "mistral": Family("Mistral"),
    "qwen2": Family("Qwen2"),
    "qwen3": Family("Qwen3"),
    "granite": Family("Granite"),
    "phi3": Family("Phi-3, Phi-4"),
    "gemma2": Family("Gemma 2"),
    "gemma3_text": Family("Gemma 3 (text)"),
    "mixtral": Family("Mixtral"),
    "qwen3_moe": Family("Qwen3-MoE"),
    "granitemoe": Family("GraniteMoE"),
    "granite_speech": Family(
        "Granite Speech",
        ("audio",),
        GraniteSpeechProcessor,
        default_adapters={"audio": ""},
        transcription=prompts.GRANITE_SPEECH,
    ),
    "granite_speech_plus": Family(
        "Granite Speech Plus",
        ("audio",),
        GraniteSpeechProcessor,
        default_adapters={"audio": ""},
        transcription=prompts.GRANITE_SPEECH,
    ),
    "voxtral": Family("Voxtral", ("audio",), VoxtralProcessor, transcription=prompts.VOXTRAL),
    "qwen2_audio": Family("Qwen2-Audio", ("audio",), towers=Qwen2AudioTowers, transcription=prompts.QWEN2_AUDIO),
    "qwen3_asr": Family("Qwen3-ASR", ("audio",), transcription=prompts.QWEN3_ASR),
    "audioflamingo3": Family("Audio Flamingo 3", ("audio",), transcription=prompts.AUDIO_FLAMINGO3),
    "llava": Family("LLaVA", ("image",)),
    "llava_next": Family("LLaVA-NeXT", ("image",)),
    "qwen2_vl": Family("Qwen2-VL", ("image",)),
    "qwen2_5_vl": Family("Qwen2.5-VL", ("image",)),
    "qwen3_vl": Family("Qwen3-VL", ("image",)),
    "idefics3": Family("Idefics3", ("image",), transformers_since="5.18"),
    "smolvlm": Family("SmolVLM", ("image",), transformers_since="5.18"),
    "internvl": Family("InternVL", ("image",), transformers_since="5.18"),
    "mistral3": Family("Mistral 3", ("image",), partial(GeneralProcessor, load=PixtralProcessor)),
    "gemma3": Family("Gemma 3", ("image",), towers=partial(GeneralTowers, bidirectional="picture")),
    "gemma3n": Family(
        "Gemma 3n", ("audio", "image"), towers=Gemma3nTowers, transformers_since="5.23", transcription=prompts.GEMMA3N
    ),
    "paligemma": Family(
        "PaliGemma 1 and 2",
        ("image",),
        PaliGemmaProcessor,
        partial(GeneralTowers, bidirectional="prompt", first_position=1),
    ),
    "granite4_vision": Family("Granite 4 Vision", ("image",)),
    "qwen2_5_omni_thinker": Family(
        "Qwen2.5-Omni (thinker)",
        ("audio", "image"),
        Qwen25OmniProcessor,
        Qwen25OmniTowers,
        transformers_since="5.23",
        transcription=prompts.QWEN2_5_OMNI,
    ),
    "phi4_multimodal": Family(
        "Phi-4-multimodal",
        ("audio", "image"),
        partial(GeneralProcessor, load=Phi4MultimodalProcessor),
        Phi4MultimodalTowers,
        {"audio": "speech-lora", "image": "vision-lora", "audio+image": "vision-lora"},
        transcription=prompts.PHI4_MULTIMODAL,
    ),
}
# By the processor class that a checkpoint names, for any family: LLaVA models with Pixtral's tower name this one.
PROCESSOR_OVERRIDES: Mapping[str, ProcessorFactory] = {
    "PixtralProcessor": partial(GeneralProcessor, load=PixtralProcessor)
}
# By the `model_type` in config.json.
LAYOUTS: Mapping[str, Layout] = {layout.name: layout for layout in (PHI4MM_LAYOUT, QWEN2_5_OMNI_LAYOUT)}


def find_layout(path: Path) -> Layout | None:
    """Return the layout of a checkpoint's directory; None if `transformers` reads it as it is."""
    try:
        content = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None  # `read_config` reports the problem
    return LAYOUTS.get(str(content.get("model_type"))) if isinstance(content, dict) else None


def get_key_mapping(path: Path) -> Mapping[str, str] | None:
    """Return how a checkpoint's tensors and modules are renamed, see `Layout`; None if they are not."""
    layout = find_layout(path)
    return layout.key_mapping if layout is not None else None


def family_key(config: PretrainedConfig) -> str | None:
    """Return the key of a model's family in `FAMILIES`; None if it is not listed."""
    return config.model_type if config.model_type in FAMILIES else None


def find_family(config: PretrainedConfig) -> Family | None:
    """Return a model's family; None if it is not listed."""
    return FAMILIES.get(config.model_type)


def check_modalities(config: PretrainedConfig, model_class: Any) -> None:
    """Refuse a model with towers whose family is not listed, instead of serving only its decoder.

    Raises:
        ConfigError: names the modalities of the model.
    """
    family = find_family(config)
    takes = model_class.input_modalities
    media = sorted({takes} if isinstance(takes, str) else set(takes)) if config.sub_configs else []
    media = [modality for modality in media if modality != "text"]  # a text decoder may inherit them from its class
    if media and (family is None or not family.modalities):
        raise ConfigError(
            f"{model_class.__name__} takes {' and '.join(media)} in addition to text, but {config.model_type} is not "
            "among the families with supported media (`mmlora models` lists them)"
        )


def get_processor(config: PretrainedConfig, model_path: str | Path, tokenizer: Any) -> MultiModalProcessor | None:
    """Build the processor of a model; return None for a text-only model.

    Args:
        config: the model's configuration.
        model_path: its local directory (for a Hub id, the snapshot folder).
        tokenizer: its tokenizer, which must have the placeholder tokens.

    Raises:
        ConfigError: the preprocessor files or the tokenizer do not fit the model, or `transformers` is too old for it.
    """
    family = find_family(config)
    if family is None or not family.modalities:
        return None
    if Version(transformers.__version__) < Version(family.transformers_since):
        raise ConfigError(
            f"{family.name} needs transformers {family.transformers_since} or newer, whose processor runs without "
            f"torchvision; version {transformers.__version__} is installed"
        )
    try:
        factory = PROCESSOR_OVERRIDES.get(named_class(Path(model_path)), family.processor)
        return factory(config, Path(model_path), tokenizer)
    except LIBRARY_ERRORS as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"the processor of {str(model_path)!r} cannot be built: {reason}") from error


def get_towers(model: Any) -> Towers | None:
    """Return the towers of a loaded `transformers` model; None for a text-only model."""
    family = find_family(model.config)
    return family.towers(model) if family is not None and family.modalities else None
