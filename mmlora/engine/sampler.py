"""`Sampler`: from logits to the next token of each sequence, and the log probabilities that were requested."""

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from mmlora.engine.model_input import logit_positions, prompt_logprob_positions
from mmlora.engine.scheduler import ScheduledSequence
from mmlora.engine.sequence import Sequence
from mmlora.errors import MMLoRAError, RequestError
from mmlora.outputs import Logprob, TokenLogprobs
from mmlora.sampling_params import SamplingParams


@dataclass(frozen=True)
class SampledToken:
    """The next token of a sequence, with log probabilities if they were requested."""

    seq: Sequence
    token_id: int
    logprob: float | None = None
    top: TokenLogprobs | None = None


@dataclass
class StepResult:
    """Result of a step: new tokens, and sequences that cannot continue."""

    sampled: list[SampledToken] = field(default_factory=list)
    failed: list[tuple[Sequence, MMLoRAError]] = field(default_factory=list)


class Sampler:
    """Chooses tokens from the logits of a forward, with the generators, matchers and penalties of live sequences.

    Args:
        tokenizer: decodes the tokens of log probabilities.
        stop_ids: end-of-text tokens.
    """

    def __init__(self, tokenizer: Any, stop_ids: frozenset[int]) -> None:
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids

    @torch.inference_mode()
    def run(self, items: list[ScheduledSequence], logits: torch.Tensor, result: StepResult) -> None:
        """Record prompt log probabilities, and sample the next token of each sequence that is computed to its end.

        Args:
            items: what was computed.
            logits: `[num_logit_rows, vocab_size]` float32: the rows of `logit_positions` of each item.
            result: collects the sampled tokens, and errors of sequences for which no token can be sampled.
        """
        seqs: list[Sequence] = []
        rows: list[int] = []
        end = 0
        for item in items:
            start, end = end, end + len(logit_positions(item))
            if item.seq.wants_prompt_logprobs:
                self._add_prompt_logprobs(item, logits[start:end])
            if item.is_sampled:
                seqs.append(item.seq)
                rows.append(end - 1)
        if seqs:
            self._sample(seqs, logits[torch.tensor(rows, device=logits.device)], result)

    def _add_prompt_logprobs(self, item: ScheduledSequence, rows: torch.Tensor) -> None:
        request, num_top = item.seq.request, item.seq.params.prompt_logprobs
        assert num_top is not None
        found = request.partial_prompt_logprobs
        if item.start == 0:
            del found[1:]  # a preempted sequence starts over
        for position, row in zip(prompt_logprob_positions(item), rows, strict=False):
            target, logprobs = item.seq.token_ids[position + 1], row.log_softmax(-1)
            if target >= logprobs.numel():  # a placeholder outside the vocabulary
                target = int(logprobs.argmax())
            found.append(top_logprobs(logprobs, target, num_top, self.tokenizer))
        if len(found) == item.seq.num_prompt_tokens:
            request.prompt_logprobs = found

    def _sample(self, seqs: list[Sequence], logits: torch.Tensor, result: StepResult) -> None:
        tokens = sample(logits.clone(), seqs, self.stop_ids)
        for row, seq, token in zip(logits, seqs, tokens, strict=True):
            if isinstance(token, MMLoRAError):
                result.failed.append((seq, token))
            elif seq.params.logprobs is None:
                result.sampled.append(SampledToken(seq, token))
            else:
                top = top_logprobs(row.log_softmax(-1), token, seq.params.logprobs, self.tokenizer)
                result.sampled.append(SampledToken(seq, token, top[token].logprob, top))


def sample(logits: torch.Tensor, seqs: list[Sequence], stop_ids: frozenset[int]) -> list[int | MMLoRAError]:
    """Choose one token per sequence.

    Each sequence has its own random generator, so that its tokens do not depend on the rest of the batch.

    Args:
        logits: `[num_seqs, vocab_size]` float32; modified in place.
        seqs: one per row.
        stop_ids: end-of-text tokens, masked while `min_tokens` is not reached.

    Returns:
        For each sequence its token, or the error if no token can be sampled.
    """
    was_finite = logits.amax(-1).isfinite()  # the maximum of a row with a NaN is NaN
    for row, seq in zip(logits, seqs, strict=True):
        _adjust_logits(row, seq, stop_ids)
    _mask_logits(logits, seqs)
    highest, argmax = logits.max(-1)
    tokens: list[int | MMLoRAError] = [*argmax.tolist()]
    for index, (seq, is_finite) in enumerate(zip(seqs, highest.isfinite().tolist(), strict=True)):
        if seq.matcher is not None and seq.matcher.error is not None:
            tokens[index] = RequestError(f"the output cannot follow its constraint any further: {seq.matcher.error}")
        elif not is_finite:
            tokens[index] = _no_token(bool(was_finite[index]))
        elif not seq.params.is_greedy:
            probs = token_probabilities(logits[index], seq.params)
            tokens[index] = int(torch.multinomial(probs, 1, generator=seq.generator))
    return tokens


