"""What comes back for a request."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from mmlora.errors import MMLoRAError
from mmlora.lora.mix import LoRAMix
from mmlora.lora.request import LoRARequest


@dataclass(frozen=True)
class Logprob:
    """Log probability of one token, its rank in the vocabulary (1 is likeliest) and its text."""

    logprob: float
    rank: int
    decoded_token: str


TokenLogprobs = dict[int, Logprob]


@dataclass
class CompletionOutput:
    """One answer. `finish_reason`: `stop`, `length`, `abort`, `error`, or None while it runs."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(frozen=True)
class LoRAChoice:
    """The adapter that was applied and why.

    `reason` is `explicit`, `explicit:base`, `default:<modalities>`, `conflict:<modalities>` or `none`.
    """

    adapter: str | None
    digest: str | None
    reason: str
    warning: str | None = None


@dataclass
class RequestMetrics:
    """Seconds spent waiting, until the first token, and from there to the last.

    `arrival_s` is when the engine took the request, on the monotonic clock; the properties are on that clock, too.
    """

    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    arrival_s: float = 0.0

    @property
    def scheduled_s(self) -> float:
        """When the request began to run."""
        return self.arrival_s + self.queue_s

    @property
    def first_token_s(self) -> float:
        """When its first token came."""
        return self.scheduled_s + self.prefill_s

    @property
    def end_s(self) -> float:
        """When the output that tells this was made."""
        return self.first_token_s + self.decode_s


@dataclass
class RequestOutput:
    """The state of a request; from `AsyncLLM`, `outputs` holds what is new since the one before.

    `num_media_tokens` are the prompt's tokens that stand for media, by modality. `error` is set when `finished` came
    from a failure; such a request's outputs have `finish_reason="error"`.
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
