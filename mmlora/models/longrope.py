"""longrope with factors chosen per sequence; `transformers` chooses one set for a whole batch.

A sequence uses short factors up to the model's original context length, and long factors beyond it. When a sequence
grows past that length, its keys are recomputed.
"""

from typing import Any

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mmlora.attention.backend import current_attention


class LongRope(nn.Module):
    """Rotary embedding of flattened tokens that replaces the model's own.

    Args:
        base: a rotary embedding of `transformers` with `rope_type="longrope"`, shared by all layers.
    """

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = base
        self.original_length: int = base.config.rope_parameters["original_max_position_embeddings"]
        device = base.inv_freq.device
        long_inv_freq, _ = ROPE_INIT_FUNCTIONS["longrope"](base.config, device, seq_len=self.original_length + 1)
        self.inv_freq = nn.Buffer(torch.stack([base.original_inv_freq, long_inv_freq]), persistent=False)

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines `[1, num_tokens, rotary_dim]` for positions `[1, num_tokens]`."""
        metadata = current_attention()
        if metadata is None:
            cos_sin: tuple[torch.Tensor, torch.Tensor] = self.base(x, position_ids)
            return cos_sin
        uses_long = metadata.uses_long_rope_factors
        uses_long = torch.zeros_like(position_ids[0]) if uses_long is None else uses_long.long()
        inv_freq = self.inv_freq.float()[uses_long]  # [num_tokens, rotary_dim / 2]
        angles = position_ids[..., None].float() * inv_freq
        angles = torch.cat([angles, angles], dim=-1)
        scaling = self.base.attention_scaling
        return (angles.cos() * scaling).to(x.dtype), (angles.sin() * scaling).to(x.dtype)


def replace_longrope(model: nn.Module) -> int | None:
    """Replace a model's longrope embeddings by `LongRope`.

    Returns:
        The length in tokens beyond which a sequence uses long factors; None for a model without longrope.
    """
    lengths = []
    for name, module in list(model.named_modules()):
        if getattr(module, "rope_type", None) == "longrope":
            rope = LongRope(module)
            model.set_submodule(name, rope)
            lengths.append(rope.original_length)
    return min(lengths, default=None)
