"""`ModelRunner`: one step of the model over the sequences that the scheduler chose.

It gathers tokens, media embeddings, positions and KV rows into one flattened batch, runs the decoder, and samples.
"""

import inspect
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from mmlora.attention.paged import KVCache, attention_context
from mmlora.engine.model_input import Batch, prompt_positions
from mmlora.engine.sampler import sample, top_logprobs
from mmlora.engine.scheduler import ScheduledSequence
from mmlora.engine.sequence import Sequence
from mmlora.errors import AdapterError, MMLoRAError
from mmlora.inputs.engine_input import MediaInput
from mmlora.lora.layers.state import LoRAState
from mmlora.outputs import TokenLogprobs
from mmlora.towers.encoder import EncoderJob, MediaEncoder
from mmlora.towers.general import decoder_inputs

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SampledToken:
    """The next token of a sequence and, if asked for, the log probabilities around it."""

    seq: Sequence
    token_id: int
    logprob: float | None = None
    top: TokenLogprobs | None = None


@dataclass
class StepResult:
    """What a step brought: new tokens, and sequences that cannot go on."""

    sampled: list[SampledToken] = field(default_factory=list)
    failed: list[tuple[Sequence, MMLoRAError]] = field(default_factory=list)


class ModelRunner:
    """Runs a loaded model on one device.

    Args:
        model: a `transformers` causal language model whose decoder uses paged attention.
        kv_cache: sized for the block manager.
        encoder: of media; None for a text-only model.
        lora_state: shared with the wrapped layers; None without LoRA.
        tokenizer: spells tokens in log probabilities.
        stop_ids: end-of-text tokens.
    """

    def __init__(
        self,
        model: Any,
        kv_cache: KVCache,
        encoder: MediaEncoder | None,
        lora_state: LoRAState | None,
        tokenizer: Any,
        stop_ids: frozenset[int],
    ) -> None:
        self.model = model
        self.kv_cache = kv_cache
        self.encoder = encoder
        self.lora_state = lora_state
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids
        self.device: torch.device = kv_cache.keys.device
        self._kept_rows: torch.Tensor | None = None  # of the forward that runs
        if "logits_to_keep" not in inspect.signature(model.forward).parameters:
            model.model.register_forward_hook(self._keep_rows)

    @torch.inference_mode()
    def run(self, scheduled: list[ScheduledSequence]) -> StepResult:
        """Compute the scheduled tokens; sequences that are complete up to here get their next token."""
        result = StepResult()
        items = self._encode_media(scheduled, result)
        for own_slot, members in _passes(items).items():
            try:
                self._run_pass(members, own_slot, result)
            except Exception as error:
                if own_slot is None:
                    raise
                logger.exception("the pass of an adapter failed")
                failure = AdapterError(f"the model failed with this adapter: {error}")
                result.failed.extend((item.seq, failure) for item in members)
        return result

    def _run_pass(self, items: list[ScheduledSequence], own_slot: int | None, result: StepResult) -> None:
        num_rows = self.encoder.towers.num_position_rows if self.encoder is not None else 1
        batch = Batch.build(items, self.kv_cache, num_rows, own_slot)
        rows, logits = self._forward(batch)
        self._take_prompt_logprobs(batch, rows, logits)
        self._sample(batch, logits, rows, result)

    def _encode_media(self, scheduled: list[ScheduledSequence], result: StepResult) -> list[ScheduledSequence]:
        """Give each sequence the embeddings that this step needs; return those that have them all."""
        if self.encoder is None or not any(item.seq.media for item in scheduled):
            return scheduled
        needed = {(item.seq, index) for item in scheduled for index in _missing_media(item)}
        embeds = self.encoder.encode([_encoder_job(seq, index) for seq, index in needed])
        errors: dict[Sequence, MMLoRAError] = {}
        for seq, index in needed:
            rows = embeds[seq.media[index].encoder_key]
            if isinstance(rows, MMLoRAError):
                errors[seq] = rows
            else:
                seq.media_embeds[index] = rows
        result.failed.extend(errors.items())
        return [item for item in scheduled if item.seq not in errors]

    def _forward(self, batch: Batch) -> tuple[list[int], torch.Tensor]:
        """Run the model.

        Returns:
            The rows of the batch whose logits are needed, and these `[num_rows, vocab_size]` in float32.
        """
        rows = batch.logit_rows
        with ExitStack() as stack:
            stack.enter_context(attention_context(batch.attention))
            if self.lora_state is not None and batch.own_slot is not None:
                stack.enter_context(self.lora_state.uniform(batch.own_slot))
            elif self.lora_state is not None:
                stack.enter_context(self.lora_state.rows(batch.segments, batch.segments_of(rows)))
            inputs, deep = self._embed(batch)
            if self.encoder is not None and deep is not None:
                stack.enter_context(self.encoder.towers.deepstack(*deep))
            kept = torch.tensor(rows, dtype=torch.long, device=self.device)
            stack.enter_context(self._keeping(kept))
            output = self.model(**inputs, position_ids=batch.positions, use_cache=False, logits_to_keep=kept)
        return rows, output.logits[0].float()

    @contextmanager
    def _keeping(self, rows: torch.Tensor) -> Iterator[None]:
        self._kept_rows = rows
        try:
            yield
        finally:
            self._kept_rows = None

    def _keep_rows(self, module: torch.nn.Module, args: Any, output: Any) -> Any:
        """Cut the decoder's output for a model that does not know `logits_to_keep`."""
        if self._kept_rows is not None:
            output.last_hidden_state = output.last_hidden_state[:, self._kept_rows]
        return output

    def _embed(self, batch: Batch) -> tuple[dict[str, torch.Tensor], tuple[torch.Tensor, torch.Tensor] | None]:
        """Gather token embeddings, and media embeddings at their placeholders.

        Returns:
            What the model takes, and what `Towers.deepstack` takes where media have features for deeper layers.
        """
        inputs = decoder_inputs(self.model, self.encoder.towers if self.encoder is not None else None, batch.input_ids)
        embeds = inputs["inputs_embeds"][0]
        hidden_size = embeds.shape[1]
        is_deep, deep = torch.zeros_like(batch.input_ids, dtype=torch.bool), []
        for item, first_row in zip(batch.items, batch.starts, strict=True):
            for index, media in enumerate(item.seq.media):
                start, end = max(media.start, item.start), min(media.end, item.end)
                if start < end:
                    rows, places = _embeds_between(item.seq.media_embeds[index], media, start, end)
                    places += first_row - item.start
                    embeds[places] = rows[:, :hidden_size].to(embeds.dtype)
                    if rows.shape[1] > hidden_size:
                        is_deep[places] = True
                        deep.append(rows[:, hidden_size:])
                if media.end <= item.end:
                    item.seq.media_embeds.pop(index, None)
        return inputs, (is_deep, torch.cat(deep)) if deep else None

    def _take_prompt_logprobs(self, batch: Batch, rows: list[int], logits: torch.Tensor) -> None:
        index_of = {row: index for index, row in enumerate(rows)}
        for item, first_row in zip(batch.items, batch.starts, strict=True):
            if not item.seq.wants_prompt_logprobs:
                continue
            request, num_top = item.seq.request, item.seq.params.prompt_logprobs
            assert num_top is not None
            found = request.partial_prompt_logprobs
            if item.start == 0:
                del found[1:]  # a preempted sequence starts over
            for position in prompt_positions(item):
                logprobs = logits[index_of[first_row + position - item.start]].log_softmax(-1)
                target = item.seq.token_ids[position + 1]
                found.append(_prompt_entry(logprobs, target, num_top, self.tokenizer))
            if len(found) == item.seq.num_prompt_tokens:
                request.prompt_logprobs = found

    def _sample(self, batch: Batch, logits: torch.Tensor, rows: list[int], result: StepResult) -> None:
        index_of = {row: index for index, row in enumerate(rows)}
        ready = [
            (item.seq, index_of[start + item.num_tokens - 1])
            for item, start in zip(batch.items, batch.starts, strict=True)
            if item.is_sampled
        ]
        if not ready:
            return
        seqs = [seq for seq, _ in ready]
        chosen = logits[torch.tensor([index for _, index in ready], device=logits.device)]
        tokens = sample(chosen.clone(), seqs, self.stop_ids)
        for row, seq, token in zip(chosen, seqs, tokens, strict=True):
            if isinstance(token, MMLoRAError):
                result.failed.append((seq, token))
                continue
            if seq.params.logprobs is None:
                result.sampled.append(SampledToken(seq, token))
                continue
            top = top_logprobs(row.log_softmax(-1), token, seq.params.logprobs, self.tokenizer)
            result.sampled.append(SampledToken(seq, token, top[token].logprob, top))


