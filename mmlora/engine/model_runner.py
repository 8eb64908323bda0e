"""`ModelRunner`: from a `ModelInput` to logits; it knows neither requests nor sampling."""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from mmlora.attention.backend import AttentionBackend, attention_context
from mmlora.attention.kv_cache import KVCache
from mmlora.engine.model_input import ModelInput
from mmlora.errors import MMLoRAError
from mmlora.lora.layers.base import LoRAState
from mmlora.towers.encoder import EncoderJob, EncoderKey, MediaEncoder


class ModelRunner:
    """Runs a loaded model on one device.

    Args:
        model: a `transformers` causal language model whose decoder uses paged attention.
        backend: implements the attention.
        kv_cache: allocated by the backend, with the blocks that the block manager hands out.
        encoder: encodes media; None for a text-only model.
        lora_state: shared with the wrapped layers; None without LoRA.
    """

    def __init__(
        self,
        model: Any,
        backend: AttentionBackend,
        kv_cache: KVCache,
        encoder: MediaEncoder | None,
        lora_state: LoRAState | None,
    ) -> None:
        self.model = model
        self.backend = backend
        self.kv_cache = kv_cache
        self.encoder = encoder
        self.lora_state = lora_state
        self.device: torch.device = kv_cache.keys.device
        self._kept_rows: torch.Tensor | None = None  # of the forward that is running
        if "logits_to_keep" not in inspect.signature(model.forward).parameters:
            model.model.register_forward_hook(self._keep_rows)

    @property
    def num_position_rows(self) -> int:
        """Number of position rows of the model: 1, or 3 for multimodal RoPE."""
        return self.encoder.towers.num_position_rows if self.encoder is not None else 1

    @torch.inference_mode()
    def encode_media(self, jobs: list[EncoderJob]) -> dict[EncoderKey, torch.Tensor | MMLoRAError]:
        """Return the embeddings of media items, or the error of each that cannot be encoded."""
        assert self.encoder is not None
        return self.encoder.encode(jobs)

    @torch.inference_mode()
    def run(self, model_input: ModelInput) -> torch.Tensor:
        """Run one forward.

        Returns:
            `[num_logit_rows, vocab_size]` float32, the logits of `model_input.logit_rows`.
        """
        with ExitStack() as stack:
            metadata = self.backend.build_metadata(self.kv_cache, list(model_input.spans))
            stack.enter_context(attention_context(metadata))
            if self.lora_state is not None and model_input.uniform_slot is not None:
                stack.enter_context(self.lora_state.uniform(model_input.uniform_slot))
            elif self.lora_state is not None and model_input.segments is not None:
                stack.enter_context(self.lora_state.rows(model_input.segments, model_input.logit_segments))
            inputs, deep = self._embed(model_input)
            if self.encoder is not None and deep is not None:
                stack.enter_context(self.encoder.towers.deepstack(*deep))
            rows = model_input.logit_rows.to(self.device)
            stack.enter_context(self._keeping(rows))
            positions = model_input.positions.to(self.device)
            output = self.model(**inputs, position_ids=positions, use_cache=False, logits_to_keep=rows)
        logits: torch.Tensor = output.logits[0].float()
        return logits

    @contextmanager
    def _keeping(self, rows: torch.Tensor) -> Iterator[None]:
        self._kept_rows = rows
        try:
            yield
        finally:
            self._kept_rows = None

    def _keep_rows(self, module: torch.nn.Module, args: Any, output: Any) -> Any:
        """Cut the decoder's output for a model whose `forward` lacks `logits_to_keep`."""
        if self._kept_rows is not None:
            output.last_hidden_state = output.last_hidden_state[:, self._kept_rows]
        return output

    def _embed(
        self, model_input: ModelInput
    ) -> tuple[dict[str, torch.Tensor], tuple[torch.Tensor, torch.Tensor] | None]:
        """Look up token embeddings, and replace those of placeholders by media embeddings.

        Returns:
            Arguments of the model, and of `Towers.deepstack` where media have features for deeper layers.
        """
        inputs = self._decoder_inputs(model_input)
        if not model_input.media:
            return inputs, None
        embeds = inputs["inputs_embeds"][0]
        hidden_size = embeds.shape[1]
        is_deep, deep = torch.zeros(len(embeds), dtype=torch.bool, device=self.device), []
        for media in model_input.media:
            rows = media.rows.to(self.device)
            embeds[rows] = media.embeds[:, :hidden_size].to(embeds)
            if media.embeds.shape[1] > hidden_size:
                is_deep[rows] = True
                deep.append(media.embeds[:, hidden_size:].to(self.device))
        return inputs, (is_deep, torch.cat(deep)) if deep else None

    def _decoder_inputs(self, model_input: ModelInput) -> dict[str, torch.Tensor]:
        token_ids = model_input.token_ids.to(self.device)
        if self.encoder is not None and (model_input.media or self.encoder.towers.has_token_inputs):
            return self.encoder.towers.decoder_inputs(token_ids)
        return {"inputs_embeds": self.model.get_input_embeddings()(token_ids[None])}
