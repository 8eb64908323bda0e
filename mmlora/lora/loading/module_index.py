"""Modules of a model by name: how each can be adapted, and their names in older adapter files."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mmlora.lora.adapter import PARTS
from mmlora.lora.layers.uniform import convolution_of
from mmlora.lora.loading.conversions import Target, WeightConversions


class ModuleIndex:
    """Index of the modules of a model.

    Args:
        model: a transformers model, before any of its modules is wrapped; its weights may be on the meta device.
        part_of: returns the part of the model (one of `PARTS`) of a module; by default, all are language model.
        key_mapping: regular expressions for names in the checkpoint, with their replacements in the model.

    Attributes:
        modules: every module by name.
        input_embedding: name of the token embedding; None without one.
        output_layer: name of the layer that computes the logits; None without one.
        is_tied: whether these two share their weight.
    """

    def __init__(
        self,
        model: nn.Module,
        part_of: Callable[[str], str] | None = None,
        key_mapping: Mapping[str, str] | None = None,
    ) -> None:
        self._part_of = part_of
        self._conversions = WeightConversions(model, key_mapping)
        self.modules: dict[str, nn.Module] = {name: module for name, module in model.named_modules() if name}
        # Tensors of the base model: during a forward pass, a module may hold tensors of an adapter instead.
        self._tensors = {name: {**module._parameters, **module._buffers} for name, module in self.modules.items()}
        names: dict[nn.Module | None, str] = {module: name for name, module in self.modules.items()}
        embedding = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
        self.input_embedding = names.get(embedding)
        self.output_layer = names.get(output_layer_of(model))
        tied = [self.modules[name] for name in (self.input_embedding, self.output_layer) if name is not None]
        self.is_tied = len(tied) == 2 and tied[0].weight is tied[1].weight

    def kind_of(self, name: str) -> str:
        """Return how a module is adapted, see `kind_of` below."""
        return kind_of(self.modules[name])

    def parameter(self, name: str, parameter: str) -> torch.Tensor | None:
        """Return a parameter or buffer of a module of the base model; None when it has none of this name."""
        return self._tensors[name].get(parameter)

    def has_parameters(self, name: str) -> bool:
        """Return whether a module has direct parameters, not counting those of its children."""
        return any(parameter is not None for parameter in self.modules[name]._parameters.values())

    def resolve(self, names: Iterable[str]) -> dict[str, Target]:
        """Return where the model has the weight of each module in an adapter file; names without one are left out.

        Names that the model does not have are converted as transformers converts checkpoints: published adapters use
        the names of transformers 4.
        """
        names = set(names)
        own = {name: Target(name) for name in names & self.modules.keys()}
        converted = self._conversions.convert(names - own.keys())
        return {**own, **{name: target for name, target in converted.items() if self._exists(target)}}

    def _exists(self, target: Target) -> bool:
        if target.module not in self.modules or not target.parameter:
            return target.module in self.modules
        parameter = self.parameter(target.module, target.parameter)
        if parameter is None or target.expert is None:
            return parameter is not None
        return parameter.ndim == 3 and target.expert < parameter.shape[0] and parameter.shape[1] % target.num_parts == 0

    def part_of(self, name: str) -> str:
        """Return the part of the model that a module belongs to."""
        part = self._part_of(name) if self._part_of else PARTS[0]
        if part not in PARTS:
            raise ValueError(f"part_of({name!r}) is {part!r}; it must be one of {', '.join(PARTS)}")
        return part


def output_layer_of(model: nn.Module) -> nn.Module | None:
    """Return the layer that computes a model's logits; None without one."""
    return model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None  # type: ignore[no-untyped-call]


def kind_of(module: nn.Module) -> str:
    """Return how a module is adapted: linear, embedding, convolution or other (by whole parameters).

    A subclass that overrides `forward` is other, unless it computes the same; embeddings that only scale their output
    (`embed_scale`) are embeddings.
    """
    # Includes the out_proj of nn.MultiheadAttention, which is never called: PEFT with target_modules="all-linear"
    # saves tensors for it, which have no effect there either.
    if isinstance(module, nn.Linear | Conv1D):
        return "linear" if _is_plain(module, nn.Linear, Conv1D) or _computes_linear(module) else "other"
    if isinstance(module, nn.Embedding):
        return "embedding" if _is_plain(module, nn.Embedding) or hasattr(module, "embed_scale") else "other"
    if convolution_of(module) is not None:
        return "convolution" if _is_plain(module, nn.Conv1d, nn.Conv2d, nn.Conv3d) else "other"
    return "other"


def _is_plain(module: nn.Module, *classes: type[nn.Module]) -> bool:
    return any(type(module).forward is kind.forward for kind in classes)


@torch.no_grad()
def _computes_linear(module: nn.Module) -> bool:
    """Return whether a subclass of Linear that overrides `forward` computes what Linear does, as Falcon's does."""
    weight, bias = module.weight, module.bias
    assert isinstance(weight, torch.Tensor) and (bias is None or isinstance(bias, torch.Tensor))
    x = torch.linspace(-1, 1, weight.shape[1], dtype=weight.dtype, device=weight.device)[None]
    try:
        y = module(x)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False
    expected = nn.functional.linear(x, weight, bias)
    is_alike = isinstance(y, torch.Tensor) and y.shape == expected.shape
    return is_alike and (y.device.type == "meta" or torch.allclose(y, expected, rtol=1e-2, atol=1e-3))


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """Return `(in_features, out_features)` of a Linear or of transformers' Conv1D."""
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    out_features, in_features = weight.shape if isinstance(module, nn.Linear) else reversed(weight.shape)
    return in_features, out_features
