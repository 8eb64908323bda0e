"""`LLMEngine`: queue requests, compute steps, return outputs.

One step is: schedule, run, append, collect. `LLM` steps in the caller's thread, `AsyncLLM` in a dedicated thread. Calls
from several threads are served one after the other (`EngineLock`); those marked thread-safe do not wait.
"""

import functools
import itertools
import logging
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch

from mmlora.config import EngineArgs
from mmlora.engine.detokenizer import Detokenizer
from mmlora.engine.loading import load_engine_parts
from mmlora.engine.metrics import EngineMetrics, EngineSummary, RequestCounters, measure
from mmlora.engine.model_input import build_model_input, group_by_slot
from mmlora.engine.sampler import SampledToken, Sampler, StepResult
from mmlora.engine.scheduler import ScheduledSequence
from mmlora.engine.sequence import Request, Sequence, Status, build_output
from mmlora.errors import AdapterError, MMLoRAError, RequestError
from mmlora.inputs.engine_input import EngineInput
from mmlora.inputs.input_processor import Prompt
from mmlora.lora.request import LoRARequest
from mmlora.lora.store.manager import LoRAInfo, LoRAManager
from mmlora.outputs import RequestOutput
from mmlora.sampling_params import RequestOutputKind, SamplingParams
from mmlora.towers.encoder import EncoderJob
from mmlora.utils.locks import EngineLock

logger = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")


def _lora_method(change: Callable[Concatenate[LoRAManager, P], T]) -> Callable[Concatenate["LoRAMethods", P], T]:
    """Wrap a method of `LoRAManager` so that the slots are synced after it."""

    @functools.wraps(change)
    def method(self: "LoRAMethods", /, *args: P.args, **kwargs: P.kwargs) -> T:
        result = change(self.lora, *args, **kwargs)
        self.sync_slots()
        return result

    return method


class LoRAMethods(ABC):
    """Life cycle of adapters, safe in any thread; `LoRAManager` documents the methods."""

    @property
    @abstractmethod
    def lora(self) -> LoRAManager:
        """The adapters of the engine, on the host and in the slots.

        Raises:
            RequestError: the engine runs without LoRA.
        """

    @abstractmethod
    def between_steps(self, function: Callable[[], None]) -> None:
        """Call a short function while no step runs."""

    def sync_slots(self) -> None:
        """Sync the slots with the adapters on the host, between two steps."""
        self.between_steps(self.lora.sync_slots)

    add_lora = _lora_method(LoRAManager.add)
    reload_lora = _lora_method(LoRAManager.reload)
    remove_lora = _lora_method(LoRAManager.remove)

    def pin_lora(self, lora: str | int, *, is_pinned: bool = True) -> None:
        """Exempt an adapter from eviction, on the host and in its slot; or undo that, with `is_pinned=False`.

        At most `max_loras - 1` slots are held this way. With `max_loras=1`, pinned adapters stay on the host only.

        Raises:
            AdapterError: it is unknown, cannot be loaded, or too many are pinned; nothing has changed.
        """
        if is_pinned:
            self.lora.pin(lora, self.between_steps)
        else:
            self.lora.unpin(lora)
            self.sync_slots()

    def list_loras(self) -> list[LoRAInfo]:
        """Return the state of every known adapter, in the order of their first loads; defaults are not included."""
        return self.lora.list_infos()


def _exclusive(method: Callable[Concatenate["LLMEngine", P], T]) -> Callable[Concatenate["LLMEngine", P], T]:
    """Wrap a method so that no other thread uses the engine while it runs."""

    @functools.wraps(method)
    def exclusive(self: "LLMEngine", /, *args: P.args, **kwargs: P.kwargs) -> T:
        with self.lock.call():
            return method(self, *args, **kwargs)

    return exclusive


