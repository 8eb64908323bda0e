"""`mmlora.model_loader` and attention: what a model takes, and what is refused instead of being computed wrongly."""

import pytest
import torch
from transformers import BloomConfig, LlamaConfig

from mmlora.attention import AttentionMetadata, KVCache, Span, attention_context, paged_attention
from mmlora.errors import ConfigError
from mmlora.model_loader import load_model, resolve_max_model_len

FACTORS = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "rope_theta": 1e4}


def llama(**rope):
    parameters = {**FACTORS, "factor": 8.0, **rope}
    return LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=512, rope_parameters=parameters)


def test_longrope_takes_the_models_whole_length():
    assert resolve_max_model_len(None, llama(original_max_position_embeddings=64)) == 512
    with pytest.raises(ConfigError, match="max_model_len=513 exceeds the 512 tokens"):
        resolve_max_model_len(513, llama(original_max_position_embeddings=64))


def test_attention_sinks_are_refused():
    cache = KVCache(1, 1, 4, 1, 8, dtype=torch.float32, device=torch.device("cpu"))
    module = torch.nn.Module()
    module.layer_idx = 0
    query = torch.zeros(1, 1, 2, 8)
    with attention_context(AttentionMetadata.build(cache, [Span([0], 0, 2)])):
        paged_attention(module, query, query, query, None, s_aux=None)
        with pytest.raises(ValueError, match="sinks"):
            paged_attention(module, query, query, query, None, s_aux=torch.zeros(1))


def test_a_decoder_without_the_attention_interface_is_refused(tmp_path):
    config = BloomConfig(architectures=["BloomForCausalLM"])
    with pytest.raises(ConfigError, match="attention of BloomForCausalLM cannot be replaced"):
        load_model(config, tmp_path, dtype=torch.float32, device=torch.device("cpu"))
