"""The layers that apply adapters: each wraps one module of the model and holds what every slot changes in it.

A pass without adapters calls the wrapped module and nothing else.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from mmlora.kernels import ops
from mmlora.kernels.segments import RowSegments
from mmlora.kernels.slot_weights import SlotWeights
from mmlora.lora.state import LoRAState
from mmlora.lora.weights import LoRAWeights, ModuleWeights, TokenRows


class LoRALayer(nn.Module):
    """What all wrappers share: the wrapped module, reachable with all its attributes, and the state of the pass.

    Args:
        base: the wrapped module.
        state: shared by all layers of the model.
        max_loras: number of slots.
        is_output_layer: the module sees the rows whose logits are wanted, not all tokens.
    """

    base: Any  # its attributes are those of many classes

    def __init__(self, base: nn.Module, state: LoRAState, max_loras: int, *, is_output_layer: bool = False) -> None:
        super().__init__()
        self.base = base
        self.state = state
        self.max_loras = max_loras
        self.is_output_layer = is_output_layer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def set_slot(self, slot: int, weights: ModuleWeights) -> None:
        """Put what an adapter changes in this module into a slot."""
        raise NotImplementedError

    def clear_slot(self, slot: int) -> None:
        """Empty a slot."""
        raise NotImplementedError

    def rows_of(self, num_rows: int) -> RowSegments | None:
        """Return the running pass's assignment of rows to slots."""
        return self.state.rows_of(num_rows, is_output_layer=self.is_output_layer)

    def on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy a tensor to where the wrapped module lies, unless it is there."""
        return tensor.to(self.state.device, non_blocking=True)


@dataclass(frozen=True, eq=False)
class _OutputPatch:
    """What a slot does to the output of a Linear besides its low-rank product."""

    parameters: Mapping[str, torch.Tensor] = field(default_factory=dict)  # replaced ones, with a weight among them
    factor: torch.Tensor | None = None  # [out_features], of everything but the bias (DoRA)
    shift: torch.Tensor | None = None  # [out_features], added last
    token_rows: TokenRows | None = None  # the module is an output layer: new rows of its weight


class LoRALinear(LoRALayer):
    """Add the adapter in each row's slot to a Linear: `y = base(x) + scaling · (x Aᵀ) Bᵀ`.

    Replaced weights and biases and DoRA's magnitudes (https://arxiv.org/abs/2402.09353) are applied to the rows of
    their slot. `transformers`' Conv1D, a Linear whose weight is transposed, is wrapped, too.
    """

    def __init__(self, base: nn.Module, state: LoRAState, max_loras: int, *, is_output_layer: bool = False) -> None:
        super().__init__(base, state, max_loras, is_output_layer=is_output_layer)
        weight: torch.Tensor = base.weight  # type: ignore[assignment]
        self.out_features, self.in_features = reversed(weight.shape) if isinstance(base, Conv1D) else weight.shape
        self.slots = SlotWeights(max_loras, weight.device)
        self._patches: dict[int, _OutputPatch] = {}

    def set_slot(self, slot: int, weights: ModuleWeights) -> None:
        self.clear_slot(slot)
        patch = self._patch(weights)
        if weights.lora is not None:
            self.slots.set(slot, weights.lora.lora_A, weights.lora.lora_B, weights.lora.scaling)
        if patch is not None:
            self._patches[slot] = patch

    def clear_slot(self, slot: int) -> None:
        self.slots.clear(slot)
        self._patches.pop(slot, None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `[…, out_features]` for `x [..., in_features]`; its rows are all leading dimensions flattened."""
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
            if patch.parameters:
                flat_y[part] = functional_call(self.base, dict(patch.parameters), (flat_x[part],))
        ops.lora_apply(flat_y, flat_x, self.slots, rows)
        for part, patch in patched:
            self._finish(flat_x[part], flat_y[part], patch)
        return flat_y.view(y.shape)

    def _finish(self, x: torch.Tensor, y: torch.Tensor, patch: _OutputPatch) -> None:
        """Apply in place what comes after the low-rank product."""
        bias = self.base.bias
        if patch.token_rows is not None:
            values = x @ patch.token_rows.rows.T
            y[:, patch.token_rows.ids] = values if bias is None else values + bias[patch.token_rows.ids]
        if patch.factor is not None:
            total = (y.float() - bias.float()) * patch.factor + bias.float() if bias is not None else y * patch.factor
            y.copy_(total)
        if patch.shift is not None:
            y.add_(patch.shift)

    def _patch(self, weights: ModuleWeights) -> _OutputPatch | None:
        lora, token_rows = weights.lora, weights.token_rows
        parameters = {name: self.on_device(tensor) for name, tensor in weights.parameters.items()}
        shift = None
        if "weight" not in parameters and (new_bias := parameters.pop("bias", None)) is not None:
            shift = new_bias - self.base.bias
        if lora is not None and lora.bias is not None:
            lora_bias = lora.scaling * self.on_device(lora.bias)
            shift = lora_bias if shift is None else shift + lora_bias
        if token_rows is not None:
            token_rows = TokenRows(self.on_device(token_rows.ids), self.on_device(token_rows.rows))
        factor = self._dora_factor(lora) if lora is not None and lora.magnitude is not None else None
        if not parameters and factor is None and shift is None and token_rows is None:
            return None
        return _OutputPatch(parameters, factor, shift, token_rows)

    def _dora_factor(self, lora: LoRAWeights) -> torch.Tensor:
        """Return magnitude over the norm of each row of the changed weight, `[out_features] fp32`."""
        weight = self.base.weight.T if isinstance(self.base, Conv1D) else self.base.weight
        delta = self.on_device(lora.lora_B).float() @ self.on_device(lora.lora_A).float()
        norm: torch.Tensor = torch.linalg.norm(weight.float() + lora.scaling * delta, dim=1)
        assert lora.magnitude is not None
        return self.on_device(lora.magnitude).float() / norm
