"""`mmlora.models.loader` and attention: limits of a model, and models that are refused."""

import json

import pytest
import torch
from transformers import BloomConfig, LlamaConfig

from mmlora.attention.backend import Span, attention_context, paged_attention
from mmlora.attention.kv_cache import KVLayout
from mmlora.attention.paged import SDPABackend
from mmlora.config import EngineArgs
from mmlora.errors import ConfigError
from mmlora.models.config import check_config
from mmlora.models.loader import disable_tf32, load_tokenizer, resolve_max_model_len
from tests.families.table import save_family

FACTORS = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "rope_theta": 1e4}


def llama(**rope):
    parameters = {**FACTORS, "factor": 8.0, **rope}
    return LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=512, rope_parameters=parameters)


def test_longrope_allows_the_full_context_length():
    assert resolve_max_model_len(None, llama(original_max_position_embeddings=64)) == 512
    with pytest.raises(ConfigError, match="max_model_len=513 exceeds this model's limit of 512 tokens"):
        resolve_max_model_len(513, llama(original_max_position_embeddings=64))


def test_attention_sinks_are_refused():
    backend = SDPABackend()
    cache = backend.allocate(KVLayout(1, 1, 8, 4, torch.float32), 1, torch.device("cpu"))
    module = torch.nn.Module()
    module.layer_idx = 0
    query = torch.zeros(1, 1, 2, 8)
    with attention_context(backend.build_metadata(cache, [Span((0,), 0, 2)])):
        paged_attention(module, query, query, query, None, s_aux=None)
        with pytest.raises(ValueError, match="sinks"):
            paged_attention(module, query, query, query, None, s_aux=torch.zeros(1))


def test_the_template_of_an_older_processor_is_used(tmp_path):
    path = save_family(tmp_path / "model", "llava")
    template = "{% for part in messages[0]['content'] %}{{ '[' + part['type'] + ']' }}{% endfor %}"
    (path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    tokenizer = load_tokenizer(EngineArgs(str(path)), path)
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}
    assert tokenizer.apply_chat_template([turn], tokenize=False) == "[image][text]"
    (path / "chat_template.json").write_text("[]")
    with pytest.raises(ConfigError, match="tokenizer=.* cannot be loaded"):
        load_tokenizer(EngineArgs(str(path)), path)


def test_a_decoder_without_the_attention_interface_is_refused():
    config = BloomConfig(architectures=["BloomForCausalLM"])
    with pytest.raises(ConfigError, match="attention of BloomForCausalLM cannot be replaced"):
        check_config(config)


@pytest.mark.parametrize(
    ("dtype", "device", "is_allowed"),
    [(torch.float32, "cuda", False), (torch.bfloat16, "cuda", True), (torch.float32, "cpu", True)],
    ids=str,
)
def test_float32_convolutions_do_not_use_tf32(dtype, device, is_allowed, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    disable_tf32(dtype, torch.device(device))
    assert torch.backends.cudnn.allow_tf32 is is_allowed
