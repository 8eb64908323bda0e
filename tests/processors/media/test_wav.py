"""WAV files whose headers claim wrong sizes: the samples that are there, as libsndfile and FFmpeg read them."""

import io
import struct
import time

import av
import numpy as np
import pytest
import soundfile

from mmlora.errors import MediaError
from mmlora.processors.media.items import MediaLimits
from mmlora.processors.media.loader import load_media, sniff_modality
from mmlora.processors.media.wav import MAX_CHUNKS, read_wav
from mmlora.processors.modalities import MODALITIES
from tests.processors.media.files import RATE, add_audio

SAMPLES = (8000 * np.sin(np.arange(5000) / 9)).astype("<i2")
PCM = SAMPLES.tobytes()
EXPECTED = SAMPLES / np.float32(2**15)
LIST_CONTENT = b"INFOISFT\x05\0\0\0Lavf\0\0"
WAVE64_END = bytes.fromhex("f3acd3118cd100c04f8edb8a")
WAVE64_RIFF = b"riff" + bytes.fromhex("2e91cf11a5d628db04c10000")


def chunk(name: bytes, content: bytes, size: int | None = None) -> bytes:
    return struct.pack("<4sI", name, len(content) if size is None else size) + content + bytes(len(content) % 2)


def header(tag: int = 1, channels: int = 1, bits: int = 16) -> bytes:
    align = channels * bits // 8
    return chunk(b"fmt ", struct.pack("<HHIIHH", tag, channels, RATE, RATE * align, align, bits))


def riff(*chunks: bytes, name: bytes = b"RIFF", size: int | None = None) -> bytes:
    return chunk(name, b"WAVE" + b"".join(chunks), size)


def data_of(size: int | None, content: bytes = PCM) -> bytes:
    return chunk(b"data", content, size)


def ds64(data_size: int) -> bytes:
    return chunk(b"ds64", struct.pack("<QQQI", 0, data_size, 0, 0))


def wave64(data_size: int | None, riff_size: int = 0) -> bytes:
    inner = header()[8:]
    fmt = b"fmt " + WAVE64_END + struct.pack("<Q", 24 + len(inner)) + inner
    fact = b"fact" + WAVE64_END + struct.pack("<Q", 24 + 4) + bytes(8)  # padded to 8 bytes
    size = 24 + len(PCM) if data_size is None else data_size
    data = b"data" + WAVE64_END + struct.pack("<Q", size) + PCM
    return WAVE64_RIFF + struct.pack("<Q", riff_size) + b"wave" + WAVE64_END + fmt + fact + data


def assert_is_whole(data: bytes) -> None:
    item = load_media(data, expected="audio")
    assert item.sample_rate == RATE
    np.testing.assert_array_equal(item.samples, EXPECTED)


WRONG_SIZES = [
    *(len(PCM) + more for more in (1, 2, 7, 8, 36, 44, 68, 10_000)),
    2_000_000_000, 1 << 31, (1 << 31) - 1, 0x7FFFF000, 0xFFFFFFFF, 0xFFFFFFDB, 0xFFFFF000, 0xFFFFFFFF - 36, 0,
]  # fmt: skip


@pytest.mark.parametrize("size", WRONG_SIZES, ids=hex)
def test_a_size_beyond_the_file_or_of_zero_means_all_that_is_there(size):
    data = riff(header(), data_of(size), size=min(size + 36, 0xFFFFFFFF))
    assert_is_whole(data)
    if size:  # libsndfile believes the zero
        np.testing.assert_array_equal(soundfile.read(io.BytesIO(data), dtype="float32")[0], EXPECTED)


@pytest.mark.parametrize("size", [0, 1, 35, 36, 100, 0x7FFFFFFF, 0xFFFFFFFF])
def test_the_size_of_the_whole_file_is_ignored(size):
    assert_is_whole(riff(header(), data_of(None), size=size))


@pytest.mark.parametrize("size", [100, 5001, len(PCM) - 1])
def test_a_smaller_size_is_believed_as_by_libsndfile(size):
    data = riff(header(), data_of(size))
    expected = soundfile.read(io.BytesIO(data), dtype="float32")[0]
    assert len(expected) == size // 2
    np.testing.assert_array_equal(load_media(data).samples, expected)


