"""`LoRAModule`: adapters that change parameters of a module as a whole: norms, experts, routers."""

from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from mmlora.lora.layers import LoRALayer
from mmlora.lora.state import LoRAState
from mmlora.lora.weights import LoRAWeights, ModuleWeights


class LoRAModule(LoRALayer):
    """Run any module with an adapter's parameters in place of its own, on the rows of that adapter.

    Low-rank changes of parameters (`target_parameters`: fused experts, say) are added to a copy of the parameter when
    the slot is filled; such a slot costs as much memory as the parameter.
    """

    def __init__(self, base: nn.Module, state: LoRAState, max_loras: int, *, is_output_layer: bool = False) -> None:
        super().__init__(base, state, max_loras, is_output_layer=is_output_layer)
        self._parameters_of: dict[int, dict[str, torch.Tensor]] = {}

    def set_slot(self, slot: int, weights: ModuleWeights) -> None:
        parameters = {name: self.on_device(tensor) for name, tensor in weights.parameters.items()}
        for name, lora in weights.parameter_loras.items():
            old = parameters.get(name, getattr(self.base, name))
            parameters[name] = old + self._delta(lora, old)
        self._parameters_of[slot] = parameters

    def clear_slot(self, slot: int) -> None:
        self._parameters_of.pop(slot, None)

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Call the module as it is; the rows of an adapter once more with its parameters, in place of the first."""
        if not self.state.is_active:
            return self.base(*arguments, **options)
        if self.state.segments is None:
            slot = self.state.uniform_slot
            parameters = self._parameters_of.get(slot, {}) if slot is not None else {}
            return functional_call(self.base, parameters, arguments, options)
        num_rows = self.state.num_rows
        start, end, slot = self.state.segments[0]
        if end - start == num_rows and slot in self._parameters_of:
            return functional_call(self.base, self._parameters_of[slot], arguments, options)
        output = self.base(*arguments, **options)
        for start, end, slot in self.state.segments:
            if slot in self._parameters_of:
                cut = tuple(_rows(x, num_rows, start, end) for x in arguments)
                named = {name: _rows(x, num_rows, start, end) for name, x in options.items()}
                part = functional_call(self.base, self._parameters_of[slot], cut, named)
                _replace(output, part, num_rows, start, end)
        return output

    def _delta(self, lora: LoRAWeights, parameter: torch.Tensor) -> torch.Tensor:
        """Return the low-rank change of a parameter: one matrix, or one for each expert."""
        lora_A, lora_B = self.on_device(lora.lora_A).float(), self.on_device(lora.lora_B).float()
        if parameter.ndim == 2:
            return (lora.scaling * (lora_B @ lora_A)).to(parameter.dtype)
        num_experts = parameter.shape[0]
        by_expert_A = lora_A.view(num_experts, -1, lora_A.shape[-1])  # [num_experts, r, in]
        by_expert_B = lora_B.view(lora_B.shape[0], -1, num_experts)  # [out, r, num_experts]
        is_transposed = getattr(self.base, "is_transposed", False)
        pattern = "ore,eri->eio" if is_transposed else "ore,eri->eoi"
        return (lora.scaling * torch.einsum(pattern, by_expert_B, by_expert_A)).to(parameter.dtype)


def _rows(x: Any, num_rows: int, start: int, end: int) -> Any:
    """Cut `[num_rows, …]` or `[1, num_rows, …]`; anything else belongs to all rows."""
    if not isinstance(x, torch.Tensor) or x.ndim == 0:
        return x
    if x.shape[0] == num_rows:
        return x[start:end]
    return x[:, start:end] if x.ndim > 1 and x.shape[:2] == (1, num_rows) else x


def _replace(output: Any, part: Any, num_rows: int, start: int, end: int) -> None:
    """Write the rows `start … end − 1` of a module's output, or of each tensor in it.

    Raises:
        RuntimeError: a tensor has no dimension of `num_rows`, so that nobody knows which rows are whose.
    """
    pairs = zip(output, part, strict=True) if isinstance(output, tuple | list) else [(output, part)]
    for whole, new in pairs:
        rows = _rows(whole, num_rows, start, end)
        if rows is whole and end - start != num_rows:
            shape = list(whole.shape) if isinstance(whole, torch.Tensor) else type(whole).__name__
            raise RuntimeError(f"a module with an adapter gives {shape}, not one row for each of {num_rows} tokens")
        rows.copy_(new)
