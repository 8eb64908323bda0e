"""A tiny Gemma 3n, with a vision tower that replaces the one that needs timm."""

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tests.families.spec import TEXT, FamilySpec

TOKENS = {
    "boi_token": "<start_of_image>",
    "boa_token": "<start_of_audio>",
    "eoi_token": "<end_of_image>",
    "image_token": "<image_soft_token>",
    "eoa_token": "<end_of_audio>",
    "audio_token": "<audio_soft_token>",
}


class GridTower(transformers.PreTrainedModel):
    """Return 16 patches of a picture, `[batch, hidden_size, 4, 4]`, in the form of timm's MobileNet."""

    config_class = transformers.models.gemma3n.configuration_gemma3n.Gemma3nVisionConfig
    main_input_name = "pixel_values"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.patches = nn.Conv2d(3, config.hidden_size, 7, 7)
        self.mix = nn.Linear(config.hidden_size, config.hidden_size)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> BaseModelOutputWithPooling:
        rows = self.mix(self.patches(pixel_values).movedim(1, -1).tanh())
        return BaseModelOutputWithPooling(last_hidden_state=rows.movedim(-1, 1))


def _gemma3n(tokenizer: Any) -> Any:
    transformers.AutoModel.register(GridTower.config_class, GridTower, exist_ok=True)
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in TOKENS.items()}
    text = {
        **TEXT,
        "head_dim": 8,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 9,
        "vocab_size_per_layer_input": ids["eoi_token"],
        "hidden_size_per_layer_input": 6,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
        "intermediate_size": [64] * 4,
        "final_logit_softcapping": 6.0,
    }
    audio = {
        "hidden_size": 24,
        "conf_num_hidden_layers": 2,
        "conf_num_attention_heads": 2,
        "sscp_conv_channel_size": [8, 4],
        "vocab_offset": ids["eoa_token"],
        "vocab_size": 64,
    }
    return transformers.Gemma3nConfig(
        text_config=text,
        vision_config={"hidden_size": 24, "vocab_offset": ids["eoi_token"], "vocab_size": 2},
        audio_config=audio,
        audio_soft_tokens_per_image=30,
        vision_soft_tokens_per_image=16,
        **{f"{name}_id": token_id for name, token_id in ids.items()},
    )


def _gemma3n_processor(tokenizer: Any) -> Any:
    pil = transformers.SiglipImageProcessorPil(size={"height": 28, "width": 28})
    extractor = transformers.Gemma3nAudioFeatureExtractor()
    return transformers.Gemma3nProcessor(extractor, pil, tokenizer, audio_seq_length=30, image_seq_length=16)


GEMMA3N_FAMILIES: Mapping[str, FamilySpec] = {
    "gemma3n": FamilySpec(
        "Gemma3nForConditionalGeneration",
        _gemma3n,
        _gemma3n_processor,
        "image",
        {
            "language_model": r".*language_model\.layers\.\d+\..*(q_proj|down_proj|per_layer_input_gate)",
            "connector": r".*embed_(vision|audio)\.embedding_projection",
            "vision_tower": r".*vision_tower\.mix",
            "audio_tower": r".*audio_tower\.conformer\.\d+\..*(q_proj|ffw_layer_1)",
        },
        "\n<image_soft_token>",
        tokens=TOKENS,
        other_placeholder=("audio", "<audio_soft_token>"),
    )
}
