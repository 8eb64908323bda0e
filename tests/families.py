"""Tiny checkpoints of multimodal families, each with its own processor, and transformers + PEFT as their reference."""

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from transformers import AutoProcessor, PreTrainedModel

from mmlora.lora.adapter import PARTS
from tests.checkpoints import AUDIO_ID, IMAGE_ID, VOCAB_SIZE, _draw_weights, build_tokenizer, load_reference
from tests.processors import granite_features
from tests.reference import NUM_TOKENS, Media, ReferenceOutput

_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 4,
}
_VISION: dict[str, Any] = {
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
    config: Callable[[], Any]
    processor: Callable[[Any], Any] | None  # None where transformers' own cannot be built here
    modality: str
    targets: Mapping[str, str]
    placeholder: str
    is_single: bool = False  # transformers' processor takes one item a prompt
    processor_since: str = "5.17"  # the version of transformers that builds its processor without torchvision


def _llava() -> Any:
    vision, text = transformers.CLIPVisionConfig(**_VISION), transformers.LlamaConfig(**_TEXT)
    return transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_ID, image_seq_length=16
    )


def _llava_next() -> Any:
    vision, text = transformers.CLIPVisionConfig(**_VISION), transformers.LlamaConfig(**_TEXT)
    grid = [[28, 56], [56, 28], [56, 56]]
    return transformers.LlavaNextConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_ID, image_grid_pinpoints=grid
    )


def _idefics3() -> Any:
    text = transformers.LlamaConfig(**{**_TEXT, "vocab_size": VOCAB_SIZE + 64})
    return transformers.Idefics3Config(image_token_id=IMAGE_ID, vision_config=_VISION, text_config=text, scale_factor=2)


def _audio_flamingo3() -> Any:
    audio = {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_mel_bins": 128,
        "max_source_positions": 1500,
    }
    text = transformers.Qwen2Config(**_TEXT)
    return transformers.AudioFlamingo3Config(audio_config=audio, text_config=text, audio_token_id=AUDIO_ID)


def _audio_flamingo3_processor(tokenizer: Any) -> Any:
    extractor = transformers.WhisperFeatureExtractor(feature_size=128)
    return transformers.AudioFlamingo3Processor(extractor, tokenizer, audio_token="<|audio|>")


def _granite_speech() -> Any:
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
        text_config=transformers.GraniteConfig(**_TEXT, embedding_multiplier=2.0, attention_multiplier=0.3),
        projector_config=projector,
        downsample_rate=granite_features.DOWNSAMPLE,
        window_size=granite_features.PROJECTOR_WINDOW,
        has_lora_adapter=False,
    )


def _clip_processor(name: str, **options: Any) -> Callable[[Any], Any]:
    def build(tokenizer: Any) -> Any:
        sizes = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}, **options}
        pil = "CLIPImageProcessorPil" if name == "Llava" else f"{name}ImageProcessorPil"
        return getattr(transformers, f"{name}Processor")(
            image_processor=getattr(transformers, pil)(**sizes),
            tokenizer=tokenizer,
            patch_size=7,
            vision_feature_select_strategy="default",
            image_token="<|image|>",
            num_additional_image_tokens=1,
        )

    return build


def _idefics3_processor(tokenizer: Any) -> Any:
    pil = transformers.Idefics3ImageProcessorPil(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    processor = transformers.Idefics3Processor(image_processor=pil, tokenizer=tokenizer, image_seq_len=4)
    return processor


_CLIP_TARGETS = {
    "language_model": r".*language_model\.layers\.\d+\..*(q|v|down)_proj",
    "connector": r".*multi_modal_projector\.linear_[12]",
    "vision_tower": r".*vision_tower\..*layers\.\d+\..*(q_proj|out_proj|fc1)",
}
FAMILIES: Mapping[str, Family] = {
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
    "llava": Family(
        "LlavaForConditionalGeneration", _llava, _clip_processor("Llava"), "image", _CLIP_TARGETS, "<|image|>"
    ),
    "llava_next": Family(
        "LlavaNextForConditionalGeneration",
        _llava_next,
        _clip_processor("LlavaNext", image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]]),
        "image",
        _CLIP_TARGETS,
        "<|image|>",
    ),
    "idefics3": Family(
        "Idefics3ForConditionalGeneration",
        _idefics3,
        _idefics3_processor,
        "image",
        {
            "language_model": r".*text_model\.layers\.\d+\..*(q|v|down)_proj",
            "connector": r".*connector\..*proj",
            "vision_tower": r".*vision_model\..*layers\.\d+\..*(q_proj|out_proj|fc1)",
        },
        "<image>",
        processor_since="5.23",
    ),
}
_ADDED_TOKENS = {"idefics3": ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]}


