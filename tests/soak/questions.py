"""Requests of a soak test and their expected texts, computed in advance by an engine with one request at a time."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import soundfile

from mmlora import BASE, LLM, LoRAMix, LoRARequest, RequestOutput, SamplingParams
from mmlora.models.families import FAMILIES
from tests.checkpoints import PHI4_ADAPTERS, randomize_adapter, save_adapter, save_phi4
from tests.media import clip, picture

MIN_GAP = 2e-3  # between the log probabilities of the two likeliest tokens; batching changes logits by up to 1e-4
TRANSCRIBE = FAMILIES["phi4_multimodal"].transcription.transcribe  # prompt of the transcription endpoint for this model
MIX = {"fixed": 0.5, "other": 0.5}  # weights of the served mix


@dataclass(frozen=True)
class Question:
    """A request without an adapter.

    Attributes:
        name: unique.
        body: of a chat, or of a completion if it has a `prompt`.
        kinds: modalities of its media.
        clip: the file to transcribe, if the chat is equivalent to a transcription.
    """

    name: str
    body: Mapping[str, Any]
    kinds: frozenset[str]
    clip: bytes | None = None


@dataclass
class QuestionSet:
    """Questions and the text that the server must return for each, with every adapter.

    Attributes:
        model: directory of the model.
        questions: all questions.
        by_digest: text by name of the question and digest of the adapter; None is the base model.
        digests: digest of each adapter, by name.
        paths: directory of each adapter, by name.
    """

    model: Path
    questions: list[Question] = field(default_factory=list)
    by_digest: dict[tuple[str, str | None], str] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    paths: dict[str, Path] = field(default_factory=dict)

    def expected(self, question: Question, digest: str | None) -> str | None:
        """Return the text; None for an unknown digest."""
        return self.by_digest.get((question.name, digest))


def prepare(folder: Path, seed: int = 0) -> QuestionSet:
    """Create a model, its adapters, and questions whose outputs have no near-ties with any adapter."""
    model = save_phi4(folder / "model")
    question_set = QuestionSet(model)
    for name, spec, own_seed in (
        ("audio", PHI4_ADAPTERS["everything"], 11),
        ("fixed", PHI4_ADAPTERS["text"], 12),
        ("other", PHI4_ADAPTERS["text"], 13),
        ("v0", PHI4_ADAPTERS["text"], 14),
        ("v1", PHI4_ADAPTERS["everything"], 15),
        ("v2", PHI4_ADAPTERS["text"], 16),
        ("v3", PHI4_ADAPTERS["everything"], 17),
    ):
        question_set.paths[name] = save_adapter(model, folder / name, spec)
        randomize_adapter(question_set.paths[name], own_seed)
    llm = LLM(
        model=str(model),
        enable_lora=True,
        max_loras=len(question_set.paths) + 1,
        enable_prefix_caching=False,
        max_num_seqs=1,
        device="cpu",
    )
    requests: dict[str, Any] = {name: llm.add_lora(name, str(path)) for name, path in question_set.paths.items()}
    mix = LoRAMix([(requests[name], scale) for name, scale in MIX.items()])
    candidates = _candidates(random.Random(seed))
    wanted = {"text": 6, "audio": 2, "transcription": 2, "image": 3, "audio+image": 2, "completion": 4}
    for kind, count in wanted.items():
        while count:
            question = candidates(kind)
            found = _compute_texts(llm, question, [*requests.values(), mix])
            if found is not None:
                question_set.questions.append(question)
                for name, (digest, text) in found.items():
                    question_set.by_digest[question.name, digest] = text
                    if name is not None and digest is not None:
                        question_set.digests[name] = digest
                count -= 1
    return question_set


def _compute_texts(
    llm: LLM, question: Question, loras: list[LoRARequest | LoRAMix]
) -> dict[str | None, tuple[str | None, str]] | None:
    """Return digest and text by adapter; None if any output has a near-tie."""
    found: dict[str | None, tuple[str | None, str]] = {}
    for lora in (BASE, *loras):
        output = _ask(llm, question, lora)
        for top in output.outputs[0].logprobs or ():
            first, second = sorted((entry.logprob for entry in top.values()), reverse=True)[:2]
            if first - second < MIN_GAP:
                return None
        name = lora.lora_name if isinstance(lora, LoRARequest) else None if lora is BASE else "mix"
        found[name] = output.lora.digest, output.outputs[0].text
    return found


def _ask(llm: LLM, question: Question, lora: Any) -> RequestOutput:
    params = SamplingParams(temperature=0, max_tokens=question.body["max_tokens"], logprobs=2)
    if "messages" in question.body:
        return llm.chat(question.body["messages"], params, use_tqdm=False, lora_request=lora)[0]
    return llm.generate(question.body["prompt"], params, lora_request=lora, use_tqdm=False)[0]


def _candidates(rng: random.Random) -> Any:
    """Return a function that creates the next question of a kind."""

    def words() -> str:
        return " ".join("".join(rng.choices("abcdefghij", k=rng.randint(2, 7))) for _ in range(rng.randint(2, 30)))

    def make(kind: str) -> Question:
        name, seed = f"{kind}-{rng.getrandbits(48):x}", rng.getrandbits(30)
        options: dict[str, Any] = {"temperature": 0, "max_tokens": rng.randint(4, 12)}
        if kind == "completion":
            return Question(name, {"prompt": words(), **options}, frozenset())
        kinds = {"text": "", "transcription": "audio"}.get(kind, kind)
        parts: list[dict[str, Any]] = [{"type": "text", "text": TRANSCRIBE if kind == "transcription" else words()}]
        if "image" in kinds:
            url = f"data:image/png;base64,{_base64(_png(seed))}"
            parts.insert(0, {"type": "image_url", "image_url": {"url": url}})
        if "audio" in kinds:
            audio = {"data": _base64(_wav(seed)), "format": "wav"}
            parts.insert(0, {"type": "input_audio", "input_audio": audio})
        body = {"messages": [{"role": "user", "content": parts}], **options}
        sent = _wav(seed) if kind == "transcription" else None
        return Question(name, body, frozenset(filter(None, kinds.split("+"))), sent)

    return make


def _wav(seed: int) -> bytes:
    buffer = io.BytesIO()
    samples, rate = clip(0.4 + seed % 7 / 10, seed)
    soundfile.write(buffer, samples, rate, format="WAV")
    return buffer.getvalue()


def _png(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(42 + seed % 3 * 21, 42, seed).save(buffer, "PNG")
    return buffer.getvalue()


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
