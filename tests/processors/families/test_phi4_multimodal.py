"""Phi-4-multimodal: features compared with transformers' extractor, settings, options, hashes."""

import json

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, Phi4MultimodalFeatureExtractor
from transformers.models.phi4_multimodal.modeling_phi4_multimodal import Phi4MultimodalAudioEmbedding

from mmlora.errors import ConfigError, MediaError, RequestError
from mmlora.models.families import get_processor
from mmlora.processors.families.phi4_images import ImageSettings
from mmlora.processors.families.phi4_multimodal import Phi4MultimodalProcessor
from mmlora.processors.general import GeneralProcessor
from mmlora.processors.media.loader import load_media


@pytest.fixture
def build(make_config, tokenizer, tmp_path):
    """Return a function that builds a processor with the files in `tmp_path`; its arguments configure the model."""
    return lambda *args, **kwargs: GeneralProcessor(
        make_config(*args, **kwargs), tmp_path, tokenizer, load=Phi4MultimodalProcessor
    )


@pytest.fixture
def stand_in(make_config, tokenizer, tmp_path):
    return lambda: Phi4MultimodalProcessor(make_config(), tmp_path, tokenizer)


@pytest.fixture
def processor(build):
    return build()


def write(folder, name, content):
    (folder / name).write_text(json.dumps(content))


def test_one_small_crop_gives_41_tokens(processor, picture):
    media = processor.process(load_media(picture(112, 112)))
    assert media.num_tokens == 41 and media.modality == "image"
    assert {name: (tuple(t.shape), t.dtype) for name, t in media.tensors.items()} == {
        "image_pixel_values": ((1, 2, 3, 112, 112), torch.float32),
        "image_attention_mask": ((1, 2, 8, 8), torch.bool),
        "image_sizes": ((1, 2), torch.int64),
    }


@pytest.mark.parametrize("num_samples", [400, 559, 560, 16000, 51234])
@pytest.mark.parametrize("time_reduction", [4, 8])
def test_features_equal_transformers_extractor_exactly(num_samples, time_reduction, tone, build):
    processor = build(time_reduction=time_reduction)
    samples = tone(num_samples)
    media = processor.process(load_media((samples, 16000)))
    extractor = Phi4MultimodalFeatureExtractor(audio_compression_rate=time_reduction)
    expected = extractor(samples, sampling_rate=16000, return_tensors="pt")
    assert torch.equal(media.tensors["audio_input_features"], expected["audio_input_features"])
    assert media.num_tokens == int(expected["audio_embed_sizes"][0]) == int(media.tensors["audio_embed_sizes"])
    assert media.modality == "audio" and media.tensors["audio_embed_sizes"].shape == (1,)


@pytest.mark.parametrize("num_samples", [400, 16000, 20400])
@pytest.mark.parametrize("time_reduction", [4, 8])
@torch.no_grad()
def test_the_audio_tower_returns_the_announced_number_of_embeddings(
    num_samples, time_reduction, tone, build, make_config
):
    config = make_config(time_reduction=time_reduction)
    media = build(time_reduction=time_reduction).process(load_media((tone(num_samples), 16000)))
    embed = Phi4MultimodalAudioEmbedding(config).eval()
    rows = embed.encoder(media.tensors["audio_input_features"], None)
    assert rows.shape[1] == media.num_tokens


def test_other_rates_are_resampled_with_librosa(processor, stand_in, tone):
    import librosa

    samples = tone(24000, 24000)
    media = processor.process(load_media((samples, 24000)))
    resampled = librosa.resample(samples, orig_sr=24000, target_sr=16000)
    expected = stand_in().feature_extractor(resampled, sampling_rate=16000, return_tensors="pt")
    assert torch.equal(media.tensors["audio_input_features"], expected["audio_input_features"])


@pytest.mark.parametrize("num_samples, rate", [(1, 16000), (399, 16000), (1197, 48000), (1, 1000)])
def test_a_clip_shorter_than_one_window_is_refused_with_the_minimum(num_samples, rate, processor):
    with pytest.raises(MediaError, match=r"at least 400 samples \(25 ms\)"):
        processor.process(load_media((np.zeros(num_samples, np.float32), rate)))


def test_dynamic_hd_limits_the_crops(processor, picture):
    item = load_media(picture(300, 300))
    crops = {
        hd: len(processor.process(item, {"dynamic_hd": hd}).tensors["image_pixel_values"][0]) - 1 for hd in (1, 4, 36)
    }
    assert crops == {1: 1, 4: 4, 36: 9}


