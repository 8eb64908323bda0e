"""Containers that FFmpeg decodes: the same lengths as the `ffmpeg` program, and hostile files."""

import io
import re
import struct
import subprocess
import sys
import time
from contextlib import suppress

import av
import numpy as np
import pytest
import soundfile

from mmlora.errors import MediaError
from mmlora.processors.media import audio, containers
from mmlora.processors.media.items import MediaLimits
from mmlora.processors.media.loader import load_media, sniff_modality
from mmlora.processors.modalities import MODALITIES
from tests.processors.media.files import FORMATS, RATE, add_audio, clip, encode

# Of a second of `clip()`: `ffmpeg -i clip.FORMAT -f f32le -ac 1 -` (5.1.9, Debian 12) writes four bytes for each.
FFMPEG_SAMPLES = {
    "m4a": 16384, "alac": 16000, "mp4": 16384, "mov": 16384, "webm": 48000, "mkv": 16000, "adts": 17408, "mp3": 16000,
}  # fmt: skip


def video_file(with_audio: bool) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        video = container.add_stream("mpeg4", rate=5)
        video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
        finish = add_audio(container, "aac", RATE, clip()) if with_audio else lambda: None
        for _ in range(5):
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8))))
        container.mux(video.encode(None))
        finish()
    return buffer.getvalue()


def box(kind: bytes, *content: bytes) -> bytes:
    body = b"".join(content)
    return struct.pack(">I", len(body) + 8) + kind + body


def element(element_id: bytes, *content: bytes) -> bytes:
    body = b"".join(content)
    return element_id + b"\x08" + struct.pack(">I", len(body)) + body


def with_elements(data: bytes, *added: bytes) -> bytes:
    """Insert elements at the start of a WebM file's segment, and make the size of the segment unknown."""
    segment, info = data.index(b"\x18\x53\x80\x67"), data.rindex(b"\x15\x49\xa9\x66")
    return data[: segment + 4] + b"\x01" + b"\xff" * 7 + b"".join(added) + data[info:]


@pytest.mark.parametrize("name", FORMATS)
def test_lengths_are_those_of_the_ffmpeg_program(name):
    data = encode(name)
    item = load_media(data, expected="audio")
    assert (len(item.samples), item.sample_rate) == (FFMPEG_SAMPLES[name], FORMATS[name][2])


