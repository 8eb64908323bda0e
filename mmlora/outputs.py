"""Outputs of a request: `RequestOutput` and what it contains."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from mmlora.errors import MMLoRAError
from mmlora.lora.mix import LoRAMix
from mmlora.lora.request import LoRARequest


@dataclass(frozen=True)
class Logprob:
    """Log probability of one token, its rank in the vocabulary (1 is the most likely) and its text."""

    logprob: float
    rank: int
    decoded_token: str


TokenLogprobs = dict[int, Logprob]


@dataclass
class CompletionOutput:
    """One completion. `finish_reason` is `stop`, `length`, `abort`, `error`, or None while it is running."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(frozen=True)
class LoRAChoice:
    """The adapter that was applied, and why it was chosen.

    `reason` is `explicit`, `explicit:base`, `default:<modalities>`, `conflict:<modalities>` or `none`.
    """

    adapter: str | None
    digest: str | None
    reason: str
    warning: str | None = None


@dataclass
class RequestMetrics:
    """When a request reached each stage, in seconds of the monotonic clock.

    Attributes:
        arrival_s: the engine queued it.
        scheduled_s: it was first scheduled.
        first_token_s: its first token was sampled.
        end_s: this output was built.
    """

    arrival_s: float = 0.0
    scheduled_s: float = 0.0
    first_token_s: float = 0.0
    end_s: float = 0.0

    @property
    def queue_s(self) -> float:
        """Seconds spent waiting."""
        return self.scheduled_s - self.arrival_s

    @property
    def prefill_s(self) -> float:
        """Seconds from the start to the first token."""
        return self.first_token_s - self.scheduled_s

    @property
    def decode_s(self) -> float:
        """Seconds from the first token to this output."""
        return self.end_s - self.first_token_s


@dataclass
class RequestOutput:
    """State of a request. From `AsyncLLM`, `outputs` hold only what is new since the previous output.

    `num_media_tokens` counts the prompt's placeholder tokens by modality. `error` is set when the request failed; its
    completions then have `finish_reason="error"`.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    lora: LoRAChoice
    lora_request: LoRARequest | LoRAMix | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0
    num_media_tokens: Mapping[str, int] = field(default_factory=dict)
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    error: MMLoRAError | None = None
