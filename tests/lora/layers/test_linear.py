"""LoRALinear in whole models against PEFT, alone and mixed; no LoRA code runs when no row has an adapter."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mmlora.kernels import ops
from mmlora.lora.layers.base import LoRAState
from mmlora.lora.layers.linear import LoRALinear
from mmlora.lora.layers.slots import LoRASlots
from mmlora.lora.loading.files import read_adapter
from mmlora.lora.loading.load import load_adapter
from mmlora.lora.loading.module_index import ModuleIndex
from mmlora.lora.weights import LoRAWeights, ModuleWeights

CPU = torch.device("cpu")
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all-linear": {"target_modules": "all-linear", "r": 3},
    "rslora": {"use_rslora": True, "r": 16, "lora_alpha": 3},
    "rank-pattern": {"rank_pattern": {"layers.0.self_attn.q_proj": 1, "down_proj": 24}},
    "alpha-pattern": {"alpha_pattern": {"^model.layers.1.mlp.down_proj": 40, "q_proj": 1}},
    "all-patterns-rslora": {"rank_pattern": {"q_proj": 9}, "alpha_pattern": {r"layers\.0\..*": 2}, "use_rslora": True},
    "one-layer": {"layers_to_transform": [1], "layers_pattern": "layers"},
}
MEDIA_TARGETS = (
    r".*img_processor\.encoder\..*(q_proj|fc1|fc2)|.*img_projection_(up|down)"
    r"|.*audio_embed\.encoder\..*(q_proj|o_proj|down_proj|embed\.out)|.*(up|down)_proj_for_(speech|vision_speech)"
)


def activate(model: nn.Module, *paths: Path) -> LoRASlots:
    index = ModuleIndex(model)
    slots = LoRASlots(model, len(paths), CPU)
    for uid, path in enumerate(paths):
        adapter = load_adapter(read_adapter(path), path.name, index, dtype=torch.float32)
        adapter = replace(adapter, uid=uid)
        slots.retain(slots.activate(adapter))
    return slots


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_language_model_equals_peft(llama: nn.Module, save_adapter: Any, peft_reference: Any, variant: str) -> None:
    path = save_adapter(llama, **VARIANTS[variant])
    ids = torch.arange(11)[None]
    base, expected = logits(llama, ids), logits(peft_reference(llama, path), ids)
    slots = activate(llama, path)
    with slots.state.uniform(0):
        actual = logits(llama, ids)
    assert (expected - base).abs().max() > 1e-2
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    assert torch.equal(logits(llama, ids), base)


def test_mixed_rows_equal_each_adapter_alone(llama: nn.Module, save_adapter: Any, peft_reference: Any) -> None:
    paths = [
        save_adapter(llama, "a", seed=1),
        save_adapter(llama, "b", seed=2, r=11, target_modules=["k_proj", "down_proj", "gate_proj"], use_rslora=True),
    ]
    references = [peft_reference(llama, path).base_model.model for path in paths] + [llama]  # slot −1: the last
    x = torch.randn(1, 23, 32)
    segments = ((0, 4, 1), (4, 4, 0), (4, 9, -1), (9, 20, 0), (20, 23, -1))
    mlp = "model.layers.0.mlp"
    with torch.no_grad():
        alone = [references[slot].get_submodule(mlp)(x[:, start:end]) for start, end, slot in segments]
        base = llama.get_submodule(mlp)(x)
        slots = activate(llama, *paths)
        with slots.state.rows(segments):
            actual = llama.get_submodule(mlp)(x)
    torch.testing.assert_close(actual, torch.cat(alone, dim=1), atol=1e-5, rtol=0)
    assert torch.equal(actual[:, 4:9], base[:, 4:9]) and torch.equal(actual[:, 20:], base[:, 20:])
    assert (actual[:, :4] - base[:, :4]).abs().max() > 1e-2 and (actual[:, 9:20] - base[:, 9:20]).abs().max() > 1e-2


@torch.no_grad()
def media_embeddings(model: nn.Module) -> list[torch.Tensor]:
    """Return the outputs of both towers with their projections, speech in both projection modes."""
    extend = model.get_submodule("model.embed_tokens_extend")
    torch.manual_seed(1)
    image, audio = extend.image_embed, extend.audio_embed
    features = image.get_img_features(torch.randn(1, 3, 28, 28))
    hidden = audio.encoder(torch.randn(1, 40, 80), None)
    pictures = image.img_projection_down(nn.functional.gelu(image.img_projection_up(features)))
    speech = audio.down_proj_for_speech(nn.functional.gelu(audio.up_proj_for_speech(hidden)))
    speech_with_image = audio.down_proj_for_vision_speech(nn.functional.gelu(audio.up_proj_for_vision_speech(hidden)))
    return [pictures, speech, speech_with_image]


def test_towers_and_connectors_equal_peft(phi4: nn.Module, save_adapter: Any, peft_reference: Any) -> None:
    path = save_adapter(phi4, target_modules=MEDIA_TARGETS, rank_pattern={"q_proj": 2, "img_projection_up": 13})
    base, expected = media_embeddings(phi4), media_embeddings(peft_reference(phi4, path).base_model.model)
    slots = activate(phi4, path)
    with slots.state.uniform(0):
        actual = media_embeddings(phi4)
    for name, got, wanted, without in zip(
        ["image", "speech", "speech with image"], actual, expected, base, strict=True
    ):
        assert (wanted - without).abs().max() > 1e-2, name
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5, msg=name)
    assert all(torch.equal(got, without) for got, without in zip(media_embeddings(phi4), base, strict=True))


def test_multimodal_language_model_equals_peft(phi4: nn.Module, save_adapter: Any, peft_reference: Any) -> None:
    path = save_adapter(phi4, target_modules=["qkv_proj", "gate_up_proj", "down_proj"], r=6)
    ids = torch.arange(9)[None]
    expected = logits(peft_reference(phi4, path), ids)
    slots = activate(phi4, path)
    with slots.state.rows(((0, 9, 0),)):
        actual = logits(phi4, ids)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("pass_", ["outside", "none", "all-base", "uniform-base"])
def test_without_adapters_no_lora_code_runs(
    llama: nn.Module, save_adapter: Any, monkeypatch: pytest.MonkeyPatch, pass_: str
) -> None:
    ids = torch.arange(7)[None]
    base = logits(llama, ids)
    slots = activate(llama, save_adapter(llama))

    def fail(*arguments: object, **options: object) -> None:
        raise AssertionError("LoRA code ran")

    monkeypatch.setattr(ops, "lora_apply", fail)
    monkeypatch.setattr(LoRAState, "rows_of", fail)
    if pass_ == "outside":
        assert torch.equal(logits(llama, ids), base)
        return
    context = {
        "none": lambda: slots.state.rows(None),
        "all-base": lambda: slots.state.rows(((0, 3, -1), (3, 7, -1))),
        "uniform-base": lambda: slots.state.uniform(-1),
    }[pass_]
    with context():
        assert torch.equal(logits(llama, ids), base)
    with pytest.raises(AssertionError, match="LoRA code ran"), slots.state.uniform(0):
        logits(llama, ids)


def linear(slots: int = 2) -> LoRALinear:
    torch.manual_seed(0)
    return LoRALinear(nn.Linear(4, 6), LoRAState(CPU), slots)


def test_attributes_of_the_base_are_accessible() -> None:
    layer = linear()
    assert layer.weight is layer.base.weight and layer.bias is layer.base.bias
    assert (layer.in_features, layer.out_features) == (4, 6)
    assert next(layer.parameters()).dtype == layer.weight.dtype


@torch.no_grad()
def test_any_leading_shape_and_cleared_slots() -> None:
    layer = linear()
    layer.set_slot(1, ModuleWeights(LoRAWeights(torch.randn(3, 4), torch.randn(6, 3), 2.0)))
    x = torch.randn(2, 3, 5, 4)
    weights = layer.slots
    expected = layer.base(x) + 2.0 * x @ weights.lora_A[1].T @ weights.lora_B[1].T
    with layer.state.uniform(1):
        torch.testing.assert_close(layer(x), expected)
        torch.testing.assert_close(layer(x[0, 0, 0]), expected[0, 0, 0])
    with layer.state.uniform(0):
        assert torch.equal(layer(x), layer.base(x))
    layer.clear_slot(1)
    with layer.state.uniform(1):
        assert torch.equal(layer(x), layer.base(x))


def test_passes_do_not_nest_and_close_after_errors() -> None:
    state = LoRAState(CPU)
    with state.rows(((0, 2, 0),)):
        assert state.segments == ((0, 2, 0),) and state.uniform_slot is None
        with pytest.raises(RuntimeError, match="do not nest"), state.uniform(0):
            pass
    with pytest.raises(KeyError), state.uniform(3):
        assert state.segments is None and state.uniform_slot == 3
        raise KeyError
    with pytest.raises(ValueError, match="cover all rows"), state.rows(((1, 2, 0),)):
        pass
    assert state.segments is None and state.uniform_slot is None and not state.is_active


def test_segments_of_another_batch_are_refused() -> None:
    layer = linear()
    with layer.state.rows(((0, 5, 0),)), pytest.raises(RuntimeError, match="got 4 rows, but the segments describe 5"):
        layer(torch.randn(1, 4, 4))
