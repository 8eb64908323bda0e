"""Create tiny random checkpoints and PEFT adapters on disk.

Weights are rounded to values that both bfloat16 and float16 represent exactly, so that half-precision runs have the
same weights as the float32 reference. All tensors are redrawn at a realistic scale: the model classes initialize some
with a standard deviation of 1.0 or with zeros, which would hide errors.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mmlora.lora.adapter import PARTS

SPECIAL_TOKENS = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|audio|>", "<|image|>")
END_OF_TEXT_ID, END_ID, AUDIO_ID, IMAGE_ID = 0, 4, 5, 6
CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{- '<|' + message['role'] + '|>' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] in ('image', 'image_url') -%}{{- '<|image|>' -}}"
    "{%- elif part['type'] in ('audio', 'input_audio', 'audio_url') -%}{{- '<|audio|>' -}}"
    "{%- elif 'text' in part -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{{- '<|end|>' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)

# `target_modules` for each part of Phi-4-multimodal, as a regular expression.
_PHI4_TARGETS: Mapping[str, str] = dict(
    zip(
        PARTS,
        (
            r"model\.layers\.\d+\.(self_attn\.(qkv|o)_proj|mlp\.(gate_up|down)_proj)",
            r".*embed_tokens_extend\.(image_embed\.img_projection_\w+|audio_embed\.(up|down)_proj\w+)",
            r".*img_processor\.encoder\.layers\.\d+\..*(\w_proj|out_proj|fc\d)",
            r".*audio_embed\.encoder\..*\.(\w_proj|linear_\w+|gate_up_proj|down_proj|out)",
        ),
        strict=True,
    )
)


def phi4_targets(*parts: str) -> str:
    """Return `target_modules` for some parts of the tiny Phi-4-multimodal, by default for all."""
    return "|".join(f"({_PHI4_TARGETS[part]})" for part in parts or PARTS)


@dataclass(frozen=True)
class AdapterSpec:
    """PEFT options of a random adapter, and the seed of its tensors."""

    target_modules: str | tuple[str, ...]
    seed: int
    r: int = 4
    options: Mapping[str, Any] = field(default_factory=dict)


PHI4_ADAPTERS: Mapping[str, AdapterSpec] = {
    "text": AdapterSpec(phi4_targets("language_model"), 1, 5, {"lora_alpha": 10}),
    "rslora": AdapterSpec(phi4_targets("language_model"), 2, 9, {"lora_alpha": 6, "use_rslora": True}),
    "connector": AdapterSpec(phi4_targets("connector"), 3, 3, {"lora_alpha": 6}),
    "vision": AdapterSpec(phi4_targets("vision_tower"), 4, 4, {"lora_alpha": 4}),
    "audio": AdapterSpec(phi4_targets("audio_tower"), 5, 4, {"lora_alpha": 4}),
    "everything": AdapterSpec(
        phi4_targets(),
        6,
        2,
        {
            "lora_alpha": 3,
            "rank_pattern": {r"layers\.\d+\.mlp\.down_proj": 11, "img_projection_up": 5},
            "alpha_pattern": {r"self_attn\.o_proj": 5},
        },
    ),
}


def build_tokenizer(tokens: Mapping[str, str] | None = None) -> PreTrainedTokenizerFast:
    """Build a tokenizer with the special tokens and one token per byte, which round-trips any text.

    Args:
        tokens: more special tokens of a family, by attribute; they come last.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    if tokens:  # as in Gemma: line breaks next to media become one token, which is added but not special
        tokenizer.add_tokens([AddedToken("\n" * count, normalized=False) for count in (1, 2, 3, 4)])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        **({"extra_special_tokens": dict(tokens)} if tokens else {}),
    )


VOCAB_SIZE = len(SPECIAL_TOKENS) + 256


def phi4_config() -> transformers.PretrainedConfig:
    """Return a configuration: 3 decoder layers, 6 query and 3 KV heads of size 12, rotated by half, and 42-px crops."""
    return transformers.Phi4MultimodalConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=72,
        intermediate_size=100,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=512,
        original_max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        bos_token_id=END_OF_TEXT_ID,
        pad_token_id=END_OF_TEXT_ID,
        eos_token_id=[END_ID, END_OF_TEXT_ID],
        audio_config={
            "hidden_size": 24,
            "intermediate_size": 20,
            "num_blocks": 2,
            "num_attention_heads": 2,
            "ext_pw_out_channel": 24,
            "depthwise_separable_out_channel": 24,
            "nemo_conv_channels": 8,
            "time_reduction": 4,
            "bias_max_distance": 20,
            "audio_token_id": AUDIO_ID,
        },
        vision_config={
            "hidden_size": 30,
            "intermediate_size": 44,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "image_size": 42,
            "crop_size": 42,
            "patch_size": 7,
            "feature_layer": -2,
            "image_token_id": IMAGE_ID,
        },
    )


_TEXT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 60,
    "intermediate_size": 84,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": END_OF_TEXT_ID,
    "pad_token_id": END_OF_TEXT_ID,
    "eos_token_id": END_ID,
}
TEXT_FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen3": ("Qwen3", {"head_dim": 14}),
    "granite": (
        "Granite",
        {"logits_scaling": 3.0, "residual_multiplier": 0.7, "embedding_multiplier": 2.0, "attention_multiplier": 0.2},
    ),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 14,
            "sliding_window": 9,
            "attn_logit_softcapping": 4.0,
            "final_logit_softcapping": 6.0,
            "query_pre_attn_scalar": 20,
        },
    ),
    "gemma3_text": ("Gemma3", {"head_dim": 14, "sliding_window": 9, "sliding_window_pattern": 2}),
    "phi3": ("Phi3", {"sliding_window": 9}),
    "mixtral": ("Mixtral", {"num_local_experts": 3}),
    "gpt2": ("GPT2", {"n_inner": 84, "num_key_value_heads": None}),
    "mistral": ("Mistral", {"sliding_window": 9}),
    "qwen2": ("Qwen2", {}),
    "qwen3_moe": (
        "Qwen3Moe",
        {"head_dim": 14, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 40},
    ),
    "granitemoe": ("GraniteMoe", {"num_local_experts": 3, "num_experts_per_tok": 2}),
    "opt": ("OPT", {"ffn_dim": 84, "word_embed_proj_dim": 60, "num_key_value_heads": None}),
    "phi": ("Phi", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}}),
    "llama4_text": (
        "Llama4",
        {
            "head_dim": 16,
            "intermediate_size_mlp": 84,
            "num_local_experts": 3,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 1,
            "layer_types": ["full_attention"] * 3,
        },
    ),
}


