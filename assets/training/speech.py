"""Synthesize speech with espeak-ng and turn it into the model's own log-mel features.

The corpus is a folder of shards (`features-K.npy`, fp16, and `items-K.json`); its only labels are texts.
"""

import argparse
import io
import json
import random
import shutil
import subprocess
import wave
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import soxr
import torch
from transformers import Phi4MultimodalFeatureExtractor

from mmlora.assets.training import pictures, world

RATE = 16_000
FRAMES_PER_BUCKET = 32
SEEN_ACCENTS = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-gbclan", "en-gb-x-rp")
SEEN_VARIANTS = (
    "",
    "+m1",
    "+m2",
    "+m3",
    "+m4",
    "+m5",
    "+m6",
    "+f1",
    "+f2",
    "+f3",
    "+Alex",
    "+Annie",
    "+Mike",
    "+steph",
    "+adam",
    "+Alicia",
    "+Andy",
    "+belinda",
    "+benjamin",
    "+boris",
    "+caleb",
    "+david",
    "+edward",
    "+Gene",
    "+Henrique",
    "+Hugo",
    "+iven",
    "+Jacky",
    "+john",
    "+Lee",
    "+marcelo",
    "+michel",
    "+paul",
    "+quincy",
    "+rob",
    "+sandro",
    "+travis",
    "+zac",
)
SEEN_VOICES = tuple(accent + variant for accent in SEEN_ACCENTS for variant in SEEN_VARIANTS)
UNSEEN_VOICES = (
    "en-029",
    "en-gb-x-gbcwmd",
    "en-us-nyc",
    "en-us+m7",
    "en-gb+m8",
    "en-us+f4",
    "en-gb+f5",
    "en-us+Andrea",
    "en-gb+Michael",
    "en-us+linda",
    "en-029+m3",
    "en-us-nyc+f2",
)


@dataclass(frozen=True)
class Utterance:
    """One spoken sentence: what is said, why (`kind`: sentence, sum or picture), and the answer of a sum."""

    text: str
    kind: str
    answer: str = ""


def require_espeak() -> str:
    """Return the path of espeak-ng, or raise RuntimeError that names the Debian package."""
    path = shutil.which("espeak-ng")
    if path is None:
        raise RuntimeError("espeak-ng was not found on PATH; install it with: apt-get install espeak-ng")
    return path


def synthesize(text: str, voice: str, *, pitch: int = 50, speed: int = 160, gap: int = 0) -> np.ndarray:
    """Speak `text` with an espeak-ng voice.

    Args:
        text: What to say.
        voice: An espeak-ng voice, with an optional `+variant`.
        pitch: 0 to 99.
        speed: Words per minute.
        gap: Pause between words in units of 10 ms.

    Returns:
        Mono samples at 16 kHz, fp32 in [-1, 1].
    """
    command = [require_espeak(), "-v", voice, "-p", str(pitch), "-s", str(speed), "-g", str(gap), "--stdout", text]
    data = subprocess.run(command, capture_output=True, check=True).stdout
    with wave.open(io.BytesIO(data)) as reader:
        rate = reader.getframerate()
    samples = np.frombuffer(data[44:], dtype=np.int16).astype(np.float32) / 32768
    return np.asarray(soxr.resample(samples, rate, RATE), dtype=np.float32)


def speak(text: str, voice: str, rng: random.Random) -> np.ndarray:
    """Speak `text` at a random pitch, speed and loudness, with silence around it and, half of the time, noise."""
    gap = rng.choice([0, 0, 0, rng.randint(1, 6)])
    samples = synthesize(text, voice, pitch=rng.randint(25, 75), speed=rng.randint(120, 190), gap=gap)
    before, after = (np.zeros(int(rng.uniform(0, 0.35) * RATE), np.float32) for _ in range(2))
    samples = np.concatenate([before, samples, after]) * rng.uniform(0.3, 1.0)
    return add_noise(samples, rng)


