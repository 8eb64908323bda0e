"""Tiny checkpoints of families with images."""

from collections.abc import Callable, Mapping
from typing import Any

import transformers

from tests.checkpoints import IMAGE_ID
from tests.families.spec import TEXT, VISION, FamilySpec, pixtral_class, without_video


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


_QWEN_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
_QWEN_VISION: dict[str, Any] = {"depth": 3, "num_heads": 2, "patch_size": 7, "spatial_merge_size": 2}


def _qwen_vl(name: str, vision: Mapping[str, Any], **text: Any) -> Callable[[Any], Any]:
    def build(tokenizer: Any) -> Any:
        ids = {f"{key}_id": tokenizer.convert_tokens_to_ids(token) for key, token in _QWEN_TOKENS.items()}
        rope = {"rope_type": "default", "mrope_section": [1, 2, 1], "rope_theta": 10000.0}
        return getattr(transformers, f"{name}Config")(
            vision_config={**_QWEN_VISION, **vision},
            text_config={**TEXT, "rope_parameters": {**rope, **text.pop("rope", {})}, **text},
            **ids,
        )

    return build


def _qwen_vl_processor(name: str) -> Callable[[Any], Any]:
    def build(tokenizer: Any) -> Any:
        sizes = {"shortest_edge": 14 * 14, "longest_edge": 14 * 14 * 9}
        pil = transformers.Qwen2VLImageProcessorPil(size=sizes, patch_size=7, merge_size=2)
        return without_video(getattr(transformers, f"{name}Processor"), pil, tokenizer, None)

    return build


def _internvl(tokenizer: Any) -> Any:
    vision = {**VISION, "image_size": [28, 28], "patch_size": [7, 7]}
    return transformers.InternVLConfig(
        vision_config=vision,
        text_config=transformers.Qwen2Config(**TEXT),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
    )


def _internvl_processor(tokenizer: Any) -> Any:
    sizes = {"size": {"height": 28, "width": 28}, "min_patches": 1, "max_patches": 3, "crop_to_patches": True}
    pil = transformers.GotOcr2ImageProcessorPil(**sizes)
    return without_video(transformers.InternVLProcessor, pil, tokenizer, None, image_seq_length=4)


def _granite4_vision(tokenizer: Any) -> Any:
    vision = {"model_type": "siglip_vision_model", **VISION, "hidden_size": 64, "num_attention_heads": 2}
    text = {**TEXT, "num_hidden_layers": 4, "embedding_multiplier": 2.0, "logits_scaling": 3.0}
    return transformers.Granite4VisionConfig(
        vision_config=vision,
        text_config={**text, "attention_multiplier": 0.3, "residual_multiplier": 0.7},
        image_token_index=IMAGE_ID,
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
        downsample_rate="1/2",
        deepstack_layer_map=[[-2, 0], [-1, 1]],
        spatial_vision_layer=-1,
        spatial_target_layers=[1, 2, 3, 3],
        vision_feature_select_strategy="full",
        qformer_config={
            "hidden_size": 64,
            "encoder_hidden_size": 64,
            "num_attention_heads": 1,
            "num_hidden_layers": 1,
            "intermediate_size": 32,
            "cross_attention_frequency": 1,
        },
    )


def _granite4_vision_processor(tokenizer: Any) -> Any:
    grid, sizes = [[28, 56], [56, 28], [56, 56]], {"height": 28, "width": 28}
    pil = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": 28}, crop_size=sizes, image_grid_pinpoints=grid
    )
    return transformers.Granite4VisionProcessor(
        pil, tokenizer, 7, "full", image_token="<|image|>", downsample_rate="1/2"
    )


