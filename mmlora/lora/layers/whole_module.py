"""`LoRAWholeModule`: adapters that change parameters of a module as a whole: norms, experts, routers."""

from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from mmlora.lora.layers.linear import LoRALayer
from mmlora.lora.layers.state import LoRAState
from mmlora.lora.weights import LoRAWeights, ModuleWeights


class LoRAWholeModule(LoRALayer):
    """Run any module with an adapter's parameters in place of its own.

    What such a module makes of rows is not known (norms of heads see them transposed, experts several times), so an
    adapter that changes one has passes of its own (`Adapter.needs_own_pass`); in towers every adapter has. Low-rank
    changes of parameters (`target_parameters`: fused experts, say) are added to a copy of the parameter when the slot
    is filled; such a slot costs as much memory as the parameter.
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
        """Call the module as it is, or with the parameters of the adapter that the whole pass belongs to."""
        slot = self.state.uniform_slot
        parameters = self._parameters_of.get(slot) if slot is not None else None
        if parameters is None:
            return self.base(*arguments, **options)
        return functional_call(self.base, parameters, arguments, options)

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