def add_noise(samples: np.ndarray, rng: random.Random) -> np.ndarray:
    """Add white or low-pass noise at 12 to 40 dB below the signal to half of all clips."""
    if rng.random() < 0.5:
        return samples
    generator = np.random.default_rng(rng.randrange(2**32))
    noise = generator.standard_normal(len(samples)).astype(np.float32)
    if rng.random() < 0.5:
        noise = np.convolve(noise, np.ones(8, np.float32) / 8**0.5, mode="same")
    level = float(np.sqrt(np.mean(samples**2))) * 10 ** (-rng.uniform(12, 40) / 20)
    return np.clip(samples + level * noise, -1, 1).astype(np.float32)


def feature_extractor() -> Phi4MultimodalFeatureExtractor:
    """Return the extractor that matches the assistant's `time_reduction` of 4."""
    return Phi4MultimodalFeatureExtractor(audio_compression_rate=4)


def features(samples: np.ndarray, extractor: Phi4MultimodalFeatureExtractor) -> np.ndarray:
    """Compute log-mel features of one 16 kHz clip, `[num_frames, 80]` fp32."""
    lengths = torch.tensor([len(samples)])
    return np.asarray(extractor._torch_extract_fbank_features(torch.from_numpy(samples)[None], lengths)[0])


def pad_to_bucket(samples: np.ndarray) -> np.ndarray:
    """Append silence until the clip has a whole number of buckets of 32 frames."""
    frames = max(0, (len(samples) - 400 + 159) // 160) + 1
    buckets = -(-frames // FRAMES_PER_BUCKET)
    return np.pad(samples, (0, 400 + 160 * (buckets * FRAMES_PER_BUCKET - 1) - len(samples)))


def sample_utterance(rng: random.Random, *, held_out: bool, kind: str = "") -> Utterance:
    """Draw an utterance of `kind`, or a sentence to transcribe (70 %), a sum (18 %) or a picture question (12 %)."""
    kind = kind or rng.choices(("sentence", "sum", "picture"), (70, 18, 12))[0]
    if kind == "sentence":
        return Utterance(world.sample_sentence(rng, held_out=held_out), kind)
    if kind == "sum":
        text, answer = world.sample_sum(rng, held_out=held_out)
        return Utterance(text, kind, answer)
    return Utterance(pictures.sample_spoken_question(rng, held_out=held_out), kind)


def _render_one(job: tuple[Utterance, str, int]) -> np.ndarray:
    utterance, voice, seed = job
    return pad_to_bucket(speak(utterance.text, voice, random.Random(seed)))


def render_shard(
    folder: Path, index: int, size: int, voices: tuple[str, ...], *, held_out: bool, kind: str = ""
) -> None:
    """Render one shard of the corpus, of all kinds or of one; the result depends on nothing but the arguments."""
    target = folder / f"items-{index}.json"
    if target.exists():
        return
    rng = random.Random(f"speech {kind}{index} {held_out}")
    utterances = [sample_utterance(rng, held_out=held_out, kind=kind) for _ in range(size)]
    jobs = [(utterance, rng.choice(voices), rng.randrange(2**32)) for utterance in utterances]
    folder.mkdir(parents=True, exist_ok=True)
    extractor = feature_extractor()
    items, blocks, offset = [], [], 0
    with ThreadPoolExecutor(2) as pool:
        for (utterance, voice, _), samples in zip(jobs, pool.map(_render_one, jobs), strict=True):
            block = features(samples, extractor).astype(np.float16)
            items.append({**asdict(utterance), "voice": voice, "start": offset, "frames": len(block)})
            blocks.append(block)
            offset += len(block)
    np.save(folder / f"features-{index}.npy", np.concatenate(blocks))
    target.with_suffix(".tmp").write_text(json.dumps(items))
    target.with_suffix(".tmp").rename(target)


def main() -> None:
    """Render the training corpus, more spoken questions, and small development sets of seen and unseen voices."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "checkpoints" / "speech")
    parser.add_argument("--shards", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--size", type=int, default=3000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for index in args.shards:
        render_shard(args.folder, index, args.size, SEEN_VOICES, held_out=False)
    for index in range(2):
        render_shard(args.folder / "questions", index, args.size, SEEN_VOICES, held_out=False, kind="picture")
    for name, voices in (("seen", SEEN_VOICES), ("unseen", UNSEEN_VOICES)):
        render_shard(args.folder / name, 0, 200, voices, held_out=True)


if __name__ == "__main__":
    main()
