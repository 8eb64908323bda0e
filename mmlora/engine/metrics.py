"""Metrics as plain numbers: `EngineMetrics` of the engine, `RequestRecord` and `RequestHistograms` of requests.

The server exports them. The engine thread counts; records and histograms are updated on event loops.
"""

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Final

from mmlora.engine.scheduler import Scheduler
from mmlora.engine.sequence import Request, Status
from mmlora.inputs.engine_input import EngineInput
from mmlora.lora.adapter import Adapter, AdapterIdentity
from mmlora.lora.mix import LoRAMix
from mmlora.lora.store.manager import LoRAManager
from mmlora.outputs import LoRAChoice, RequestMetrics, RequestOutput
from mmlora.sampling_params import SamplingParams
from mmlora.towers.encoder import MediaEncoder


@dataclass(frozen=True)
class AdapterMetrics:
    """Metrics of one adapter, all versions together; or of one `LoRAMix`, while requests use it.

    Attributes:
        is_pinned: whether the adapter is exempt from eviction, on the host and in its slot.
        rank: largest rank of its modules; 0 while nothing holds the adapter in memory.
    """

    name: str
    is_default: bool
    num_requests_running: int
    num_requests_waiting: int
    is_on_host: bool
    is_on_device: bool
    num_loads: int
    load_s: float
    is_mix: bool = False
    is_pinned: bool = False
    rank: int = 0


@dataclass(frozen=True)
class EngineMetrics:
    """A snapshot of an engine; fields that start with `total` are counters, the others gauges.

    Attributes:
        adapters: those added first, then defaults.
        total_requests: by the reason of the adapter choice, for example `explicit` or `default:audio`.
        total_finished: completions by finish reason.
        total_prompt_tokens: of requests that were scheduled.
        total_prefix_queries: prompt tokens looked up in the prefix cache.
        total_cached_tokens: prompt tokens found there.
        block_size: tokens of one KV block.
        max_loras: number of slots; 0 without LoRA.
        total_encoder_hits, total_encoder_misses: media items found in the encoder cache, and encoded.
        num_host_adapter_bytes: all adapter versions in host memory, defaults included.
    """

    adapters: tuple[AdapterMetrics, ...]
    num_requests_running: int
    num_requests_waiting: int
    total_requests: Mapping[str, int]
    total_finished: Mapping[str, int]
    total_prompt_tokens: int
    total_prefix_queries: int
    total_cached_tokens: int
    total_output_tokens: int
    total_preemptions: int
    num_kv_blocks: int
    num_kv_blocks_used: int
    block_size: int
    total_encoder_hits: int
    total_encoder_misses: int
    num_encoder_cache_bytes: int
    max_loras: int
    num_host_adapter_bytes: int
    num_device_adapter_bytes: int
    total_adapter_loads: int
    total_adapter_load_s: float
    total_adapter_evictions: int


@dataclass(frozen=True)
class EngineSummary:
    """What an engine has loaded.

    Attributes:
        model_class: name of the `transformers` class.
        modalities: media that the model accepts, sorted.
        num_parameters: by part of the model.
        num_lora_slots: maximum number of adapters in one step; 0 without LoRA.
        encoder_cache_bytes: limit of the encoder cache; 0 for a text-only model.
    """

    model_class: str
    modalities: tuple[str, ...]
    num_parameters: Mapping[str, int]
    dtype: str
    device: str
    num_lora_slots: int
    kv_cache_bytes: int
    kv_cache_tokens: int
    encoder_cache_bytes: int


@dataclass
class RequestCounters:
    """Counters of the engine thread: requests by reason of the adapter choice, completions by finish reason, tokens."""

    reasons: Counter[str] = field(default_factory=Counter)
    finished: Counter[str] = field(default_factory=Counter)
    num_prompt_tokens: int = 0
    num_prefix_queries: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0

    def begin(self, request: Request, *, uses_prefix_cache: bool) -> None:
        """Count a request that is scheduled for the first time."""
        num_tokens = len(request.input.prompt_token_ids)
        self.num_prompt_tokens += num_tokens
        self.num_prefix_queries += num_tokens if uses_prefix_cache else 0
        self.num_cached_tokens += request.num_cached_tokens or 0


