"""`FamilySpec`: how to create a tiny checkpoint of a model family, and sizes that most families share."""

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from tests.checkpoints import VOCAB_SIZE

TEXT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE + 64,  # with room for tokens of a family
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 4,
}
VISION: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}


@dataclass(frozen=True)
class FamilySpec:
    """How to create a tiny checkpoint of a family, and how to prompt and adapt it.

    Attributes:
        model_class: name of the transformers class.
        config: builds the configuration from the tokenizer.
        processor: builds the processor from the tokenizer; None if transformers' own class does not run here.
        modality: of the media.
        targets: `target_modules` of adapters by part, as regular expressions.
        placeholder: text of one item in a prompt.
        parameters: raw parameters that take LoRA, by part.
        tokens: special tokens of the family, by attribute of the tokenizer.
        token_kinds: model inputs with one value per token, with the value for a generated token.
        other_placeholder: a second modality and its placeholder.
        is_single: transformers' processor takes one item at a time.
    """

    model_class: str
    config: Callable[[Any], Any]
    processor: Callable[[Any], Any] | None
    modality: str
    targets: Mapping[str, str]
    placeholder: str
    parameters: Mapping[str, str] = field(default_factory=dict)
    tokens: Mapping[str, str] = field(default_factory=dict)
    token_kinds: Mapping[str, int] = field(default_factory=dict)
    other_placeholder: tuple[str, str] | None = None
    is_single: bool = False


def without_video(processor_class: type, *parts: Any, **options: Any) -> Any:
    """Build a processor without its video processor, which needs torchvision."""

    class Built(processor_class):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return argument and super().check_argument_for_proper_class(argument_name, argument)

    return Built(*parts, **options)


def pixtral_class() -> Any:
    """Return `transformers.PixtralProcessor`, with the Pillow module in place of one that needs torchvision."""
    name = "transformers.models.pixtral.image_processing_pixtral"
    pil = importlib.import_module("transformers.models.pixtral.image_processing_pil_pixtral")
    with patch.dict(sys.modules, {name: pil}):
        module = importlib.import_module("transformers.models.pixtral.processing_pixtral")
    return module.PixtralProcessor