@pytest.mark.parametrize("name", FORMATS)
def test_the_frequency_and_level_of_a_tone_are_kept(name):
    item = load_media(encode(name))
    found = item.samples[item.sample_rate // 4 : item.sample_rate // 4 * 3]
    assert 0.3 < np.sqrt(np.mean(found**2)) * np.sqrt(2) < 0.6
    peak_hz = np.argmax(np.abs(np.fft.rfft(found))) * item.sample_rate / len(found)
    assert abs(peak_hz - 440) < 5


@pytest.mark.parametrize("name", FORMATS)
def test_stereo_is_averaged(name):
    stereo = np.stack([clip(level=0.5), np.zeros(RATE, np.float32)], axis=1)
    found, expected = load_media(encode(name, stereo)), load_media(encode(name, clip(level=0.25)))
    assert len(found.samples) == FFMPEG_SAMPLES[name]
    np.testing.assert_allclose(found.samples[4096:-4096], expected.samples[4096:-4096], atol=0.03)


@pytest.mark.parametrize("channels", [6, 8])
@pytest.mark.parametrize("name", ["m4a", "webm", "mkv", "adts"])
def test_surround_sound_is_averaged(name, channels):
    """PyAV would read beyond the planes of a frame of eight channels."""
    samples = np.tile(clip(level=0.5)[:, None], channels)
    found = load_media(encode(name, samples)).samples
    middle = found[len(found) // 4 : len(found) // 4 * 3]
    assert 0.25 < np.abs(middle).max() < 0.6


def test_a_change_of_the_channels_is_followed():
    data = bytearray(encode("adts"))
    frames, at = [], 0
    while at < len(data):
        frames.append(at)
        at += (data[at + 3] & 3) << 11 | data[at + 4] << 3 | data[at + 5] >> 5
    for at in frames[5:]:
        data[at + 2], data[at + 3] = data[at + 2] | 1, data[at + 3] | 0xC0  # configuration 7: eight channels
    with suppress(MediaError):
        assert len(load_media(bytes(data)).samples) > 0


def test_webm_with_vorbis_is_decoded():
    ogg, webm = io.BytesIO(), io.BytesIO()
    soundfile.write(ogg, clip(), RATE, format="OGG", subtype="VORBIS")
    with av.open(io.BytesIO(ogg.getvalue())) as source, av.open(webm, "w", format="webm") as copy:
        stream = copy.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(source.streams.audio[0]):
            packet.stream = stream
            if packet.size:
                copy.mux(packet)
    assert abs(len(load_media(webm.getvalue()).samples) - RATE) < 1024


def test_the_audio_track_of_a_video_is_decoded_and_a_video_without_one_is_refused():
    data = video_file(with_audio=True)
    assert sniff_modality(data) == MODALITIES["audio"]
    assert load_media(data).content_hash == load_media(encode("mp4")).content_hash
    with pytest.raises(MediaError, match="no audio track"):
        load_media(video_file(with_audio=False))


def test_the_default_track_is_decoded_or_else_the_first():
    loud, quiet = clip(level=0.5), clip(level=0.05)
    assert np.abs(load_media(encode("mkv", loud, quiet)).samples).max() > 0.4
    assert np.abs(load_media(encode("mkv", quiet, loud)).samples).max() < 0.1
    options = {"default_mode": "passthrough"}
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska", options=options) as container:
        tracks = [add_audio(container, "flac", RATE, track) for track in (quiet, loud)]
        container.streams[1].disposition = av.stream.Disposition.default
        for finish in tracks:
            finish()
    assert np.abs(load_media(buffer.getvalue()).samples).max() > 0.4


@pytest.mark.parametrize("name", ["m4a", "alac", "webm", "mkv", "mp3"])
@pytest.mark.parametrize("kept", [0.01, 0.3, 0.7, 0.95])
def test_truncated_containers_are_refused(name, kept):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 3 * RATE).astype(np.float32)
    data = encode(name, noise)
    with pytest.raises(MediaError):
        load_media(data[: int(len(data) * kept)])


def test_truncation_is_detected_if_the_index_is_in_front():
    data = encode("m4a", movflags="faststart")
    assert data.index(b"moov") < data.index(b"mdat")
    assert len(load_media(data).samples) == 16384
    with pytest.raises(MediaError, match="truncated or damaged MP4: its b'mdat' box claims"):
        load_media(data[: len(data) * 3 // 4])


def test_a_live_recording_without_lengths_is_fully_decoded():
    data = encode("webm", live="1")
    assert len(load_media(data).samples) == 48000
    cut = data[: data.rindex(b"\x1f\x43\xb6\x75")] if data.count(b"\x1f\x43\xb6\x75") > 1 else data
    assert len(load_media(cut).samples) > 0


@pytest.mark.parametrize("kept", [0.3, 0.71])
def test_raw_aac_has_no_declared_length_and_is_decoded_to_its_end(kept):
    data = encode("adts")
    assert abs(len(load_media(data[: int(len(data) * kept)]).samples) - kept * 17408) < 2 * 1024


@pytest.mark.parametrize("name", FORMATS)
def test_the_declared_length_is_checked_before_decoding_and_the_real_one_while_decoding(name, monkeypatch):
    data = encode(name)
    with pytest.raises(MediaError, match=r"lasts (0\.[45]|1\.\d) s, more than the allowed 0.4 s"):
        load_media(data, MediaLimits(max_duration_s=0.4))
    with pytest.raises(MediaError, match="at most 4000 are allowed"):
        load_media(data, MediaLimits(max_samples=4000))
    if name not in ("webm", "mkv", "adts"):  # these declare no length of the audio track
        monkeypatch.setattr(audio, "_decode_track", lambda *_, **__: pytest.fail("decoded before the check"))
        with pytest.raises(MediaError, match="more than the allowed 0.4 s"):
            load_media(data, MediaLimits(max_duration_s=0.4))


def test_a_container_that_declares_one_second_is_still_limited():
    data = bytearray(encode("m4a", clip(60), use_editlist="0"))
    for kind, offset in ((b"mvhd", 20), (b"tkhd", 24), (b"mdhd", 20)):  # durations, after type and version
        at = data.index(kind) + offset
        scale = int.from_bytes(data[at - 4 : at], "big") if kind != b"tkhd" else 1000
        data[at : at + 4] = scale.to_bytes(4, "big")
    at = data.index(b"stts") + 8
    count = int.from_bytes(data[at : at + 4], "big")
    for entry in range(count):
        data[at + 8 + 8 * entry : at + 12 + 8 * entry] = (1).to_bytes(4, "big")  # each packet lasts one sample
    with pytest.raises(MediaError, match=r"lasts 5\.\d s, more than the allowed 5 s"):
        load_media(bytes(data), MediaLimits(max_duration_s=5))


def test_a_container_that_declares_ten_hours_is_refused():
    data = bytearray(encode("m4a", use_editlist="0"))
    at = data.index(b"stts") + 8
    data[at + 8 : at + 12] = (36_000 * RATE).to_bytes(4, "big")  # the duration of the first packets
    at = data.index(b"mdhd") + 20
    data[at : at + 4] = (36_000 * RATE).to_bytes(4, "big")
    with pytest.raises(MediaError, match="audio of 576000000 samples: at most"):
        load_media(bytes(data))


def test_the_declared_length_of_a_webm_file_is_ignored():
    data = encode("webm")
    at = data.index(b"\x44\x89\x88")
    claimed = data[: at + 3] + struct.pack(">d", 36_000_000.0) + data[at + 11 :]  # ms
    assert len(load_media(claimed).samples) == 48000


@pytest.mark.parametrize("header", [b"moov", b"free", b"hoov"])
@pytest.mark.parametrize("count", [10_000_000, 4_000_000_000])
def test_tables_without_entries_cannot_declare_millions_of_packets(count, header):
    """FFmpeg also finds headers in padding."""
    data = bytearray(encode("m4a").replace(b"moov", header))
    at = data.index(b"stsz") + 8
    data[at : at + 8] = struct.pack(">II", 1, count)
    with pytest.raises(MediaError, match=f"claims {count} packets; at most"):
        load_media(bytes(data))


@pytest.mark.parametrize("header", [b"moov", b"moof"])
def test_fragments_cannot_declare_millions_of_packets(header):
    run = box(b"trun", struct.pack(">II", 0, 100_000_000))
    data = box(b"ftyp", b"isom" + bytes(4)) + box(header, box(b"traf", run))
    with pytest.raises(MediaError, match="claims 100000000 packets"):
        load_media(data)


def test_many_streams_are_refused():
    moov = box(b"moov", *[box(b"trak", box(b"mdia")) for _ in range(10_000)])
    with pytest.raises(MediaError, match="more than 32 streams"):
        load_media(box(b"ftyp", b"isom" + bytes(4)) + moov)
    track = element(b"\xae", element(b"\xd7", b"\x01"), element(b"\x83", b"\x02"), element(b"\x86", b"A_OPUS"))
    data = encode("webm")
    with pytest.raises(MediaError, match="more than"):
        load_media(with_elements(data, element(b"\x16\x54\xae\x6b", track * 10_000)))
    with pytest.raises(MediaError, match="more than 32 streams"):
        load_media(with_elements(data, element(b"\x16\x54\xae\x6b", track * 1_000)))


def test_excessive_metadata_is_refused_quickly():
    """FFmpeg compares each tag with all others, so a megabyte of tags takes minutes."""
    name = element(b"\x45\xa3", b"name")
    tags = element(b"\x73\x73", *[element(b"\x67\xc8", name) for _ in range(50_000)])
    items = [box(b"----", box(b"name", bytes(4), b"%d" % i), box(b"data", bytes(8))) for i in range(50_000)]
    ilst = box(b"moov", box(b"udta", box(b"meta", bytes(4), box(b"ilst", *items))))
    frame = b"TXXX" + struct.pack(">IH", 8, 0) + b"\0k\0valuex"
    id3 = b"ID3\3\0\0" + bytes((0, 32, 0, 0)) + frame * 1000
    cases = [with_elements(encode("webm"), element(b"\x12\x54\xc3\x67", tags)), encode("m4a") + ilst]
    cases.append(encode("adts") + id3.ljust(600_000, b"\0") + encode("adts"))
    for data in cases:
        start = time.monotonic()
        with pytest.raises(MediaError, match="more than the allowed|are allowed"):
            load_media(data)
        assert time.monotonic() - start < 10


def with_reference(data, kind, content):
    """Return an MP4 file whose track refers to another file by an entry `kind` of its `dref` box."""
    at = data.index(b"dref") - 4
    size = int.from_bytes(data[at : at + 4], "big")
    dref = box(b"dref", bytes(4), struct.pack(">I", 1), box(kind, bytes(4), content))  # flags 0: in another file
    changed = bytearray(data[:at] + dref + data[at + size :])
    for parent in (b"moov", b"trak", b"mdia", b"minf", b"dinf"):  # they grow, too
        begin = changed.index(parent) - 4
        grown = int.from_bytes(changed[begin : begin + 4], "big") + len(dref) - size
        changed[begin : begin + 4] = grown.to_bytes(4, "big")
    return bytes(changed)


def test_references_to_other_files_are_not_followed(tmp_path, monkeypatch):
    data, target = encode("m4a"), tmp_path / "secret.m4a"
    shown = re.escape(str(target)[:60])  # longer paths are shortened
    target.write_bytes(encode("m4a", clip(level=0.1)))
    for kind, content in [(b"url ", f"file://{target}".encode() + b"\0"), (b"alis", bytes(200))]:
        item = load_media(with_reference(data, kind, content))
        assert item.content_hash == load_media(data).content_hash  # only its own bytes were read
    target.write_bytes(data)
    path = str(target).encode() + bytes(len(str(target)) % 2)
    aliased = with_reference(data, b"alis", bytes(150) + struct.pack(">HH", 2, len(path)) + path + b"\xff\xff\0\0")
    with pytest.raises(MediaError, match="no audio could be decoded"):
        load_media(aliased)
    monkeypatch.setattr(
        audio, "_FFMPEG_OPTIONS", {**audio._FFMPEG_OPTIONS, "enable_drefs": "1", "use_absolute_path": "1"}
    )
    with pytest.raises(MediaError, match=rf"refers to another file \('{shown}.*\), which is not opened"):
        load_media(aliased)
    monkeypatch.setattr(audio, "_refuse_to_open", None)
    with pytest.raises(MediaError, match="no audio could be decoded"):  # no protocol can open it
        load_media(aliased)
    with av.open(io.BytesIO(aliased), options={"enable_drefs": "1", "use_absolute_path": "1"}) as container:
        assert sum(frame.samples for frame in container.decode(audio=0)) >= len(clip())  # the reference works


@pytest.mark.parametrize(
    "content",
    [
        b"#EXTM3U\n#EXTINF:10,\n/etc/passwd\n",
        b"ffconcat version 1.0\nfile /etc/passwd\n",
        b"<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011'></MPD>",
        b"v=0\no=- 0 0 IN IP4 127.0.0.1\n",
        b"1\n00:00:00,000 --> 00:00:01,000\nhello\n",
        b"[Script Info]\n",
    ],
    ids=["hls", "concat", "dash", "sdp", "srt", "ass"],
)
@pytest.mark.parametrize("prefix", [b"", b"ID3\3\0\0\0\0\0\0", b"\x1aE\xdf\xa3", b"\0\0\0\x10ftypM4A \0\0\0\0"])
def test_playlists_and_subtitles_are_never_parsed(content, prefix, monkeypatch):
    monkeypatch.setattr(audio, "_refuse_to_open", lambda *_: pytest.fail("FFmpeg tried to open another file"))
    with pytest.raises(MediaError):
        load_media(prefix + content)


def test_other_codecs_are_refused_by_name():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        add_audio(container, "pcm_s16le", RATE, clip())()
    with pytest.raises(MediaError, match="codec is pcm_s16le; allowed in matroska files are opus, vorbis"):
        load_media(buffer.getvalue())


def test_a_damaged_packet_of_a_container_is_an_error():
    data = bytearray(encode("m4a"))
    start = data.index(b"mdat") + 4
    data[start + 200 : start + 4000] = bytes(3800)
    with pytest.raises(MediaError, match="cannot decode the audio content"):
        load_media(bytes(data))


@pytest.mark.parametrize("name", FORMATS)
def test_random_damage_ends_in_samples_or_a_named_error(name):
    data, generator = encode(name), np.random.default_rng(0)
    for _ in range(40):
        damaged = bytearray(data)
        for at in generator.integers(0, len(data), 20):
            damaged[at] = generator.integers(0, 256)
        try:
            assert len(load_media(bytes(damaged)).samples) > 0
        except MediaError as error:
            assert "<none>" not in str(error)


def test_pyav_is_imported_on_first_use_and_logs_nothing():
    code = (
        "import sys, mmlora.processors.media.loader as loader\n"
        "assert 'av' not in sys.modules\n"
        "data = sys.stdin.buffer.read()\n"
        "print(len(loader.load_media(data).samples))\n"
        "try: loader.load_media(data[:200] + bytes(len(data)))\n"
        "except Exception as error: print(type(error).__name__)\n"
    )
    for name in ("mp3", "webm"):
        run = subprocess.run([sys.executable, "-c", code], input=encode(name), capture_output=True, timeout=300)
        assert (run.returncode, run.stderr) == (0, b"")
        assert run.stdout.split()[0] == str(FFMPEG_SAMPLES[name]).encode()


def test_the_packet_limit_allows_the_longest_clips():
    """Ten minutes of AAC at 96 kHz and a video track of 120 frames per second."""
    assert containers.MAX_MP4_SAMPLES / 10 > 600 * 96_000 / 1024 + 600 * 120


@pytest.mark.parametrize("name", ["mp3", "adts"])
def test_id3_tags_in_front_are_skipped(name):
    data = encode(name)
    tag = b"ID3\4\0\0" + bytes((0, 0, 1, 0)) + bytes(128)
    assert sniff_modality(tag + data) == MODALITIES["audio"]
    assert load_media(tag + tag + data).content_hash == load_media(data).content_hash
