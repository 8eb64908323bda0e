"""Define the assistant's configuration, its initial weights, and the forward pass that the training stages share."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from torch import nn
from transformers import Phi4MultimodalConfig, Phi4MultimodalForCausalLM, PreTrainedTokenizerFast

from mmlora.assets.training.rows import Batch
from mmlora.assets.training.tokenizer import END, END_OF_TEXT

CHECKPOINTS = Path(__file__).parent / "checkpoints"
_HAS_FAST_BFLOAT16 = torch.cpu._is_avx512_bf16_supported()
LORA_TARGETS = r"model\.layers\.\d+\.(self_attn\.(qkv|o)_proj|mlp\.(gate_up|down)_proj)"


def autocast() -> torch.autocast:
    """Run matrix products in bfloat16 where the processor multiplies it faster than float32."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=_HAS_FAST_BFLOAT16)


def build_config(tokenizer: PreTrainedTokenizerFast) -> Phi4MultimodalConfig:
    """Return the configuration: a 1.9 M language model, a 2.2 M audio tower and a 1.1 M vision tower."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in (END, END_OF_TEXT)}
    return Phi4MultimodalConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        original_max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=ids[END_OF_TEXT],
        pad_token_id=ids[END_OF_TEXT],
        eos_token_id=[ids[END], ids[END_OF_TEXT]],
        audio_config={
            "hidden_size": 144,
            "intermediate_size": 384,
            "num_blocks": 4,
            "num_attention_heads": 4,
            "ext_pw_out_channel": 144,
            "depthwise_separable_out_channel": 144,
            "kernel_size": 3,
            "nemo_conv_channels": 32,
            "time_reduction": 4,
            "bias_max_distance": 250,
            "audio_token_id": tokenizer.convert_tokens_to_ids("<|audio|>"),
        },
        vision_config={
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "image_size": 112,
            "crop_size": 112,
            "patch_size": 14,
            "feature_layer": -1,
            "image_token_id": tokenizer.convert_tokens_to_ids("<|image|>"),
        },
    )


def build_model(config: Phi4MultimodalConfig, seed: int = 0) -> Phi4MultimodalForCausalLM:
    """Initialize the model; linear layers of both towers get LeCun scale (the class's own vision scale is 1.0)."""
    torch.manual_seed(seed)
    model = Phi4MultimodalForCausalLM(config)
    for module in model.model.embed_tokens_extend.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, std=1 / math.sqrt(fan_in))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.MultiheadAttention):
            nn.init.normal_(module.in_proj_weight, std=1 / math.sqrt(module.embed_dim))
    positions = model.model.embed_tokens_extend.image_embed.img_processor.embeddings.position_embedding
    positions.weight.data = 0.3 * _sine_grid(positions.num_embeddings, positions.embedding_dim)
    model.set_attn_implementation({"": "eager"})  # the language model's attention weights are trained on
    return model


def _sine_grid(num_positions: int, width: int) -> torch.Tensor:
    """Return sines and cosines of the row and column of each patch of a square grid, `[num_positions, width]`."""
    side = math.isqrt(num_positions)
    frequencies = torch.linspace(0.2, math.pi, width // 4)
    angles = torch.arange(side)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=-1)
    rows, columns = waves.repeat_interleave(side, 0), waves.repeat(side, 1)
    return torch.cat([rows, columns], dim=-1)


def lora_config(r: int = 32) -> LoraConfig:
    """Return the adapter configuration: attention and MLP of the language model, scale 2."""
    return LoraConfig(
        r=r,
        lora_alpha=2 * r,
        target_modules=LORA_TARGETS,
        task_type="CAUSAL_LM",
        base_model_name_or_path="mmlora/assistant",
    )


def audio_hidden(model: Phi4MultimodalForCausalLM, features: torch.Tensor) -> torch.Tensor:
    """Encode clips of one length, `[num_clips, num_frames, 80]` to `[num_clips, ceil(num_frames / 4), 144]`."""
    with autocast():
        hidden: torch.Tensor = model.model.embed_tokens_extend.audio_embed.encoder(features, None)
    return hidden.float()