def test_other_chunks_before_and_after_the_samples_are_skipped():
    extra = [chunk(b"LIST", LIST_CONTENT), chunk(b"bext", bytes(602)), chunk(b"JUNK", b"odd"), chunk(b"\0\0\0\0", b"")]
    for each in (*extra, b"".join(extra)):
        assert_is_whole(riff(each, header(), each, data_of(None), each))
    assert_is_whole(riff(header(), data_of(None), data_of(None)))  # only the first, as FFmpeg


def test_a_partial_frame_at_the_end_is_dropped():
    for size in (len(PCM) + 1, 0xFFFFFFFF, 0):
        assert_is_whole(riff(header(), data_of(size, PCM + b"x"))[:-1])
    stereo = riff(header(channels=2), data_of(0xFFFFFFFF, PCM + b"xyz"))[:-1]
    np.testing.assert_allclose(load_media(stereo).samples, EXPECTED.reshape(-1, 2).mean(axis=1), atol=1e-7)


@pytest.mark.parametrize("kept", [0.02, 0.3, 0.7, 0.999])
def test_a_file_that_was_cut_is_decoded_to_its_end(kept):
    data = riff(header(), data_of(None))
    cut = data[: int(len(data) * kept)]
    expected = soundfile.read(io.BytesIO(cut), dtype="float32")[0]
    assert len(expected) == (len(cut) - 44) // 2 > 0
    np.testing.assert_array_equal(load_media(cut).samples, expected)


@pytest.mark.parametrize(
    "after", [b"", chunk(b"LIST", LIST_CONTENT), chunk(b"id3 ", b"odd"), chunk(b"id3 ", b"x")[:-1]]
)
def test_an_empty_data_chunk_has_no_samples(after):
    with pytest.raises(MediaError, match="no samples"):
        load_media(riff(header(), data_of(0, b""), after))


@pytest.mark.parametrize("name", [b"RF64", b"BW64"])
@pytest.mark.parametrize("size", [len(PCM), 0, len(PCM) + 1, 1 << 40, (1 << 64) - 1], ids=hex)
def test_the_64_bit_size_of_an_rf64_file_may_be_wrong_too(name, size):
    data = riff(ds64(size), header(), data_of(0xFFFFFFFF), name=name, size=0xFFFFFFFF)
    assert sniff_modality(data[:64]) == MODALITIES["audio"]
    assert_is_whole(data)


def test_an_rf64_file_may_have_a_32_bit_size_or_a_smaller_64_bit_one():
    assert_is_whole(riff(ds64(0), header(), data_of(None), name=b"RF64"))
    assert_is_whole(riff(header(), data_of(0xFFFFFFFF), name=b"RF64"))
    smaller = riff(ds64(4000), header(), data_of(0xFFFFFFFF), name=b"RF64")
    np.testing.assert_array_equal(load_media(smaller).samples, EXPECTED[:2000])


@pytest.mark.parametrize("size", [None, 0, 24, 24 + len(PCM) + 1, 1 << 40, (1 << 64) - 1], ids=str)
def test_wave64_is_read_whatever_its_sizes(size):
    data = wave64(size, riff_size=(1 << 64) - 1)
    assert sniff_modality(data[:64]) == MODALITIES["audio"]
    assert_is_whole(data)


def test_wave64_and_rf64_as_libsndfile_writes_them():
    for format in ("W64", "RF64", "WAVEX"):
        file = io.BytesIO()
        soundfile.write(file, SAMPLES, RATE, format=format, subtype="PCM_16")
        assert_is_whole(file.getvalue())


SUBTYPES = {
    "WAV": ("PCM_U8", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW", "IMA_ADPCM", "MS_ADPCM", "GSM610",
            "G721_32"),
    "WAVEX": ("PCM_U8", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"),
    "W64": ("PCM_24", "FLOAT", "IMA_ADPCM"),
    "RF64": ("PCM_24", "FLOAT", "ALAW"),
}  # fmt: skip


@pytest.mark.parametrize("format, subtype", [(format, subtype) for format in SUBTYPES for subtype in SUBTYPES[format]])
def test_every_encoding_is_read_as_by_libsndfile(format, subtype):
    file = io.BytesIO()
    soundfile.write(file, EXPECTED, 8000, format=format, subtype=subtype)
    data = bytearray(file.getvalue())
    expected = soundfile.read(io.BytesIO(data), dtype="float32")[0]
    np.testing.assert_array_equal(load_media(bytes(data)).samples, expected)
    if format == "W64":
        return
    at = data.index(b"data") + 4
    data[at : at + 4] = struct.pack("<I", 2_000_000_000)
    np.testing.assert_array_equal(load_media(bytes(data)).samples, expected)


def mp3_in_wav() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="wav") as container:
        add_audio(container, "libmp3lame", RATE, np.tile(EXPECTED, 4))()
    return file.getvalue()


