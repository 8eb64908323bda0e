"""`TranscriptionBuilder`: OpenAI's transcriptions and translations, whole or as events."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass

from starlette.responses import PlainTextResponse, Response

from mmlora.outputs import LoRAChoice, RequestOutput
from mmlora.server.openai.chat.output import list_logprobs
from mmlora.server.openai.output import DONE, Json, ResponseBuilder, count_tokens, event
from mmlora.server.openai.transcriptions.protocol import ResponseFormat

UNKNOWN_LANGUAGE = "unknown"


@dataclass(frozen=True)
class Asked:
    """What an answer must know of its request.

    Attributes:
        task: `transcribe` or `translate`.
        response_format: of a whole answer.
        has_logprobs: each token has its log probability.
        language: English name of the text's language, where it is known.
        duration_s: of the clip.
        mark: what stands between the language heard and the text; None where the model gives the text alone.
    """

    task: str
    response_format: ResponseFormat
    has_logprobs: bool
    language: str | None
    duration_s: float
    mark: str | None = None


class TranscriptionBuilder(ResponseBuilder):
    """One text in the making.

    Args:
        asked: what it answers.
    """

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._raw = ""  # all that the model wrote
        self._text = ""  # what of it is the text
        self._logprobs: list[Json] = []
        self._num_tokens = 0
        self._last: RequestOutput | None = None

    def response(self, outputs: list[RequestOutput], headers: Mapping[str, str]) -> Response:
        """The whole answer, for `response_format=text` the text and nothing else."""
        if self._asked.response_format != "text":
            return super().response(outputs, headers)
        return PlainTextResponse(self.complete(outputs)["text"], headers=dict(headers))

    def complete(self, outputs: list[RequestOutput]) -> Json:
        """The whole answer from all deltas."""
        for output in outputs:
            self._take(output)
        if self._asked.response_format != "verbose_json":
            return {"text": self._text, **self._end()}
        seconds = self._asked.duration_s
        return {
            "task": self._asked.task,
            "language": self._asked.language or self._heard_language() or UNKNOWN_LANGUAGE,
            "duration": seconds,
            "text": self._text,
            **self._end(),
            "usage": {"type": "duration", "seconds": seconds},
        }

    def lora(self, outputs: Iterable[RequestOutput]) -> LoRAChoice:
        """What the headers tell of the adapter."""
        return next(iter(outputs)).lora

    def events(self, output: RequestOutput) -> Iterator[str]:
        """What is new since the last output; the first event names the adapter, and comes even without text."""
        is_first, num_chars, num_logprobs = self._last is None, len(self._text), len(self._logprobs)
        self._take(output)
        delta, logprobs = self._text[num_chars:], self._logprobs[num_logprobs:]
        if is_first or delta or logprobs:
            content: Json = {"type": "transcript.text.delta", "delta": delta}
            if self._asked.has_logprobs:
                content["logprobs"] = logprobs
            yield event({**content, "lora": asdict(output.lora)} if is_first else content)

    def last_events(self) -> Iterator[str]:
        """The whole text with the token counts and the adapter, and the end."""
        yield event({"type": "transcript.text.done", "text": self._text, **self._end()})
        yield DONE

    def _take(self, output: RequestOutput) -> None:
        (completion,), mark = output.outputs, self._asked.mark
        self._last = output
        self._num_tokens += len(completion.token_ids)
        self._raw += completion.text
        if mark is None or mark in self._raw:
            self._text = self._raw.partition(mark)[2] if mark else self._raw
        elif output.finished:  # the model did not say which language it heard
            self._text = self._raw
        if self._asked.has_logprobs:
            entries = list_logprobs(output.outputs, 0)
            self._logprobs += [{name: entry[name] for name in ("token", "logprob", "bytes")} for entry in entries]

    def _heard_language(self) -> str | None:
        """What stands before the mark is `language English`."""
        mark = self._asked.mark
        if mark is None or mark not in self._raw:
            return None
        return self._raw.partition(mark)[0].strip().removeprefix("language").strip().lower() or None

    def _end(self) -> Json:
        """What a whole answer and the last event of a stream tell beside the text."""
        assert self._last is not None
        counts = count_tokens([self._last], self._num_tokens)
        details = counts["prompt_tokens_details"]
        logprobs = {"logprobs": self._logprobs} if self._asked.has_logprobs else {}
        return {
            **logprobs,
            "finish_reason": self._last.outputs[0].finish_reason,
            "usage": {
                "type": "tokens",
                "input_tokens": counts["prompt_tokens"],
                "output_tokens": counts["completion_tokens"],
                "total_tokens": counts["total_tokens"],
                "input_token_details": {name: details[name] for name in ("audio_tokens", "text_tokens")},
            },
            "lora": asdict(self._last.lora),
        }
