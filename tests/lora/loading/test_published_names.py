"""Adapters published with the module names of transformers 4 match the modules of transformers 5."""

from functools import cache

import pytest
import torch
import transformers

from mmlora.lora.loading.module_index import ModuleIndex
from mmlora.models.families import get_towers
from tests.checkpoints import build_tokenizer
from tests.families.table import FAMILIES

LLM = "language_model.model.layers.1.self_attn.q_proj"
# By family and part, a module name of older files, taken from model cards and adapters on the Hub.
PUBLISHED = {
    "llava": {
        "language_model": LLM,
        "connector": "multi_modal_projector.linear_1",
        "vision_tower": "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj",
    },
    "llava_next": {"language_model": LLM, "vision_tower": "vision_tower.vision_model.encoder.layers.0.mlp.fc1"},
    "qwen2_vl": {
        "language_model": "model.layers.1.self_attn.q_proj",
        "connector": "visual.merger.mlp.0",
        "vision_tower": "visual.blocks.0.attn.qkv",
    },
    "qwen2_5_vl": {
        "language_model": "model.layers.1.mlp.down_proj",
        "connector": "visual.merger.mlp.2",
        "vision_tower": "visual.blocks.0.mlp.up_proj",
    },
    "qwen3_vl": {
        "language_model": "model.language_model.layers.1.self_attn.q_proj",
        "connector": "model.visual.merger.linear_fc1",
        "vision_tower": "model.visual.blocks.0.attn.qkv",
    },
    "idefics3": {
        "language_model": "model.text_model.layers.1.self_attn.q_proj",
        "connector": "model.connector.modality_projection.proj",
        "vision_tower": "model.vision_model.encoder.layers.0.self_attn.q_proj",
    },
    "mistral3": {
        "language_model": LLM,
        "connector": "multi_modal_projector.patch_merger.merging_layer",
        "vision_tower": "vision_tower.transformer.layers.0.attention.q_proj",
    },
    "internvl": {
        "language_model": LLM,
        "connector": "multi_modal_projector.linear_1",
        "vision_tower": "vision_tower.encoder.layer.0.attention.q_proj",
    },
    "gemma3": {"language_model": LLM, "vision_tower": "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"},
    "paligemma": {
        "language_model": LLM,
        "connector": "multi_modal_projector.linear",
        "vision_tower": "vision_tower.vision_model.encoder.layers.0.mlp.fc1",
    },
    "granite_speech": {
        "language_model": LLM,
        "connector": "projector.linear",
        "audio_tower": "encoder.layers.0.attn.to_q",
    },
    "voxtral": {
        "language_model": LLM,
        "connector": "multi_modal_projector.linear_1",
        "audio_tower": "audio_tower.layers.0.self_attn.q_proj",
    },
    "qwen2_audio": {
        "language_model": LLM,
        "connector": "multi_modal_projector.linear",
        "audio_tower": "audio_tower.layers.0.fc1",
    },
    "audioflamingo3": {"language_model": LLM, "audio_tower": "audio_tower.layers.0.fc1"},
    "qwen2_5_omni_thinker": {
        "language_model": "model.layers.1.self_attn.q_proj",
        "connector": "visual.merger.mlp.0",
        "vision_tower": "visual.blocks.0.attn.proj",
        "audio_tower": "audio_tower.layers.0.self_attn.q_proj",
    },
}


@cache
def index_of(family: str) -> ModuleIndex:
    spec = FAMILIES[family]
    with torch.device("meta"):
        model = getattr(transformers, spec.model_class)(spec.config(build_tokenizer(spec.tokens)))
    towers = get_towers(model)
    assert towers is not None
    return ModuleIndex(model, towers.part_of)


@pytest.mark.parametrize(("family", "part"), [(family, part) for family, names in PUBLISHED.items() for part in names])
def test_older_names_match_a_module_of_their_part(family: str, part: str) -> None:
    name, index = PUBLISHED[family][part], index_of(family)
    found = {old: target.module for old, target in index.resolve([name]).items()}
    assert list(found) == [name]
    own = found[name]
    assert own.split(".")[-1] == name.split(".")[-1]
    assert index.part_of(own) == part
    number = [piece for piece in name.split(".") if piece.isdigit()]
    assert [piece for piece in own.split(".") if piece.isdigit()] == number