@pytest.mark.parametrize(
    "options, named",
    [
        ({"dynamic_HD": 4}, "dynamic_HD.*allowed are dynamic_hd"),
        ({"size": {}, "crop": 1}, "crop, size"),
        *[({"dynamic_hd": value}, "1 to 144") for value in (0, -1, 145, 2.0, True, "4", None)],
    ],
)
def test_other_options_are_refused_by_name_for_any_modality(options, named, processor, picture, tone):
    contents = [picture(), (tone(), 16000)] if "dynamic_hd" not in options else [picture()]
    for content in contents:
        with pytest.raises(RequestError, match=named):
            processor.process(load_media(content), options)


def test_hashes_differ_if_tensors_differ(processor, picture, tone):
    image, audio = load_media(picture()), load_media((tone(), 16000))
    plain = processor.process(image).content_hash
    assert plain == processor.process(load_media(picture())).content_hash
    assert plain != processor.process(image, {"dynamic_hd": 4}).content_hash
    assert plain != processor.process(load_media(picture(seed=1))).content_hash
    assert processor.process(audio).content_hash == processor.process(audio, {"dynamic_hd": 4}).content_hash


def test_nested_settings_precede_flat_ones(tmp_path, stand_in):
    write(tmp_path, "preprocessor_config.json", {"dynamic_hd": 9, "image_mean": None, "preemphasis": 0.5})
    flat = stand_in()
    assert flat.image_processor == ImageSettings(112, 14, 9) and flat.feature_extractor.preemphasis == 0.5
    nested = {"image_processor": {"dynamic_hd": 16, "resample": 2}, "audio_processor": {"preemphasis": 0.9}}
    write(tmp_path, "processor_config.json", nested)
    both = stand_in()
    assert both.image_processor == ImageSettings(112, 14, 16, global_mode="bilinear")
    assert both.feature_extractor.preemphasis == 0.9 and both.feature_extractor.audio_compression_rate == 4


def test_files_saved_by_transformers_are_read(tmp_path, stand_in):
    extractor = Phi4MultimodalFeatureExtractor(audio_compression_rate=4, hop_length=200)
    extractor.save_pretrained(tmp_path)
    assert stand_in().feature_extractor.hop_length == 200


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"size": {"height": 448, "width": 448}}, "crop_size 112"),
        ({"patch_size": 16}, "patch_size"),
        ({"audio_compression_rate": 8}, "time_reduction 4"),
        ({"feature_size": 40}, "feature_size of the preprocessor is 40"),
        ({"do_normalize": False}, "do_normalize"),
        ({"resample": 1}, "resample is 1"),
        ({"dynamic_hd": 0}, "dynamic_hd"),
        ({"image_std": [1.0, 1.0]}, "image_std"),
        ([1], "not an object"),
    ],
)
def test_files_that_do_not_fit_the_model_are_refused(settings, named, tmp_path, build):
    write(tmp_path, "preprocessor_config.json", settings)
    with pytest.raises(ConfigError, match=named):
        build()


def test_crops_that_the_tower_cannot_pool_are_refused(build):
    with pytest.raises(ConfigError, match="odd number of patches"):
        build(98, image_size=112)


def test_a_tokenizer_without_the_placeholder_is_refused(build):
    with pytest.raises(ConfigError, match="image placeholder id 93"):
        build(image_token_id=93)


def test_numbered_placeholders_are_replaced_in_order(processor):
    prompt = "<|image_1|> and <|audio_1|>, <|image_2|> <|audio|> <|image_|> <|video_1|>"
    expected = "<|image|> and <|audio|>, <|image|> <|audio|> <|image_|> <|video_1|>"
    assert processor.normalize_placeholders(prompt) == expected
    with pytest.raises(MediaError, match=r"'<\|image_3\|>' where image 2 is expected"):
        processor.normalize_placeholders("<|image_1|><|image_3|>")


def test_the_processor_is_selected_by_model_type(tmp_path, make_config, tokenizer):
    processor = get_processor(make_config(), str(tmp_path), tokenizer)
    assert isinstance(processor, GeneralProcessor) and processor.modalities == {"audio", "image"}
    assert processor.placeholder_token("image") == "<|image|>" and processor.placeholder_token_id("audio") == 91
    assert get_processor(LlamaConfig(), tmp_path, tokenizer) is None
    with pytest.raises(MediaError, match="'video'.*audio, image"):
        processor.placeholder_token("video")
    with pytest.raises(ConfigError, match="not a directory"):
        get_processor(make_config(), tmp_path / "nowhere", tokenizer)
