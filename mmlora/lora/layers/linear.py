"""`LoRALinear`: adapters on linear layers."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from mmlora.kernels import ops
from mmlora.kernels.slot_weights import SlotWeights
from mmlora.lora.layers.base import LoRALayer, LoRAState
from mmlora.lora.weights import LoRAWeights, ModuleWeights, TokenRows


@dataclass(frozen=True, eq=False)
class _LinearPatch:
    """Changes of a slot in a Linear besides its low-rank product."""

    weight: torch.Tensor | None = None  # [out_features, in_features], replaces the base's
    bias: torch.Tensor | None = None  # [out_features], replaces the base's; includes lora_B's
    factor: torch.Tensor | None = None  # [out_features], scales the output except the bias (DoRA)
    token_rows: TokenRows | None = None  # for an output layer: new rows of its weight


class LoRALinear(LoRALayer):
    """Adds the adapter in each row's slot to a Linear: `y = base(x) + scaling · (x Aᵀ) Bᵀ`.

    Replaced weights and biases and DoRA's magnitudes (https://arxiv.org/abs/2402.09353) apply to the rows of their
    slot. Also wraps `transformers`' Conv1D, a Linear with a transposed weight.
    """

    _patches: dict[int, _LinearPatch]

    def __init__(self, base: nn.Module, state: LoRAState, max_loras: int, *, is_output_layer: bool = False) -> None:
        super().__init__(base, state, max_loras, is_output_layer=is_output_layer)
        weight: torch.Tensor = base.weight  # type: ignore[assignment]
        self.out_features, self.in_features = reversed(weight.shape) if isinstance(base, Conv1D) else weight.shape
        self.slots = SlotWeights(max_loras, weight.device)

    def set_slot(self, slot: int, weights: ModuleWeights) -> None:
        self.clear_slot(slot)
        patch = self._patch(weights)
        if weights.lora is not None:
            self.slots.set(slot, weights.lora.lora_A, weights.lora.lora_B, weights.lora.scaling)
        if patch is not None:
            self._patches[slot] = patch

    def clear_slot(self, slot: int) -> None:
        super().clear_slot(slot)
        self.slots.clear(slot)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `[…, out_features]` for `x [..., in_features]`; the leading dimensions are flattened to rows."""
        y: torch.Tensor = self.base(x)
        if not self.state.is_active:
            return y
        flat_x, flat_y = x.reshape(-1, self.in_features), y.reshape(-1, self.out_features)
        rows = self.rows_of(flat_y.shape[0])
        if rows is None:
            return y
        patched = [
            (slice(start, end), self._patches[slot]) for start, end, slot in rows.segments if slot in self._patches
        ]
        for part, patch in patched:
            if patch.weight is not None or patch.bias is not None:
                weight = patch.weight if patch.weight is not None else self._weight
                flat_y[part] = linear(flat_x[part], weight, self._bias_of(patch))
        ops.lora_apply(flat_y, flat_x, self.slots, rows)
        for part, patch in patched:
            self._finish(flat_x[part], flat_y[part], patch)
        return flat_y.view(y.shape)

    @property
    def _weight(self) -> torch.Tensor:
        """The wrapped weight, `[out_features, in_features]`."""
        weight: torch.Tensor = self.base.weight
        return weight.T if isinstance(self.base, Conv1D) else weight

    def _bias_of(self, patch: _LinearPatch) -> torch.Tensor | None:
        bias: torch.Tensor | None = self.base.bias
        return patch.bias if patch.bias is not None else bias

    def _finish(self, x: torch.Tensor, y: torch.Tensor, patch: _LinearPatch) -> None:
        """Apply in place the changes that follow the low-rank product."""
        bias = self._bias_of(patch)
        if patch.token_rows is not None:
            y[:, patch.token_rows.ids] = linear(x, patch.token_rows.rows)
        if patch.factor is not None:
            shift = bias.float() if bias is not None else 0.0
            y.copy_((y.float() - shift) * patch.factor + shift)

    def _patch(self, weights: ModuleWeights) -> _LinearPatch | None:
        lora, token_rows = weights.lora, weights.token_rows
        replaced = self.parameters_on_device(weights)
        weight, bias = replaced.get("weight"), replaced.get("bias")
        if weight is not None and isinstance(self.base, Conv1D):
            weight = weight.T
        if lora is not None and lora.bias is not None:
            lora_bias = lora.scaling * self.on_device(lora.bias)
            bias = bias if bias is not None else self.base.bias
            bias = lora_bias if bias is None else bias + lora_bias
        if token_rows is not None:
            token_rows = TokenRows(self.on_device(token_rows.ids), self.on_device(token_rows.rows))
            # PEFT's layer of trained tokens computes the output without a bias, so the adapter was trained without one.
            bias = torch.zeros_like(self.base.bias) if self.base.bias is not None else None
        factor = self._dora_factor(lora) if lora is not None and lora.magnitude is not None else None
        if all(change is None for change in (weight, bias, factor, token_rows)):
            return None
        return _LinearPatch(weight, bias, factor, token_rows)

    def _dora_factor(self, lora: LoRAWeights) -> torch.Tensor:
        """Return the magnitude divided by the norm of each row of the changed weight, `[out_features] fp32`."""
        delta = self.on_device(lora.lora_B).float() @ self.on_device(lora.lora_A).float()
        norm: torch.Tensor = torch.linalg.norm(self._weight.float() + lora.scaling * delta, dim=1)
        assert lora.magnitude is not None
        return self.on_device(lora.magnitude).float() / norm