def targets_of(family: str, *parts: str) -> str:
    """`target_modules` of some parts of a family; of all that it has by default."""
    found = FAMILIES[family].targets
    return "|".join(f"({found[part]})" for part in parts or PARTS if part in found)


def save_family(path: Path, family: str, seed: int = 0) -> Path:
    """Write a tiny model of a family with its tokenizer and processor."""
    spec, tokenizer = FAMILIES[family], build_tokenizer()
    if family in _ADDED_TOKENS:
        tokenizer.add_special_tokens({"additional_special_tokens": _ADDED_TOKENS[family]})
    config = spec.config()
    for name in ("image_token_id", "image_token_index"):
        if hasattr(config, name) and family in _ADDED_TOKENS:
            setattr(config, name, tokenizer.convert_tokens_to_ids(spec.placeholder))
    torch.manual_seed(seed)
    model = getattr(transformers, spec.model_class)(config)
    _draw_weights(model, torch.Generator().manual_seed(seed))
    model.generation_config.eos_token_id = 4
    model.save_pretrained(path)
    if spec.processor is not None:
        spec.processor(tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


class FamilyReference:
    """A checkpoint as transformers and PEFT run it: its own processor, and everything anew for each token."""

    def __init__(self, path: Path) -> None:
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        self._processor = AutoProcessor.from_pretrained(path) if (path / "processor_config.json").exists() else None
        self._base: PreTrainedModel = load_reference(path)
        self._models: dict[Path | None, Any] = {None: self._base}

    @torch.inference_mode()
    def generate(
        self, prompt: str, media: Media | None = None, adapter: Path | None = None, max_tokens: int = NUM_TOKENS
    ) -> ReferenceOutput:
        """Continue a prompt greedily, never stopping early."""
        if adapter not in self._models:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._models[adapter] = PeftModel.from_pretrained(copy.deepcopy(self._base), adapter).eval()
        inputs = self._inputs(prompt, media or Media())
        ids = inputs.pop("input_ids")
        prompt_ids = ids[0].tolist()
        tensors = {name: value for name, value in inputs.items() if name not in ("attention_mask", "token_type_ids")}
        for _ in range(max_tokens):
            logits = self._models[adapter](input_ids=ids, use_cache=False, **tensors).logits[0].float()
            ids = torch.cat([ids, logits[-1:].argmax(-1, keepdim=True)], dim=1)
        return ReferenceOutput(prompt_ids, ids[0, len(prompt_ids) :].tolist(), logits)

    def _inputs(self, prompt: str, media: Media) -> dict[str, Any]:
        arguments = _arguments(media)
        if arguments and self._processor is not None:
            return dict(self._processor(text=prompt, return_tensors="pt", **arguments))
        ids, tensors = self.tokenizer(prompt).input_ids, {}
        if media.audios:  # of equal lengths
            features = [granite_features.features(samples) for samples, _ in media.audios]
            count = granite_features.num_embeds(len(media.audios[0][0]))
            ids = [token for known in ids for token in [known] * (count if known == AUDIO_ID else 1)]
            tensors = {
                "input_features": torch.cat(features),
                "input_features_mask": torch.ones(len(features), count, dtype=torch.bool),
            }
        return {"input_ids": torch.tensor([ids]), **tensors}


def _arguments(media: Media) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    if media.images:
        arguments["images"] = list(media.images)
    if media.audios:
        arguments["audio"] = [samples for samples, _ in media.audios]
        arguments["sampling_rate"] = media.audios[0][1]
    return arguments


__all__ = ["AUDIO_ID", "FAMILIES", "FamilyReference", "save_family", "targets_of"]
