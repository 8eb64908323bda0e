"""`load_media`: content decides about the modality, and limits are checked before decoding."""

import numpy as np
import pytest
import torch

from mmlora.errors import ConfigError, MediaError
from mmlora.processors.media.audio import AudioItem
from mmlora.processors.media.image import ImageItem
from mmlora.processors.media.items import MediaLimits
from mmlora.processors.media.loader import load_media, sniff_modality
from mmlora.processors.modalities import MODALITIES

AUDIO = ["WAV", "FLAC", "OGG", "MP3"]
IMAGE = ["PNG", "JPEG", "WEBP", "GIF", "BMP"]


@pytest.mark.parametrize("format", AUDIO)
def test_audio_files_are_audio(format, encode_audio):
    data = encode_audio(format=format)
    assert sniff_modality(data) == MODALITIES["audio"]
    item = load_media(data)
    assert isinstance(item, AudioItem) and item.modality == "audio" and item.sample_rate == 16000
    assert item.samples.dtype == np.float32 and item.samples.ndim == 1
    assert abs(len(item.samples) - 8000) <= (2 * 1152 if format == "MP3" else 0)
    assert 0.4 < np.abs(item.samples).max() < 0.6


@pytest.mark.parametrize("format", IMAGE)
def test_image_files_are_images(format, picture, encode_image):
    data = encode_image(picture(), format)
    assert sniff_modality(data) == MODALITIES["image"]
    item = load_media(data)
    assert isinstance(item, ImageItem) and item.modality == "image"
    assert item.image.mode == "RGB" and item.image.size == (60, 40)


@pytest.mark.parametrize(
    "data, named",
    [
        (b"hello, I am not an image", "text"),
        ("\ufeffhällo".encode("utf-16"), "neither"),
        (b"BM is how this sentence begins", "text"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "text"),
        (b"\x00\x00\x00\x20ftypheic\x00\x00\x00\x00mif1", "HEIC"),
        (b"\x00\x00\x00\x20ftypavif\x00\x00\x00\x00mif1", "AVIF"),
        (b"FORM\x00\x00\x00\x20AIFF", "AIFF"),
        (b"#!AMR\n", "AMR"),
        (b"0&\xb2u\x8ef\xcf\x11\xa6\xd9", "Windows Media"),
        (b"RIFF\x24\x00\x00\x00AVI LIST", "RIFF"),
        (b"%PDF-1.7", "PDF"),
        (b"", "0 bytes"),
    ],
    ids=["text", "utf16", "BM-text", "svg", "heic", "avif", "aiff", "amr", "wma", "avi", "pdf", "empty"],
)
def test_unsupported_files_are_refused_by_name(data, named):
    assert sniff_modality(data) is None
    with pytest.raises(MediaError, match=named):
        load_media(data)


@pytest.mark.parametrize(
    "content, named",
    [
        (np.zeros(16000, np.float32), "array, sample_rate"),
        (torch.zeros(16000), "array, sample_rate"),
        (np.zeros((40, 60), np.uint8), "array, sample_rate"),
        (np.zeros((40, 60, 3), np.float32), "uint8"),
        (np.zeros((3, 40, 60), np.uint8), "height, width, 3"),
        (np.zeros((0, 60, 3), np.uint8), "no pixels"),
        ((16000, np.zeros(16000, np.float32)), "sample_rate, array"),
        ((np.zeros(5, np.float32), 16000, 1), "3 items"),
        ("/etc/passwd", "str"),
        (__import__("pathlib").Path("/etc/passwd"), "pass its bytes"),
        (None, "NoneType"),
        ({"array": [0.0]}, "dict"),
    ],
)
def test_unsupported_objects_are_refused_by_name(content, named):
    with pytest.raises(MediaError, match=named):
        load_media(content)


@pytest.mark.parametrize("wrap", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])
def test_uint8_arrays_are_images(wrap, picture):
    image = picture()
    item = load_media(wrap(np.array(image)))
    assert isinstance(item, ImageItem) and item.image.tobytes() == image.tobytes()


def test_expected_modality_is_enforced_and_both_are_named(encode_audio, encode_image, picture):
    with pytest.raises(MediaError, match="is audio, but image"):
        load_media(encode_audio(), expected="image")
    with pytest.raises(MediaError, match="is image, but audio"):
        load_media(encode_image(picture()), expected="audio")
    assert load_media(picture(), expected="image").modality == "image"


def test_hashes_depend_on_the_content_and_not_on_the_container(tone, picture, encode_audio, encode_image):
    samples = np.round(tone() * 32767).astype(np.int16)
    wav, flac = (load_media(encode_audio(samples, format=f)) for f in ("WAV", "FLAC"))
    assert wav.content_hash == flac.content_hash == load_media((samples, 16000)).content_hash
    assert wav.content_hash != load_media((samples, 16001)).content_hash
    assert wav.content_hash != load_media((samples[:-1], 16000)).content_hash
    png, bmp = (load_media(encode_image(picture(), f)) for f in ("PNG", "BMP"))
    assert png.content_hash == bmp.content_hash == load_media(picture()).content_hash
    square, wide = np.zeros((20, 20, 3), np.uint8), np.zeros((10, 40, 3), np.uint8)  # the same bytes
    assert load_media(square).content_hash != load_media(wide).content_hash


def test_items_are_independent_copies(tone, picture):
    samples, image = tone(), picture()
    audio, photo = load_media((samples, 16000)), load_media(image)
    samples[:] = 0
    image.paste((0, 0, 0), (0, 0, 60, 40))
    assert np.abs(audio.samples).max() > 0.4 and photo.image.getextrema() != ((0, 0),) * 3
    with pytest.raises(ValueError, match="read-only"):
        audio.samples[0] = 1


def test_byte_limit_holds_before_decoding(encode_image, picture):
    data = encode_image(picture())
    with pytest.raises(MediaError, match=f"{len(data)} bytes is larger than the allowed 100 bytes"):
        load_media(data, MediaLimits(max_bytes=100))


def test_limits_must_be_positive():
    with pytest.raises(ConfigError, match="max_pixels"):
        MediaLimits(max_pixels=0)
