"""`FAMILIES`: specifications of all tiny multimodal checkpoints, and functions that save them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

from mmlora.lora.adapter import PARTS
from mmlora.models import families
from tests.checkpoints import VOCAB_SIZE, AdapterSpec, _draw_weights, build_tokenizer
from tests.families.audio import AUDIO_FAMILIES
from tests.families.gemma3n import GEMMA3N_FAMILIES
from tests.families.image import IMAGE_FAMILIES
from tests.families.spec import FamilySpec

FAMILIES: Mapping[str, FamilySpec] = {**AUDIO_FAMILIES, **IMAGE_FAMILIES, **GEMMA3N_FAMILIES}


def adapter_of(family: str, *parts: str, seed: int, r: int) -> AdapterSpec:
    """Return an adapter on some parts of a family, by default on all of them."""
    spec = FAMILIES[family]
    modules = [f"({spec.targets[part]})" for part in parts or PARTS if part in spec.targets]
    parameters = [spec.parameters[part] for part in parts or PARTS if part in spec.parameters]
    return AdapterSpec("|".join(modules) or (), seed, r, {"target_parameters": parameters} if parameters else {})


def parts_of(family: str) -> list[str]:
    """Return the parts of a family that take LoRA."""
    return [part for part in PARTS if part in {**FAMILIES[family].targets, **FAMILIES[family].parameters}]


def save_family(path: Path, family: str, seed: int = 0) -> Path:
    """Save a tiny model of a family with its tokenizer and processor; skip the test if transformers is too old."""
    since = families.FAMILIES[family.partition("+")[0]].transformers_since
    if Version(transformers.__version__) < Version(since):
        pytest.skip(f"{family} needs transformers {since}; docs/models.md")
    spec = FAMILIES[family]
    tokenizer = build_tokenizer(spec.tokens)
    config = spec.config(tokenizer)
    torch.manual_seed(seed)
    model = getattr(transformers, spec.model_class)(config)
    _draw_weights(model, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        model.get_output_embeddings().weight[VOCAB_SIZE:] = 0  # never generate placeholders
    model.generation_config.eos_token_id = 4
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    if spec.processor is not None:
        save_processor(spec.processor(tokenizer), path)
    return path


def save_processor(processor: Any, path: Path) -> None:
    """Save the settings of a processor and its parts; `save_pretrained` fails if a part is None."""
    class_name = next(base.__name__ for base in type(processor).__mro__ if base.__name__ != "Built")
    settings = {key: value for key, value in processor.to_dict().items() if not key.endswith("processor")}
    parts = {}
    for name in ("image_processor", "feature_extractor"):
        if getattr(processor, name, None) is not None:
            parts |= json.loads(getattr(processor, name).to_json_string())
    (path / "preprocessor_config.json").write_text(json.dumps(parts))
    settings = {key: value for key, value in settings.items() if key != "feature_extractor"}
    (path / "processor_config.json").write_text(json.dumps({**settings, "processor_class": class_name}))
