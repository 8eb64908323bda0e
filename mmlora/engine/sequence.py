"""`Request` and its `Sequence`s: everything the engine knows about work in progress.

A request has `n` sequences, one per answer. The scheduler moves sequences; the model runner appends tokens.
"""

import time
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
    """Where a sequence is."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(eq=False)
class Request:
    """A request in the engine, with the times (s, monotonic) of its stages."""

    input: EngineInput
    arrival_s: float
    sequences: list["Sequence"] = field(default_factory=list)
    scheduled_s: float | None = None
    first_token_s: float | None = None
    num_cached_tokens: int | None = None  # set when its first sequence is first admitted
    partial_prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=lambda: [None])
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # set once the whole prompt is computed
    error: MMLoRAError | None = None

    @property
    def request_id(self) -> str:
        """The caller's id."""
        return self.input.request_id

    @property
    def is_finished(self) -> bool:
        """Whether every answer has ended."""
        return all(seq.status is Status.FINISHED for seq in self.sequences)


@dataclass(eq=False)
class Sequence:
    """One answer in the making: tokens, how many have KV, and the blocks that hold it."""

    request: Request
    index: int
    token_ids: list[int]
    detokenizer: Detokenizer
    generator: torch.Generator
    status: Status = Status.WAITING
    num_computed_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)  # of the full blocks, filled by the block manager
    span_digests: dict[BidirectionalSpan, bytes] = field(default_factory=dict)  # likewise
    media_embeds: dict[int, torch.Tensor] = field(default_factory=dict)  # media index: [num_tokens, hidden_size]
    slot: int | None = None  # LoRA slot held while running
    uses_long_rope_factors: bool = False  # beyond the length at which longrope changes its factors
    num_returned_tokens: int = 0  # tokens given out as deltas
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    matcher: Matcher | None = None  # after the tokens generated so far

    @property
    def params(self) -> SamplingParams:
        """The request's sampling parameters."""
        return self.request.input.params

    @property
    def adapter(self) -> Adapter | None:
        """The adapter version that this sequence started with."""
        return self.request.input.adapter

    @property
    def adapter_start(self) -> int:
        """First token that the adapter changes; all before are the base model's."""
        return self.request.input.adapter_start

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
        """Positions of the prompt's tokens, and which of them see more than those before them."""
        return self.request.input.layout

    def positions(self, start: int, end: int, row: int) -> list[int] | range:
        """Rotary positions of the tokens `[start, end)`, one row of them."""
        layout = self.layout
        if layout.positions is None:
            return range(start, end)
        prompt = layout.positions[row][start:end]
        return [*prompt, *range(start + len(prompt) + layout.shift, end + layout.shift)]

    def bidirectional_spans_between(self, start: int, end: int) -> tuple[BidirectionalSpan, ...]:
        """Spans that hold some of the tokens `[start, end)`."""
        return tuple(span for span in self.layout.bidirectional_spans if span.start < end and start < span.end)

    def drop_media(self, end: int) -> None:
        """Drop the embeddings of media items that lie before `end`: they are not needed any more."""
        for index in [index for index in self.media_embeds if self.media[index].end <= end]:
            del self.media_embeds[index]

    def whole_chunk_end(self, start: int, end: int) -> int:
        """Where a chunk from `start` to about `end` may end: not inside a span whose tokens all see each other."""
        for span in self.bidirectional_spans_between(end - 1, end + 1):
            if span.start < end < span.end:
                return span.start if span.start > start else span.end
        return end

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt, placeholders expanded."""
        return len(self.request.input.prompt_token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        """Tokens generated so far."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_output_tokens(self) -> int:
        """How many tokens were generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether this sequence computes its request's prompt log probabilities."""
        return self.index == 0 and self.params.prompt_logprobs is not None and self.request.prompt_logprobs is None


def build_output(request: Request, *, is_delta: bool) -> RequestOutput:
    """State what a request has brought.

    Args:
        request: running or ended.
        is_delta: only what is new since the last call, not everything so far.
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
