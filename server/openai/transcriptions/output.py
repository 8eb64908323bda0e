"""`TranscriptionBuilder`: transcriptions and translations, whole or as events."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict

from starlette.responses import PlainTextResponse, Response

from mmlora.outputs import RequestOutput
from mmlora.processors.media.loader import PromptMedia
from mmlora.server.openai.logprobs import list_logprobs
from mmlora.server.openai.output import DONE, Json, ResponseBuilder, count_tokens, event
from mmlora.server.openai.transcriptions.protocol import AudioRequest

UNKNOWN_LANGUAGE = "unknown"


class TranscriptionBuilder(ResponseBuilder):
    """Builds the response to one transcription or translation.

    Args:
        form: the request.
        media: the clip, whose duration is known when it has been decoded.
        language: English name of the text's language, if known.
        separator: string between the detected language and the text in the model's output; None if the output is only
            the text.
    """

    def __init__(self, form: AudioRequest, media: PromptMedia, language: str | None, separator: str | None) -> None:
        self._form = form
        self._media = media
        self._language = language
        self._separator = separator
        self._raw = ""  # the model's output so far
        self._text = ""  # its part that is the transcription
        self._logprobs: list[Json] = []
        self._num_tokens = 0
        self._last: RequestOutput | None = None

    def response(self, outputs: list[RequestOutput], headers: Mapping[str, str]) -> Response:
        """Return the whole HTTP response; plain text for `response_format=text`."""
        if self._form.response_format != "text":
            return super().response(outputs, headers)
        return PlainTextResponse(self.complete(outputs)["text"], headers=dict(headers))

    def complete(self, outputs: list[RequestOutput]) -> Json:
        """Return the whole response, built from all output deltas."""
        for output in outputs:
            self._add(output)
        if self._form.response_format != "verbose_json":
            return {"text": self._text, **self._end_fields()}
        return {
            "task": self._form.TASK,
            "language": self._language or self._detected_language() or UNKNOWN_LANGUAGE,
            "duration": self._media.audio_duration_s,
            "text": self._text,
            **self._end_fields(),
            "usage": {"type": "duration", "seconds": self._media.audio_duration_s},
        }

    def events(self, output: RequestOutput) -> Iterator[str]:
        """Yield the events of one output delta; the first one names the adapter and is sent even without text."""
        is_first, num_chars, num_logprobs = self._last is None, len(self._text), len(self._logprobs)
        self._add(output)
        delta, logprobs = self._text[num_chars:], self._logprobs[num_logprobs:]
        if is_first or delta or logprobs:
            content: Json = {"type": "transcript.text.delta", "delta": delta}
            if self._form.has_logprobs:
                content["logprobs"] = logprobs
            if self._form.continuous_usage:
                content["usage"] = self._usage()
            yield event({**content, "lora": asdict(output.lora)} if is_first else content)

    def last_events(self) -> Iterator[str]:
        """Yield the whole text with the token counts and the adapter, and the end marker."""
        yield event({"type": "transcript.text.done", "text": self._text, **self._end_fields()})
        yield DONE

    def _add(self, output: RequestOutput) -> None:
        (completion,), separator = output.outputs, self._separator
        self._last = output
        self._num_tokens += len(completion.token_ids)
        self._raw += completion.text
        if separator is None or separator in self._raw:
            self._text = self._raw.partition(separator)[2] if separator else self._raw
        elif output.finished:  # the model did not name a language
            self._text = self._raw
        if self._form.has_logprobs:
            entries = list_logprobs(output.outputs, 0)
            self._logprobs += [{name: entry[name] for name in ("token", "logprob", "bytes")} for entry in entries]

    def _detected_language(self) -> str | None:
        """Return the language named before the separator, as in `language English`."""
        separator = self._separator
        if separator is None or separator not in self._raw:
            return None
        return self._raw.partition(separator)[0].strip().removeprefix("language").strip().lower() or None

    def _end_fields(self) -> Json:
        """Return the fields that a whole response and the last event of a stream have in addition to the text."""
        assert self._last is not None
        logprobs = {"logprobs": self._logprobs} if self._form.has_logprobs else {}
        return {
            **logprobs,
            "finish_reason": self._last.outputs[0].finish_reason,
            "usage": self._usage(),
            "lora": asdict(self._last.lora),
        }

    def _usage(self) -> Json:
        assert self._last is not None
        counts = count_tokens([self._last], self._num_tokens)
        details = counts["prompt_tokens_details"]
        return {
            "type": "tokens",
            "input_tokens": counts["prompt_tokens"],
            "output_tokens": counts["completion_tokens"],
            "total_tokens": counts["total_tokens"],
            "input_token_details": {name: details[name] for name in ("audio_tokens", "text_tokens")},
        }
