"""MP3 files without a declared length, with a wrong one, and truncated ones: fully decoded, or refused."""

import io

import av
import numpy as np
import pytest
import soundfile

from mmlora.errors import MediaError
from mmlora.processors.media.loader import load_media

RATE = 16000


def encode(samples, rate=RATE, mode="VARIABLE"):
    buffer = io.BytesIO()
    options = {"bitrate_mode": mode, "compression_level": 0.3}
    soundfile.write(buffer, samples, rate, format="MP3", subtype="MPEG_LAYER_III", **options)
    return buffer.getvalue()


def without_tag(data):
    """Return the same packets without the Xing frame, which has their number."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(buffer, "w", format="mp3", options={"write_xing": "0"}) as copy:
        stream = copy.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(source.streams.audio[0]):
            packet.stream = stream
            if packet.size:
                copy.mux(packet)
    return buffer.getvalue()


def noise(*loudness, rate=RATE, channels=1):
    """Return one second of noise at each loudness."""
    generator = np.random.default_rng(0)
    parts = [level * generator.standard_normal((rate, channels)).astype(np.float32) for level in loudness]
    return np.concatenate(parts)


def num_samples(data):
    return len(load_media(data).samples)


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("mode", ["VARIABLE", "CONSTANT"])
def test_every_mpeg_version_is_fully_decoded(rate, channels, mode):
    data = encode(noise(0.3, 0.001, rate=rate, channels=channels), rate, mode)
    assert num_samples(data) == 2 * rate
    assert abs(num_samples(without_tag(data)) - 2 * rate) <= 3 * 1152


@pytest.mark.parametrize(
    "loudness", [(0.3, 0.3, 0.3, 0.3), (0.3, 0.001, 0.001, 0.001), (0.001, 0.3, 0.3, 0.3)], ids=str
)
def test_files_without_a_length_are_fully_decoded(loudness):
    data = encode(noise(*loudness))
    with soundfile.SoundFile(io.BytesIO(without_tag(data))) as file:
        guessed = file.frames
    found = load_media(without_tag(data)).samples
    assert abs(len(found) - 4 * RATE) <= 3 * 1152
    assert loudness[0] == loudness[1] or abs(guessed - 4 * RATE) > 3 * 1152, "libsndfile would have guessed right"
    loud = [float(np.sqrt(np.mean(found[i * RATE + 4000 : (i + 1) * RATE - 4000] ** 2))) for i in range(4)]
    np.testing.assert_allclose(loud, loudness, rtol=0.3)


def test_a_cover_image_is_not_decoded_as_audio():
    data = without_tag(encode(noise(0.3, 0.3), mode="CONSTANT"))
    size = 50_000
    synchsafe = bytes(size >> shift & 0x7F for shift in (21, 14, 7, 0))
    cover = b"ID3\x04\x00\x00" + synchsafe + b"\xff\xfb\x90\x00" * (size // 4)
    assert num_samples(cover + data) == num_samples(data)


def test_joined_files_are_decoded_to_the_end():
    one = encode(noise(0.3, 0.1))
    assert abs(num_samples(one + one) - 2 * num_samples(one)) <= 5 * 1152


@pytest.mark.parametrize("kept", [0.2, 0.5, 0.9])
def test_a_truncated_file_with_a_declared_length_is_refused(kept):
    data = encode(noise(0.3, 0.3))
    with pytest.raises(MediaError, match="truncated MP3: its header claims"):
        load_media(data[: int(len(data) * kept)])
