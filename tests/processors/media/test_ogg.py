"""Ogg files that do not begin at granule 0, with gaps, or with wrong granules: as libsndfile or FFmpeg read them."""

import io
from collections.abc import Callable

import av
import numpy as np
import pytest
import soundfile

from mmlora.errors import MediaError
from mmlora.processors.media.containers import is_chained_ogg
from mmlora.processors.media.items import MediaLimits
from mmlora.processors.media.loader import load_media
from tests.processors.media.files import add_audio

Pages = list[bytes]
RATES = {"libopus": 48000, "vorbis": 16000, "flac": 16000}
NUM_HEADERS = 2  # pages
SECONDS = 6
POLYNOMIAL = 0x04C11DB7


def crc_table() -> list[int]:
    table = []
    for byte in range(256):
        value = byte << 24
        for _ in range(8):
            value = value << 1 ^ POLYNOMIAL if value & 1 << 31 else value << 1
        table.append(value & 0xFFFFFFFF)
    return table


CRC = crc_table()


def tone(rate: int, seconds: float = SECONDS) -> np.ndarray:
    """Return a tone that rises, so that a repeated or a missing part is seen."""
    time_s = np.arange(int(rate * seconds)) / rate
    return (0.5 * np.sin(2 * np.pi * (300 + 100 * time_s) * time_s)).astype(np.float32)


def pages_of(data: bytes) -> Pages:
    pages, at = [], 0
    while at < len(data):
        count = data[at + 26]
        end = at + 27 + count + sum(data[at + 27 : at + 27 + count])
        pages.append(data[at:end])
        at = end
    return pages


def granule(page: bytes) -> int:
    return int.from_bytes(page[6:14], "little", signed=True)


def with_granule(page: bytes, value: int) -> bytes:
    page = page[:6] + value.to_bytes(8, "little", signed=True) + page[14:22] + bytes(4) + page[26:]
    crc = 0
    for byte in page:
        crc = (crc << 8 & 0xFFFFFFFF) ^ CRC[crc >> 24 ^ byte]
    return page[:22] + crc.to_bytes(4, "little") + page[26:]


def mapped(pages: Pages, change: Callable[[int], int]) -> Pages:
    """Change the granules of the pages behind the headers."""
    return pages[:NUM_HEADERS] + [with_granule(page, change(granule(page))) for page in pages[NUM_HEADERS:]]


def encode(codec: str) -> Pages:
    """Return a whole file in pages of about 0.3 s."""
    file = io.BytesIO()
    with av.open(file, "w", format="ogg", options={"page_duration": "300000"}) as container:
        if codec == "vorbis":
            copy_vorbis(container)
        else:
            add_audio(container, codec, RATES[codec], tone(16000))()
    return pages_of(file.getvalue())


def copy_vorbis(container: av.container.OutputContainer) -> None:
    """Add packets that libsndfile has encoded; PyAV has no good encoder."""
    encoded = io.BytesIO()
    soundfile.write(encoded, tone(RATES["vorbis"]), RATES["vorbis"], format="OGG", subtype="VORBIS")
    with av.open(io.BytesIO(encoded.getvalue())) as source:
        stream = container.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(source.streams.audio[0]):
            packet.stream = stream
            if packet.size:
                container.mux(packet)


