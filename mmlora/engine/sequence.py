"""`Request` and its `Sequence`s: the state of unfinished work, and the outputs built from it.

A request has `n` sequences, one per completion.
"""

import time
from collections.abc import Hashable
from dataclasses import dataclass, field
from enum import Enum, auto

import torch

from mmlora.engine.detokenizer import Detokenizer
from mmlora.errors import MMLoRAError
from mmlora.inputs.engine_input import EngineInput, MediaInput
from mmlora.lora.adapter import Adapter
from mmlora.outputs import CompletionOutput, RequestMetrics, RequestOutput, TokenLogprobs
from mmlora.sampling_params import SamplingParams
from mmlora.structured_outputs import Matcher
from mmlora.towers.base import BidirectionalSpan, PromptLayout


class Status(Enum):
    """State of a sequence in the scheduler."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(eq=False)
class Request:
    """A request in the engine; times are in seconds of the monotonic clock."""

    input: EngineInput
    arrival_s: float
    sequences: list["Sequence"] = field(default_factory=list)
    scheduled_s: float | None = None
    first_token_s: float | None = None
    num_cached_tokens: int | None = None  # set when its first sequence starts for the first time
    partial_prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=lambda: [None])
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # set once the whole prompt is computed
    error: MMLoRAError | None = None

    @property
    def request_id(self) -> str:
        """Id given by the caller."""
        return self.input.request_id

    @property
    def is_finished(self) -> bool:
        """Whether every sequence is finished."""
        return all(seq.status is Status.FINISHED for seq in self.sequences)


@dataclass(eq=False)
class Sequence:
    """One completion in progress: its tokens, how many of them have KV, and the blocks with that KV."""

    request: Request
    index: int
    token_ids: list[int]
    detokenizer: Detokenizer
    generator: torch.Generator
    status: Status = Status.WAITING
    num_computed_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)  # of the full blocks, set by the block manager
    span_digests: dict[BidirectionalSpan, bytes] = field(default_factory=dict)  # set by the block manager
    media_embeds: dict[int, torch.Tensor] = field(default_factory=dict)  # by media index: [num_embeds, hidden_size]
    slot: int | None = None  # LoRA slot held while running
    uses_long_rope_factors: bool = False  # longer than the model's original context length
    num_returned_tokens: int = 0  # tokens returned in deltas
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    matcher: Matcher | None = None  # advanced by every generated token

    @property
    def params(self) -> SamplingParams:
        """The request's sampling parameters."""
        return self.request.input.params

    @property
    def adapter(self) -> Adapter | None:
        """The adapter version that this sequence runs with."""
        return self.request.input.adapter

    @property
    def adapter_start(self) -> int:
        """First token that the adapter applies to; earlier ones are the base model's."""
        return self.request.input.adapter_start

    @property
    def group(self) -> Hashable:
        """What the sequence shares its turns with: its request, or the requests that were sent with it."""
        group = self.request.input.group
        return group if group is not None else self.request

    @property
    def priority(self) -> int:
        """The request's priority; lower is served earlier."""
        return self.request.input.priority

    @property
    def media(self) -> tuple[MediaInput, ...]:
        """The prompt's media items."""
        return self.request.input.media

    @property
    def layout(self) -> PromptLayout:
        """Rotary positions and bidirectional spans of the prompt."""
        return self.request.input.layout

    def positions(self, start: int, end: int, row: int) -> list[int] | range:
        """Return one row of the rotary positions of the tokens `[start, end)`."""
        layout = self.layout
        if layout.positions is None:
            return range(start, end)
        prompt = layout.positions[row][start:end]
        return [*prompt, *range(start + len(prompt) + layout.shift, end + layout.shift)]

    def bidirectional_spans_between(self, start: int, end: int) -> tuple[BidirectionalSpan, ...]:
        """Return the bidirectional spans that overlap `[start, end)`."""
        return tuple(span for span in self.layout.bidirectional_spans if span.start < end and start < span.end)

    def media_between(self, start: int, end: int) -> list[tuple[int, MediaInput]]:
        """Return the media items that overlap `[start, end)`, with their indices."""
        return [(index, item) for index, item in enumerate(self.media) if item.start < end and start < item.end]

    def drop_media(self, end: int) -> None:
        """Drop the embeddings of media items that end at or before `end`: their KV is computed."""
        for index in [index for index in self.media_embeds if self.media[index].end <= end]:
            del self.media_embeds[index]

    def whole_chunk_end(self, start: int, end: int) -> int:
        """Return the end of a chunk `[start, end)`, moved so that it does not split a bidirectional span."""
        for span in self.bidirectional_spans_between(end - 1, end + 1):
            if span.start < end < span.end:
                return span.start if span.start > start else span.end
        return end

    @property
    def num_prompt_tokens(self) -> int:
        """Number of prompt tokens, with placeholders expanded."""
        return len(self.request.input.prompt_token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        """Tokens generated so far."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_output_tokens(self) -> int:
        """Number of tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether this sequence computes its request's prompt log probabilities."""
        return self.index == 0 and self.params.prompt_logprobs is not None and self.request.prompt_logprobs is None


def build_output(request: Request, *, is_delta: bool) -> RequestOutput:
    """Build the output of an unfinished or finished request.

    Args:
        request: its state.
        is_delta: whether completions hold only what is new since the last call.
    """
    return RequestOutput(
        request_id=request.request_id,
        prompt=request.input.prompt,
        prompt_token_ids=request.input.prompt_token_ids,
        outputs=[_completion(seq, is_delta=is_delta) for seq in request.sequences],
        finished=request.is_finished,
        lora=request.input.lora,
        lora_request=request.input.lora_request,
        prompt_logprobs=request.prompt_logprobs,
        num_cached_tokens=request.num_cached_tokens or 0,
        num_media_tokens=request.input.num_media_tokens,
        metrics=_metrics(request),
        error=request.error,
    )


def _completion(seq: Sequence, *, is_delta: bool) -> CompletionOutput:
    tokens, start = seq.output_token_ids, 0
    if is_delta:
        start, seq.num_returned_tokens = seq.num_returned_tokens, len(tokens)
        text = seq.detokenizer.take_new_text(is_finished=seq.status is Status.FINISHED)
    else:
        text = seq.detokenizer.text
    has_logprobs = seq.params.logprobs is not None
    return CompletionOutput(
        index=seq.index,
        text=text,
        token_ids=tokens[start:],
        cumulative_logprob=seq.cumulative_logprob if has_logprobs else None,
        logprobs=seq.logprobs[start:] if has_logprobs else None,
        finish_reason=seq.finish_reason,
        stop_reason=seq.stop_reason,
    )


def _metrics(request: Request) -> RequestMetrics:
    now = time.monotonic()
    scheduled_s = request.scheduled_s or now
    return RequestMetrics(request.arrival_s, scheduled_s, max(scheduled_s, request.first_token_s or now), now)
