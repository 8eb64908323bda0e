"""`RequestRecord`: what is known of one request of `AsyncLLM`, and `RequestHistograms` over all of them.

Both are kept where the outputs arrive, on event loops: the engine thread has nothing to do with them. A request ends
here when its last output arrives, whoever still waits for it.
"""

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Final

from mmlora.engine.histogram import SECONDS, TOKENS, Histogram
from mmlora.inputs.engine_input import EngineInput
from mmlora.outputs import LoRAChoice, RequestMetrics, RequestOutput
from mmlora.sampling_params import SamplingParams
from mmlora.stream import Stream


@dataclass(frozen=True)
class MediaRecord:
    """One media item: its kind, the hash of its content and of how it was processed, and its sizes."""

    modality: str
    content_hash: str
    num_tokens: int
    num_feature_bytes: int


@dataclass(eq=False)
class RequestRecord:
    """One request so far.

    Attributes:
        request_id: the caller's.
        start_s, queued_s: when it was made, and when it was ready for the engine (monotonic).
        prompt: its text; None where only tokens were given, or before it was ready.
        params: its sampling parameters, once it was ready.
        times: what the last output told of its stages.
        finish_reasons: by answer, of those that ended.
    """

    request_id: str
    start_s: float
    queued_s: float = 0.0
    prompt: str | None = None
    params: SamplingParams | None = None
    times: RequestMetrics | None = None
    media: tuple[MediaRecord, ...] = ()
    lora: LoRAChoice | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    finish_reasons: dict[int, str] = field(default_factory=dict)
    last_token_s: dict[int, float] = field(default_factory=dict)  # by answer
    num_answers: int = 1

    @property
    def all_finish_reasons(self) -> list[str]:
        """Why each answer ended; those that did not will be aborted."""
        return [self.finish_reasons.get(index, "abort") for index in range(self.num_answers)]

    def queue(self, ready: EngineInput, now: float) -> None:
        """Note what a request is, once it is ready for the engine. It keeps neither media nor adapter alive."""
        self.queued_s, self.prompt, self.params, self.lora = now, ready.prompt, ready.params, ready.lora
        self.num_prompt_tokens, self.num_answers = len(ready.prompt_token_ids), ready.params.n
        items = [item.media for item in ready.media]
        self.media = tuple(
            MediaRecord(
                item.modality,
                item.content_hash,
                item.num_tokens,
                sum(tensor.nbytes for tensor in item.tensors.values()),
            )
            for item in items
        )


@dataclass(frozen=True)
class ReadyRequest:
    """A request that is ready for the engine, where its outputs will arrive, and what is known of it."""

    input: EngineInput
    stream: Stream
    record: RequestRecord


OPEN_RECORDS: Final[ContextVar[list[RequestRecord] | None]] = ContextVar("mmlora_open_records", default=None)
"""Where the requests that are made in this context are noted; a server sets a list for each of its own requests."""


class RequestHistograms:
    """Latencies (s) and lengths (tokens) of requests.

    Attributes:
        first_token, inter_token: from the call to the first token, and from each token of an answer to its next.
        queue: from the time that the engine could have begun to the time that it did, of requests that got a token.
        end_to_end: from the call to the last output.
        prompt_tokens, output_tokens: of requests that ended, all answers together.
    """

    def __init__(self) -> None:
        self.first_token = Histogram(SECONDS)
        self.inter_token = Histogram(SECONDS)
        self.queue = Histogram(SECONDS)
        self.end_to_end = Histogram(SECONDS)
        self.prompt_tokens = Histogram(TOKENS)
        self.output_tokens = Histogram(TOKENS)

    def take(self, record: RequestRecord, output: RequestOutput) -> None:
        """Bring the record of a request up to date with an output (a delta), and count what it tells."""
        times = output.metrics
        now = times.end_s
        record.times, record.lora, record.num_cached_tokens = times, output.lora, output.num_cached_tokens
        if record.num_output_tokens == 0 and any(part.token_ids for part in output.outputs):
            self.first_token.observe(times.first_token_s - record.start_s)
            self.queue.observe(times.scheduled_s - record.queued_s)
        for part in output.outputs:
            if part.finish_reason is not None:
                record.finish_reasons[part.index] = part.finish_reason
            self._take_tokens(record, part.index, part.token_ids, now)
        if output.finished:
            self.end_to_end.observe(now - record.start_s)
            self.prompt_tokens.observe(len(output.prompt_token_ids))
            self.output_tokens.observe(record.num_output_tokens)

    def _take_tokens(self, record: RequestRecord, index: int, token_ids: Sequence[int], now: float) -> None:
        if not token_ids:
            return
        last_s = record.last_token_s.get(index)
        if last_s is not None:
            self.inter_token.observe(now - last_s)
        record.last_token_s[index] = now
        record.num_output_tokens += len(token_ids)
