"""Layers that apply one adapter per call: `LoRAConvolution`, and `LoRAWholeModule` for modules of any class."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from mmlora.lora.layers.base import LoRALayer
from mmlora.lora.weights import LoRAWeights, ModuleWeights

CONVOLUTIONS: dict[type[nn.Module], Callable[..., torch.Tensor]] = {
    nn.Conv1d: functional.conv1d,
    nn.Conv2d: functional.conv2d,
    nn.Conv3d: functional.conv3d,
}


def convolution_of(module: nn.Module) -> Callable[..., torch.Tensor] | None:
    """Return the functional form of a convolution module; None for other modules."""
    return next((function for kind, function in CONVOLUTIONS.items() if isinstance(module, kind)), None)


@dataclass(frozen=True, eq=False)
class _ConvolutionPatch:
    parameters: Mapping[str, torch.Tensor]
    lora: LoRAWeights | None
    factor: torch.Tensor | None  # [1, out_channels, 1, …] (DoRA)


class LoRAConvolution(LoRALayer):
    """Adds an adapter to a convolution of a tower: `y = base(x) + scaling · B(A(x))` with a 1 x 1 convolution B.

    One call uses one adapter, because towers encode media grouped by adapter.
    """

    _patches: dict[int, _ConvolutionPatch]

    def set_slot(self, slot: int, weights: ModuleWeights) -> None:
        lora, factor = weights.lora, None
        if lora is not None:
            found = {name: self.on_device(tensor) for name, tensor in lora.tensors}
            lora = LoRAWeights(
                found["lora_A"], found["lora_B"], lora.scaling, found.get("bias"), found.get("magnitude")
            )
            factor = self._dora_factor(lora) if lora.magnitude is not None else None
        self._patches[slot] = _ConvolutionPatch(self.parameters_on_device(weights), lora, factor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `[batch, out_channels, …]` for `x [batch, in_channels, …]`."""
        slot = self.state.uniform_slot
        patch = self._patches.get(slot) if slot is not None else None
        if patch is None:
            base_only: torch.Tensor = self.base(x)
            return base_only
        y: torch.Tensor = functional_call(self.base, dict(patch.parameters), (x,))
        if patch.lora is None:
            return y
        convolution = convolution_of(self.base)
        assert convolution is not None
        hidden = convolution(x, patch.lora.lora_A, stride=self.base.stride, padding=self.base.padding)
        delta = convolution(hidden, patch.lora.lora_B, patch.lora.bias, groups=self.base.groups) * patch.lora.scaling
        if patch.factor is None:
            return y + delta
        bias = patch.parameters.get("bias", self.base.bias)
        shape = (1, -1, *[1] * (y.ndim - 2))
        shift = bias.view(shape) if bias is not None else 0.0
        return (y - shift + delta) * patch.factor.to(y.dtype) + shift

    def _dora_factor(self, lora: LoRAWeights) -> torch.Tensor:
        weight, rank = self.base.weight.float(), lora.lora_A.shape[0]
        delta = lora.lora_B.float().view(-1, rank) @ lora.lora_A.float().view(rank, -1)
        changed = weight + lora.scaling * delta.view(weight.shape)
        assert lora.magnitude is not None
        norm: torch.Tensor = changed.flatten(1).norm(dim=1).view(lora.magnitude.shape)
        return lora.magnitude.float() / norm


class LoRAWholeModule(LoRALayer):
    """Runs a module of any class with an adapter's parameters instead of its own: norms, experts, routers.

    Such a module may permute or repeat rows (norms of heads get them transposed, experts several times), so one call
    uses one adapter: an adapter that changes such a module in the language model runs in a separate forward pass
    (`Adapter.needs_own_pass`), as every adapter does in towers. Low-rank changes of parameters (`target_parameters`,
    fused or single experts) are merged into a copy of the parameter, so the slot takes as much memory as the parameter.
    """

    _patches: dict[int, dict[str, torch.Tensor]]  # parameters by name

    def set_slot(self, slot: int, weights: ModuleWeights) -> None:
        parameters = self.parameters_on_device(weights)
        for name, lora in weights.parameter_loras.items():
            parameters[name] = self._changed(lora, parameters.get(name, getattr(self.base, name)))
        for name in {rows.parameter for rows in weights.expert_loras}:
            parameters[name] = parameters.get(name, getattr(self.base, name)).detach().clone()
        for rows, lora in weights.expert_loras.items():
            matrix = parameters[rows.parameter][rows.expert, rows.start : rows.stop]
            matrix.copy_(self._changed(lora, matrix))
        self._patches[slot] = parameters

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Call the module with the parameters of the adapter of this pass, or unchanged."""
        slot = self.state.uniform_slot
        parameters = self._patches.get(slot) if slot is not None else None
        if parameters is None:
            return self.base(*arguments, **options)
        return functional_call(self.base, parameters, arguments, options)

    def _changed(self, lora: LoRAWeights, parameter: torch.Tensor) -> torch.Tensor:
        """Return a parameter with its low-rank change, and with DoRA the rows scaled to their magnitudes."""
        delta = self._delta(lora, parameter)
        if lora.magnitude is None:
            return parameter + delta.to(parameter.dtype)
        changed = parameter.float() + delta
        magnitude = self.on_device(lora.magnitude).float()
        norm: torch.Tensor = torch.linalg.norm(changed, dim=-1)
        return (changed * (magnitude / norm)[..., None]).to(parameter.dtype)

    def _delta(self, lora: LoRAWeights, parameter: torch.Tensor) -> torch.Tensor:
        """Return the low-rank change of a parameter in float32: one matrix, or one per expert."""
        lora_A, lora_B = self.on_device(lora.lora_A).float(), self.on_device(lora.lora_B).float()
        if parameter.ndim == 2:
            return lora.scaling * (lora_B @ lora_A)
        by_expert_A = lora_A.view(lora.num_experts, -1, lora_A.shape[1])  # [num_experts, r, in]
        by_expert_B = lora_B.view(lora_B.shape[0], -1, lora.num_experts)  # [out, r, num_experts]
        is_transposed = getattr(self.base, "is_transposed", False)
        pattern = "ore,eri->eio" if is_transposed else "ore,eri->eoi"
        return lora.scaling * torch.einsum(pattern, by_expert_B, by_expert_A)