def _gemma3(tokenizer: Any) -> Any:
    vision = transformers.SiglipVisionConfig(**{**VISION, "image_size": 35}, vision_use_head=False)
    text = {"head_dim": 8, "sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]}
    return transformers.Gemma3Config(
        vision_config=vision,
        text_config={**TEXT, **text, "query_pre_attn_scalar": 20},
        mm_tokens_per_image=25,  # more than the window and than a chunk
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
    )


def _gemma3_processor(tokenizer: Any) -> Any:
    pil = transformers.Gemma3ImageProcessorPil(size={"height": 35, "width": 35})
    return transformers.Gemma3Processor(pil, tokenizer, image_seq_length=25)


def _pixtral_text(name: str) -> Callable[[Any], Any]:
    def build(tokenizer: Any) -> Any:
        vision = {"model_type": "pixtral", **VISION, "image_size": 56, "head_dim": 12}
        text = {"model_type": "mistral", **TEXT, "head_dim": 8, "sliding_window": None}
        own = {"spatial_merge_size": 2} if name == "Mistral3" else {"vision_feature_select_strategy": "full"}
        return getattr(transformers, f"{name}Config")(
            vision_config=vision,
            text_config=text,
            image_token_index=tokenizer.image_token_id,
            vision_feature_layer=-1,
            **own,
        )

    return build


def _pixtral_processor(merge_size: int) -> Callable[[Any], Any]:
    def build(tokenizer: Any) -> Any:
        pil = transformers.PixtralImageProcessorPil(size={"longest_edge": 56}, patch_size={"height": 7, "width": 7})
        return pixtral_class()(pil, tokenizer, patch_size=7, spatial_merge_size=merge_size)

    return build


def _smolvlm(tokenizer: Any) -> Any:
    return transformers.SmolVLMConfig(
        image_token_id=tokenizer.image_token_id,
        vision_config=VISION,
        text_config=transformers.LlamaConfig(**TEXT),
        scale_factor=2,
    )


def _smolvlm_processor(tokenizer: Any) -> Any:
    pil = transformers.SmolVLMImageProcessorPil(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    return without_video(transformers.SmolVLMProcessor, pil, tokenizer, None, image_seq_len=4)


def _paligemma(text_class: str, **text: Any) -> Callable[[Any], Any]:
    def build(tokenizer: Any) -> Any:
        decoder = getattr(transformers, text_class)(**TEXT, head_dim=8, **text)
        return transformers.PaliGemmaConfig(
            vision_config=transformers.SiglipVisionConfig(**VISION, vision_use_head=False, projection_dim=48),
            text_config=decoder,
            projection_dim=48,
            image_token_index=tokenizer.image_token_id,
            tie_word_embeddings=False,
        )

    return build


def _paligemma_processor(tokenizer: Any) -> Any:
    pil = transformers.SiglipImageProcessorPil(size={"height": 28, "width": 28})
    pil.image_seq_length = 16
    return transformers.PaliGemmaProcessor(pil, tokenizer)


_OMNI_TOKENS = {
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}


def _omni(tokenizer: Any) -> Any:
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in _OMNI_TOKENS.items()}
    rope = {"rope_type": "default", "mrope_section": [1, 2, 1], "rope_theta": 10000.0}
    audio = {"num_mel_bins": 128, "d_model": 24, "encoder_layers": 2, "encoder_attention_heads": 2}
    vision = {"hidden_size": 24, "intermediate_size": 32, "out_hidden_size": 48, "window_size": 28}
    return transformers.Qwen2_5OmniThinkerConfig(
        audio_config={**audio, "encoder_ffn_dim": 32, "n_window": 20, "output_dim": 48},
        vision_config={**_QWEN_VISION, **vision, "fullatt_block_indexes": [1]},
        text_config={**TEXT, "rope_parameters": rope},
        image_token_index=ids["image_token"],
        audio_token_index=ids["audio_token"],
        video_token_index=ids["video_token"],
        vision_start_token_id=ids["vision_bos_token"],
        vision_end_token_id=ids["vision_eos_token"],
        audio_start_token_id=ids["audio_bos_token"],
        audio_end_token_id=ids["audio_eos_token"],
    )


def _omni_processor(tokenizer: Any) -> Any:
    sizes = {"shortest_edge": 14 * 14, "longest_edge": 14 * 14 * 9}
    pil = transformers.Qwen2VLImageProcessorPil(size=sizes, patch_size=7, merge_size=2)
    audio = transformers.WhisperFeatureExtractor(feature_size=128)
    return without_video(transformers.Qwen2_5OmniProcessor, pil, None, audio, tokenizer)


_CLIP_TARGETS = {
    "language_model": r".*language_model\.layers\.\d+\..*(q|v|down)_proj",
    "connector": r".*multi_modal_projector\.linear_[12]",
    "vision_tower": r".*vision_tower\..*layers\.\d+\..*(q_proj|out_proj|fc1)",
}
IMAGE_FAMILIES: Mapping[str, FamilySpec] = {
    "llava": FamilySpec(
        "LlavaForConditionalGeneration", _llava, _clip_processor("Llava"), "image", _CLIP_TARGETS, "<|image|>"
    ),
    "llava_next": FamilySpec(
        "LlavaNextForConditionalGeneration",
        _llava_next,
        _clip_processor("LlavaNext", image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]]),
        "image",
        _CLIP_TARGETS,
        "<|image|>",
    ),
    "idefics3": FamilySpec(
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
    ),
    "smolvlm": FamilySpec(
        "SmolVLMForConditionalGeneration",
        _smolvlm,
        _smolvlm_processor,
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
            "video_token": "<video>",
        },
    ),
    **{
        model_type: FamilySpec(
            f"{name}ForConditionalGeneration",
            _qwen_vl(name, vision, **text),
            _qwen_vl_processor(name),
            "image",
            {
                "language_model": r".*language_model\.layers\.\d+\..*(q|v|down)_proj",
                "connector": r".*visual\.(merger|deepstack_merger_list\.\d+)\.(mlp\.[02]|linear_fc[12])",
                "vision_tower": r".*visual\.blocks\.\d+\..*(qkv|proj|fc1|linear_fc1|up_proj)",
            },
            "<|vision_start|><|image_pad|><|vision_end|>",
            tokens=_QWEN_TOKENS,
            token_kinds={"mm_token_type_ids": 0},
        )
        for model_type, name, vision, text in (
            ("qwen2_vl", "Qwen2VL", {"embed_dim": 24, "hidden_size": 48, "mlp_ratio": 2}, {}),
            (
                "qwen2_5_vl",
                "Qwen2_5_VL",
                {"hidden_size": 24, "intermediate_size": 32, "out_hidden_size": 48, "window_size": 28}
                | {"fullatt_block_indexes": [1]},
                {},
            ),
            (
                "qwen3_vl",
                "Qwen3VL",
                {"hidden_size": 24, "intermediate_size": 32, "out_hidden_size": 48, "num_position_embeddings": 16}
                | {"deepstack_visual_indexes": [0, 1]},
                {"head_dim": 8, "rope": {"mrope_interleaved": True}},
            ),
        )
    },
    "internvl": FamilySpec(
        "InternVLForConditionalGeneration",
        _internvl,
        _internvl_processor,
        "image",
        {
            "language_model": r".*language_model\.layers\.\d+\..*(q|v|down)_proj",
            "connector": r".*multi_modal_projector\.linear_[12]",
            "vision_tower": r".*vision_tower\.encoder\.layer\.\d+\..*(q_proj|projection_layer|fc1)",
        },
        "<IMG_CONTEXT>",
        tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    ),
    "granite4_vision": FamilySpec(
        "Granite4VisionForConditionalGeneration",
        _granite4_vision,
        _granite4_vision_processor,
        "image",
        {
            "language_model": r".*language_model\.layers\.\d+\..*(q|v|down)_proj",
            "connector": r".*(layerwise|spatial)_projectors\.\d+\..*(attention\.query|output\.dense|out_linear)",
            "vision_tower": r".*vision_tower\..*layers\.\d+\..*(q_proj|out_proj|fc1)",
        },
        "<|image|>",
    ),
    "gemma3": FamilySpec(
        "Gemma3ForConditionalGeneration",
        _gemma3,
        _gemma3_processor,
        "image",
        {
            "language_model": r".*language_model\.layers\.\d+\..*(q|v|down)_proj",
            "vision_tower": r".*vision_tower\..*layers\.\d+\..*(q_proj|out_proj|fc1)",
        },
        "\n<start_of_image>\n",
        {"connector": "multi_modal_projector.mm_input_projection_weight"},
        tokens={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
        token_kinds={"token_type_ids": 0},
    ),
    **{
        model_type: FamilySpec(
            f"{name}ForConditionalGeneration",
            _pixtral_text(name),
            _pixtral_processor(merge_size),
            "image",
            {
                "language_model": r".*language_model\.layers\.\d+\..*(q|v|down)_proj",
                "connector": r".*multi_modal_projector\.(linear_[12]|patch_merger\.merging_layer)",
                "vision_tower": r".*vision_tower\..*layers\.\d+\..*(q_proj|o_proj|up_proj)",
            },
            "[IMG]",
            tokens={"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"},
        )
        for model_type, name, merge_size in (("mistral3", "Mistral3", 2), ("llava+pixtral", "Llava", 1))
    },
    **{
        model_type: FamilySpec(
            "PaliGemmaForConditionalGeneration",
            config,
            _paligemma_processor,
            "image",
            {
                "language_model": r".*language_model\.layers\.\d+\..*(q|v|down)_proj",
                "connector": r".*multi_modal_projector\.linear",
                "vision_tower": r".*vision_tower\..*layers\.\d+\..*(q_proj|out_proj|fc1)",
            },
            "<image>",
            tokens={"image_token": "<image>"},
            token_kinds={"token_type_ids": 1},
        )
        for model_type, config in (
            ("paligemma", _paligemma("GemmaConfig")),
            (
                "paligemma+gemma2",
                _paligemma(
                    "Gemma2Config",
                    sliding_window=9,
                    attn_logit_softcapping=4.0,
                    final_logit_softcapping=6.0,
                    query_pre_attn_scalar=20,
                ),
            ),
        )
    },
    "qwen2_5_omni_thinker": FamilySpec(
        "Qwen2_5OmniThinkerForConditionalGeneration",
        _omni,
        _omni_processor,
        "image",
        {
            "language_model": r".*model\.(language_model\.)?layers\.\d+\..*(q|v|down)_proj",
            "connector": r".*visual\.merger\.mlp\.[02]",
            "vision_tower": r".*visual\.blocks\.\d+\..*(\bq|proj|up_proj)",
            "audio_tower": r".*audio_tower\.layers\.\d+\..*(q_proj|out_proj|fc1)",
        },
        "<|vision_bos|><|IMAGE|><|vision_eos|>",
        tokens=_OMNI_TOKENS,
        token_kinds={"attention_mask": 1},
        other_placeholder=("audio", "<|audio_bos|><|AUDIO|><|audio_eos|>"),
    ),
}