def measure(
    counters: RequestCounters,
    requests: Iterable[Request],
    scheduler: Scheduler,
    encoder: MediaEncoder | None,
    lora: LoRAManager | None,
    default_adapters: Mapping[str, Adapter],
    default_load_s: Mapping[str, float],
) -> EngineMetrics:
    """Return a snapshot of an engine's metrics.

    Args:
        counters: what the engine has counted.
        requests: the unfinished requests.
        scheduler, encoder, lora: parts of the engine.
        default_adapters: by modality key.
        default_load_s: seconds that loading each default adapter took, by adapter name.
    """
    running: list[Request] = []
    waiting: list[Request] = []
    for request in requests:
        is_running = any(seq.status is Status.RUNNING for seq in request.sequences)
        (running if is_running else waiting).append(request)
    block_manager, slots = scheduler.block_manager, scheduler.slots
    defaults = {adapter.identity: adapter for adapter in default_adapters.values()}
    num_loads, load_s = (lora.cache.num_loads, lora.cache.load_s) if lora is not None else (0, 0.0)
    return EngineMetrics(
        adapters=tuple(_adapters(lora, defaults, default_load_s, running, waiting)) if lora is not None else (),
        num_requests_running=len(running),
        num_requests_waiting=len(waiting),
        total_requests=dict(counters.reasons),
        total_finished=dict(counters.finished),
        total_prompt_tokens=counters.num_prompt_tokens,
        total_prefix_queries=counters.num_prefix_queries,
        total_cached_tokens=counters.num_cached_tokens,
        total_output_tokens=counters.num_output_tokens,
        total_preemptions=scheduler.num_preemptions,
        num_kv_blocks=block_manager.num_blocks,
        num_kv_blocks_used=block_manager.num_blocks - block_manager.num_free_blocks,
        block_size=block_manager.block_size,
        total_encoder_hits=encoder.num_hits if encoder is not None else 0,
        total_encoder_misses=encoder.num_encoded if encoder is not None else 0,
        num_encoder_cache_bytes=encoder.num_bytes if encoder is not None else 0,
        max_loras=slots.max_loras if slots is not None else 0,
        num_host_adapter_bytes=lora.cache.num_bytes if lora is not None else 0,
        num_device_adapter_bytes=lora.num_device_bytes if lora is not None else 0,
        total_adapter_loads=num_loads,
        total_adapter_load_s=load_s,
        total_adapter_evictions=lora.cache.num_evictions if lora is not None else 0,
    )


def _adapters(
    lora: LoRAManager,
    defaults: Mapping[AdapterIdentity, Adapter],
    default_load_s: Mapping[str, float],
    running: list[Request],
    waiting: list[Request],
) -> Iterator[AdapterMetrics]:
    num_running, num_waiting = (Counter(_kinds_of(requests, defaults)) for requests in (running, waiting))
    infos = {info.name: info for info in lora.list_infos()}
    requested = [(name, is_mix) for name, is_default, is_mix in num_running + num_waiting if not is_default]
    for name, is_mix in dict.fromkeys([*((name, False) for name in infos), *requested]):
        key = (name, False, is_mix)  # also of a removed adapter that requests still use
        info = None if is_mix else infos.get(name)
        counts = num_running[key], num_waiting[key]
        if info is None:
            yield AdapterMetrics(name, False, *counts, False, False, 0, 0.0, is_mix)
            continue
        places, rank = (info.is_on_host, info.is_on_device), info.rank
        yield AdapterMetrics(
            name, False, *counts, *places, info.num_loads, info.load_s, is_pinned=info.is_pinned, rank=rank
        )
    for adapter in defaults.values():
        key = adapter.name, True, False
        counts = num_running[key], num_waiting[key]
        is_on_device, load_s, rank = lora.is_on_device(adapter), default_load_s[adapter.name], adapter.report.max_rank
        yield AdapterMetrics(adapter.name, True, *counts, True, is_on_device, 1, load_s, rank=rank)


def _kinds_of(requests: list[Request], defaults: Container[AdapterIdentity]) -> Iterator[tuple[str, bool, bool]]:
    """Yield the adapter's name, whether it is a default, and whether it is a mix, for each request with an adapter."""
    for request in requests:
        adapter = request.input.adapter
        if adapter is not None:
            yield adapter.name, adapter.identity in defaults, isinstance(request.input.lora_request, LoRAMix)


SECONDS: Final = tuple(digit * 10.0**power for power in range(-3, 3) for digit in (1, 2.5, 5))  # 1 ms to 500 s
TOKENS: Final = tuple(2.0**power for power in range(18))


@dataclass(frozen=True)
class HistogramCounts:
    """A snapshot of a histogram.

    Attributes:
        bounds: upper bounds of the buckets, inclusive; the last bucket has none.
        cumulative: number of values up to each bound, then of all values.
        total: sum of all values.
    """

    bounds: tuple[float, ...]
    cumulative: tuple[int, ...]
    total: float

    @property
    def count(self) -> int:
        """Number of values."""
        return self.cumulative[-1]


