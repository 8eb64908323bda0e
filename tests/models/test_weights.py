"""`mmlora.models.weights`: every tensor of a model comes from its files; nothing is left to chance."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmlora import LLM, SamplingParams
from mmlora.errors import ConfigError
from mmlora.models.config import load_config
from mmlora.models.families import find_layout
from mmlora.models.loader import load_meta_model
from mmlora.models.weights import StoredTensor, check_weights, read_headers
from tests.checkpoints import TEXT_FAMILIES, save_text_model
from tests.families.table import FAMILIES, save_family

Headers = dict[str, StoredTensor]
Tensors = dict[str, torch.Tensor]


def check(path: Path, tensors: Headers) -> None:
    check_weights(load_meta_model(load_config(path)), tensors, find_layout(path))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Headers]]:
    """Return the directory and the headers of a family's tiny checkpoint."""
    known: dict[str, Path] = {}

    def get(family: str) -> tuple[Path, Headers]:
        if family not in known:
            save = save_text_model if family in TEXT_FAMILIES else save_family
            known[family] = save(tmp_path_factory.mktemp("weights") / family, family)
        return known[family], read_headers(str(known[family]), None, known[family])

    return get


def changed(path: Path, folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """Return a copy of a checkpoint with other tensors."""
    copy = Path(shutil.copytree(path, folder / "changed"))
    save_file(change(load_file(copy / "model.safetensors")), copy / "model.safetensors", {"format": "pt"})
    return copy


def load(path: Path) -> LLM:
    return LLM(str(path), dtype="float32", device="cpu", max_model_len=64)


@pytest.mark.parametrize("family", [*TEXT_FAMILIES, *FAMILIES])
def test_every_family_is_whole_and_refused_without_any_part(
    family: str, checkpoint: Callable[[str], tuple[Path, Headers]], caplog: pytest.LogCaptureFixture
) -> None:
    path, tensors = checkpoint(family)
    check(path, tensors)
    assert not caplog.records
    parts = {tuple(part for part in name.split(".") if not part.isdigit())[:3]: name for name in tensors}
    for name in (name for name in parts.values() if not name.endswith("num_batches_tracked")):
        with pytest.raises(ConfigError, match=r"tensor\(s\) of a \w+ checkpoint (are missing|cannot be joined)"):
            check(path, {key: tensor for key, tensor in tensors.items() if key != name})


@pytest.mark.parametrize("family", ["llama", "mixtral", "llava", "qwen2_audio"])
@pytest.mark.parametrize(
    ("wrapper", "advice"),
    [
        ("_orig_mod.", "save the module that torch.compile wraps"),
        ("module.", "save the module that DistributedDataParallel wraps"),
        ("module._orig_mod.", "save the module that torch.compile wraps"),
        ("_fsdp_wrapped_module.", "save the full state dict"),
        ("base_model.model.", "merge_and_unload"),
        ("student.", "the files have 'student.' in the names of such tensors"),
    ],
)
def test_a_prefix_is_named(
    wrapper: str, advice: str, family: str, checkpoint: Callable[[str], tuple[Path, Headers]]
) -> None:
    path, tensors = checkpoint(family)
    with pytest.raises(ConfigError, match="are missing: .* and [0-9]+ more; .*") as caught:
        check(path, {wrapper + name: tensor for name, tensor in tensors.items()})
    instead = "the files have instead: student."  # the family's names differ in more than the prefix
    assert advice in str(caught.value) or (wrapper == "student." and instead in str(caught.value))


ADDED = {
    "a bias": ("model.layers.1.self_attn.q_proj.bias", [60]),
    "the bias of a norm": ("model.norm.bias", [60]),
    "scales of a quantized weight": ("model.layers.0.mlp.up_proj.weight_scale", [84, 1]),
    "an adapter": ("model.layers.0.self_attn.v_proj.lora_A.default.weight", [4, 60]),
    "a head's bias": ("lm_head.bias", [128]),
}
UNUSED = {
    "a value head": "v_head.summary.weight",
    "another layer": "model.layers.3.self_attn.q_proj.weight",
    "a tower": "vision_tower.patch_embed.weight",
    "a norm of another family": "model.layers.0.self_attn.q_norm.weight",
}


def with_tensor(tensors: Headers, name: str, shape: list[int]) -> Headers:
    return {**tensors, name: StoredTensor("F32", tuple(shape), 4)}


@pytest.mark.parametrize("case", ADDED)
def test_a_tensor_that_would_change_a_module_is_refused(
    case: str, checkpoint: Callable[[str], tuple[Path, Headers]]
) -> None:
    path, tensors = checkpoint("llama")
    name, shape = ADDED[case]
    with pytest.raises(ConfigError, match=rf"^1 tensor\(s\) of a LlamaForCausalLM checkpoint are unknown: {name}; "):
        check(path, with_tensor(tensors, name, shape))


@pytest.mark.parametrize("case", UNUSED)
def test_tensors_of_other_modules_are_named_in_one_warning(
    case: str, checkpoint: Callable[[str], tuple[Path, Headers]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = changed(checkpoint("llama")[0], tmp_path, lambda tensors: {**tensors, UNUSED[case]: torch.zeros(2)})
    load(path)
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert (
        f"1 tensor(s) of the checkpoint are not used, because LlamaForCausalLM has no such modules: {UNUSED[case]}"
        == (record.getMessage())
    )


def test_buffers_that_the_model_computes_are_ignored(
    checkpoint: Callable[[str], tuple[Path, Headers]], caplog: pytest.LogCaptureFixture
) -> None:
    path, tensors = checkpoint("llama")
    for name in ("model.rotary_emb.inv_freq", "model.layers.0.self_attn.rotary_emb.inv_freq"):
        tensors = with_tensor(tensors, name, [7])
    check(path, tensors)
    path, tensors = checkpoint("granite_speech")
    counters = [name for name in tensors if name.endswith("num_batches_tracked")]
    check(path, {name: tensor for name, tensor in tensors.items() if name not in counters})
    assert counters and not caplog.records


def test_other_shapes_are_named(checkpoint: Callable[[str], tuple[Path, Headers]], tmp_path: Path) -> None:
    path, tensors = checkpoint("llama")
    rows = tensors["model.embed_tokens.weight"].shape[0]
    cut = changed(path, tmp_path, lambda old: {**old, "model.embed_tokens.weight": torch.zeros(rows - 1, 60)})
    shape = rf"model.embed_tokens.weight is \[{rows - 1}, 60\]"
    message = rf"1 tensor\(s\) of a LlamaForCausalLM checkpoint have other shapes: {shape}"
    with pytest.raises(ConfigError, match=message):
        load(cut)


def test_an_expert_of_the_older_format_is_missed(checkpoint: Callable[[str], tuple[Path, Headers]]) -> None:
    for family, expert in (("mixtral", "experts.1.w3"), ("qwen3_moe", "experts.2.down_proj")):
        path, tensors = checkpoint(family)
        assert any(expert in name for name in tensors)
        with pytest.raises(ConfigError, match=r"layers\.\d\.mlp\.experts\.\w+_proj"):
            check(path, {name: tensor for name, tensor in tensors.items() if expert not in name})


def test_experts_that_cannot_be_joined_are_named(checkpoint: Callable[[str], tuple[Path, Headers]]) -> None:
    path, tensors = checkpoint("mixtral")
    smaller = {
        name: StoredTensor("F32", (5, 60), 1200) if "experts.1.w1" in name else tensor
        for name, tensor in tensors.items()
    }
    joined = "model.layers.0.mlp.experts.gate_up_proj"
    message = rf"^3 tensor\(s\) of a MixtralForCausalLM checkpoint cannot be joined, .*: {joined}, "
    with pytest.raises(ConfigError, match=message):
        check(path, smaller)


def test_integers_are_not_weights(checkpoint: Callable[[str], tuple[Path, Headers]]) -> None:
    path, tensors = checkpoint("llama")
    masks = {"position_ids": StoredTensor("I64", (9,), 72), "bias": StoredTensor("BOOL", (1, 1, 9, 9), 81)}
    check(path, {**tensors, **{f"model.layers.0.self_attn.{name}": mask for name, mask in masks.items()}})
    name = "model.layers.1.mlp.up_proj.weight"
    for dtype in ("I8", "U8"):
        with pytest.raises(
            ConfigError, match=rf"1 tensor\(s\) of a LlamaForCausalLM checkpoint are quantized \({dtype}\): {name}"
        ):
            check(path, {**tensors, name: StoredTensor(dtype, tensors[name].shape, 4)})


@pytest.mark.parametrize(
    "name",
    ["", "..", "model..x", "model.(layers[0", "x\nforged\x1b[2J", "m." * 9999],
    ids=["empty", "dots", "empty part", "brackets", "control characters", "long"],
)
def test_any_name_is_printed_in_one_line(
    name: str, checkpoint: Callable[[str], tuple[Path, Headers]], caplog: pytest.LogCaptureFixture
) -> None:
    path, tensors = checkpoint("llama")
    check(path, with_tensor(tensors, name, [2]))
    (record,) = caplog.records
    assert record.getMessage().isprintable() and len(record.getMessage()) < 400
    with pytest.raises(ConfigError) as caught:
        check(path, {f"{name}.{key}": tensor for key, tensor in tensors.items()})
    assert str(caught.value).isprintable() and len(str(caught.value)) < 3000


def config_with(path: Path, folder: Path, **fields: Any) -> Path:
    copy = Path(shutil.copytree(path, folder / "config"))
    content = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**content, **fields}))
    return copy