def project_audio(model: Phi4MultimodalForCausalLM, hidden: torch.Tensor, mode: str = "speech") -> torch.Tensor:
    """Project audio hidden states into the language model with the projection of `mode`, speech or vision."""
    embed = model.model.embed_tokens_extend.audio_embed
    up, down = (
        (embed.up_proj_for_speech, embed.down_proj_for_speech)
        if mode == "speech"
        else (embed.up_proj_for_vision_speech, embed.down_proj_for_vision_speech)
    )
    projected: torch.Tensor = down(nn.functional.gelu(up(hidden)))
    return projected


def patch_features(model: Phi4MultimodalForCausalLM, pixels: torch.Tensor) -> torch.Tensor:
    """Run the vision tower on 112-px pictures `[num_images, 3, 112, 112]`; returns `[num_images, 64, 128]`."""
    tower = model.model.embed_tokens_extend.image_embed.img_processor
    features: torch.Tensor = tower(pixels, output_hidden_states=True).hidden_states[-1]
    return features


def embed_patches(model: Phi4MultimodalForCausalLM, patches: torch.Tensor) -> torch.Tensor:
    """Pool and project patch features into `[num_images, 41, 192]`, as the model does.

    The crop and the global view of a 112-px picture are the same pixels, so the tower runs once for both.
    """
    embed = model.model.embed_tokens_extend.image_embed
    num, side = len(patches), math.isqrt(patches.shape[1])
    grid = patches.view(num, side, side, -1).permute(0, 3, 1, 2)
    grid = embed.image_token_compression(grid).permute(0, 2, 3, 1)
    newline = embed.sub_img_feature_extensor.expand(num, side // 2, 1, -1)
    view = torch.cat([grid, newline], dim=2).flatten(1, 2)
    joined = torch.cat([view, embed.global_img_feature_extensor.expand(num, 1, -1), view], dim=1)
    projected: torch.Tensor = embed.img_projection_down(nn.functional.gelu(embed.img_projection_up(joined)))
    return projected


def image_embeds(model: Phi4MultimodalForCausalLM, pixels: torch.Tensor) -> torch.Tensor:
    """Embed 112-px pictures `[num_images, 3, 112, 112]` as `[num_images, 41, 192]`."""
    return embed_patches(model, patch_features(model, pixels))


class Output(NamedTuple):
    """What a forward pass leaves to train on, in fp32.

    Shapes: logits of the labelled positions `[num_labels, vocab_size]`, their labels `[num_labels]`, and for each layer
    its attention weights `[num_rows, num_heads, num_tokens, num_tokens]` and its input
    `[num_rows, num_tokens, hidden_size]`.
    """

    logits: torch.Tensor
    labels: torch.Tensor
    attentions: tuple[torch.Tensor, ...]
    hidden_states: tuple[torch.Tensor, ...]


def run_language_model(model: Any, batch: Batch, media: dict[int, torch.Tensor] | None = None) -> Output:
    """Run the language model over a batch of rows, matrix products in bfloat16.

    Args:
        model: The model, or the base inside a PEFT model.
        batch: The rows.
        media: Embeddings that replace a placeholder, `{token_id: [num_items, num_tokens, hidden_size]}`.

    """
    embeds = model.model.embed_tokens(batch.ids)
    for token_id, values in (media or {}).items():
        where = torch.nonzero(batch.ids == token_id, as_tuple=True)
        embeds = embeds.index_put(where, values.flatten(0, 1).float())
    with autocast():
        output = model.model(
            inputs_embeds=embeds,
            attention_mask=torch.zeros(batch.mask.shape).masked_fill(~batch.mask, torch.finfo(torch.float32).min),
            position_ids=batch.positions,
            use_cache=False,
            output_attentions=True,
            output_hidden_states=True,
        )
        chosen = batch.labels >= 0
        logits = model.lm_head(output.last_hidden_state[chosen])
    attentions = tuple(weights.float() for weights in output.attentions)
    return Output(logits.float(), batch.labels[chosen], attentions, tuple(h.float() for h in output.hidden_states))
