"""`EngineMetrics`: what the engine counts, as plain numbers. How they are exported is the server's business."""

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from mmlora.engine.scheduler import Scheduler
from mmlora.engine.sequence import Request, Status
from mmlora.inputs.engine_input import EngineInput
from mmlora.lora.adapter import Adapter, AdapterIdentity
from mmlora.lora.mix import LoRAMix
from mmlora.lora.store.manager import LoRAManager
from mmlora.towers.encoder import MediaEncoder


@dataclass(frozen=True)
class AdapterMetrics:
    """One adapter: how many requests run and wait with any version of it, where it is, and its loads so far.

    A `LoRAMix` is here, too, while requests ask for it.
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


@dataclass(frozen=True)
class EngineMetrics:
    """The state of an engine at one moment; names that begin with `total` only ever grow.

    Attributes:
        adapters: by name, defaults after those that were added.
        total_requests: by the reason of the adapter choice, such as `explicit` or `default:audio`.
        total_finished: answers by finish reason.
        total_prompt_tokens: of requests that have begun.
        total_prefix_queries: those of them that were looked for in the prefix cache.
        total_cached_tokens: those of them that it held.
        max_loras: slots; 0 without adapters.
        total_encoder_hits, total_encoder_misses: media items found in the encoder cache, or encoded.
        num_host_adapter_bytes: all adapter versions that anybody holds, defaults included.
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
    """What an engine loaded.

    Attributes:
        model_class: of `transformers`.
        modalities: of media that the model takes, sorted.
        num_parameters: by part of the model, adapters not counted.
        num_lora_slots: adapters in one step; 0 without LoRA.
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
    """What is counted as requests come and go."""

    reasons: Counter[str] = field(default_factory=Counter)
    finished: Counter[str] = field(default_factory=Counter)
    num_prompt_tokens: int = 0
    num_prefix_queries: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0

    def add(self, request: EngineInput) -> None:
        """Count a request that was queued."""
        self.reasons[request.lora.reason] += 1

    def begin(self, request: Request, *, is_prefix_sought: bool) -> None:
        """Count a request that is scheduled for the first time."""
        num_tokens = len(request.input.prompt_token_ids)
        self.num_prompt_tokens += num_tokens
        self.num_prefix_queries += num_tokens if is_prefix_sought else 0
        self.num_cached_tokens += request.num_cached_tokens or 0

    def finish(self, request: Request) -> None:
        """Count a request that ended."""
        for seq in request.sequences:
            self.finished[seq.finish_reason or "none"] += 1


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
        counters: what the engine counted so far.
        requests: unfinished ones.
        scheduler, encoder, lora: of the engine.
        default_adapters: by modality key.
        default_load_s: seconds that loading each of them took, by adapter name.
    """
    running: list[Request] = []
    waiting: list[Request] = []
    for request in requests:
        is_running = any(seq.status is Status.RUNNING for seq in request.sequences)
        (running if is_running else waiting).append(request)
    block_manager, slots = scheduler.block_manager, scheduler.slots
    defaults = {adapter.identity: adapter for adapter in default_adapters.values()}
    num_loads, load_s = lora.loads if lora is not None else (0, 0.0)
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
        total_encoder_hits=encoder.num_hits if encoder is not None else 0,
        total_encoder_misses=encoder.num_encoded if encoder is not None else 0,
        num_encoder_cache_bytes=encoder.num_bytes if encoder is not None else 0,
        max_loras=slots.max_loras if slots is not None else 0,
        num_host_adapter_bytes=lora.num_host_bytes if lora is not None else 0,
        num_device_adapter_bytes=lora.num_device_bytes if lora is not None else 0,
        total_adapter_loads=num_loads,
        total_adapter_load_s=load_s,
        total_adapter_evictions=lora.num_evictions if lora is not None else 0,
    )


def _adapters(
    lora: LoRAManager,
    defaults: Mapping[AdapterIdentity, Adapter],
    default_load_s: Mapping[str, float],
    running: list[Request],
    waiting: list[Request],
) -> Iterator[AdapterMetrics]:
    num_running, num_waiting = (Counter(_kinds_of(requests, defaults)) for requests in (running, waiting))
    infos = {info.name: info for info in lora.infos()}
    asked = [(name, is_mix) for name, is_default, is_mix in num_running + num_waiting if not is_default]
    for name, is_mix in dict.fromkeys([*((name, False) for name in infos), *asked]):
        key = (name, False, is_mix)  # what was removed and still runs is among them
        info = None if is_mix else infos.get(name)
        is_on_host, is_on_device = (info.is_on_host, info.is_on_device) if info else (False, False)
        num_loads, load_s = (info.num_loads, info.load_s) if info else (0, 0.0)
        counts = num_running[key], num_waiting[key]
        yield AdapterMetrics(name, False, *counts, is_on_host, is_on_device, num_loads, load_s, is_mix)
    for adapter in defaults.values():
        key = adapter.name, True, False
        counts = num_running[key], num_waiting[key]
        load_s = default_load_s[adapter.name]
        yield AdapterMetrics(adapter.name, True, *counts, True, lora.is_on_device(adapter), 1, load_s)


def _kinds_of(requests: list[Request], defaults: Container[AdapterIdentity]) -> Iterator[tuple[str, bool, bool]]:
    """For each request with an adapter its name, whether it is a default, and whether it is a mix."""
    for request in requests:
        adapter = request.input.adapter
        if adapter is not None:
            yield adapter.name, adapter.identity in defaults, isinstance(request.input.lora_request, LoRAMix)
