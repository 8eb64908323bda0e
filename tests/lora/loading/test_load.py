"""Strict loading: every tensor matches a module, or a named error is raised."""

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mmlora.errors import AdapterError, AdapterMismatch, AdapterNotFound
from mmlora.lora.adapter import Adapter
from mmlora.lora.loading.conversions import Target
from mmlora.lora.loading.files import read_adapter
from mmlora.lora.loading.load import load_adapter
from mmlora.lora.loading.module_index import ModuleIndex
from mmlora.lora.loading.peft_config import PeftConfig

Q0 = "model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{Q0}.lora_A.weight"
DOWN0 = "model.layers.0.mlp.down_proj"
Tensors = dict[str, torch.Tensor]


def load(path: Path, index: ModuleIndex, **arguments: Any) -> Adapter:
    return load_adapter(read_adapter(path), "test", index, **{"dtype": torch.float32, **arguments})


def part_of(name: str) -> str:
    if ".img_processor." in name:
        return "vision_tower"
    if ".audio_embed.encoder." in name:
        return "audio_tower"
    return "connector" if "embed_tokens_extend" in name else "language_model"


@pytest.fixture(scope="module")
def index(tiny_llama: nn.Module) -> ModuleIndex:
    return ModuleIndex(tiny_llama)


def test_report_rank_and_shapes(tiny_llama: nn.Module, index: ModuleIndex, save_adapter: Any) -> None:
    adapter = load(save_adapter(tiny_llama, rank_pattern={"down_proj": 7}), index, max_lora_rank=7)
    assert adapter.report.matched == 4 and adapter.report.unmatched == ()
    assert adapter.report.parts == {"language_model": 4, "connector": 0, "vision_tower": 0, "audio_tower": 0}
    assert adapter.report.max_rank == 7 and adapter.modules[Q0].lora.lora_A.shape == (4, 32)
    assert adapter.modules["model.layers.1.mlp.down_proj"].lora.lora_B.shape == (32, 7)
    assert adapter.num_bytes == 4 * 2 * (4 * (32 + 32) + 7 * (48 + 32))
    assert adapter.media_digest is None


def test_weights_have_the_models_dtype(tiny_llama: nn.Module, index: ModuleIndex, save_adapter: Any) -> None:
    adapter = load(save_adapter(tiny_llama), index, dtype=torch.bfloat16)
    assert adapter.modules[Q0].lora.lora_A.dtype == torch.bfloat16


def test_the_prefix_may_be_missing(
    tiny_llama: nn.Module, index: ModuleIndex, save_adapter: Any, edit_tensors: Any
) -> None:
    path = save_adapter(tiny_llama)
    edit_tensors(path, lambda tensors: {key.removeprefix("base_model.model."): t for key, t in tensors.items()})
    assert load(path, index).report.matched == 4


def test_names_of_transformers_4_are_renamed() -> None:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, image_size=28, patch_size=14)
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**sizes, vocab_size=16))
    index = ModuleIndex(LlavaForConditionalGeneration(config))
    old = [
        "language_model.model.layers.0.self_attn.q_proj",
        "multi_modal_projector.linear_1",
        "language_model.x.q_proj",
    ]
    new = ["model.language_model.layers.0.self_attn.q_proj", "model.multi_modal_projector.linear_1"]
    assert index.resolve(old) == {name: Target(module) for name, module in zip(old, new, strict=False)}
    assert index.resolve(new) == {name: Target(name) for name in new}


def replace_key(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key.replace(old, new): tensor for key, tensor in tensors.items()}


def with_tensor(key: str, tensor: torch.Tensor | None) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        changed = {**tensors, key: tensor}
        return {key: tensor for key, tensor in changed.items() if tensor is not None}

    return change