def test_tied_embeddings_are_stored_once(checkpoint: Callable[[str], tuple[Path, Headers]], tmp_path: Path) -> None:
    path, tensors = checkpoint("llama")
    without = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    with pytest.raises(ConfigError, match="are missing: lm_head.weight; tie_word_embeddings is false: set it to true"):
        check(path, without)
    tied = config_with(path, tmp_path, tie_word_embeddings=True)
    check(tied, without)
    check(tied, tensors)
    check(tied, {name: tensor for name, tensor in tensors.items() if name != "model.embed_tokens.weight"})
    with pytest.raises(ConfigError, match="are missing: lm_head.weight, model.embed_tokens.weight$"):
        check(tied, {name: tensor for name, tensor in without.items() if name != "model.embed_tokens.weight"})


def test_shards_are_read_together(checkpoint: Callable[[str], tuple[Path, Headers]], tmp_path: Path) -> None:
    source, _ = checkpoint("llama")
    path = Path(shutil.copytree(source, tmp_path / "shards"))
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(names)}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, path / file, {"format": "pt"})
    prompt, greedy = {"prompt_token_ids": [5, 9, 13]}, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    outputs = [load(model).generate(prompt, greedy, use_tqdm=False)[0].outputs[0].token_ids for model in (source, path)]
    assert outputs[0] == outputs[1]
    lost = path / "model-00002-of-00002.safetensors"
    left = {name: tensor for name, tensor in load_file(lost).items() if name != names[1]}
    save_file(left, lost, {"format": "pt"})
    with pytest.raises(ConfigError, match=rf"1 tensor\(s\) of a LlamaForCausalLM checkpoint are missing: {names[1]}"):
        load(path)


def test_the_start_does_not_rely_on_headers_alone(
    checkpoint: Callable[[str], tuple[Path, Headers]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = changed(checkpoint("llama")[0], tmp_path, lambda old: {k: v for k, v in old.items() if "norm" not in k})
    monkeypatch.setattr("mmlora.engine.loading.check_weights", lambda *_: None)
    with pytest.raises(ConfigError, match=r"7 tensor\(s\) would be random, because the files lack them: model.layers"):
        load(path)