# Decoders whose attention the engine does not support, in the form of `TEXT_FAMILIES`.
REFUSED_FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "diffllama": ("DiffLlama", {}),
    "doge": ("Doge", {}),
    "phimoe": ("Phimoe", {"num_local_experts": 3, "sliding_window": 64}),
    "deepseek_v3": (
        "DeepseekV3",
        {
            "num_key_value_heads": 6,
            "moe_intermediate_size": 40,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "first_k_dense_replace": 1,
        },
    ),
    "gpt_oss": ("GptOss", {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 14}),
}


def save_text_model(path: Path, family: str, seed: int = 0, **changes: Any) -> Path:
    """Save a tiny text model of a family with its tokenizer; `changes` override options of its configuration."""
    name, options = {**TEXT_FAMILIES, **REFUSED_FAMILIES}[family]
    config_name = f"{name}TextConfig" if family.endswith("_text") else f"{name}Config"
    config = getattr(transformers, config_name)(**{**_TEXT, **options, **changes})
    class_name = "GPT2LMHeadModel" if family == "gpt2" else f"{name}ForCausalLM"
    return _save(path, getattr(transformers, class_name), config, seed)


def save_phi4(path: Path, seed: int = 0) -> Path:
    """Save a tiny Phi-4-multimodal in the Hub's format: weights, tokenizer, chat template, preprocessor."""
    _save(path, transformers.Phi4MultimodalForCausalLM, phi4_config(), seed)
    (path / "preprocessor_config.json").write_text(
        '{"processor_class": "Phi4MultimodalProcessor", "image_processor_type": "Phi4MultimodalImageProcessor",'
        ' "feature_extractor_type": "Phi4MultimodalFeatureExtractor", "size": {"height": 42, "width": 42},'
        ' "patch_size": 7, "dynamic_hd": 4, "feature_size": 80, "audio_compression_rate": 4}'
    )
    return path


def save_adapter(model_path: Path, path: Path, spec: AdapterSpec, dtype: torch.dtype = torch.float32) -> Path:
    """Save an adapter with PEFT for the model in `model_path`; random A and B change the output visibly."""
    from peft import LoraConfig, get_peft_model

    model = load_reference(model_path)
    targets = spec.target_modules if isinstance(spec.target_modules, str) else list(spec.target_modules)
    config = LoraConfig(r=spec.r, target_modules=targets, task_type="CAUSAL_LM", **spec.options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(model, config).save_pretrained(path)
    randomize_adapter(path, spec.seed, dtype)
    return path


def randomize_adapter(path: Path, seed: int, dtype: torch.dtype = torch.float32) -> None:
    """Replace an adapter's tensors by random ones: rows of A have length 1, B has half the scale of base weights."""
    generator = torch.Generator().manual_seed(seed)
    file = path / "adapter_model.safetensors"
    tensors = {}
    for key, tensor in sorted(load_file(file).items()):
        scale = tensor.shape[1] ** -0.5
        if ".lora_B." in key:
            scale *= 0.5
        tensors[key] = _rounded(torch.randn(tensor.shape, generator=generator) * scale).to(dtype)
    save_file(tensors, file, {"format": "pt"})


def load_reference(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a model with plain transformers."""
    config = transformers.AutoConfig.from_pretrained(path)
    model_class = getattr(transformers, config.architectures[0])
    text_config = config.get_text_config()
    # SDPA lacks softcap (transformers 5.17 still selects it), and without a mask it makes PaliGemma bidirectional.
    needs_eager = ("attn_logit_softcapping", "use_bidirectional_attention")
    attention = "eager" if any(getattr(text_config, name, None) for name in needs_eager) else None
    model = model_class.from_pretrained(path, dtype=dtype, attn_implementation=attention)
    return model.eval().requires_grad_(False)


def _save(path: Path, model_class: Any, config: Any, seed: int) -> Path:
    torch.manual_seed(seed)
    model = model_class(config)
    _draw_weights(model, torch.Generator().manual_seed(seed))
    model.generation_config.eos_token_id = config.eos_token_id
    model.save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


@torch.no_grad()
def _draw_weights(model: nn.Module, generator: torch.Generator) -> None:
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("bias"):
            value = 0.1 * noise
        elif parameter.ndim == 1:  # a norm; Gemma adds 1 to its weight
            value = parameter + 0.1 * noise
        elif "embed_tokens.weight" in name or "extensor" in name or "position_embedding" in name:
            value = noise
        else:
            value = noise * (2.0 if name == "lm_head.weight" else 1.0) * parameter[0].numel() ** -0.5
        parameter.copy_(_rounded(value))


def _rounded(value: torch.Tensor) -> torch.Tensor:
    """Round to values that bfloat16 and float16 both represent; float16 subnormals become 0."""
    smallest = torch.finfo(torch.float16).smallest_normal
    return torch.where(value.abs() < smallest, 0.0, value).bfloat16().to(value.dtype)
