"""`LoRAEmbedding`: adapters on the token embedding."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.func import functional_call

from mmlora.lora.layers.base import LoRALayer
from mmlora.lora.weights import ModuleWeights, TokenRows


@dataclass(frozen=True, eq=False)
class _EmbeddingPatch:
    parameters: Mapping[str, torch.Tensor]
    lora_A: torch.Tensor | None  # [num_embeddings, r], contiguous by row for the look-up
    lora_B: torch.Tensor | None  # [r, embedding_dim], includes the scaling
    factor: torch.Tensor | None  # [embedding_dim] (DoRA)
    token_rows: TokenRows | None


class LoRAEmbedding(LoRALayer):
    """Adds the adapter in each row's slot to an Embedding: `y = base(ids) + scaling · A[:, ids]ᵀ Bᵀ`.

    Embeddings that scale their output (`embed_scale`) also scale the adapter's part.
    """

    _patches: dict[int, _EmbeddingPatch]

    def set_slot(self, slot: int, weights: ModuleWeights) -> None:
        lora, token_rows = weights.lora, weights.token_rows
        lora_A = lora_B = factor = None
        if lora is not None:
            lora_A = self.on_device(lora.lora_A).T.contiguous()
            lora_B = self.on_device(lora.lora_B).T * lora.scaling
            if lora.magnitude is not None:  # norm of each dimension over the whole vocabulary
                norm = torch.linalg.norm(self.base.weight.float() + lora_A.float() @ lora_B.float(), dim=0)
                factor = self.on_device(lora.magnitude).float() / norm
        if token_rows is not None:
            token_rows = TokenRows(self.on_device(token_rows.ids), self.on_device(token_rows.rows))
        self._patches[slot] = _EmbeddingPatch(self.parameters_on_device(weights), lora_A, lora_B, factor, token_rows)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return `[…, embedding_dim]` for `ids [...] int64`."""
        y: torch.Tensor = self.base(ids)
        if not self.state.is_active:
            return y
        rows = self.rows_of(ids.numel())
        flat_ids, flat_y = ids.reshape(-1), y.reshape(-1, y.shape[-1])
        for start, end, slot in rows.segments if rows is not None else ():
            if slot in self._patches:
                flat_y[start:end] = self._patched(flat_ids[start:end], flat_y[start:end], self._patches[slot])
        return flat_y.view(y.shape)

    def _patched(self, ids: torch.Tensor, y: torch.Tensor, patch: _EmbeddingPatch) -> torch.Tensor:
        scale = getattr(self.base, "embed_scale", 1.0)
        if patch.parameters:
            y = functional_call(self.base, dict(patch.parameters), (ids,))
        if patch.lora_A is not None and patch.lora_B is not None:
            y = y + patch.lora_A[ids] @ patch.lora_B * scale
        if patch.factor is not None:
            y = (y.float() * patch.factor).to(y.dtype)
        if patch.token_rows is not None:
            index = torch.searchsorted(patch.token_rows.ids, ids).clamp_(max=len(patch.token_rows.ids) - 1)
            is_new = patch.token_rows.ids[index] == ids
            y = torch.where(is_new[:, None], patch.token_rows.rows[index] * scale, y)
        return y
