"""Tiny checkpoints of families that see."""

from collections.abc import Callable, Mapping
from typing import Any

import transformers

from tests.checkpoints import IMAGE_ID
from tests.families.spec import TEXT, VISION, Family


def _llava(tokenizer: Any) -> Any:
    vision, text = transformers.CLIPVisionConfig(**VISION), transformers.LlamaConfig(**TEXT)
    return transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_ID, image_seq_length=16
    )


def _llava_next(tokenizer: Any) -> Any:
    vision, text = transformers.CLIPVisionConfig(**VISION), transformers.LlamaConfig(**TEXT)
    grid = [[28, 56], [56, 28], [56, 56]]
    return transformers.LlavaNextConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_ID, image_grid_pinpoints=grid
    )


def _idefics3(tokenizer: Any) -> Any:
    image_id, text = tokenizer.convert_tokens_to_ids("<image>"), transformers.LlamaConfig(**TEXT)
    return transformers.Idefics3Config(image_token_id=image_id, vision_config=VISION, text_config=text, scale_factor=2)


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
IMAGE_FAMILIES: Mapping[str, Family] = {
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
        tokens={
            "fake_image_token": "<fake_token_around_image>",
            "image_token": "<image>",
            "end_of_utterance_token": "<end_of_utterance>",
            "global_image_token": "<global-img>",
        },
        processor_since="5.23",
    ),
}
