"""Names of weights in older adapter files, converted as transformers converts checkpoints.

Published adapters use the names of transformers 4, which had a Linear for each expert; transformers 5 has one fused
parameter for all of them.
"""

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from torch import nn
from transformers import PreTrainedModel

_EXPERT: Final = re.compile(r"(?P<module>.+)\.(?P<expert>[0-9]{1,6})\.[^.]+\.weight")


@dataclass(frozen=True)
class Target:
    """Where the weight of a module in an adapter file is in the model.

    Attributes:
        module: name of the model's module.
        parameter: its parameter that the weight became, or became a part of; empty for the module's own parameters.
        expert: index of the expert in a fused parameter `[num_experts, out_features, in_features]`; None for all of it.
        part: which of `num_parts` equal blocks of out_features, such as gate and up.
        num_parts: number of these blocks.
    """

    module: str
    parameter: str = ""
    expert: int | None = None
    part: int = 0
    num_parts: int = 1


class WeightConversions:
    """The conversions of a model's checkpoints that also apply to adapters.

    Args:
        model: a transformers model; other models have no conversions.
        key_mapping: regular expressions for names in the checkpoint, with their replacements in the model.
    """

    def __init__(self, model: nn.Module, key_mapping: Mapping[str, str] | None) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        transforms: list[Any] = []
        if isinstance(model, PreTrainedModel):
            mapping = dict(key_mapping) if key_mapping else None
            transforms = get_model_conversion_mapping(model, mapping, add_legacy=False)
        self._renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        self._fusions = [transform for transform in transforms if _fuses_experts(transform)]

    def convert(self, names: Iterable[str]) -> dict[str, Target]:
        """Return where the weights of modules with these names may be; whether they exist is not checked."""
        renamings = copy.deepcopy(self._renamings)  # some are stateful across keys
        return {name: self._convert(name, renamings) for name in sorted(names)}

    def _convert(self, name: str, renamings: Iterable[Any]) -> Target:
        key = f"{name}.weight"
        for renaming in renamings:
            key, _ = renaming.rename_source_key(key)
        for fusion in self._fusions:
            fused, pattern = fusion.rename_source_key(key)
            module, _, parameter = fused.rpartition(".")
            match = _EXPERT.fullmatch(key) if pattern is not None else None
            if match is not None and match["module"] == module:
                sources = fusion.source_patterns
                return Target(module, parameter, int(match["expert"]), sources.index(pattern), len(sources))
        module, _, parameter = key.rpartition(".")
        return Target(module) if parameter == "weight" else Target(module, parameter)


def _fuses_experts(transform: Any) -> bool:
    """Return whether a conversion stacks the weights of experts, and joins parts of one expert along out_features."""
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

    if not isinstance(transform, WeightConverter) or len(transform.target_patterns) != 1:
        return False
    operations = [(type(operation), operation.dim) for operation in transform.operations if hasattr(operation, "dim")]
    stack, join = (MergeModulelist, 0), (Concatenate, 1)
    expected = [stack] if len(transform.source_patterns) == 1 else [stack, join]
    return len(operations) == len(transform.operations) and operations == expected
