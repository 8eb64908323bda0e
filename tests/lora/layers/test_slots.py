"""Device slots: residency, eviction, and no remains of an evicted adapter."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from mmlora.errors import AdapterError
from mmlora.lora.adapter import Adapter, AdapterReport
from mmlora.lora.layers.embedding import LoRAEmbedding
from mmlora.lora.layers.linear import LoRALinear
from mmlora.lora.layers.slots import LoRASlots
from mmlora.lora.layers.uniform import LoRAConvolution, LoRAWholeModule
from mmlora.lora.weights import LoRAWeights, ModuleWeights


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 4))


def adapter(uid: int, names: tuple[str, ...] = ("0", "2"), generation: int = 0) -> Adapter:
    lora = LoRAWeights(torch.full((2, 4), float(uid)), torch.ones(4, 2), 1.0)
    modules = {name: ModuleWeights(lora) for name in names}
    return Adapter(f"a{uid}", "digest", None, Path(), modules, AdapterReport(len(names), {}), uid, generation)


def test_modules_are_wrapped_when_first_needed() -> None:
    net = model()
    slots = LoRASlots(net, 2, "cpu")
    assert not any(isinstance(module, LoRALinear) for module in net.modules())
    slots.activate(adapter(1, ("0",)))
    assert [isinstance(module, LoRALinear) for module in net] == [True, False, False, False]
    slots.activate(adapter(2, ("0", "3")))
    assert [isinstance(module, LoRALinear) for module in net] == [True, False, False, True]


def test_an_idle_adapter_stays_until_its_slot_is_needed() -> None:
    slots = LoRASlots(model(), 2, "cpu")
    one, two, three = adapter(1), adapter(2), adapter(3)
    first, second = slots.activate(one), slots.activate(two)
    assert {first, second} == {0, 1}
    slots.retain(first)
    slots.release(first)
    assert slots.activate(one) == first  # now the most recently used
    assert slots.activate(three) == second
    assert slots.slot_of(two.identity) is None
    assert [resident.name for resident in slots.resident] == ["a1", "a3"]


def test_a_slot_in_use_is_never_evicted() -> None:
    slots = LoRASlots(model(), 1, "cpu")
    one, two = adapter(1), adapter(2)
    slot = slots.activate(one)
    slots.retain(slot)
    slots.retain(slot)
    slots.release(slot)
    assert slots.can_activate(one) and not slots.can_activate(two)
    with pytest.raises(AdapterError, match="no slot for adapter 'a2': all 1 are in use"):
        slots.activate(two)
    assert not slots.evict(one.identity)
    slots.release(slot)
    assert slots.can_activate(two) and slots.activate(two) == slot
    with pytest.raises(RuntimeError, match="released more often"):
        slots.release(slot)


def test_a_new_generation_is_another_adapter() -> None:
    slots = LoRASlots(model(), 2, "cpu")
    assert slots.activate(adapter(1)) != slots.activate(adapter(1, generation=1))


@torch.no_grad()
def test_eviction_clears_the_layers() -> None:
    net = model()
    slots = LoRASlots(net, 1, "cpu")
    old = adapter(1, ("0", "2", "3"))
    tensor = weakref.ref(old.modules["3"].lora.lora_A)
    slots.activate(old)
    del old
    slots.activate(adapter(2, ("0",)))
    gc.collect()
    assert tensor() is None
    x = torch.randn(3, 4)
    with slots.state.uniform(0):
        assert torch.equal(net[2](x), net[2].base(x)) and not torch.equal(net[0](x), net[0].base(x))


def test_evict_frees_an_idle_slot() -> None:
    slots = LoRASlots(model(), 1, "cpu")
    one = adapter(1)
    slots.activate(one)
    assert slots.evict(one.identity) and slots.resident == () and slots.evict(one.identity)


def test_a_failed_activation_leaves_the_slot_free(monkeypatch: pytest.MonkeyPatch) -> None:
    net = model()
    slots = LoRASlots(net, 1, "cpu")
    set_slot = LoRALinear.set_slot

    def fail_on_second(layer: LoRALinear, slot: int, weights: ModuleWeights) -> None:
        if layer is net[2]:
            raise torch.OutOfMemoryError
        set_slot(layer, slot, weights)

    monkeypatch.setattr(LoRALinear, "set_slot", fail_on_second)
    with pytest.raises(torch.OutOfMemoryError):
        slots.activate(adapter(1))
    assert slots.resident == () and net[0].slots.max_rank == 0
    monkeypatch.undo()
    assert slots.activate(adapter(2)) == 0


def test_each_module_gets_its_wrapper() -> None:
    kinds = {
        nn.Linear(4, 4): LoRALinear,
        Conv1D(4, 4): LoRALinear,
        nn.Embedding(4, 4): LoRAEmbedding,
        nn.Conv2d(4, 4, 1): LoRAConvolution,
        nn.LayerNorm(4): LoRAWholeModule,
    }
    net = nn.ModuleList(kinds)
    slots = LoRASlots(net, 1, "cpu")
    weight = torch.ones(4, 4)
    for index, (module, kind) in enumerate(kinds.items()):
        slots.activate(
            replaced := Adapter(
                "a",
                "d",
                None,
                None,
                {str(index): ModuleWeights(None, {"weight": weight})},
                AdapterReport(1, {}),
                index + 1,
            )
        )
        slots.evict(replaced.identity)
        assert type(net[index]) is kind and net[index].base is module


def test_children_of_wrapped_modules_are_wrapped_where_they_are_called() -> None:
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 4)))
    net[0].register_parameter("own", nn.Parameter(torch.ones(1)))
    slots = LoRASlots(net, 1, "cpu")
    lora = LoRAWeights(torch.ones(2, 4), torch.ones(4, 2), 1.0)
    modules = {"0": ModuleWeights(None, {"own": torch.zeros(1)}), "0.0": ModuleWeights(lora)}
    slots.activate(Adapter("a", "d", None, None, modules, AdapterReport(2, {}), 1))
    x = torch.randn(3, 4)
    with torch.no_grad(), slots.state.uniform(0):
        torch.testing.assert_close(net(x), net[0].base[0].base(x) + x.sum(1, keepdim=True) * 2)
