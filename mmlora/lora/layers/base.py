"""`LoRALayer`, base class of all LoRA layers, and `LoRAWholeModule`, the layer for modules of any class."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from mmlora.kernels.ops import RowSegments
from mmlora.lora.layers.state import LoRAState
from mmlora.lora.weights import LoRAWeights, ModuleWeights


class LoRALayer(nn.Module, ABC):
    """Base class of the layers that wrap a module of the model and hold the changes of each slot.

    Without active adapters, `forward` only calls the wrapped module. Other attributes are those of the wrapped module.

    Args:
        base: the wrapped module.
        state: row assignment of the forward pass, shared by all layers of the model.
        max_loras: number of slots.
        is_output_layer: whether the module gets only the rows whose logits are needed, not all tokens.
    """

    base: Any  # any class of module

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

    @abstractmethod
    def set_slot(self, slot: int, weights: ModuleWeights) -> None:
        """Load an adapter's weights for this module into a slot."""

    @abstractmethod
    def clear_slot(self, slot: int) -> None:
        """Empty a slot."""

    def rows_of(self, num_rows: int) -> RowSegments | None:
        """Return the slots of the rows in the running forward pass."""
        return self.state.rows_of(num_rows, is_output_layer=self.is_output_layer)

    def on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor on the device of the wrapped module."""
        return tensor.to(self.state.device, non_blocking=True)


class LoRAWholeModule(LoRALayer):
    """Runs a module of any class with an adapter's parameters instead of its own: norms, experts, routers.

    Such a module may permute or repeat rows (norms of heads get them transposed, experts several times), so one call
    uses one adapter: an adapter that changes such a module in the language model runs in a separate forward pass
    (`Adapter.needs_own_pass`), as every adapter does in towers. Low-rank changes of parameters (`target_parameters`,
    such as fused experts) are merged into a copy of the parameter, so the slot takes as much memory as the parameter.
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
        """Call the module with the parameters of the adapter of this pass, or unchanged."""
        slot = self.state.uniform_slot
        parameters = self._parameters_of.get(slot) if slot is not None else None
        if parameters is None:
            return self.base(*arguments, **options)
        return functional_call(self.base, parameters, arguments, options)

    def _delta(self, lora: LoRAWeights, parameter: torch.Tensor) -> torch.Tensor:
        """Return the low-rank change of a parameter: one matrix, or one per expert."""
        lora_A, lora_B = self.on_device(lora.lora_A).float(), self.on_device(lora.lora_B).float()
        if parameter.ndim == 2:
            return (lora.scaling * (lora_B @ lora_A)).to(parameter.dtype)
        num_experts = parameter.shape[0]
        by_expert_A = lora_A.view(num_experts, -1, lora_A.shape[-1])  # [num_experts, r, in]
        by_expert_B = lora_B.view(lora_B.shape[0], -1, num_experts)  # [out, r, num_experts]
        is_transposed = getattr(self.base, "is_transposed", False)
        pattern = "ore,eri->eio" if is_transposed else "ore,eri->eoi"
        return (lora.scaling * torch.einsum(pattern, by_expert_B, by_expert_A)).to(parameter.dtype)