BROKEN: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "nothing-matches": (replace_key("layers", "blocks"), "nothing matches a module of this model: 8 tensors, such as"),
    "some-do-not-match": (
        replace_key("layers.1", "layers.7"),
        "4 of 8 tensors match no module.*layers.7.mlp.down_proj",
    ),
    "no-tensors": (lambda tensors: {}, "the file contains no tensors"),
    "no-partner": (with_tensor(KEY, None), rf"{Q0}.lora_B.weight has no partner lora_A"),
    "other-width": (with_tensor(KEY, torch.ones(4, 31)), rf"another model: {Q0} is Linear\(32, 32\).*\[4, 31\]"),
    "other-rank": (with_tensor(KEY, torch.ones(5, 32)), rf"says rank 4 for {Q0}, but lora_A is \[5, 32\]"),
    "nan": (with_tensor(KEY, torch.full((4, 32), torch.nan)), f"lora_A of {Q0} contains NaN"),
    "infinity": (with_tensor(KEY, torch.full((4, 32), -torch.inf)), f"lora_A of {Q0} contains NaN or infinity"),
    "integers": (with_tensor(KEY, torch.ones(4, 32, dtype=torch.int8)), rf"{KEY} on {Q0} is \[4, 32\] torch.int8"),
    "conv-shaped": (with_tensor(KEY, torch.ones(4, 32, 1)), rf"{Q0} is Linear\(32, 32\), but lora_A is \[4, 32, 1\]"),
    "not-linear": (
        replace_key("self_attn.q_proj", "input_layernorm"),
        "input_layernorm is a LlamaRMSNorm, of which target_parameters selects 0",
    ),
    "half-an-embedding": (
        with_tensor("base_model.model.model.embed_tokens.lora_embedding_A", torch.ones(4, 64)),
        "does not select model.embed_tokens",
    ),
    "dora": (
        with_tensor(f"base_model.model.{Q0}.lora_magnitude_vector", torch.ones(32)),
        f"says use_dora=False, but there is a magnitude tensor for {Q0}",
    ),
    "lora-bias": (
        with_tensor(f"base_model.model.{Q0}.lora_B.bias", torch.ones(32)),
        f"says lora_bias=False, but there is a lora_bias tensor for {Q0}",
    ),
    "saved-module-shape": (
        with_tensor("base_model.model.lm_head.weight", torch.ones(2)),
        r"\[2\]; lm_head has \[64, 32\]",
    ),
    "saved-module": (
        with_tensor("base_model.model.lm_head.weight", torch.ones(64, 32)),
        "lm_head.weight is not named by modules_to_save or bias",
    ),
    "other-base": (
        with_tensor("base_model.model.lm_head.base_layer.weight", torch.ones(64, 32)),
        "lm_head.base_layer.weight differs from the base model",
    ),
    "no-such-parameter": (with_tensor("base_model.model.lm_head.bias", torch.ones(64)), "1 of 9 tensors.*lm_head.bias"),
    "token-rows": (
        with_tensor("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", torch.ones(1, 32)),
        "trainable_token_indices of adapter_config.json does not name model.embed_tokens",
    ),
    "same-twice": (with_tensor(KEY.removeprefix("base_model.model."), torch.ones(4, 32)), "name the same matrix"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_tensors_that_do_not_fit_are_named(
    tiny_llama: nn.Module, index: ModuleIndex, save_adapter: Any, edit_tensors: Any, broken: str
) -> None:
    change, message = BROKEN[broken]
    path = save_adapter(tiny_llama)
    edit_tensors(path, change)
    with pytest.raises(AdapterMismatch, match=message) as refused:
        load(path, index)
    assert str(path) in str(refused.value)


def test_without_strict_unmatched_tensors_are_reported_but_one_must_match(
    tiny_llama: nn.Module, index: ModuleIndex, save_adapter: Any, edit_tensors: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = save_adapter(tiny_llama)
    edit_tensors(path, replace_key("layers.1", "layers.7"))
    with caplog.at_level(logging.WARNING):
        report = load(path, index, strict=False).report
    assert report.matched == 2 and len(report.unmatched) == 4 and "layers.7.mlp.down_proj" in caplog.text
    edit_tensors(path, replace_key("layers.0", "layers.8"))
    with pytest.raises(AdapterMismatch, match="nothing matches"):
        load(path, index, strict=False)


def test_values_that_overflow_the_models_dtype_are_refused(
    tiny_llama: nn.Module, index: ModuleIndex, save_adapter: Any, edit_tensors: Any
) -> None:
    path = save_adapter(tiny_llama)
    edit_tensors(path, with_tensor(KEY, torch.full((4, 32), 1e6)))
    with pytest.raises(AdapterMismatch, match=f"lora_A of {Q0} overflows torch.float16"):
        load(path, index, dtype=torch.float16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, f"says use_dora=True, but there is no magnitude tensor for {DOWN0}"),
        ({"lora_bias": True}, f"says lora_bias=True, but there is no lora_bias tensor for {DOWN0}"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save has 'lm_head', but there are no tensors for lm_head"),
        ({"modules_to_save": ["nowhere"]}, "modules_to_save has 'nowhere', but this model has no such module"),
        ({"trainable_token_indices": [3]}, "names the input embedding, but has no tensor"),
        ({"trainable_token_indices": {"lm_head": [3]}}, "names lm_head, but has no tensor"),
    ],
    ids=str,
)
def test_tensors_that_the_config_lists_must_exist(
    tiny_llama: nn.Module, index: ModuleIndex, save_adapter: Any, edit_config: Any, change: Any, message: str
) -> None:
    path = save_adapter(tiny_llama)
    edit_config(path, **change)
    with pytest.raises(AdapterMismatch, match=re.escape(message)):
        load(path, index)


def test_a_rank_above_the_limit_names_both(tiny_llama: nn.Module, index: ModuleIndex, save_adapter: Any) -> None:
    path = save_adapter(tiny_llama, r=17)
    with pytest.raises(AdapterMismatch, match=r"rank 17 of .* exceeds max_lora_rank=16"):
        load(path, index, max_lora_rank=16)


@pytest.mark.parametrize(
    "change",
    [{"layers_to_transform": [1]}, {"target_modules": ["q_proj"]}, {"exclude_modules": ["down_proj"]}],
    ids=str,
)
def test_tensors_that_the_config_does_not_select_are_refused(
    tiny_llama: nn.Module, index: ModuleIndex, save_adapter: Any, edit_config: Any, change: dict[str, Any]
) -> None:
    path = save_adapter(tiny_llama)
    edit_config(path, **change)
    with pytest.raises(AdapterMismatch, match="does not select model.layers"):
        load(path, index)


def test_a_pattern_may_match_names_without_the_model_prefix(
    tiny_llama: nn.Module, index: ModuleIndex, save_adapter: Any, edit_config: Any
) -> None:
    path = save_adapter(tiny_llama)
    expected = load(path, index).report.matched
    inner = r"layers.*self_attn\.(q|k|v|o)_proj|layers.*mlp\.(gate|up|down)_proj"
    edit_config(path, target_modules=inner)
    assert load(path, index).report.matched == expected > 0
    edit_config(path, target_modules=inner, exclude_modules=["down_proj"])
    with pytest.raises(AdapterMismatch, match="does not select model.layers"):
        load(path, index)


def test_a_refused_config_key_names_the_adapter(
    tiny_llama: nn.Module, index: ModuleIndex, save_adapter: Any, edit_config: Any
) -> None:
    path = save_adapter(tiny_llama)
    edit_config(path, use_qalora=True)
    with pytest.raises(AdapterMismatch, match=f"adapter 'test' .{path}.: .*use_qalora=True is not supported"):
        load(path, index)


def test_unknown_keys_that_are_off_are_ignored_with_one_warning(
    tiny_llama: nn.Module, index: ModuleIndex, save_adapter: Any, edit_config: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = save_adapter(tiny_llama)
    digest = load(path, index).digest
    edit_config(path, next_feature=None, other_feature={"enabled": False}, transformers_version="5.30", eva_config={})
    with caplog.at_level(logging.WARNING):
        assert load(path, index).digest == digest
    (message,) = caplog.messages
    assert message == (
        "adapter 'test': ignored unknown keys of adapter_config.json: next_feature=None, "
        "other_feature={'enabled': False}, transformers_version='5.30'"
    )


def test_missing_and_corrupt_files(tiny_llama: nn.Module, index: ModuleIndex, save_adapter: Any) -> None:
    path = save_adapter(tiny_llama)
    file = path / "adapter_model.safetensors"
    content = file.read_bytes()
    for corrupt in (content[:-100], content[:20], b"", b"PK\x03\x04" + content):
        file.write_bytes(corrupt)
        with pytest.raises(AdapterError, match=f"{len(corrupt)} bytes.* is not a valid safetensors"):
            load(path, index)
    file.unlink()
    (path / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(AdapterNotFound, match=r"adapter_model.bin cannot be used: only safetensors"):
        load(path, index)
    (path / "adapter_config.json").unlink()
    with pytest.raises(AdapterNotFound, match="no adapter_config.json"):
        load(path, index)


def test_overwriting_the_file_does_not_change_a_loaded_adapter(
    tiny_llama: nn.Module, index: ModuleIndex, save_adapter: Any
) -> None:
    path = save_adapter(tiny_llama)
    adapter = load(path, index)
    before = adapter.modules[Q0].lora.lora_A.clone()
    with open(path / "adapter_model.safetensors", "r+b") as file:
        file.write(b"\0" * 10_000)
    assert torch.equal(adapter.modules[Q0].lora.lora_A, before)


def test_digest_covers_tensors_and_config(
    tiny_llama: nn.Module, index: ModuleIndex, save_adapter: Any, edit_config: Any, edit_tensors: Any
) -> None:
    path = save_adapter(tiny_llama)
    first = load(path, index).digest
    edit_config(path, lora_dropout=0.5, inference_mode=False)
    assert load(path, index).digest == first == load(save_adapter(tiny_llama, "b"), index).digest
    edit_config(path, lora_alpha=9)
    second = load(path, index).digest
    edit_tensors(path, lambda tensors: {**tensors, KEY: tensors[KEY] + 1e-6})
    assert len({first, second, load(path, index).digest}) == 3


MEDIA = {
    "language_model": r"model\.layers\.\d+\.mlp\.down_proj",
    "vision_tower": r".*img_processor\.encoder.*fc1",
    "audio_tower": r".*audio_embed\.encoder\..*\.o_proj",
    "connector": r".*(img_projection_up|up_proj_for_speech)",
}


@pytest.mark.parametrize("part", MEDIA)
def test_parts_of_a_multimodal_model(tiny_phi4: nn.Module, save_adapter: Any, part: str) -> None:
    index = ModuleIndex(tiny_phi4, part_of)
    path = save_adapter(tiny_phi4, target_modules=MEDIA[part])
    adapter = load(path, index)
    assert adapter.report.parts[part] == adapter.report.matched > 0
    assert (adapter.media_digest is None) == (part == "language_model")
    if part != "language_model":
        with pytest.raises(AdapterMismatch, match="enable_tower_connector_lora=False"):
            load(path, index, allow_media_parts=False)
    else:
        assert load(path, index, allow_media_parts=False).report == adapter.report


def test_media_digest_ignores_the_language_model(tiny_phi4: nn.Module, save_adapter: Any, edit_tensors: Any) -> None:
    index = ModuleIndex(tiny_phi4, part_of)
    path = save_adapter(tiny_phi4, target_modules="|".join(MEDIA.values()))
    first = load(path, index)
    change_where = lambda text: lambda tensors: {k: t * 2 if text in k else t for k, t in tensors.items()}  # noqa: E731
    edit_tensors(path, change_where("mlp.down_proj"))
    second = load(path, index)
    assert second.digest != first.digest and second.media_digest == first.media_digest
    edit_tensors(path, change_where("img_projection_up"))
    assert load(path, index).media_digest != first.media_digest


def test_a_load_during_a_pass_sees_the_tensors_of_the_base_model(llama: nn.Module, save_adapter: Any) -> None:
    """A forward pass swaps in parameters of an adapter; another thread may load that adapter at the same time."""
    path = save_adapter(llama, modules_to_save=["model.norm"])
    index, loaded = ModuleIndex(llama), []
    adapter = load(path, index)
    norm = index.modules["model.norm"]
    handle = norm.register_forward_pre_hook(lambda *_: loaded.append(load(path, index)))
    torch.func.functional_call(norm, dict(adapter.modules["model.norm"].parameters), (torch.ones(1, 32),))
    handle.remove()
    assert loaded[0].modules.keys() == adapter.modules.keys() >= {"model.norm"}


def test_a_saved_module_that_rounds_to_the_base_is_not_the_base(
    llama: nn.Module, save_adapter: Any, edit_tensors: Any
) -> None:
    """Only base weights that PEFT saved with the adapter may have a narrower dtype than the base model."""
    path = save_adapter(llama, modules_to_save=["lm_head"])
    rounded = llama.get_submodule("lm_head").weight.detach().bfloat16()
    edit_tensors(path, with_tensor("base_model.model.lm_head.weight", rounded))
    assert "lm_head" in load(path, ModuleIndex(llama)).modules
    path = save_adapter(llama, "b")
    edit_tensors(path, with_tensor("base_model.model.lm_head.base_layer.weight", rounded))
    assert "lm_head" not in load(path, ModuleIndex(llama)).modules


def test_scalings_out_of_range_are_refused(llama: nn.Module, save_adapter: Any, edit_config: Any) -> None:
    path = save_adapter(llama)
    for alpha, message in ((10**400, "lora_alpha is 1000"), (1e300, "the scaling of .* is 2.5e.299")):
        edit_config(path, lora_alpha=alpha)
        with pytest.raises(AdapterMismatch, match=message):
            load(path, ModuleIndex(llama))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"target_parameters": ["glu.b1"]}, {"target_parameters": ["glu.b2"]}),
        ({"trainable_token_indices": {"a": [1], "b": [2]}}, {"trainable_token_indices": {"b": [2], "a": [1]}}),
        ({"alora_invocation_tokens": [1, 2]}, {"alora_invocation_tokens": [2, 1]}),
    ],
    ids=str,
)
def test_the_digest_covers_the_selection_of_modules(one: dict[str, Any], other: dict[str, Any]) -> None:
    contents = [PeftConfig.from_dict({"peft_type": "LORA", **content}).digest_content() for content in (one, other)]
    assert contents[0] != contents[1]


