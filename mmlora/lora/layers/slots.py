"""Device slots of LoRA adapters, with a reference count for each slot."""

from collections import OrderedDict
from typing import Final

import torch
from torch import nn

from mmlora.errors import AdapterError
from mmlora.lora.adapter import Adapter, AdapterIdentity
from mmlora.lora.layers.base import LoRALayer, LoRAState
from mmlora.lora.layers.embedding import LoRAEmbedding
from mmlora.lora.layers.linear import LoRALinear
from mmlora.lora.layers.uniform import LoRAConvolution, LoRAWholeModule
from mmlora.lora.loading.module_index import kind_of, output_layer_of


class LoRASlots:
    """Holds up to `max_loras` adapters in the layers of a model. Used by the engine thread only.

    An adapter stays resident after its last request until its slot is needed (LRU); a slot in use is never evicted.
    Modules are wrapped when the first adapter that changes them is activated.

    Args:
        model: the whole model; adapters use its module names.
        max_loras: number of slots.
        device: of the model.
        max_num_rows, max_num_segments: see `LoRAState`.

    Attributes:
        num_changes: incremented whenever an adapter enters or leaves a slot.
    """

    def __init__(
        self,
        model: nn.Module,
        max_loras: int,
        device: torch.device | str,
        *,
        max_num_rows: int = 0,
        max_num_segments: int = 0,
    ) -> None:
        self.model = model
        self.max_loras = max_loras
        self.num_changes = 0
        self.state = LoRAState(torch.device(device), max_num_rows, max_num_segments)
        self._output_layer = output_layer_of(model)
        self._layers: dict[str, LoRALayer] = {}
        self._adapters: dict[int, Adapter] = {}
        self._slots: OrderedDict[AdapterIdentity, int] = OrderedDict()  # least recently used first
        self._num_users = [0] * max_loras

    @property
    def resident(self) -> tuple[Adapter, ...]:
        """Adapters in the slots, least recently used first."""
        return tuple(self._adapters[slot] for slot in self._slots.values())

    def slot_of(self, identity: AdapterIdentity) -> int | None:
        """Return the slot of a version of an adapter; None if it is not resident."""
        return self._slots.get(identity)

    def num_users(self, slot: int) -> int:
        """Return the reference count of a slot."""
        return self._num_users[slot]

    def can_activate(self, adapter: Adapter) -> bool:
        """Return whether the adapter is resident or a slot is free or idle, so that `activate` succeeds."""
        return adapter.identity in self._slots or self._available_slot() is not None

    def activate(self, adapter: Adapter) -> int:
        """Make an adapter resident and return its slot; the caller retains the slot while requests use it.

        Raises:
            AdapterError: every slot is in use.
        """
        slot = self._slots.get(adapter.identity)
        if slot is None:
            slot = self._available_slot()
            if slot is None:
                raise AdapterError(f"no slot for adapter {adapter.name!r}: all {self.max_loras} are in use")
            self._load(slot, adapter)
        self._slots.move_to_end(adapter.identity)
        return slot

    def retain(self, slot: int) -> None:
        """Increment the reference count of a slot."""
        self._num_users[slot] += 1

    def release(self, slot: int) -> None:
        """Decrement the reference count of a slot; the adapter stays resident."""
        if self._num_users[slot] == 0:
            raise RuntimeError(f"slot {slot} is released more often than retained")
        self._num_users[slot] -= 1

    def evict(self, identity: AdapterIdentity) -> bool:
        """Free the slot of an adapter that is not in use; return whether the adapter is no longer resident."""
        slot = self._slots.get(identity)
        if slot is not None and self._num_users[slot] == 0:
            self._clear(slot)
        return identity not in self._slots

    def _available_slot(self) -> int | None:
        free = (slot for slot in range(self.max_loras) if slot not in self._adapters)
        idle = (slot for slot in self._slots.values() if self._num_users[slot] == 0)
        return next(free, next(idle, None))

    def _load(self, slot: int, adapter: Adapter) -> None:
        layers = {name: self._wrap(name) for name in adapter.modules}
        self._clear(slot)
        try:
            for name, layer in layers.items():
                layer.set_slot(slot, adapter.modules[name])
        except BaseException:
            for layer in layers.values():
                layer.clear_slot(slot)
            raise
        self._adapters[slot] = adapter
        self._slots[adapter.identity] = slot
        self.num_changes += 1

    def _clear(self, slot: int) -> None:
        adapter = self._adapters.pop(slot, None)
        if adapter is not None:
            self.num_changes += 1
            del self._slots[adapter.identity]
            for name in adapter.modules:
                self._layers[name].clear_slot(slot)

    def _wrap(self, name: str) -> LoRALayer:
        if name not in self._layers:
            base = self.model.get_submodule(name)
            layer = _LAYERS[kind_of(base)](base, self.state, self.max_loras, is_output_layer=base is self._output_layer)
            parent, _, child = name.rpartition(".")
            owner = self.model.get_submodule(parent)
            setattr(owner.base if isinstance(owner, LoRALayer) else owner, child, layer)
            self._layers[name] = layer
        return self._layers[name]


_LAYERS: Final[dict[str, type[LoRALayer]]] = {
    "linear": LoRALinear,
    "embedding": LoRAEmbedding,
    "convolution": LoRAConvolution,
    "other": LoRAWholeModule,
}
