"""Audio files of many parts are refused before they cost time; ordinary ones, and those at the limit, are decoded."""

import io
import time

import numpy as np
import pytest
import soundfile

from mmlora.errors import MediaError
from mmlora.processors.media import containers
from mmlora.processors.media.items import MediaLimits
from mmlora.processors.media.loader import load_media
from tests.processors.media.files import encode

TAG = b"ID3\4\0\0\0\0\0\0"
DAMAGED = {"mp3": b"\xff\xf3\x14\xc0" + b"\xff" * 20, "adts": b"\xff\xf1\x50\x40\0\xff\xfc"}  # one frame


def sound(format):
    file = io.BytesIO()
    samples = (10_000 * np.sin(np.arange(8000) / 20)).astype(np.int16)
    soundfile.write(file, samples, 16000, format=format)
    return file.getvalue()


def ogg(num_pages):
    data, second = sound("OGG"), sound("OGG").index(b"OggS", 4)
    empty = data[:5] + b"\0" + bytes(8) + data[14:18] + bytes(8) + b"\0"
    return data[:second] + empty * (num_pages - data.count(b"OggS")) + data[second:]


def mp4(num_boxes):
    data = encode("m4a")
    return data + b"\0\0\0\x08free" * (num_boxes - sum(1 for _ in boxes(data)))


def boxes(data):
    position = 0
    while position < len(data):
        yield position
        position += int.from_bytes(data[position : position + 4], "big")


@pytest.mark.parametrize(
    ("build", "limit", "named"),
    [
        (lambda n: TAG * n + containers.skip_id3(encode("mp3")), containers.MAX_ID3_TAGS, "ID3 tags"),
        (ogg, containers.MAX_OGG_PAGES, "pages"),
        (mp4, containers.MAX_MP4_BOXES, "boxes"),
    ],
    ids=["id3", "ogg", "mp4"],
)
def test_parts_are_counted(build, limit, named):
    assert len(load_media(build(limit)).samples) > 0
    start_s = time.monotonic()
    for count in (limit + 1, 8 * limit):
        with pytest.raises(MediaError, match=f"more than the allowed {limit} {named}"):
            load_media(build(count))
    assert time.monotonic() - start_s < 20


@pytest.mark.parametrize(("name", "per_second"), [("mp3", 48_000 / 1152), ("adts", 100)])
def test_frames_that_cannot_be_decoded_are_counted(name, per_second):
    """Only the samples of decoded frames would count towards the duration."""
    limits = MediaLimits(max_duration_s=10)
    with pytest.raises(MediaError, match=f"more than {int(10 * per_second) + 100} frames, too many for its allowed"):
        load_media(DAMAGED[name] * 100_000, limits)


@pytest.mark.parametrize(("name", "seconds"), [("mp3", 599), ("adts", 599), ("webm", 599)])
def test_the_longest_clips_have_fewer_frames(name, seconds):
    samples = np.zeros(seconds * 16000, np.float32)
    assert len(load_media(encode(name, samples)).samples) >= seconds * 16000