def _passes(items: list[ScheduledSequence]) -> dict[int | None, list[ScheduledSequence]]:
    """Divide a step: adapters that need a pass of their own under their slots, all other sequences under None."""
    passes: dict[int | None, list[ScheduledSequence]] = {}
    for item in items:
        adapter = item.seq.adapter
        own_slot = item.seq.slot if adapter is not None and adapter.needs_own_pass else None
        passes.setdefault(own_slot, []).append(item)
    return passes


def _missing_media(item: ScheduledSequence) -> list[int]:
    return [
        index
        for index, media in enumerate(item.seq.media)
        if media.start < item.end and media.end > item.start and index not in item.seq.media_embeds
    ]


def _embeds_between(rows: torch.Tensor, media: MediaInput, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the embeddings of a media item that fall on positions `start … end − 1` of the prompt, and which."""
    if media.media.places is None:
        return rows[start - media.start : end - media.start], torch.arange(start, end, device=rows.device)
    places = torch.tensor(media.media.places, device=rows.device) + media.start
    is_between = (places >= start) & (places < end)
    return rows[is_between], places[is_between]


def _encoder_job(seq: Sequence, index: int) -> EncoderJob:
    media = seq.media[index]
    has_media_part = seq.adapter is not None and seq.adapter.media_digest is not None
    return EncoderJob(media.media, media.mode, seq.slot if has_media_part else None, media.encoder_key)


def _prompt_entry(logprobs: torch.Tensor, target: int, num_top: int, tokenizer: Any) -> TokenLogprobs:
    """Log probabilities for one prompt token; a placeholder outside the vocabulary has none of its own."""
    if target >= logprobs.numel():
        target = int(logprobs.argmax())
    return top_logprobs(logprobs, target, num_top, tokenizer)
