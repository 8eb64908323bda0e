"""Weights of an adapter for one module: plain tensors on the host, ready to be loaded into a slot."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, eq=False)
class LoRAWeights:
    """Low-rank change of one weight, in the model's dtype, on the host.

    Attributes:
        lora_A: `[r, in_features]` for a Linear, `[r, num_embeddings]` for an Embedding, the weight of a convolution
            with r output channels for a convolution, `[num_experts * r, in_features]` for a parameter.
        lora_B: `[out_features, r]`, the weight of a 1 x 1 convolution, or `[out_features, r * num_experts]`.
        scaling: `alpha / r`, or `alpha / √r` with rsLoRA.
        bias: bias of lora_B, `[out_features]` (`lora_bias`); `scaling` applies to it, too.
        magnitude: DoRA magnitudes, one value per output feature.
        num_experts: number of matrices in a parameter `[num_experts, …, …]`; 1 for a single matrix.
    """

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    scaling: float
    bias: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None
    num_experts: int = 1

    @property
    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors with their names."""
        named = {"lora_A": self.lora_A, "lora_B": self.lora_B, "bias": self.bias, "magnitude": self.magnitude}
        return ((name, tensor) for name, tensor in named.items() if tensor is not None)


@dataclass(frozen=True, order=True)
class ExpertRows:
    """Rows of one expert's matrix in a parameter `[num_experts, out_features, in_features]`: gate, up or down.

    Attributes:
        parameter: name of the parameter in its module.
        expert: number of the expert.
        start, stop: first row, and the row after the last.
    """

    parameter: str
    expert: int
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Replaced rows of an embedding, or of the output layer that is tied to it.

    Attributes:
        ids: `[num_ids] int64`, ascending.
        rows: `[num_ids, hidden_size]`.
    """

    ids: torch.Tensor
    rows: torch.Tensor


@dataclass(frozen=True, eq=False)
class ModuleWeights:
    """All changes of an adapter in one module.

    Attributes:
        lora: low-rank change of its weight.
        parameters: replaced parameters and buffers by name (`modules_to_save`, trained biases).
        parameter_loras: low-rank changes of parameters, by name (`target_parameters`).
        expert_loras: low-rank changes of single experts in its parameters, which have a Linear each in transformers 4.
        token_rows: replaced rows of an embedding (`trainable_token_indices`).
    """

    lora: LoRAWeights | None = None
    parameters: Mapping[str, torch.Tensor] = field(default_factory=dict)
    parameter_loras: Mapping[str, LoRAWeights] = field(default_factory=dict)
    expert_loras: Mapping[ExpertRows, LoRAWeights] = field(default_factory=dict)
    token_rows: TokenRows | None = None

    @property
    def loras(self) -> Iterator[tuple[str, LoRAWeights]]:
        """All low-rank changes, in a fixed order, with a suffix for the names of their tensors."""
        if self.lora is not None:
            yield "", self.lora
        for name, weights in sorted(self.parameter_loras.items()):
            yield f" of {name}", weights
        for rows in sorted(self.expert_loras):
            yield f" of {rows.parameter}[{rows.expert}, {rows.start}:{rows.stop}]", self.expert_loras[rows]

    @property
    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors, with names that are unique in the module."""
        for suffix, weights in self.loras:
            yield from ((f"{key}{suffix}", tensor) for key, tensor in weights.tensors)
        for name, tensor in sorted(self.parameters.items()):
            yield f"parameter {name}", tensor
        if self.token_rows is not None:
            yield "token ids", self.token_rows.ids
            yield "token rows", self.token_rows.rows

    @property
    def scalings(self) -> list[float]:
        """Scaling factors of its low-rank changes."""
        return [weights.scaling for _, weights in self.loras]

    @property
    def is_empty(self) -> bool:
        """Whether nothing is changed."""
        return not any(True for _ in self.tensors)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for _, tensor in self.tensors)
