"""Files that are not PEFT's are refused with their cause and what to do about it."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mmlora.errors import AdapterError, AdapterMismatch
from mmlora.lora.loading.files import read_adapter
from mmlora.lora.loading.foreign_keys import explain
from mmlora.lora.loading.load import load_adapter
from mmlora.lora.loading.module_index import ModuleIndex
from mmlora.lora.loading.tensor_keys import parse_key

PREFIX = "base_model.model."
Rename = Callable[[str], str]
FOREIGN: dict[str, tuple[Rename, str]] = {
    "compiled": (lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod."), "_orig_mod.save_pretrained"),
    "compiled-outside": (lambda key: f"_orig_mod.{key}", "_orig_mod.save_pretrained"),
    "compiled-layers": (lambda key: re.sub(r"layers\.(\d+)\.", r"layers.\1._orig_mod.", key), "_orig_mod.' is torch"),
    "ddp": (lambda key: f"module.{key}", "model.module.save_pretrained"),
    "ddp-of-compiled": (lambda key: f"module._orig_mod.{key}", "torch.compile's; .*; 'module.' is that of DataPar"),
    "fsdp": (
        lambda key: "_fsdp_wrapped_module." + key.replace("self_attn.", "self_attn._fsdp_wrapped_module."),
        "'_fsdp_wrapped_module.' is FSDP's; save the full state dict",
    ),
    "checkpointing": (
        lambda key: key.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn."),
        "is that of activation checkpointing",
    ),
    "state-dict": (lambda key: key.replace(".weight", ".sql-v2.weight"), r"name of the adapter.*lora_A\.NAME\.weight"),
    "value-head": (lambda key: f"pretrained_model.{key}", "a prefix before 'base_model.model.'"),
    "wrapped-twice": (lambda key: f"base_model.model.{key}", "a prefix before 'base_model.model.'"),
    "without-head": (
        lambda key: key.replace("base_model.model.model.", "base_model.model."),
        r"lack 'model\.', so the adapter was trained on the model without its head",
    ),
    "without-head-and-prefix": (
        lambda key: f"module.{key.replace('base_model.model.model.', '')}",
        r"'module\.' is that of DataParallel.*; the keys lack 'model\.'",
    ),
    "kohya": (
        lambda key: key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"),
        "lora_down and lora_up are Kohya's names",
    ),
    "diffusers": (lambda key: key.replace("lora_A", "lora.down").replace("lora_B", "lora.up"), "Kohya's names"),
    "mlx": (
        lambda key: key.removeprefix(PREFIX).replace("lora_A.weight", "lora_a").replace("lora_B.weight", "lora_b"),
        "MLX's names, of transposed matrices",
    ),
    "flattened": (
        lambda key: f"{key.split('.self_attn')[0]}._flat_param_{key.count('A')}{key.count('v_proj')}",
        "FSDP's flattened shards",
    ),
}


@pytest.fixture
def adapter(tiny_llama: nn.Module, save_adapter: Any) -> Path:
    path: Path = save_adapter(tiny_llama, target_modules=["q_proj", "v_proj"])
    return path


@pytest.mark.parametrize("layout", FOREIGN)
def test_a_foreign_layout_is_named_with_its_remedy(
    tiny_llama: nn.Module, adapter: Path, edit_tensors: Any, layout: str
) -> None:
    rename, message = FOREIGN[layout]
    edit_tensors(adapter, lambda tensors: {rename(key): tensor for key, tensor in tensors.items()})
    with pytest.raises(AdapterMismatch, match=message) as refused:
        load_adapter(read_adapter(adapter), "a", ModuleIndex(tiny_llama), dtype=torch.float32)
    assert "nothing matches a module of this model" in str(refused.value)


@pytest.mark.parametrize("layout", ["compiled", "ddp", "fsdp", "state-dict", "checkpointing", "without-head"])
def test_peft_does_not_read_these_layouts_either(
    tiny_llama: nn.Module, adapter: Path, edit_tensors: Any, peft_reference: Any, layout: str
) -> None:
    rename, _ = FOREIGN[layout]
    edit_tensors(adapter, lambda tensors: {rename(key): tensor for key, tensor in tensors.items()})
    ids = torch.arange(8)[None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        changed = peft_reference(tiny_llama, adapter)(input_ids=ids).logits
    assert torch.equal(changed, tiny_llama(input_ids=ids).logits)


def test_the_adapter_name_default_is_read_as_by_peft(
    tiny_llama: nn.Module, save_adapter: Any, edit_tensors: Any, peft_reference: Any
) -> None:
    path = save_adapter(tiny_llama, target_modules=["q_proj"], use_dora=True)
    expected = load_adapter(read_adapter(path), "a", ModuleIndex(tiny_llama), dtype=torch.float32)
    logits = peft_reference(tiny_llama, path)(input_ids=torch.arange(8)[None]).logits
    edit_tensors(path, lambda tensors: {as_in_state_dict(key): tensor for key, tensor in tensors.items()})
    adapter = load_adapter(read_adapter(path), "a", ModuleIndex(tiny_llama), dtype=torch.float32)
    assert torch.equal(peft_reference(tiny_llama, path)(input_ids=torch.arange(8)[None]).logits, logits)
    assert adapter.modules.keys() == expected.modules.keys()
    for name, weights in expected.modules.items():
        found = dict(adapter.modules[name].tensors)
        assert found.keys() == dict(weights.tensors).keys() >= {"lora_A", "lora_B", "magnitude"}
        assert all(torch.equal(found[key], tensor) for key, tensor in weights.tensors)


@pytest.mark.parametrize("role", ["A.weight", "B.bias", "embedding_A", "magnitude_vector", "magnitude_vector.weight"])
def test_the_adapter_name_default_is_read_in_each_role(role: str) -> None:
    key = f"a.default.b.lora_{role}"
    plain, named = parse_key(key), parse_key(with_name(key))
    assert plain is not None and named is not None and ".default" in named.key
    assert (named.module, named.role) == (plain.module, plain.role) == ("a.default.b", plain.role)
    assert parse_key(with_name(key).replace("lora_", "lora_other_")) is None


def as_in_state_dict(key: str) -> str:
    return with_name(re.sub("lora_magnitude_vector$", "lora_magnitude_vector.weight", key))


def with_name(key: str) -> str:
    return re.sub(r"(lora_(?:embedding_)?[AB]|lora_magnitude_vector)", r"\1.default", key)


def test_tensors_of_which_only_some_are_foreign_are_explained_too(
    tiny_llama: nn.Module, adapter: Path, edit_tensors: Any
) -> None:
    edit_tensors(adapter, lambda found: {key.replace(".1.", ".1._orig_mod."): t for key, t in found.items()})
    with pytest.raises(AdapterMismatch, match=r"4 of 8 tensors match no module.*torch.compile's") as refused:
        load_adapter(read_adapter(adapter), "a", ModuleIndex(tiny_llama), dtype=torch.float32)
    assert "strict=False" not in str(refused.value)


def test_a_cause_is_named_only_if_its_removal_gives_a_module(
    tiny_llama: nn.Module, adapter: Path, edit_tensors: Any
) -> None:
    edit_tensors(adapter, lambda found: {key.replace("layers.", "module.blocks."): t for key, t in found.items()})
    with pytest.raises(AdapterMismatch, match="nothing matches a module") as refused:
        load_adapter(read_adapter(adapter), "a", ModuleIndex(tiny_llama), dtype=torch.float32)
    assert "DataParallel" not in str(refused.value)
    assert explain(["model.layers.0.a_module.q.weight", "model.x_orig_mod.y.weight"], lambda keys: list(keys)) is None


def test_only_causes_of_keys_that_they_explain_are_named(
    tiny_llama: nn.Module, adapter: Path, edit_tensors: Any
) -> None:
    edit_tensors(
        adapter,
        lambda found: {
            **{key.replace(".1.", ".1._orig_mod."): tensor for key, tensor in found.items()},
            "module.nothing.lora_A.weight": torch.ones(1),
            "layers.9.lora_A.other.weight": torch.ones(1),
        },
    )
    with pytest.raises(AdapterMismatch, match=r"6 of 10 tensors match no module.*torch.compile's") as refused:
        load_adapter(read_adapter(adapter), "a", ModuleIndex(tiny_llama), dtype=torch.float32)
    assert not re.search("DataParallel|without its head|name of the adapter", str(refused.value))


@pytest.mark.parametrize("chosen", ["lora_A", "lora", "layers.1.self_attn.v_proj.lora_B"])
def test_tensors_that_were_not_gathered_are_called_empty(
    tiny_llama: nn.Module, adapter: Path, edit_tensors: Any, chosen: str
) -> None:
    edit_tensors(adapter, lambda found: {key: torch.empty(0) if chosen in key else t for key, t in found.items()})
    num_empty = {"lora_A": 4, "lora": 8}.get(chosen, 1)
    message = rf"{num_empty} of 8 tensors are empty \(shape \[0\]\), such as .*{chosen}.*ZeRO-3"
    with pytest.raises(AdapterMismatch, match=message):
        load_adapter(read_adapter(adapter), "a", ModuleIndex(tiny_llama), dtype=torch.float32)


@pytest.mark.parametrize("content", ["pickle", "foreign", "none"])
def test_another_method_is_named_before_its_tensors_are_judged(
    tiny_llama: nn.Module, adapter: Path, edit_config: Any, content: str
) -> None:
    weights = adapter / "adapter_model.safetensors"
    weights.unlink()
    if content == "pickle":
        (adapter / "adapter_model.bin").write_bytes(b"PK")
    elif content == "foreign":
        save_file({"prompt_embeddings": torch.empty(0)}, weights)
    edit_config(adapter, peft_type="PROMPT_TUNING", num_virtual_tokens=3)
    with pytest.raises(AdapterError, match="peft_type PROMPT_TUNING is not supported; allowed: LORA"):
        load_adapter(read_adapter(adapter), "a", ModuleIndex(tiny_llama), dtype=torch.float32)
