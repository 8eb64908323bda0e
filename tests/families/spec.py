"""How a tiny checkpoint of a family is made, and sizes that most of them share."""

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from tests.checkpoints import VOCAB_SIZE

TEXT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE + 64,  # room for a family's own tokens
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
class Family:
    """How to make one: its model class and configuration, its processor, and what a part's Linears are called."""

    model_class: str
    config: Callable[[Any], Any]  # from the tokenizer
    processor: Callable[[Any], Any] | None  # from the tokenizer; None where transformers' own cannot be built here
    modality: str
    targets: Mapping[str, str]
    placeholder: str
    parameters: Mapping[str, str] = field(default_factory=dict)  # by part, raw parameters that take LoRA
    tokens: Mapping[str, str] = field(default_factory=dict)  # special tokens of its own, by attribute of the tokenizer
    token_kinds: Mapping[str, int] = field(default_factory=dict)  # inputs by token that count, and a new token's value
    other_placeholder: tuple[str, str] | None = None  # a second modality, and what stands for an item of it
    is_single: bool = False  # transformers' processor takes one item at a time


def without_video(processor_class: type, *parts: Any, **options: Any) -> Any:
    """Build a processor whose video part, which needs torchvision, is None."""

    class Built(processor_class):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return argument and super().check_argument_for_proper_class(argument_name, argument)

    return Built(*parts, **options)


def pixtral_class() -> Any:
    """`transformers.PixtralProcessor`; its module imports torchvision for a function that the Pillow class has, too."""
    name = "transformers.models.pixtral.image_processing_pixtral"
    pil = importlib.import_module("transformers.models.pixtral.image_processing_pil_pixtral")
    with patch.dict(sys.modules, {name: pil}):
        module = importlib.import_module("transformers.models.pixtral.processing_pixtral")
    return module.PixtralProcessor
