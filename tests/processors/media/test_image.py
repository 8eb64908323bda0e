"""Images: orientation, alpha, palettes, bit depths, limits and damaged files."""

import hashlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from mmlora.errors import MediaError
from mmlora.processors.media.image import strips
from mmlora.processors.media.loader import MediaLimits, load_media


def pixel(item, at=(0, 0)):
    return item.image.getpixel(at)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, encode_image):
    upright = Image.new("RGB", (48, 32), "white")
    upright.paste("red", (0, 0, 16, 16))
    stored = upright.transpose(_UNDO[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    item = load_media(encode_image(stored, "PNG", exif=exif))
    assert item.image.tobytes() == upright.tobytes()


# The inverse of the transformation that each EXIF orientation requires of a viewer.
_UNDO = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_is_ignored(encode_image, picture):
    data = encode_image(picture(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 40)
    assert load_media(data).image.size == (60, 40)


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_alpha_is_composited_on_white(format, encode_image):
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    image.paste((0, 0, 0, 128), (4, 0, 8, 8))
    item = load_media(encode_image(image, format, **({"lossless": True} if format == "WEBP" else {})))
    assert pixel(item) == (255, 255, 255)
    assert pixel(item, (6, 2)) == (127, 127, 127)


def test_gray_alpha_is_composited_on_white(encode_image):
    assert pixel(load_media(encode_image(Image.new("LA", (8, 8), (0, 0))))) == (255, 255, 255)


def test_transparent_palette_entry_is_composited_on_white(encode_image):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    assert pixel(load_media(encode_image(image))) == (0, 255, 0)
    assert pixel(load_media(encode_image(image, transparency=1))) == (255, 255, 255)
    assert pixel(load_media(encode_image(image, "GIF", transparency=1))) == (255, 255, 255)
    assert pixel(load_media(encode_image(image, transparency=b"\xff\x00\xff"))) == (255, 255, 255)


@pytest.mark.parametrize("value, expected", [(0, 0), (256, 1), (32896, 128), (65535, 255)])
def test_sixteen_bit_gray_is_scaled_not_clipped(value, expected, encode_image):
    image = Image.fromarray(np.full((8, 8), value, np.uint16))
    assert pixel(load_media(encode_image(image))) == (expected,) * 3
    assert pixel(load_media(image)) == (expected,) * 3
    assert pixel(load_media(Image.fromarray(np.full((8, 8), value, np.int32)))) == (expected,) * 3


def test_cmyk_one_bit_and_gray_become_rgb(encode_image):
    red = load_media(encode_image(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"))
    assert red.image.mode == "RGB" and pixel(red)[0] > 240 and max(pixel(red)[1:]) < 15
    assert pixel(load_media(encode_image(Image.new("1", (8, 8), 1)))) == (255, 255, 255)
    assert pixel(load_media(encode_image(Image.new("L", (8, 8), 77)))) == (77, 77, 77)


def test_float_images_are_refused_by_mode():
    with pytest.raises(MediaError, match="'F'"):
        load_media(Image.new("F", (8, 8)))
    with pytest.raises(MediaError, match="70000"):
        load_media(Image.fromarray(np.full((8, 8), 70000, np.int32)))


def test_the_first_frame_of_an_animation_is_decoded(encode_image):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    for format in ("GIF", "WEBP"):
        data = encode_image(frames[0], format, save_all=True, append_images=frames[1:], duration=50)
        red, _, blue = pixel(load_media(data), (4, 4))
        assert red > 240 and blue < 15


def png_header(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    data = b"IDAT" + zlib.compress(bytes(10))
    return body + struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))


@pytest.mark.parametrize("size", [(60000, 60000), (12000, 9000), (8001, 8000), (1, 2**31 - 1)])
def test_huge_header_claims_are_refused_before_decoding(size, monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("decoded before the check"))
    with pytest.raises(MediaError, match="larger than the allowed 64000000 px"):
        load_media(png_header(*size))


def test_pixel_limit_holds_for_every_form(picture, encode_image):
    limits = MediaLimits(max_pixels=60 * 40 - 1)
    for content in (picture(), np.array(picture()), encode_image(picture(), "WEBP")):
        with pytest.raises(MediaError, match="60x40 px is larger than the allowed 2399 px"):
            load_media(content, limits)
    assert load_media(picture(), MediaLimits(max_pixels=60 * 40)).image.size == (60, 40)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("kept", [0.02, 0.3, 0.6, 0.9])
def test_truncated_files_are_refused(format, kept, picture, encode_image):
    data = encode_image(picture(200, 150), format)
    with pytest.raises(MediaError):
        load_media(data[: int(len(data) * kept)])


def test_a_truncated_lazy_pil_image_is_refused(picture, encode_image):
    data = encode_image(picture(200, 150))
    with pytest.raises(MediaError, match="cannot decode"):
        load_media(Image.open(io.BytesIO(data[: len(data) // 2])))


def test_an_image_without_pixels_is_refused():
    with pytest.raises(MediaError, match="no pixels"):
        load_media(Image.new("RGB", (0, 5)))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_strips_do_not_change_the_image(mode):
    pixels = np.random.default_rng(0).integers(0, 256, (900, 1500, 4), dtype=np.uint8)
    rgba = Image.fromarray(pixels)
    given = rgba.convert(mode) if mode != "P" else rgba.convert("RGB").quantize(64)
    if mode == "P":
        given.info["transparency"] = bytes(range(64))
    white = Image.new("RGBA", given.size, "white")
    expected = Image.alpha_composite(white, given.convert("RGBA")).convert("RGB")
    item = load_media(given)
    assert len(list(strips(*given.size))) == 2 and item.image.tobytes() == expected.tobytes()
    digest = hashlib.sha256(b"image:1500x900:" + expected.tobytes()).hexdigest()
    assert item.content_hash == digest


def test_strips_cover_the_image():
    for width, height in [(1, 1), (1500, 900), (2**21, 3), (3, 2**20)]:
        boxes = list(strips(width, height))
        assert [box[1] for box in boxes] == [0, *[box[3] for box in boxes[:-1]]] and boxes[-1][3] == height
        assert all(box[0] == 0 and box[2] == width and box[3] > box[1] for box in boxes)
