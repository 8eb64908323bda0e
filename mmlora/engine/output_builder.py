"""Build a `RequestOutput` from the state of a `Request`."""

import time

from mmlora.engine.sequence import Request, Sequence, Status
from mmlora.outputs import CompletionOutput, RequestMetrics, RequestOutput


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
    first_token_s = request.first_token_s or now
    return RequestMetrics(
        queue_s=scheduled_s - request.arrival_s,
        prefill_s=max(0.0, first_token_s - scheduled_s),
        decode_s=now - first_token_s,
        arrival_s=request.arrival_s,
    )