class Histogram:
    """Histogram with fixed buckets. Thread-safe.

    Args:
        bounds: upper bounds of the buckets, ascending.
    """

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(self._bounds) + 1)
        self._total = 0.0
        self._lock = threading.Lock()

    def observe(self, value: float) -> None:
        """Add a value."""
        with self._lock:
            self._counts[bisect_left(self._bounds, value)] += 1
            self._total += value

    def counts(self) -> HistogramCounts:
        """Return a snapshot."""
        with self._lock:
            return HistogramCounts(self._bounds, tuple(accumulate(self._counts)), self._total)


@dataclass(frozen=True)
class MediaRecord:
    """One media item of a request; the hash covers its content and processor options."""

    modality: str
    content_hash: str
    num_tokens: int
    num_feature_bytes: int


@dataclass(eq=False)
class RequestRecord:
    """Data of one request of `AsyncLLM`, for logs, traces and histograms.

    Attributes:
        request_id: id given by the caller.
        start_s, queued_s: when `AsyncLLM` was called, and when the processed request was queued (monotonic clock).
        prompt: text of the prompt; None for a prompt of token ids, or before the request is queued.
        params: sampling parameters; None before the request is queued.
        times: metrics of the last output.
        finish_reasons: by index of the completion, for finished ones.
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
    last_token_s: dict[int, float] = field(default_factory=dict)  # by index of the completion
    num_completions: int = 1
    is_aborted: bool = False  # before it was queued

    @property
    def all_finish_reasons(self) -> list[str]:
        """Finish reason of each completion; unfinished ones count as aborted."""
        return [self.finish_reasons.get(index, "abort") for index in range(self.num_completions)]

    def queue(self, request_input: EngineInput, now: float) -> None:
        """Record a processed request when it is queued, without keeping its media or adapter alive."""
        self.queued_s = now
        self.prompt, self.params, self.lora = request_input.prompt, request_input.params, request_input.lora
        self.num_prompt_tokens, self.num_completions = len(request_input.prompt_token_ids), request_input.params.n
        items = [item.media for item in request_input.media]
        self.media = tuple(
            MediaRecord(
                item.modality,
                item.content_hash,
                item.num_tokens,
                sum(tensor.nbytes for tensor in item.tensors.values()),
            )
            for item in items
        )


OPEN_RECORDS: Final[ContextVar[list[RequestRecord] | None]] = ContextVar("mmlora_open_records", default=None)
"""List to which the requests made in this context add their records; the server sets one per HTTP request."""


class RequestHistograms:
    """Histograms of the latencies (s) and lengths (tokens) of requests.

    Attributes:
        first_token, inter_token: from the call to the first token, and between tokens of one completion.
        queue: from queueing to the first step, for requests with at least one token.
        end_to_end: from the call to the final output.
        prompt_tokens, output_tokens: of finished requests, all completions together.
    """

    def __init__(self) -> None:
        self.first_token = Histogram(SECONDS)
        self.inter_token = Histogram(SECONDS)
        self.queue = Histogram(SECONDS)
        self.end_to_end = Histogram(SECONDS)
        self.prompt_tokens = Histogram(TOKENS)
        self.output_tokens = Histogram(TOKENS)

    def observe(self, record: RequestRecord, output: RequestOutput) -> None:
        """Update the record of a request with a delta output, and add its values."""
        times = output.metrics
        now = times.end_s
        record.times, record.lora, record.num_cached_tokens = times, output.lora, output.num_cached_tokens
        if record.num_output_tokens == 0 and any(part.token_ids for part in output.outputs):
            self.first_token.observe(times.first_token_s - record.start_s)
            self.queue.observe(times.scheduled_s - record.queued_s)
        for part in output.outputs:
            if part.finish_reason is not None:
                record.finish_reasons[part.index] = part.finish_reason
            self._observe_tokens(record, part.index, part.token_ids, now)
        if output.finished:
            self.end_to_end.observe(now - record.start_s)
            self.prompt_tokens.observe(len(output.prompt_token_ids))
            self.output_tokens.observe(record.num_output_tokens)

    def _observe_tokens(self, record: RequestRecord, index: int, token_ids: list[int], now: float) -> None:
        if not token_ids:
            return
        last_s = record.last_token_s.get(index)
        if last_s is not None:
            self.inter_token.observe(now - last_s)
        record.last_token_s[index] = now
        record.num_output_tokens += len(token_ids)
