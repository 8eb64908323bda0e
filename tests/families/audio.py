"""Tiny checkpoints of families with audio."""

from collections.abc import Mapping
from typing import Any

import torch
import transformers

from tests.checkpoints import AUDIO_ID
from tests.families.spec import TEXT, FamilySpec
from tests.processors.families import granite_features


def _audio_flamingo3(tokenizer: Any) -> Any:
    audio = {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_mel_bins": 80,
        "max_source_positions": 50,  # 1 s instead of 30
    }
    text = transformers.Qwen2Config(**TEXT)
    return transformers.AudioFlamingo3Config(audio_config=audio, text_config=text, audio_token_id=AUDIO_ID)


def _audio_flamingo3_processor(tokenizer: Any) -> Any:
    extractor = transformers.WhisperFeatureExtractor(feature_size=80, chunk_length=1)
    return transformers.AudioFlamingo3Processor(extractor, tokenizer, audio_token="<|audio|>")


def _qwen2_audio(tokenizer: Any) -> Any:
    audio = {
        "d_model": 24,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "num_mel_bins": 80,
        "max_source_positions": 100,  # 2 s instead of 30
    }
    text = transformers.Qwen2Config(**TEXT)
    return transformers.Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=AUDIO_ID)


def _qwen2_audio_processor(tokenizer: Any) -> Any:
    extractor = transformers.WhisperFeatureExtractor(feature_size=80, chunk_length=2)
    return transformers.Qwen2AudioProcessor(extractor, tokenizer, audio_token="<|audio|>")


def _qwen3_asr(tokenizer: Any) -> Any:
    audio = {
        "d_model": 24,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "output_dim": TEXT["hidden_size"],
        "downsample_hidden_size": 8,
        "num_mel_bins": 128,
        "n_window_infer": 100,
    }
    return transformers.Qwen3ASRConfig(
        audio_config=audio,
        text_config=transformers.Qwen3Config(**TEXT, head_dim=10, tie_word_embeddings=True),
        audio_token_id=tokenizer.convert_tokens_to_ids("<|audio_pad|>"),
        pad_token_id=0,
        eos_token_id=4,
    )


def _qwen3_asr_processor(tokenizer: Any) -> Any:
    return transformers.Qwen3ASRProcessor(transformers.Qwen3ASRFeatureExtractor(), tokenizer)


VOXTRAL_FRAMES = 64  # of a chunk: 0.64 s instead of 30


def _voxtral(tokenizer: Any) -> Any:
    audio = {
        "hidden_size": 24,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_mel_bins": 80,
        "max_source_positions": VOXTRAL_FRAMES // 2,
    }
    text = transformers.LlamaConfig(**TEXT)
    return transformers.VoxtralConfig(audio_config=audio, text_config=text, audio_token_id=AUDIO_ID)


def _voxtral_processor(tokenizer: Any) -> Any:
    class Built(transformers.VoxtralProcessor):
        """Combines audio and text, for which the class requires mistral-common."""

        def __call__(self, text: str, audio: Any = (), sampling_rate: int = 16000, **kwargs: Any) -> Any:
            options = {"padding": True, "truncation": False, "pad_to_multiple_of": VOXTRAL_FRAMES * 160}
            chunks = [
                self._retrieve_input_features(
                    [clip], VOXTRAL_FRAMES, sampling_rate=sampling_rate, return_tensors="pt", **options
                )
                for clip in audio
            ]
            counts = iter([len(found) * 8 for found in chunks])  # 32 positions, four in one
            ids = [
                token
                for known in self.tokenizer(text).input_ids
                for token in [known] * (next(counts) if known == AUDIO_ID else 1)
            ]
            return {"input_ids": torch.tensor([ids]), "input_features": torch.cat(chunks)}

    return Built(transformers.WhisperFeatureExtractor(feature_size=80), tokenizer)


def _granite_speech(tokenizer: Any) -> Any:
    return _granite("GraniteSpeech", 24)


def _granite_speech_plus(tokenizer: Any) -> Any:
    return _granite("GraniteSpeechPlus", 48, cat_hidden_layers=[1])


def _granite(name: str, encoder_width: int, **options: Any) -> Any:
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
        **options,
    }
    projector = transformers.Blip2QFormerConfig(
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        encoder_hidden_size=encoder_width,
        cross_attention_frequency=1,
    )
    return getattr(transformers, f"{name}Config")(
        audio_token_index=AUDIO_ID,
        encoder_config=encoder,
        text_config=transformers.GraniteConfig(**TEXT, embedding_multiplier=2.0, attention_multiplier=0.3),
        projector_config=projector,
        downsample_rate=granite_features.DOWNSAMPLE,
        window_size=granite_features.PROJECTOR_WINDOW,
        has_lora_adapter=False,
    )


_WHISPER_TARGETS = {
    "language_model": r".*language_model\.layers\.\d+\..*(q|v|down)_proj",
    "connector": r".*multi_modal_projector\.linear(_[12])?",
    "audio_tower": r".*audio_tower\.layers\.\d+\..*(q_proj|out_proj|fc1)",
}
_GRANITE_TARGETS = {
    "language_model": r".*language_model\..*layers\.\d+\..*(q|v|down)_proj",
    "connector": r".*projector\.(linear|.*layer\.\d+\.(attention\.attention\.query|output_query\.dense))",
    "audio_tower": r".*encoder\.layers\.\d+\.(attn|ff1)\..*(to_q|to_out|up_proj)",
}
AUDIO_FAMILIES: Mapping[str, FamilySpec] = {
    "audioflamingo3": FamilySpec(
        "AudioFlamingo3ForConditionalGeneration",
        _audio_flamingo3,
        _audio_flamingo3_processor,
        "audio",
        _WHISPER_TARGETS,
        "<|audio|>",
        is_single=True,
    ),
    "granite_speech": FamilySpec(
        "GraniteSpeechForConditionalGeneration", _granite_speech, None, "audio", _GRANITE_TARGETS, "<|audio|>"
    ),
    "granite_speech_plus": FamilySpec(
        "GraniteSpeechPlusForConditionalGeneration",
        _granite_speech_plus,
        None,
        "audio",
        _GRANITE_TARGETS,
        "<|audio|>",
    ),
    "qwen2_audio": FamilySpec(
        "Qwen2AudioForConditionalGeneration",
        _qwen2_audio,
        _qwen2_audio_processor,
        "audio",
        _WHISPER_TARGETS,
        "<|audio|>",
    ),
    "qwen3_asr": FamilySpec(
        "Qwen3ASRForConditionalGeneration",
        _qwen3_asr,
        _qwen3_asr_processor,
        "audio",
        _WHISPER_TARGETS,
        "<|audio_pad|>",
        tokens={
            "audio_token": "<|audio_pad|>",
            "audio_bos_token": "<|audio_start|>",
            "audio_eos_token": "<|audio_end|>",
        },
        is_single=True,
    ),
    "voxtral": FamilySpec(
        "VoxtralForConditionalGeneration", _voxtral, _voxtral_processor, "audio", _WHISPER_TARGETS, "<|audio|>"
    ),
}
