"""Scaling, channels, sample rates, resampling, and invalid audio."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from mmlora.errors import MediaError
from mmlora.processors.media.audio import resample
from mmlora.processors.media.items import MediaLimits
from mmlora.processors.media.loader import load_media


@pytest.mark.parametrize("dtype, full", [("int8", 2**7), ("int16", 2**15), ("int32", 2**31)])
def test_integers_are_scaled_by_their_full_scale(dtype, full):
    item = load_media((np.array([-full, 0, full // 2], dtype), 16000))
    assert item.samples.tolist() == [-1.0, 0.0, 0.5]


def test_unsigned_bytes_are_centred():
    assert load_media((np.array([0, 128, 192], np.uint8), 8000)).samples.tolist() == [-1.0, 0.0, 0.5]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_floats_are_kept(dtype):
    assert load_media((np.array([-1.0, 0.25], dtype), 16000)).samples.tolist() == [-1.0, 0.25]


def test_lists_and_tensors_are_arrays():
    assert load_media(([-0.5, 0.5], 16000)).samples.tolist() == [-0.5, 0.5]
    assert load_media((torch.tensor([-0.5, 0.5], dtype=torch.bfloat16), 16000)).samples.tolist() == [-0.5, 0.5]


def test_stereo_is_averaged_in_both_layouts(tone, encode_audio):
    stereo = np.stack([tone(hz=300), -0.25 * tone(hz=500)], axis=1)  # [n, 2]
    mono = stereo.mean(axis=1)
    for array in (stereo, stereo.T, torch.from_numpy(stereo.T.copy())):
        np.testing.assert_allclose(load_media((array, 16000)).samples, mono, atol=1e-7)
    np.testing.assert_allclose(load_media(encode_audio(stereo, subtype="FLOAT")).samples, mono, atol=1e-7)
    assert load_media((tone()[None], 16000)).samples.tolist() == tone().tolist()


@pytest.mark.parametrize(
    "array, named",
    [
        (np.zeros(0, np.float32), "no samples"),
        (np.zeros((2, 0), np.float32), "no samples"),
        (np.zeros((2, 3, 4), np.float32), r"shape \(2, 3, 4\)"),
        (np.zeros((40, 40), np.float32), "40 channels"),
        (np.array([0.0, np.nan], np.float32), "NaN"),
        (np.array([0.0, np.inf], np.float32), "NaN or infinite"),
        (np.array([0.0, 12000.0], np.float32), "12000"),
        (np.array([0, 1], np.int64), "int64"),
        (np.array([True, False]), "bool"),
        (np.array(["a"]), "<U1"),
        (["a", "b"], "list"),
        ("abc", "str"),
    ],
)
def test_bad_arrays_are_refused_by_name(array, named):
    with pytest.raises(MediaError, match=named):
        load_media((array, 16000))


@pytest.mark.parametrize("rate", [0, -16000, 999, 10**9, 16000.5, float("nan"), float("inf"), True, None, "16000"])
def test_bad_rates_are_refused(rate):
    with pytest.raises(MediaError, match="sample rate"):
        load_media((np.zeros(1000, np.float32), rate))


@pytest.mark.parametrize("rate", [16000, 16000.0, np.int64(16000), np.float32(16000)])
def test_whole_rates_are_accepted(rate):
    assert load_media((np.zeros(1000, np.float32), rate)).sample_rate == 16000


@pytest.mark.parametrize("source", [8000, 22050, 44100, 48000])
def test_resampling_keeps_a_tone(source, tone):
    item = load_media((tone(source, source), source))  # one second
    resampled = resample(item, 16000)
    assert len(resampled) == 16000 and resampled.dtype == np.float32
    middle = slice(2000, -2000)  # without the ringing of the filter at both ends
    np.testing.assert_allclose(resampled[middle], tone(16000)[middle], atol=2e-3)


def test_equal_rate_is_not_resampled(tone):
    item = load_media((tone(), 16000))
    assert resample(item, 16000) is item.samples


@pytest.mark.parametrize("format", ["FLAC", "OGG", "MP3"])
@pytest.mark.parametrize("kept", [0.01, 0.3, 0.7, 0.93])
def test_truncated_files_are_refused(format, kept, encode_audio):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 48000).astype(np.float32)
    data = encode_audio(noise, format=format)
    with pytest.raises(MediaError):
        load_media(data[: int(len(data) * kept)])


def test_flac_of_unknown_length_is_read_to_its_end(encode_audio, tone):
    data = bytearray(encode_audio(tone(), format="FLAC"))
    assert data[:4] == b"fLaC" and data[4] & 0x7F == 0  # STREAMINFO comes first
    expected = load_media(bytes(data)).content_hash
    data[8 + 13] &= 0xF0  # the 36 bits of total samples
    data[8 + 14 : 8 + 18] = bytes(4)
    assert load_media(bytes(data)).content_hash == expected
    with pytest.raises(MediaError, match="more than the allowed 0.4 s"):
        load_media(bytes(data), MediaLimits(max_duration_s=0.4))


def test_the_sample_limit_is_independent_of_the_rate(encode_audio):
    for content in (encode_audio(), (np.zeros(8000, np.float32), 384_000)):
        with pytest.raises(MediaError, match="audio of 8000 samples: at most 7999 are allowed"):
            load_media(content, MediaLimits(max_samples=7999))


@pytest.mark.parametrize("format", ["WAV", "FLAC", "OGG"])
def test_length_limit_is_read_from_the_header(format, encode_audio, monkeypatch):
    monkeypatch.setattr("mmlora.processors.media.audio._read_mono", lambda *_: pytest.fail("decoded before the check"))
    with pytest.raises(MediaError, match="lasts 0.5 s, more than the allowed 0.4 s"):
        load_media(encode_audio(format=format), MediaLimits(max_duration_s=0.4))


def test_length_limit_holds_for_arrays_and_mp3(encode_audio, tone):
    for content in (encode_audio(format="MP3"), (tone(), 16000)):
        with pytest.raises(MediaError, match="more than the allowed 0.4 s"):
            load_media(content, MediaLimits(max_duration_s=0.4))


def test_not_a_number_in_a_file_is_refused(encode_audio, tone):
    samples = tone()
    samples[17] = np.nan
    with pytest.raises(MediaError, match="NaN"):
        load_media(encode_audio(samples, subtype="FLOAT"))


def test_a_file_without_samples_is_refused(encode_audio):
    with pytest.raises(MediaError, match="no samples"):
        load_media(encode_audio(np.zeros(0, np.float32)))


def test_the_audio_libraries_are_not_imported_before_they_are_needed():
    code = (
        "import sys; sys.modules['soundfile'] = sys.modules['librosa'] = None\n"
        "import mmlora.models.families, mmlora.processors.media.loader\n"
        "from mmlora.processors.media.loader import load_media\n"
        "assert load_media(([0.0] * 9, 16000)).sample_rate == 16000\n"
        "try: load_media(b'fLaC' + bytes(99))\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("MediaError") and "soundfile" in run.stdout
