"""The modules of a model by name, as adapters see them: which can be adapted, and what older files call them."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from mmlora.lora.adapter import PARTS


class ModuleIndex:
    """Look up modules of a model.

    Args:
        model: a transformers model, before any of its modules is wrapped.
        part_of: tells the part of the model that a module lies in (one of `PARTS`); all are language model without it.

    Attributes:
        linears: `(in_features, out_features)` of every module that can be adapted.
        others: class name of every other module.
    """

    def __init__(self, model: nn.Module, part_of: Callable[[str], str] | None = None) -> None:
        self._part_of = part_of
        self._renamings = _checkpoint_renamings(model)
        self.linears: dict[str, tuple[int, int]] = {}
        self.others: dict[str, str] = {}
        head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None  # type: ignore[no-untyped-call]
        for name, module in model.named_modules():
            if module is head:
                self.others[name] = "output embedding"
                continue
            # This takes in the out_proj of nn.MultiheadAttention, which is never called: as in PEFT, where
            # target_modules="all-linear" saves tensors for it, they have no effect.
            if isinstance(module, nn.Linear):
                self.linears[name] = (module.in_features, module.out_features)
            elif name:
                self.others[name] = type(module).__name__

    def __contains__(self, name: object) -> bool:
        return name in self.linears or name in self.others

    def resolve(self, names: Sequence[str]) -> dict[str, str]:
        """Return the model's own name for each name that an adapter file uses, leaving out those that have none.

        A name that the model does not have is renamed as transformers renames checkpoints: published adapters carry
        the names of transformers 4.
        """
        renamings = copy.deepcopy(self._renamings)  # some keep state from one key to the next
        resolved = {}
        for name in sorted(names):
            renamed = name if name in self else _rename(name, renamings)
            if renamed in self:
                resolved[name] = renamed
        return resolved

    def part_of(self, name: str) -> str:
        """Return the part of the model that a module lies in."""
        part = self._part_of(name) if self._part_of else PARTS[0]
        if part not in PARTS:
            raise ValueError(f"part_of({name!r}) is {part!r}; it must be one of {', '.join(PARTS)}")
        return part


def _checkpoint_renamings(model: nn.Module) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    if not isinstance(model, PreTrainedModel):
        return []
    transforms = get_model_conversion_mapping(model, add_legacy=False)
    return [transform for transform in transforms if isinstance(transform, WeightRenaming)]


def _rename(name: str, renamings: Sequence[Any]) -> str:
    key = f"{name}.weight"
    for renaming in renamings:
        key, _ = renaming.rename_source_key(key)
    return key.removesuffix(".weight")