def token_probabilities(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Apply `temperature`, `min_p`, `top_k` and `top_p`, in this order, to one row of logits; return probabilities.

    Args:
        logits: `[vocab_size]` float32.
    """
    scores = (logits - logits.max()) / params.temperature  # at most 0: a tiny temperature overflows to -inf only
    if params.min_p > 0:
        scores = scores.masked_fill(scores < math.log(params.min_p), float("-inf"))
    if 0 < params.top_k < scores.numel():
        threshold = scores.topk(params.top_k).values[-1]
        scores = scores.masked_fill(scores < threshold, float("-inf"))
    probs = scores.softmax(-1)
    if params.top_p < 1:
        ordered, order = probs.sort(descending=True)
        is_dropped = ordered.cumsum(-1) - ordered >= params.top_p
        is_dropped[0] = False  # top_p may underflow to 0 in float32
        probs = probs.index_fill(0, order[is_dropped], 0.0)
    return probs / probs.sum()


def top_logprobs(logprobs: torch.Tensor, token: int, num_top: int, tokenizer: Any) -> TokenLogprobs:
    """Return the `num_top` most likely tokens of one row (-1: all), and the given token.

    Args:
        logprobs: `[vocab_size]` float32.
    """
    count = logprobs.numel() if num_top == -1 else min(num_top, logprobs.numel())
    values, ids = logprobs.topk(count)
    ranked = {i: (v, rank) for rank, (i, v) in enumerate(zip(ids.tolist(), values.tolist(), strict=True), 1)}
    if token not in ranked:
        ranked[token] = (float(logprobs[token]), int((logprobs > logprobs[token]).sum()) + 1)
    return {i: Logprob(value, rank, tokenizer.decode([i])) for i, (value, rank) in ranked.items()}


def _adjust_logits(row: torch.Tensor, seq: Sequence, stop_ids: frozenset[int]) -> None:
    params = seq.params
    if params.logit_bias:
        row[list(params.logit_bias)] += torch.tensor(list(params.logit_bias.values()), device=row.device)
    if params.allowed_token_ids is not None:
        allowed = list(params.allowed_token_ids)
        kept = row[allowed]
        row.fill_(float("-inf"))
        row[allowed] = kept
    if seq.request.input.bad_words:
        row[_bad_tokens(seq)] = float("-inf")
    if seq.num_output_tokens < params.min_tokens:
        blocked = stop_ids.union(params.stop_token_ids or ())
        row[[token for token in blocked if token < row.numel()]] = float("-inf")
    if params.has_penalties:
        _apply_penalties(row, seq)


def _bad_tokens(seq: Sequence) -> list[int]:
    """Return the tokens that would complete a bad word."""
    num_tokens, num_outputs = len(seq.token_ids), seq.num_output_tokens
    return [
        word[-1]
        for word in seq.request.input.bad_words
        if len(word) - 1 <= num_outputs and tuple(seq.token_ids[num_tokens - len(word) + 1 :]) == word[:-1]
    ]


def _mask_logits(logits: torch.Tensor, seqs: list[Sequence]) -> None:
    """Mask the tokens that the matchers do not allow; end-of-text is masked, too, while a sequence may not end."""
    rows = [index for index, seq in enumerate(seqs) if seq.matcher is not None]
    if not rows:
        return
    masks = []
    for seq in (seqs[index] for index in rows):
        assert seq.matcher is not None
        can_end = not seq.params.ignore_eos and seq.num_output_tokens >= seq.params.min_tokens
        masks.append(seq.matcher.allowed(logits.shape[1], can_end=can_end))
    allowed = torch.from_numpy(np.stack(masks)).to(logits.device)
    logits[rows] = logits[rows].masked_fill(~allowed, float("-inf"))


def _no_token(was_finite: bool) -> MMLoRAError:
    if was_finite:
        return RequestError(
            "no token can be chosen: repetition_penalty, logit_bias, stop_token_ids, min_tokens, "
            "allowed_token_ids, bad_words and structured_outputs of this request leave no finite logit"
        )
    return MMLoRAError("the model's logits for this request hold NaN or infinity")


def _apply_penalties(row: torch.Tensor, seq: Sequence) -> None:
    params = seq.params
    if params.repetition_penalty != 1:
        known = {token for token in seq.token_ids if token < row.numel()}  # placeholders may be outside the vocabulary
        seen = torch.tensor(sorted(known), device=row.device)
        scores = row[seen]
        row[seen] = torch.where(scores > 0, scores / params.repetition_penalty, scores * params.repetition_penalty)
    if seq.num_output_tokens:
        counts = Counter(seq.output_token_ids)
        tokens = torch.tensor(list(counts), device=row.device)
        times = torch.tensor(list(counts.values()), device=row.device)
        row[tokens] -= params.frequency_penalty * times + params.presence_penalty