@pytest.mark.parametrize(
    ("shape_A", "shape_B", "r"),
    [((4, 0), (32, 4), 4), ((4, 32), (32, 0), 4), ((10**6, 32), (10**6, 1), 10**6), ((4, 32), (0, 1), 10**25)],
    ids=str,
)
def test_invalid_blocks_are_refused(
    llama: nn.Module, save_adapter: Any, edit_tensors: Any, edit_config: Any, shape_A: Any, shape_B: Any, r: int
) -> None:
    path = save_adapter(llama, target_modules=["q_proj"])
    edit_config(path, use_bdlora={"nblocks": 2}, r=r)
    edit_tensors(path, with_tensor(KEY, torch.zeros(shape_A)))
    edit_tensors(path, with_tensor(KEY.replace("lora_A", "lora_B"), torch.zeros(shape_B)))
    with pytest.raises(AdapterMismatch, match="another model|says rank"):
        load(path, ModuleIndex(llama))


def test_token_rows_without_a_token_are_refused(
    llama: nn.Module, save_adapter: Any, edit_tensors: Any, edit_config: Any
) -> None:
    path = save_adapter(llama)
    edit_config(path, trainable_token_indices={"embed_tokens": []})
    key = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    edit_tensors(path, with_tensor(key, torch.zeros(0, 32)))
    with pytest.raises(AdapterMismatch, match="trainable_token_indices"):
        load(path, ModuleIndex(llama))