@pytest.fixture(scope="module", params=sorted(RATES))
def codec(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def pages(codec: str) -> Pages:
    return encode(codec)


def decode(pages: Pages) -> np.ndarray:
    return load_media(b"".join(pages), expected="audio").samples


def test_streams_begin_at_any_granule(codec, pages):
    whole = decode(pages)
    assert abs(len(whole) - SECONDS * RATES[codec]) < 1100
    for offset in (1, 312, 20_000, 100 * RATES[codec], 1 << 31, 1 << 40):
        moved = mapped(pages, lambda at, more=offset: at + more)
        assert len(decode(moved)) == len(whole)
        if codec != "flac":
            expected = soundfile.read(io.BytesIO(b"".join(moved)), dtype="float32")[0]
            np.testing.assert_array_equal(decode(moved), expected)
    if codec == "libopus":  # libsndfile refuses granules that begin before 0
        for offset in (-1, -100, -312, -20_000):
            moved = decode(mapped(pages, lambda at, more=offset: max(at + more, 0)))
            assert abs(len(moved) - len(whole)) <= 312
            middle = slice(48_000, 200_000)
            np.testing.assert_allclose(moved[middle], whole[middle], atol=0.02)


def test_recordings_of_a_running_stream_may_begin_and_end_anywhere(codec, pages):
    live = pages[:NUM_HEADERS] + mapped(pages, lambda at: at + 3600 * RATES[codec])[NUM_HEADERS + 5 :]
    for cut in (1, 20, 60):
        data = b"".join(live)[:-cut]
        samples = load_media(data).samples
        seconds = len(samples) / RATES[codec]
        assert 3 < seconds < SECONDS - 1
        middle = len(samples) // 2
        spectrum = np.abs(np.fft.rfft(samples[middle - 4000 : middle + 4000]))
        assert 700 < spectrum.argmax() * RATES[codec] / 8000 < 1200  # the tone rises from 300 to 1500 Hz


def test_a_truncated_file_that_begins_at_0_is_still_refused(codec, pages):
    data = b"".join(pages)
    for cut in (1, 20, 60):
        with pytest.raises(MediaError, match="truncated OGG"):
            load_media(data[:-cut])


def test_nothing_is_repeated_after_a_gap(codec, pages):
    gap = pages[: NUM_HEADERS + 6] + pages[NUM_HEADERS + 10 :]
    lost = granule(pages[NUM_HEADERS + 9]) - granule(pages[NUM_HEADERS + 5])
    samples, whole = decode(gap), decode(pages)
    assert abs(len(whole) - lost - len(samples)) < 6000
    end = RATES[codec]
    np.testing.assert_allclose(samples[-end:], whole[-end:], atol=2e-3)


def test_a_wrong_last_granule_does_not_matter(codec, pages):
    rate, whole = RATES[codec], decode(pages)
    for more in (5 * rate, 100 * rate):
        samples = decode([*pages[:-1], with_granule(pages[-1], granule(pages[-1]) + more)])
        assert 0 <= len(samples) - len(whole) < 1100
        np.testing.assert_array_equal(samples[: len(whole)], whole)
    assert abs(len(decode([*pages[:-1], with_granule(pages[-1], -1)])) - len(whole)) < rate // 2


def test_streams_whose_granules_make_no_sense_are_decoded_by_ffmpeg(codec, pages):
    for change in (lambda at: 0, lambda at: 10**7 - at):
        samples = decode(mapped(pages, change))
        assert abs(len(samples) - SECONDS * RATES[codec]) < 1100


def test_chained_streams_are_decoded_to_the_end(codec, pages):
    data = b"".join(pages)
    assert is_chained_ogg(data * 2) and not is_chained_ogg(data)
    samples, whole = load_media(data * 2).samples, load_media(data).samples
    assert abs(len(samples) - 2 * len(whole)) < 1100
    with pytest.raises(MediaError, match="more than the allowed 7 s"):
        load_media(data * 2, MediaLimits(max_duration_s=7))


def test_limits_hold_for_the_samples_that_are_there(codec, pages):
    for data in (pages, mapped(pages, lambda at: 0), mapped(pages, lambda at: at + 10**9)):
        with pytest.raises(MediaError, match="more than the allowed 5 s"):
            load_media(b"".join(data), MediaLimits(max_duration_s=5))


def test_whole_files_are_read_by_libsndfile(codec, pages):
    if codec == "flac":
        return  # libsndfile cannot read FLAC in Ogg as FFmpeg writes it
    expected = soundfile.read(io.BytesIO(b"".join(pages)), dtype="float32")[0]
    np.testing.assert_array_equal(decode(pages), expected)


def test_streams_without_headers_or_samples_are_refused(codec, pages):
    for part in (pages[NUM_HEADERS:], pages[:NUM_HEADERS], pages[:1]):
        with pytest.raises(MediaError):
            decode(part)