class LLMEngine(LoRAMethods):
    """Serves requests on one base model with many adapters.

    Args:
        args: all options.

    Raises:
        ConfigError: options, model and default adapters are incompatible.
        AdapterError: a default adapter cannot be loaded.
    """

    def __init__(self, args: EngineArgs) -> None:
        parts = load_engine_parts(args)
        self.args = args
        self.lock = EngineLock()
        self.tokenizer = parts.tokenizer
        self.max_model_len = parts.max_model_len
        self.input_processor = parts.input_processor
        self.runner = parts.runner
        self.sampler = Sampler(parts.tokenizer, parts.stop_ids)
        self.block_manager = parts.block_manager
        self.scheduler = parts.scheduler
        self.host_cache = parts.adapters.host_cache
        self.slots = parts.adapters.slots
        self.default_adapters = parts.adapters.defaults
        self.stop_ids = parts.stop_ids
        self.sampling_defaults = parts.sampling_defaults
        self.transcription_prompt = parts.transcription_prompt
        self._lora = parts.adapters.lora
        self._default_load_s = parts.adapters.default_load_s
        self._long_length = parts.long_length
        self._num_seeds = itertools.count()
        self._requests: dict[str, Request] = {}
        self._warned: set[str] = set()
        self._counters = RequestCounters()

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._requests)

    @property
    def default_loras(self) -> dict[str, LoRARequest]:
        """The default adapters by modality key (`audio`, `audio+image`)."""
        return {key: request for key, (request, _) in self.default_adapters.items()}

    @property
    def lora(self) -> LoRAManager:
        """See `LoRAMethods.lora`."""
        if self._lora is None:
            raise RequestError("adapters cannot be managed: the engine has enable_lora=False")
        return self._lora

    def between_steps(self, function: Callable[[], None]) -> None:
        """See `LoRAMethods.between_steps`."""
        with self.lock.pause():
            function()

    @property
    def metrics(self) -> EngineMetrics:
        """A snapshot of all metrics. Thread-safe."""
        return measure(
            self._counters,
            list(self._requests.values()),  # an atomic copy
            self.scheduler,
            self.runner.encoder,
            self._lora,
            {key: adapter for key, (_, adapter) in self.default_adapters.items()},
            self._default_load_s,
        )

    def summary(self) -> EngineSummary:
        """Return what the engine has loaded."""
        model, cache, processor = self.runner.model, self.runner.kv_cache, self.input_processor.processor
        towers = self.runner.encoder.towers if self.runner.encoder is not None else None
        num_parameters: Counter[str] = Counter()
        for name, parameter in model.named_parameters():
            num_parameters[towers.part_of(name) if towers is not None else "language_model"] += parameter.numel()
        return EngineSummary(
            model_class=type(model).__name__,
            modalities=tuple(sorted(processor.modalities)) if processor is not None else (),
            num_parameters=num_parameters,
            dtype=str(model.dtype).removeprefix("torch."),
            device=str(self.runner.device),
            num_lora_slots=self.slots.max_loras if self.slots is not None else 0,
            kv_cache_bytes=cache.num_bytes,
            kv_cache_tokens=self.block_manager.num_blocks * self.args.block_size,
            encoder_cache_bytes=self.args.encoder_cache_memory_bytes if towers is not None else 0,
        )

    def default_sampling_params(self, **changes: Any) -> SamplingParams:
        """Return the sampling parameters of the model's `generation_config.json`, updated with `changes`."""
        return SamplingParams(**{**self.sampling_defaults, **changes})

    def process_input(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams | None = None,
        lora_request: LoRARequest | object | None = None,
        priority: int = 0,
    ) -> EngineInput:
        """Tokenize a prompt, process its media, and load its adapter: the slow part of `add_request`. Thread-safe.

        Raises:
            RequestError: the request cannot be served; `MediaError` and `AdapterError` are subclasses.
            EngineInUseError: after a fork.
        """
        self.lock.check_process()
        params = params or self.default_sampling_params()
        return self.input_processor.process(request_id, prompt, params, lora_request, priority)

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams | None = None,
        lora_request: LoRARequest | object | None = None,
        priority: int = 0,
    ) -> None:
        """Queue a request.

        Args:
            request_id: unique among unfinished requests.
            prompt: text, token ids, or a mapping with `multi_modal_data`.
            params: by default the model's own.
            lora_request: an adapter, `BASE`, or None to choose one by the media.
            priority: lower is served earlier; needs `scheduling_policy="priority"`.

        Raises:
            RequestError: the request cannot be served; nothing was queued.
        """
        self.add_input(self.process_input(request_id, prompt, params, lora_request, priority))

    @_exclusive
    def add_input(self, request_input: EngineInput) -> None:
        """Queue a request that `process_input` returned.

        Raises:
            RequestError: a request with this id is unfinished.
            EngineInUseError: see `EngineLock.call`, for `abort_request` and `step`, too.
        """
        if request_input.request_id in self._requests:
            raise RequestError(f"request_id {request_input.request_id!r} is in use by an unfinished request")
        warning = request_input.lora.warning
        if warning is not None and warning not in self._warned:
            self._warned.add(warning)
            logger.warning("%s", warning)
        request = Request(request_input, arrival_s=time.monotonic())
        request.sequences = [self._new_sequence(request, index) for index in range(request_input.params.n)]
        self._requests[request.request_id] = request
        self._counters.reasons[request_input.lora.reason] += 1
        if request_input.adapter is not None:
            self.lora.retain(request_input.adapter)
        self.scheduler.add(request.sequences[0])  # its siblings follow once the prompt is in the prefix cache

    @_exclusive
    def abort_request(self, request_id: str, *, is_delta: bool = False) -> RequestOutput | None:
        """Abort an unfinished request.

        Returns:
            Its final output, with `finish_reason="abort"` for unfinished completions; None if the id is unknown.
        """
        request = self._requests.get(request_id)
        if request is None:
            return None
        self._end(request, "abort")
        return self._collect([request], is_delta=is_delta)[0]

    @_exclusive
    def step(self, *, is_delta: bool = False) -> list[RequestOutput]:
        """Compute one step.

        Args:
            is_delta: completions hold only what is new since the last call, unless the request has an `output_kind`.

        Returns:
            The state of every request that has new tokens or is finished; each request has exactly one finished output.
        """
        return self._collect(self._advance(), is_delta=is_delta)

    def prefetch_loras(self, lora_requests: Iterable[object]) -> None:
        """Load the missing adapters of several requests concurrently; `process_input` reports the errors."""
        if self._lora is not None:
            self._lora.prefetch(lora_requests)

    def must_load_lora(self, lora_request: object) -> bool:
        """Return whether `process_input` has to load an adapter for this request. Thread-safe."""
        is_default = any(lora_request is default for default, _ in self.default_adapters.values())
        return self._lora is not None and not is_default and self._lora.is_missing(lora_request)

    def _new_sequence(self, request: Request, index: int) -> Sequence:
        params = request.input.params
        generator = torch.Generator(device=self.runner.device)
        generator.manual_seed(params.seed + index if params.seed is not None else self._next_seed())
        detokenizer = Detokenizer(
            self.tokenizer,
            request.input.prompt_token_ids,
            stop=params.stop_strings,
            include_stop=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens,
            is_enabled=params.detokenize,
            kept_token_ids=params.kept_special_token_ids or (),
        )
        seq = Sequence(request, index, list(request.input.prompt_token_ids), detokenizer, generator)
        seq.uses_long_rope_factors = self._needs_long_rope_factors(seq)
        if request.input.matchers:
            seq.matcher = request.input.matchers[index]
        return seq

    def _next_seed(self) -> int:
        """Return the seed of a sequence whose request has none; deterministic for each `EngineArgs.seed`."""
        return (self.args.seed * 1_000_003 + next(self._num_seeds)) % 2**63

    def _needs_long_rope_factors(self, seq: Sequence) -> bool:
        """Return whether a sequence is so long that longrope uses its long factors."""
        return self._long_length is not None and len(seq.token_ids) > self._long_length

    def _advance(self) -> list[Request]:
        scheduled = self.scheduler.schedule()
        touched = self._fail(self.scheduler.failed)
        self.scheduler.failed.clear()
        scheduled = [item for item in scheduled if item.seq.status is Status.RUNNING]  # some failed with a sibling
        now = time.monotonic()
        for item in scheduled:
            if item.seq.request.scheduled_s is None:
                item.seq.request.scheduled_s = now
                uses_prefix_cache = self.block_manager.uses_prefix_cache(item.seq)
                self._counters.begin(item.seq.request, uses_prefix_cache=uses_prefix_cache)
        if scheduled:
            touched += self._run(scheduled)
        return list(dict.fromkeys(touched))

    def _run(self, scheduled: list[ScheduledSequence]) -> list[Request]:
        """Run the model and process its results; an error fails only the requests of this step."""
        try:
            result = self._compute(scheduled)
        except Exception as error:  # the engine must survive it
            logger.exception("a step failed")
            failure = MMLoRAError(f"the model failed on this step: {error}")
            return self._fail([(item.seq, failure) for item in scheduled])
        touched = self._fail(result.failed)
        for item in scheduled:
            if item.seq.status is Status.RUNNING:
                item.seq.num_computed_tokens = item.end
                self.block_manager.mark_computed(item.seq)
        for token in result.sampled:
            if token.seq.status is Status.RUNNING:
                self._append(token)
                touched.append(token.seq.request)
        return touched

    def _compute(self, scheduled: list[ScheduledSequence]) -> StepResult:
        """Encode media, run the forwards of a step, and sample."""
        result = StepResult()
        for uniform_slot, items in _divide(self._encode_media(scheduled, result)).items():
            try:
                items = group_by_slot(items)
                logits = self.runner.run(build_model_input(items, self.runner.num_position_rows, uniform_slot))
                self.sampler.run(items, logits, result)
            except Exception as error:
                if uniform_slot is None:
                    raise
                logger.exception("the forward of an adapter failed")
                failure = AdapterError(f"the model failed with this adapter: {error}")
                result.failed.extend((item.seq, failure) for item in items)
            for item in items:
                item.seq.drop_media(item.end)
        return result

    def _encode_media(self, scheduled: list[ScheduledSequence], result: StepResult) -> list[ScheduledSequence]:
        """Encode the media that this step needs; return the sequences whose media could be encoded."""
        if not any(item.seq.media for item in scheduled):
            return scheduled
        missing = [
            (item.seq, index) for item in scheduled for index, _ in item.media if index not in item.seq.media_embeds
        ]
        if not missing:
            return scheduled
        embeds = self.runner.encode_media([_encoder_job(seq, index) for seq, index in missing])
        errors: dict[Sequence, MMLoRAError] = {}
        for seq, index in missing:
            rows = embeds[seq.media[index].encoder_key]
            if isinstance(rows, MMLoRAError):
                errors[seq] = rows
            else:
                seq.media_embeds[index] = rows
        result.failed.extend(errors.items())
        return [item for item in scheduled if item.seq not in errors]

    def _fail(self, failures: Iterable[tuple[Sequence, MMLoRAError]]) -> list[Request]:
        touched = []
        for seq, error in failures:
            seq.request.error = error
            self._end(seq.request, "error")
            touched.append(seq.request)
        return touched

    def _append(self, sampled: SampledToken) -> None:
        """Append a token to its sequence, and finish the sequence if it ends there."""
        seq, token_id = sampled.seq, sampled.token_id
        request = seq.request
        if request.first_token_s is None:
            request.first_token_s = time.monotonic()
        if seq.index == 0 and seq.num_output_tokens == 0:
            for sibling in request.sequences[1:]:
                self.scheduler.add(sibling)
        seq.token_ids.append(token_id)
        self._counters.num_output_tokens += 1
        if sampled.top is not None:
            seq.logprobs.append(sampled.top)
            seq.cumulative_logprob += sampled.logprob or 0.0
        finish_reason = self._process_token(seq, token_id)
        if finish_reason is not None:
            self.scheduler.finish(seq, finish_reason)
            if not isinstance(seq.stop_reason, str):
                seq.detokenizer.finish()
        elif not seq.uses_long_rope_factors and self._needs_long_rope_factors(seq):
            seq.uses_long_rope_factors = True
            seq.block_hashes.clear()
            self.scheduler.recompute(seq)  # the rotary factors of all its keys change

    def _process_token(self, seq: Sequence, token_id: int) -> str | None:
        """Advance the matcher and the text of a sequence by its last token; return its finish reason if it ended."""
        params = seq.params
        can_stop = seq.num_output_tokens >= params.min_tokens
        is_eos = can_stop and not params.ignore_eos and token_id in self.stop_ids
        is_stop_token = can_stop and not is_eos and token_id in (params.stop_token_ids or ())
        is_end = is_eos or is_stop_token
        if seq.matcher is not None and not is_end:
            seq.matcher.advance(token_id)
        stop_string = None
        if not is_end or (is_stop_token and params.include_stop_str_in_output):
            stop_string = seq.detokenizer.append(token_id, can_stop=can_stop and not is_end)
        seq.stop_reason = token_id if is_stop_token else stop_string
        is_complete = seq.matcher is not None and seq.matcher.is_complete
        if is_end or stop_string is not None or is_complete:
            return "stop"
        return "length" if seq.num_output_tokens >= seq.request.input.max_tokens else None

    def _end(self, request: Request, reason: str) -> None:
        for seq in request.sequences:
            if seq.status is not Status.FINISHED:
                self.scheduler.finish(seq, reason)
                seq.detokenizer.finish()

    def _collect(self, requests: list[Request], *, is_delta: bool = False) -> list[RequestOutput]:
        """Build outputs, and drop finished requests with their adapters and media."""
        outputs = []
        for request in requests:
            if self._requests.get(request.request_id) is not request:
                continue  # its final output has been returned
            kind = request.input.params.output_kind
            if kind is not RequestOutputKind.FINAL_ONLY or request.is_finished:
                outputs.append(
                    build_output(request, is_delta=is_delta if kind is None else kind is RequestOutputKind.DELTA)
                )
            if request.is_finished:
                self._forget(request)
        if self._lora is not None:
            self._lora.sync_slots()
        return outputs

    def _forget(self, request: Request) -> None:
        del self._requests[request.request_id]
        self._counters.finished.update(seq.finish_reason or "none" for seq in request.sequences)
        if request.input.adapter is not None:
            self.lora.release(request.input.adapter)
        request.sequences.clear()  # breaks a reference cycle, which would keep media and adapter alive


def _divide(items: list[ScheduledSequence]) -> dict[int | None, list[ScheduledSequence]]:
    """Divide a step into forward passes by slot: one per adapter that must run alone, and one (None) for the rest."""
    forwards: dict[int | None, list[ScheduledSequence]] = {}
    for item in items:
        adapter = item.seq.adapter
        uniform_slot = item.seq.slot if adapter is not None and adapter.needs_own_pass else None
        forwards.setdefault(uniform_slot, []).append(item)
    return forwards


def _encoder_job(seq: Sequence, index: int) -> EncoderJob:
    media = seq.media[index]
    has_media_part = seq.adapter is not None and seq.adapter.media_digest is not None
    return EncoderJob(media.media, media.mode, seq.slot if has_media_part else None, media.encoder_key)