@pytest.mark.parametrize("size", [None, 0, 0xFFFFFFFF], ids=str)
def test_mp3_in_a_wav_is_read(size):
    data = mp3_in_wav()
    if size is not None:
        at = data.index(b"data") + 4
        data = data[:at] + struct.pack("<I", size) + data[at + 4 :]
    assert read_wav(data).format_tag == 0x55
    expected = soundfile.read(io.BytesIO(mp3_in_wav()), dtype="float32")[0]
    found = load_media(data)
    assert found.sample_rate == RATE and len(found.samples) == len(expected) >= 20_000
    np.testing.assert_allclose(found.samples, expected, atol=1e-4)
    with pytest.raises(MediaError, match="more than the allowed 1 s"):
        load_media(data, MediaLimits(max_duration_s=1))


@pytest.mark.parametrize(
    "data, named",
    [
        (riff(data_of(None)), "no 'fmt ' chunk"),
        (riff(data_of(None), header()), "no 'fmt ' chunk in front"),
        (riff(header()), "36 bytes without a data chunk"),
        (riff(header(), data_of(None))[:20], "'fmt ' chunk claims 16 bytes, 0 are there"),
        (riff(header(), data_of(None))[:30], "'fmt ' chunk claims 16 bytes, 10 are there"),
        (riff(header(), data_of(None))[:42], "42 bytes without a data chunk"),
        (riff(header(), data_of(None))[:44], "no samples"),
        (riff(header(), data_of(None))[:45], "no samples"),
        (riff(chunk(b"fmt ", header()[8:22]), data_of(None)), "'fmt ' chunk has 14 bytes"),
        (riff(header(), chunk(b"LIST", LIST_CONTENT, 10**6)), "'LIST' chunk claims 1000000 bytes"),
        (riff(header(channels=0), data_of(0)), "cannot decode"),
        (riff(header(channels=33), data_of(0)), "33 channels"),
        (wave64(None)[:50], "without a data chunk"),
        (wave64(None)[:70], "'fmt ' chunk claims 16 bytes, 6 are there"),
        (b"RIFF\0\0\0\0WAVE", "12 bytes without a data chunk"),
    ],
)  # fmt: skip
def test_headers_that_are_missing_or_cut_are_refused(data, named):
    with pytest.raises(MediaError, match=named):
        load_media(data, expected="audio")


@pytest.mark.parametrize("size", [0, None, 2_000_000_000])
def test_limits_hold_for_the_samples_that_are_there(size):
    data = riff(header(), data_of(size))
    assert len(load_media(data, MediaLimits(max_samples=5000)).samples) == 5000
    with pytest.raises(MediaError, match="audio of 5000 samples: at most 4999"):
        load_media(data, MediaLimits(max_samples=4999))
    with pytest.raises(MediaError, match="lasts 0.3 s, more than the allowed 0.3 s"):
        load_media(data, MediaLimits(max_duration_s=0.3))


def test_millions_of_empty_chunks_do_not_take_long():
    assert_is_whole(riff(header(), chunk(b"junk", b"") * (MAX_CHUNKS - 2), data_of(None)))
    many = chunk(b"junk", b"") * 2_000_000
    start = time.monotonic()
    with pytest.raises(MediaError, match="more than the allowed 10000 chunks"):
        read_wav(riff(header(), many, data_of(None)))
    with pytest.raises(MediaError, match="more than the allowed 10000 chunks"):
        read_wav(wave64(None)[:40] + (b"junk" + WAVE64_END + struct.pack("<Q", 24)) * 1_000_000)
    assert len(read_wav(riff(header(), data_of(0, b""), many)).samples) == len(many)
    assert time.monotonic() - start < 2


def test_other_containers_of_samples_are_refused_by_name():
    for format, name in (("AIFF", "an AIFF file"), ("AU", "an AU file"), ("CAF", "a CAF file")):
        file = io.BytesIO()
        soundfile.write(file, SAMPLES, RATE, format=format)
        with pytest.raises(MediaError, match=name):
            load_media(file.getvalue())
