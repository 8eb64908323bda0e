"""Transcriptions by models with special prompts, and by models without support."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from openai import BadRequestError

from mmlora.outputs import CompletionOutput, LoRAChoice, RequestOutput
from mmlora.server.openai.transcriptions.output import TranscriptionBuilder
from mmlora.server.openai.transcriptions.protocol import TranscriptionRequest
from tests.checkpoints import save_text_model
from tests.families.table import save_family
from tests.processors.families.test_voxtral import SPECIAL, as_published
from tests.server.conftest import RunningServer, ServerFactory

pytestmark = pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")  # the openai client's translations API


def rendered(server: RunningServer, wav: bytes, monkeypatch: pytest.MonkeyPatch, **options: Any) -> str:
    """Transcribe a clip and return the prompt."""
    prompts: list[str] = []
    process = server.llm.engine.process_input

    def record(request_id: str, prompt: Any, *rest: Any) -> Any:
        ready = process(request_id, prompt, *rest)
        prompts.append(ready.prompt)
        return ready

    with monkeypatch.context() as patch, server.client as client:
        patch.setattr(server.llm.engine, "process_input", record)
        client.audio.transcriptions.create(
            model="tiny", file=("clip", wav), extra_body={"max_tokens": 2, "ignore_eos": True}, **options
        )
    return prompts[0]


def test_qwen3_asr_gets_context_and_language_around_the_clip(
    tmp_path: Path, wav: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_family(tmp_path / "model", "qwen3_asr")
    with ExitStack() as stack:
        with pytest.raises(BadRequestError, match="lacks the token '<asr_text>'"):
            rendered(ServerFactory(path, stack)(), wav, monkeypatch)
        file = path / "tokenizer.json"
        content = json.loads(file.read_text())
        token = {**content["added_tokens"][-1], "id": 300, "content": "<asr_text>", "special": False}
        file.write_text(json.dumps({**content, "added_tokens": [*content["added_tokens"], token]}))
        server = ServerFactory(path, stack)()
        clip = "<|im_start|>user\n<|audio_start|><|audio_pad|><|audio_end|><|im_end|>\n<|im_start|>assistant\n"
        assert rendered(server, wav, monkeypatch) == f"<|im_start|>system\n<|im_end|>\n{clip}"
        prompt = rendered(server, wav, monkeypatch, prompt="Zürich {{ 1 }}", language="de")
        assert prompt == f"<|im_start|>system\nZürich {{{{ 1 }}}}<|im_end|>\n{clip}language German<asr_text>"


def test_voxtral_is_prompted_by_a_token(tmp_path: Path, wav: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_family(tmp_path / "model", "voxtral")
    as_published(path)
    with ExitStack() as stack:
        with pytest.raises(BadRequestError, match=r"lacks the token '\[TRANSCRIBE\]'"):
            rendered(ServerFactory(path, stack)(), wav, monkeypatch)
        tokens = [
            {"rank": i, "token_str": token, "is_control": True} for i, token in enumerate((*SPECIAL, "[TRANSCRIBE]"))
        ]
        (path / "tekken.json").write_text(
            json.dumps({**json.loads((path / "tekken.json").read_text()), "special_tokens": tokens})
        )
        server = ServerFactory(path, stack)()
        assert rendered(server, wav, monkeypatch) == "<s>[INST][BEGIN_AUDIO][AUDIO][/INST][TRANSCRIBE]"
        prompt = rendered(server, wav, monkeypatch, language="fr")
        assert prompt == "<s>[INST][BEGIN_AUDIO][AUDIO][/INST]lang:fr[TRANSCRIBE]"
        ids = server.llm.tokenizer(prompt, add_special_tokens=False).input_ids
        assert ids[:5] == [1, 3, 6, 5, 4] and ids[-1] == len(SPECIAL)
        with pytest.raises(BadRequestError, match="prompt is not supported"):
            rendered(server, wav, monkeypatch, prompt="Zürich")
        with server.client as client, pytest.raises(BadRequestError, match="not trained to translate"):
            client.audio.translations.create(model="tiny", file=("clip", wav))


def test_a_text_model_does_not_transcribe(tmp_path: Path, wav: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_text_model(tmp_path / "model", "llama")
    with ExitStack() as stack:
        server = ServerFactory(path, stack)()
        with pytest.raises(BadRequestError, match="does not support transcription; it supports text only") as refused:
            rendered(server, wav, monkeypatch)
    assert (refused.value.param, refused.value.code) == ("model", "transcription_not_supported")


def test_a_clip_that_is_too_long_is_refused(tmp_path: Path, wav: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_family(tmp_path / "model", "qwen2_audio")  # accepts 2 s; the clip lasts 0.5 s
    long = wav[:40] + (16000 * 6).to_bytes(4, "little") + wav[44:] * 6
    with ExitStack() as stack:
        server = ServerFactory(path, stack)()
        assert "Transcribe the speech into text." in rendered(server, wav, monkeypatch)
        with pytest.raises(BadRequestError, match="this model accepts at most 2 s"):
            rendered(server, long, monkeypatch)


def outputs(*texts: str) -> list[RequestOutput]:
    """Return deltas of one output, a token each."""
    choice = LoRAChoice(None, None, "none")
    deltas = [CompletionOutput(0, text, [7]) for text in texts]
    deltas[-1].finish_reason = "stop"
    return [RequestOutput("id", None, [5], [delta], delta is deltas[-1], choice) for delta in deltas]


@pytest.mark.parametrize(
    ("texts", "deltas", "language"),
    [
        (("language Ger", "man<asr", "_text>", "Guten", " Tag"), ["", "Guten", " Tag"], "german"),
        (("language None<asr_text>",), [""], "none"),
        (("no mark ", "at all"), ["", "no mark at all"], "unknown"),
    ],
)
def test_the_detected_language_is_cut_from_the_text(texts: tuple[str, ...], deltas: list[str], language: str) -> None:
    form = TranscriptionRequest(file=b"", response_format="verbose_json")
    media: Any = SimpleNamespace(audio_duration_s=1.0)
    whole = TranscriptionBuilder(form, media, None, "<asr_text>").complete(outputs(*texts))
    assert (whole["text"], whole["language"]) == ("".join(deltas), language)
    builder = TranscriptionBuilder(form, media, None, "<asr_text>")
    events = [json.loads(event[6:]) for output in outputs(*texts) for event in builder.events(output)]
    assert [event["delta"] for event in events] == deltas
    done = json.loads(next(builder.last_events())[6:])
    assert done["text"] == whole["text"] and done["usage"]["output_tokens"] == len(texts)
