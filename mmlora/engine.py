"""`LLMEngine`: requests in, steps, outputs out.

One step is: schedule, run, postprocess, collect, return. `LLM` drives it in the caller's thread, `AsyncLLM` in a
thread of its own; only `process_input` may be called from other threads.
"""

import logging
import time
from collections.abc import Iterable
from typing import Any

import torch

from mmlora.config import EngineArgs
from mmlora.detokenizer import Detokenizer
from mmlora.engine_parts import EngineParts, load_engine_parts
from mmlora.errors import MMLoRAError, RequestError
from mmlora.inputs import Prompt
from mmlora.lora.request import LoRARequest
from mmlora.model_runner import SampledToken
from mmlora.outputs import CompletionOutput, RequestMetrics, RequestOutput
from mmlora.sampling_params import SamplingParams
from mmlora.scheduler import ScheduledSequence
from mmlora.sequence import EngineInput, Request, Sequence, Status

logger = logging.getLogger(__name__)


class LLMEngine:
    """Serves requests on one base model with many adapters.

    Args:
        args: every option.

    Raises:
        ConfigError: the options, the model and its default adapters do not fit together.
        AdapterError: a default adapter cannot be loaded.
    """

    def __init__(self, args: EngineArgs) -> None:
        self.args = args
        self.parts: EngineParts = load_engine_parts(args)
        self.tokenizer: Any = self.parts.tokenizer
        self.scheduler = self.parts.scheduler
        self._requests: dict[str, Request] = {}
        self._warned: set[str] = set()

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._requests)

    @property
    def default_loras(self) -> dict[str, LoRARequest]:
        """The default adapters by modality key (`audio`, `audio+image`)."""
        return {key: request for key, (request, _) in self.parts.defaults.items()}

    @property
    def max_model_len(self) -> int:
        """Most tokens in prompt and answer together."""
        return self.parts.max_model_len

    def default_sampling_params(self, **changes: Any) -> SamplingParams:
        """Sampling parameters with the model's `generation_config.json` as defaults, then `changes`."""
        return SamplingParams(**{**self.parts.sampling_defaults, **changes})

    def process_input(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams | None = None,
        lora_request: LoRARequest | object | None = None,
    ) -> EngineInput:
        """Make a request ready: tokens, media, adapter. Thread-safe; the slow part of `add_request`.

        Raises:
            RequestError: the request cannot be served; a subclass says whether media or adapter are at fault.
        """
        return self.parts.inputs.process(request_id, prompt, params or self.default_sampling_params(), lora_request)

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams | None = None,
        lora_request: LoRARequest | object | None = None,
    ) -> None:
        """Queue a request.

        Args:
            request_id: unique among unfinished requests.
            prompt: text, token ids, or a mapping with `multi_modal_data`.
            params: by default the model's own.
            lora_request: an adapter, `BASE`, or None to let the media decide.

        Raises:
            RequestError: the request cannot be served; nothing was queued.
        """
        self.add_input(self.process_input(request_id, prompt, params, lora_request))

    def add_input(self, request_input: EngineInput) -> None:
        """Queue a request that `process_input` made ready.

        Raises:
            RequestError: a request with this id is unfinished.
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
        self.scheduler.add(request.sequences[0])  # the others follow once its prompt is in the prefix cache

    def abort_request(self, request_id: str, *, is_delta: bool = False) -> RequestOutput | None:
        """End a request; None when there is none of this id.

        Returns:
            Its terminal output, with `finish_reason="abort"` for answers that were still running.
        """
        request = self._requests.get(request_id)
        if request is None:
            return None
        self._end(request, "abort")
        return self._collect([request], is_delta=is_delta)[0]

    def step(self, *, is_delta: bool = False) -> list[RequestOutput]:
        """Compute one step.

        Args:
            is_delta: `outputs` hold only what is new since the last call, not everything so far.

        Returns:
            The state of every request that got tokens or ended; each request ends in exactly one finished output.
        """
        return self._collect(self._advance(), is_delta=is_delta)

    def _advance(self) -> list[Request]:
        scheduled = self.scheduler.schedule()
        touched = self._fail(self.scheduler.failed)
        self.scheduler.failed.clear()
        now = time.monotonic()
        for item in scheduled:
            item.seq.request.scheduled_s = item.seq.request.scheduled_s or now
        if scheduled:
            touched += self._run(scheduled)
        return list(dict.fromkeys(touched))

    def _run(self, scheduled: list[ScheduledSequence]) -> list[Request]:
        """Run the model and take its results in; whatever fails, fails with its requests alone."""
        try:
            result = self.parts.runner.run(scheduled)
        except Exception as error:  # the engine outlives any request; those of this step do not
            logger.exception("a step failed")
            failure = MMLoRAError(f"the model failed on this step: {error}")
            return self._fail([(item.seq, failure) for item in scheduled])
        touched = self._fail(result.failed)
        for item in scheduled:
            if item.seq.status is Status.RUNNING:
                item.seq.num_computed_tokens = item.end
                self.parts.block_manager.mark_computed(item.seq)
        for token in result.sampled:
            if token.seq.status is Status.RUNNING:
                self._append(token)
                touched.append(token.seq.request)
        return touched

    def _fail(self, failures: Iterable[tuple[Sequence, MMLoRAError]]) -> list[Request]:
        touched = []
        for seq, error in failures:
            seq.request.error = error
            self._end(seq.request, "error")
            touched.append(seq.request)
        return touched

    def _append(self, sampled: SampledToken) -> None:
        """Add a token to its sequence and end the sequence where it must end."""
        seq, token_id, params = sampled.seq, sampled.token_id, sampled.seq.params
        request = seq.request
        if request.first_token_s is None:
            request.first_token_s = time.monotonic()
        if seq.index == 0 and seq.num_output_tokens == 0:
            for sibling in request.sequences[1:]:
                self.scheduler.add(sibling)
        seq.token_ids.append(token_id)
        if sampled.top is not None:
            seq.logprobs.append(sampled.top)
            seq.cumulative_logprob += sampled.logprob or 0.0
        can_stop = seq.num_output_tokens >= params.min_tokens
        if token_id in self.parts.stop_ids and not params.ignore_eos and can_stop:
            self.scheduler.finish(seq, "stop")
        elif token_id in (params.stop_token_ids or ()) and can_stop:
            seq.stop_reason = token_id
            if params.include_stop_str_in_output:
                seq.detokenizer.append(token_id, can_stop=False)
            self.scheduler.finish(seq, "stop")
        else:
            stop = seq.detokenizer.append(token_id, can_stop=can_stop)
            if stop is not None:
                seq.stop_reason = stop
                self.scheduler.finish(seq, "stop")
            elif seq.num_output_tokens >= request.input.max_tokens:
                self.scheduler.finish(seq, "length")
        if seq.status is Status.FINISHED and not isinstance(seq.stop_reason, str):
            seq.detokenizer.finish()

    def _new_sequence(self, request: Request, index: int) -> Sequence:
        params = request.input.params
        generator = torch.Generator(device=self.parts.runner.device)
        if params.seed is not None:
            generator.manual_seed(params.seed + index)
        else:
            generator.manual_seed(self.parts.next_seed())
        detokenizer = Detokenizer(
            self.tokenizer,
            request.input.prompt_token_ids,
            stop=params.stop_strings,
            include_stop=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens,
        )
        return Sequence(request, index, list(request.input.prompt_token_ids), detokenizer, generator)

    def _end(self, request: Request, reason: str) -> None:
        for seq in request.sequences:
            if seq.status is not Status.FINISHED:
                self.scheduler.finish(seq, reason)
                seq.detokenizer.finish()

    def _collect(self, requests: list[Request], *, is_delta: bool = False) -> list[RequestOutput]:
        """Build outputs, and forget requests that ended."""
        outputs = []
        for request in requests:
            if self._requests.get(request.request_id) is not request:
                continue  # its terminal output was given before
            if request.is_finished:
                del self._requests[request.request_id]
            outputs.append(_output(request, is_delta=is_delta))
        return outputs


def _output(request: Request, *, is_delta: bool) -> RequestOutput:
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
    first_token_s = request.first_token_s or now
    return RequestMetrics(
        queue_s=scheduled_s - request.arrival_s,
        prefill_s=max(0.0, first_token_s - scheduled_s),
        decode_s=now - first_token_s,
    )
