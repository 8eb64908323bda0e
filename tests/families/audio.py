"""Tiny checkpoints of families that hear."""

from collections.abc import Mapping
from typing import Any

import transformers

from tests.checkpoints import AUDIO_ID
from tests.families.spec import TEXT, Family
from tests.processors import granite_features


def _audio_flamingo3(tokenizer: Any) -> Any:
    audio = {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_mel_bins": 128,
        "max_source_positions": 1500,
    }
    text = transformers.Qwen2Config(**TEXT)
    return transformers.AudioFlamingo3Config(audio_config=audio, text_config=text, audio_token_id=AUDIO_ID)


def _audio_flamingo3_processor(tokenizer: Any) -> Any:
    extractor = transformers.WhisperFeatureExtractor(feature_size=128)
    return transformers.AudioFlamingo3Processor(extractor, tokenizer, audio_token="<|audio|>")


def _granite_speech(tokenizer: Any) -> Any:
    encoder = {
        "input_dim": 160,
        "num_layers": 2,
        "hidden_dim": 24,
        "feedforward_mult": 2,
        "num_heads": 2,
        "dim_head": 12,
        "output_dim": 30,
        "context_size": 20,
        "max_pos_emb": 32,
        "conv_kernel_size": 3,
        "conv_expansion_factor": 2,
    }
    projector = transformers.Blip2QFormerConfig(
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        encoder_hidden_size=24,
        cross_attention_frequency=1,
    )
    return transformers.GraniteSpeechConfig(
        audio_token_index=AUDIO_ID,
        encoder_config=encoder,
        text_config=transformers.GraniteConfig(**TEXT, embedding_multiplier=2.0, attention_multiplier=0.3),
        projector_config=projector,
        downsample_rate=granite_features.DOWNSAMPLE,
        window_size=granite_features.PROJECTOR_WINDOW,
        has_lora_adapter=False,
    )


AUDIO_FAMILIES: Mapping[str, Family] = {
    "audioflamingo3": Family(
        "AudioFlamingo3ForConditionalGeneration",
        _audio_flamingo3,
        _audio_flamingo3_processor,
        "audio",
        {
            "language_model": r".*language_model\.layers\.\d+\..*(q|v|down)_proj",
            "connector": r".*multi_modal_projector\.linear_[12]",
            "audio_tower": r".*audio_tower\.layers\.\d+\..*(q_proj|out_proj|fc1)",
        },
        "<|audio|>",
        is_single=True,
    ),
    "granite_speech": Family(
        "GraniteSpeechForConditionalGeneration",
        _granite_speech,
        None,
        "audio",
        {
            "language_model": r".*language_model\..*layers\.\d+\..*(q|v|down)_proj",
            "connector": r".*projector\.(linear|.*layer\.\d+\.(attention\.attention\.query|output_query\.dense))",
            "audio_tower": r".*encoder\.layers\.\d+\.(attn|ff1)\..*(to_q|to_out|up_proj)",
        },
        "<|audio|>",
    ),
}
