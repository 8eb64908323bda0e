"""Microsoft's layout of Phi-4-multimodal gives what transformers + PEFT give on the layout of `transformers`.

The layout is written here from what is public of the Hub repository, name by name, not from the table under test.
"""

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmlora import LLM
from mmlora.errors import ConfigError, MediaError
from mmlora.lora.loading.files import read_adapter
from mmlora.models.config import load_config
from mmlora.models.default_adapters import find_default_adapters
from mmlora.models.layouts import phi4mm
from mmlora.models.loader import load_meta_model, resolve_dtype, resolve_max_model_len
from mmlora.processors.families.phi4_multimodal import Phi4MultimodalProcessor
from tests.checkpoints import AUDIO_ID, IMAGE_ID, AdapterSpec, phi4_targets, save_adapter, save_phi4
from tests.equality import Case, Checkpoint, check_equal, run_cases
from tests.media import clip, picture
from tests.reference import Media, Reference

VISION = {
    "hidden_size": 30,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 42,
    "patch_size": 7,
    "image_token_id": IMAGE_ID,
}
SIGLIP, AUDIO = phi4mm.VISION_CONSTANTS, phi4mm.AUDIO_CONSTANTS
PUBLISHED_SIZE = 5_574_460_384  # parameters in microsoft/Phi-4-multimodal-instruct, adapters included
ROPE = {"short_factor": [1.0, 1.3, 1.9], "long_factor": [1.1, 2.0, 7.5]}
LORA_LAYERS = r"layers.*((self_attn\.(qkv|o)_proj)|(mlp\.(gate_up|down)_proj))"
LORA_MODULES = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
SPECS = {
    "speech": AdapterSpec(phi4_targets("language_model"), 31, 5, {"lora_alpha": 10}),
    "vision": AdapterSpec(phi4_targets("language_model"), 32, 3, {"lora_alpha": 6}),
}
CONFIG: dict[str, Any] = {
    "_name_or_path": "Phi-4-multimodal-instruct",
    "architectures": ["Phi4MMForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "audio_processor": {
        "config": {
            "activation": "swish",
            "activation_checkpointing": {"interval": 1, "module": "transformer", "offload": False},
            "attention_dim": 24,
            "attention_heads": 2,
            "batch_norm": False,
            "bias_in_glu": True,
            "causal": True,
            "chunk_size": -1,
            "cnn_layer_norm": True,
            "conv_activation": "swish",
            "conv_glu_type": "swish",
            "depthwise_multiplier": 1,
            "depthwise_seperable_out_channel": 24,
            "dropout_rate": 0.0,
            "encoder_embedding_config": {"input_size": 80},
            "ext_pw_kernel_size": 1,
            "ext_pw_out_channel": 24,
            "input_layer": "nemo_conv",
            "input_size": 80,
            "kernel_size": 3,
            "left_chunk": 18,
            "linear_units": 20,
            "nemo_conv_settings": {"conv_channels": 8},
            "num_blocks": 2,
            "relative_attention_bias_args": {"t5_bias_max_distance": 20, "type": "t5"},
            "time_reduction": 4,
        },
        "name": "cascades",
    },
    "auto_map": {
        "AutoConfig": "configuration_phi4mm.Phi4MMConfig",
        "AutoModelForCausalLM": "modeling_phi4mm.Phi4MMForCausalLM",
        "AutoTokenizer": "Xenova/gpt-4o",
    },
    "bos_token_id": 0,
    "embd_layer": {
        "audio_embd_layer": {
            "compression_rate": 4,
            "downsample_rate": 1,
            "embedding_cls": "audio",
            "enable_gradient_checkpointing": True,
            "projection_cls": "mlp",
            "use_conv_downsample": False,
            "use_qformer": False,
        },
        "embedding_cls": "image_audio",
        "image_embd_layer": {
            "crop_size": 42,
            "embedding_cls": "tune_image",
            "enable_gradient_checkpointing": True,
            "hd_transform_order": "sub_glb",
            "image_token_compression_cls": "avg_pool_2d",
            "projection_cls": "mlp",
            "use_hd_transform": True,
            "with_learnable_separator": True,
        },
    },
    "embd_pdrop": 0.0,
    "eos_token_id": 0,
    "full_attn_mod": 1,
    "hidden_act": "silu",
    "hidden_size": 72,
    "initializer_range": 0.02,
    "intermediate_size": 100,
    "interpolate_factor": 1,
    "lm_head_bias": False,
    "max_position_embeddings": 512,
    "mlp_bias": False,
    "model_type": "phi4mm",
    "num_attention_heads": 6,
    "num_hidden_layers": 3,
    "num_key_value_heads": 3,
    "original_max_position_embeddings": 256,
    "pad_token_id": 0,
    "partial_rotary_factor": 0.5,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {**ROPE, "type": "longrope"},
    "rope_theta": 10000.0,
    "sliding_window": 262144,
    "speech_lora": {"dp": 0.01, "layer": LORA_LAYERS, "lora_alpha": 10, "r": 5},
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "transformers_version": "4.46.1",
    "use_cache": True,
    "vision_lora": {"dp": 0.0, "layer": LORA_LAYERS, "lora_alpha": 6, "r": 3},
    "vocab_size": 263,
    "_attn_implementation": "flash_attention_2",
}
PREPROCESSOR = {
    "auto_map": {
        "AutoFeatureExtractor": "processing_phi4mm.Phi4MMAudioFeatureExtractor",
        "AutoImageProcessor": "processing_phi4mm.Phi4MMImageProcessor",
        "AutoProcessor": "processing_phi4mm.Phi4MMProcessor",
    },
    "audio_compression_rate": 4,
    "audio_downsample_rate": 1,
    "audio_feat_stride": 1,
    "dynamic_hd": 4,
    "feature_extractor_type": "Phi4MMAudioFeatureExtractor",
    "image_processor_type": "Phi4MMImageProcessor",
    "processor_class": "Phi4MMProcessor",
}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
DIGITS_FIRST = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": r"\d{1,3}|\D+"}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ],
}

AUDIO_PROMPT = "<|user|>Write down:<|audio_1|><|end|><|assistant|>"
BOTH = Media(audios=[clip(0.55, 3), clip(0.55, 4)], images=[picture(90, 50, 4), picture(42, 30, 5)])
BOTH_PROMPT = "<|user|>See<|image_1|>hear <|audio_1|>see <|image_2|><|audio_2|>!<|end|><|assistant|>"
CASES = [
    Case("text", "<|user|>How many dogs can you count?<|end|><|assistant|>"),
    Case("audio", AUDIO_PROMPT, Media(audios=[clip(0.7, 1)]), "speech"),
    Case("image", "<|user|><|image_1|>What is it?<|end|><|assistant|>", Media(images=[picture(90, 42, 2)]), "vision"),
    Case("audio + image", BOTH_PROMPT, BOTH, "vision"),
]
BASE_CASES = [replace(case, name=f"{case.name}, base", adapter=None) for case in CASES[1:]]


def microsoft_name(name: str) -> str:
    """Return the name of a tensor of `Phi4MultimodalForCausalLM` in Microsoft's files."""
    decoder = re.fullmatch(r"(model\.layers\.\d+\.(?:self_attn|mlp)\.\w+)\.weight", name)
    if decoder:
        return f"{decoder[1]}.base_layer.weight"
    for ours, theirs in (
        ("img_projection_up", "img_projection.0"),
        ("img_projection_down", "img_projection.2"),
        ("global_img_feature_extensor", "glb_GN"),
        ("sub_img_feature_extensor", "sub_GN"),
        ("up_proj_for_speech", "audio_projection.speech.0"),
        ("down_proj_for_speech", "audio_projection.speech.2"),
        ("up_proj_for_vision_speech", "audio_projection.vision.0"),
        ("down_proj_for_vision_speech", "audio_projection.vision.2"),
    ):
        if f".{ours}" in f"{name}." and re.search(rf"\.{ours}(\.|$)", name):
            return name.replace(ours, theirs)
    if ".audio_embed.encoder.encoders." in name:
        name = re.sub(r"(feed_forward_\w+)\.gate_up_proj\.", r"\1.net.0.linear.", name)
        name = re.sub(r"(feed_forward_\w+)\.down_proj\.", r"\1.net.2.", name)
        name = re.sub(r"self_attn\.([qkv])_proj\.", r"self_attn.linear_\1.", name)
        name = name.replace("self_attn.o_proj.", "self_attn.linear_out.")
    return name


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def save_twin(path: Path) -> Path:
    """Save a tiny checkpoint in the layout of `transformers`, with longrope and tied embeddings like Microsoft's."""
    save_phi4(path)
    config = json.loads((path / "config.json").read_text())
    theirs = {"rope_type": "longrope", "original_max_position_embeddings": 256}
    config["rope_parameters"] = {**ROPE, **theirs, "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    config.update(tie_word_embeddings=True, original_max_position_embeddings=256)
    write_json(path / "config.json", config)
    tensors = load_file(path / "model.safetensors")
    del tensors["lm_head.weight"]
    tensors["model.embed_tokens.weight"] /= 4  # otherwise rounding of large logits exceeds the tolerance
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def save_microsoft(path: Path, twin: Path, adapters: dict[str, Path]) -> Path:
    """Write the model of another directory and its adapters in Microsoft's layout, with code that must not run."""
    path.mkdir()
    tensors = {microsoft_name(name): tensor for name, tensor in load_file(twin / "model.safetensors").items()}
    for name, folder in adapters.items():
        for key, tensor in load_file(folder / "adapter_model.safetensors").items():
            module, matrix = re.fullmatch(r"base_model\.model\.(.+)\.(lora_[AB])\.weight", key).groups()
            tensors[f"{module}.{matrix}.{name}.weight"] = tensor
    names = sorted(tensors)
    weight_map = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(names)}
    for file in sorted(set(weight_map.values())):
        shard = {name: tensors[name] for name in names if weight_map[name] == file}
        save_file(shard, path / file, {"format": "pt"})
    write_json(path / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    write_json(path / "config.json", CONFIG)
    write_json(path / "generation_config.json", {"bos_token_id": 0, "eos_token_id": [4, 0], "pad_token_id": 0})
    write_json(path / "preprocessor_config.json", PREPROCESSOR)
    write_json(path / "processor_config.json", {"auto_map": {"AutoProcessor": "processing_phi4mm.Phi4MMProcessor"}})
    save_microsoft_tokenizer(path, twin)
    for module in ("configuration", "modeling", "processing"):
        (path / f"{module}_phi4mm.py").write_text("raise SystemExit('code of a checkpoint was run')")
    return path


def save_microsoft_tokenizer(path: Path, twin: Path) -> None:
    text = (twin / "tokenizer.json").read_text()
    text = text.replace("<|image|>", "<|endoftext10|>").replace("<|audio|>", "<|endoftext11|>")
    write_json(path / "tokenizer.json", {**json.loads(text), "pre_tokenizer": DIGITS_FIRST})
    tokens = {"bos_token": "<|endoftext|>", "eos_token": "<|end|>", "pad_token": "<|endoftext|>"}
    content = {**tokens, "tokenizer_class": "GPT2TokenizerFast", "chat_template": CHAT_TEMPLATE}
    write_json(path / "tokenizer_config.json", content)


@pytest.fixture(scope="module", autouse=True)
def tiny_towers() -> Any:
    """Replace the constants of Microsoft's code, such as the size of SigLIP, by those of the tiny checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phi4mm, "VISION_CONSTANTS", VISION)
        patch.setattr(phi4mm, "AUDIO_CONSTANTS", {"audio_token_id": AUDIO_ID})
        yield


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The `microsoft` checkpoint to test, and its `twin` in the layout of `transformers` and PEFT's adapters."""
    folder = tmp_path_factory.mktemp("phi4mm")
    twin = save_twin(folder / "twin")
    adapters = {name: save_adapter(twin, folder / name, spec) for name, spec in SPECS.items()}
    path = save_microsoft(folder / "microsoft", twin, adapters)
    reference = Checkpoint(twin, adapters, Reference(twin))
    return SimpleNamespace(twin=reference, microsoft=Checkpoint(path, {}, reference.reference), path=path)


def load(path: Path, **options: Any) -> LLM:
    limits = {"max_num_batched_tokens": 16, "max_model_len": 256}
    return LLM(str(path), dtype="float32", device="cpu", enable_lora=True, max_logprobs=-1, **limits, **options)


def default_adapters(path: Path) -> dict[str, str]:
    speech, vision = str(path / "speech-lora"), str(path / "vision-lora")
    return {"audio": speech, "image": vision, "audio+image": vision}


def check(llm: LLM, checkpoints: SimpleNamespace, cases: list[Case], checkpoint: Checkpoint, **options: Any) -> None:
    """Compare with the twin, whose tokenizer has one spelling per placeholder."""
    for case, (output, logits) in zip(cases, run_cases(llm, checkpoint, cases, **options), strict=True):
        known = replace(case, prompt=re.sub(r"<\|(image|audio)_\d\|>", r"<|\1|>", case.prompt))
        check_equal(output, logits, checkpoints.twin.expected(known), case.name)


@pytest.fixture(scope="module")
def llm(checkpoints: SimpleNamespace) -> LLM:
    """An engine whose default adapters are only in the weight files."""
    return load(checkpoints.path, default_mm_loras=default_adapters(checkpoints.path))


def test_every_kind_of_prompt_with_its_default_adapter(llm: LLM, checkpoints: SimpleNamespace) -> None:
    assert not list(checkpoints.path.glob("*-lora"))
    check(llm, checkpoints, CASES, checkpoints.microsoft, is_automatic=True)


def test_embedded_adapters_are_found_automatically(checkpoints: SimpleNamespace, tmp_path: Path) -> None:
    found = find_default_adapters(load_config(checkpoints.path), checkpoints.path)
    assert found == default_adapters(checkpoints.path)
    path = Path(shutil.copytree(checkpoints.path, tmp_path / "noise"))
    for file in path.glob("*.safetensors"):
        file.write_bytes(b"noise")
    assert find_default_adapters(load_config(path), path) == {}


def test_base_model(llm: LLM, checkpoints: SimpleNamespace) -> None:
    check(llm, checkpoints, BASE_CASES, checkpoints.microsoft)


def test_extracted_adapters_are_what_peft_wrote(llm: LLM, checkpoints: SimpleNamespace, tmp_path: Path) -> None:
    found = phi4mm.extract_adapters(checkpoints.path, tmp_path)
    assert found == {"speech": tmp_path / "speech-lora", "vision": tmp_path / "vision-lora"}
    for name, path in found.items():
        files, original = read_adapter(path), read_adapter(checkpoints.twin.adapters[name])
        assert {key: files.config[key] for key in ("r", "lora_alpha")} == {
            key: original.config[key] for key in ("r", "lora_alpha")
        }
        assert files.tensors.keys() == original.tensors.keys()
        assert all(torch.equal(tensor, original.tensors[key]) for key, tensor in files.tensors.items())
    check(llm, checkpoints, CASES[1:], replace(checkpoints.microsoft, adapters=found))
    # PEFT accepts them as well, with the same output.
    extracted = checkpoints.twin.reference.generate("<|user|>one<|assistant|>", adapter=found["speech"])
    original = checkpoints.twin.reference.generate(
        "<|user|>one<|assistant|>", adapter=checkpoints.twin.adapters["speech"]
    )
    assert torch.equal(extracted.logits, original.logits)
    with pytest.raises(ConfigError, match="speech-lora exists"):
        phi4mm.extract_adapters(checkpoints.path, tmp_path)


def test_an_adapter_folder_takes_precedence_over_the_weight_files(checkpoints: SimpleNamespace, tmp_path: Path) -> None:
    path = copy(checkpoints.path, tmp_path)
    assert phi4mm.embedded_adapter(path, str(path / "vision-lora")) is not None
    (path / "vision-lora").mkdir()
    assert phi4mm.embedded_adapter(path, str(path / "vision-lora")) is None
    assert phi4mm.embedded_adapter(path, str(path / "other-lora")) is None
    assert phi4mm.embedded_adapter(path, "org/speech-lora") is None


def copy(source: Path, folder: Path) -> Path:
    """Return a directory of links to the files of another, in which single files can be replaced."""
    path = folder / "copy"
    path.mkdir()
    for file in source.iterdir():
        (path / file.name).symlink_to(file)
    return path


def replace_shard(path: Path, change: Any) -> None:
    file = path / "model-00001-of-00002.safetensors"
    tensors, index = load_file(file), path / "model.safetensors.index.json"
    change(tensors)
    weight_map = json.loads(index.read_text())["weight_map"]
    others = {name: at for name, at in weight_map.items() if at != file.name}
    file.unlink()
    index.unlink()
    save_file(tensors, file, {"format": "pt"})
    write_json(index, {"metadata": {}, "weight_map": {**others, **dict.fromkeys(tensors, file.name)}})


def drop(part: str) -> Any:
    return lambda tensors: tensors.pop(next(name for name in sorted(tensors) if part in name))


def add(name: str) -> Any:
    return lambda tensors: tensors.update({name: torch.zeros(2)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(".base_layer."), r"1 tensor\(s\) of a phi4mm checkpoint are missing: model\.layers\.\d"),
        (
            drop(".linear_"),
            r"are missing: model\.embed_tokens_extend\.audio_embed\.encoder\..*self_attn\.\w_proj\.\w+$",
        ),
        (
            add("model.layers.0.mlp.bias"),
            r"1 tensor\(s\) of a phi4mm checkpoint are unknown: model\.layers\.0\.mlp\.bias",
        ),
        (add("model.layers.0.mlp.down_proj.lora_A.code.weight"), r"are unknown: .*lora_A\.code\.weight"),
    ],
    ids=["base", "audio tower", "unknown", "unknown adapter"],
)
def test_tensors_that_are_missing_or_unknown(
    checkpoints: SimpleNamespace, tmp_path: Path, change: Any, message: str
) -> None:
    path = copy(checkpoints.path, tmp_path)
    replace_shard(path, change)
    with pytest.raises(ConfigError, match=message):
        load(path)


def set_at(content: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    changed: dict[str, Any] = json.loads(json.dumps(content))
    *blocks, last = name.split(".")
    place = changed
    for block in blocks:
        place = place[block]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return changed


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("embd_layer.image_embd_layer.hd_transform_order", "glb_sub", "'glb_sub'; only 'sub_glb' is supported"),
        ("audio_processor.config.causal", False, "causal is False; only True is supported"),
        ("audio_processor", None, "audio_processor.name is missing"),
        ("rope_scaling.short_factor", [1.0], "short_factor"),
    ],
)
def test_configurations_that_are_refused(
    checkpoints: SimpleNamespace, tmp_path: Path, name: str, value: Any, message: str
) -> None:
    path = copy(checkpoints.path, tmp_path)
    (path / "config.json").unlink()
    write_json(path / "config.json", set_at(CONFIG, name, value))
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_configuration_equals_that_of_the_twin(checkpoints: SimpleNamespace) -> None:
    ours, theirs = load_config(checkpoints.path).to_dict(), load_config(checkpoints.twin.path).to_dict()
    names = set(CONFIG) & set(theirs) - {"model_type", "eos_token_id", "sliding_window", "embd_layer", "_name_or_path"}
    names.add("architectures")
    assert {name: ours[name] for name in names} == {name: theirs[name] for name in names}
    for block in ("audio_config", "vision_config", "rope_parameters"):
        assert {name: ours[block].get(name) for name in theirs[block]} == theirs[block]


def test_the_published_configuration_has_as_many_parameters_as_the_published_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phi4mm, "VISION_CONSTANTS", SIGLIP)
    monkeypatch.setattr(phi4mm, "AUDIO_CONSTANTS", AUDIO)
    content = set_at(CONFIG, "embd_layer.image_embd_layer.crop_size", 448)
    content.update(hidden_size=3072, intermediate_size=8192, num_hidden_layers=32, vocab_size=200064)
    content.update(num_attention_heads=24, num_key_value_heads=8, partial_rotary_factor=0.75, torch_dtype="bfloat16")
    content.update(max_position_embeddings=131072, original_max_position_embeddings=4096)
    content["rope_scaling"] = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48, "type": "longrope"}
    conformer = content["audio_processor"]["config"]
    conformer.update(attention_dim=1024, attention_heads=16, linear_units=1536, num_blocks=24, time_reduction=8)
    conformer.update(ext_pw_out_channel=1024, depthwise_seperable_out_channel=1024)
    conformer["nemo_conv_settings"]["conv_channels"] = 1024
    conformer["relative_attention_bias_args"]["t5_bias_max_distance"] = 500
    write_json(tmp_path / "config.json", content)
    config = load_config(tmp_path)
    assert (config.vision_config.image_token_id, config.audio_config.audio_token_id) == (200010, 200011)
    assert resolve_dtype("auto", config, torch.device("cuda")) == torch.bfloat16
    assert resolve_max_model_len(None, config) == 131072
    model = load_meta_model(config)
    shapes = [model.get_submodule(f"model.layers.0.{name}").weight.shape for name in LORA_MODULES]
    num_lora = 32 * (256 + 320) * sum(rows + columns for rows, columns in shapes)
    num_base = sum(tensor.numel() for name, tensor in model.state_dict().items() if name != "lm_head.weight")
    assert num_base + num_lora == PUBLISHED_SIZE


def test_the_tokenizer_follows_its_file(llm: LLM) -> None:
    written = json.loads(llm.get_tokenizer().backend_tokenizer.to_str())
    assert written["pre_tokenizer"] == DIGITS_FIRST


def test_settings_are_read_from_microsofts_files(llm: LLM, checkpoints: SimpleNamespace) -> None:
    processor = llm.llm_engine.input_processor.processor
    stand_in = Phi4MultimodalProcessor(load_config(checkpoints.path), checkpoints.path, llm.get_tokenizer())
    assert stand_in.image_processor.dynamic_hd == 4
    assert stand_in.feature_extractor.audio_compression_rate == 4
    assert processor.placeholder_token("image") == "<|endoftext10|>"
    assert processor.placeholder_token("audio") == "<|endoftext11|>"
    assert llm.llm_engine.stop_ids == {0, 4}


@pytest.mark.parametrize("prompt", ["<|image_2|>", "<|audio_1|><|image_1|><|image_1|>", "<|image_2|><|image_1|>"])
def test_numbered_placeholders_out_of_order_are_refused(llm: LLM, prompt: str) -> None:
    with pytest.raises(MediaError, match=r"where image [12] is expected"):
        llm.generate({"prompt": prompt, "multi_modal_data": {"image": picture(30, 30, 1)}}, use_tqdm=False)


def test_chat_writes_placeholders_into_the_text(llm: LLM) -> None:
    content = [{"type": "image", "image": picture(30, 30, 1)}, {"type": "text", "text": "12?"}]
    inputs = llm.llm_engine.input_processor
    prompt, token_ids = inputs.render(inputs.chat_prompt([{"role": "user", "content": content}]))
    assert prompt == "<|user|><|endoftext10|>12?<|end|><|assistant|>"
    assert token_ids.count(IMAGE_ID) == 1


def test_no_code_of_the_checkpoint_is_run(llm: LLM) -> None:
    """The modules of the checkpoint exit when `transformers` imports them under this name."""
    assert not [name for name in sys.modules if name.startswith("transformers_modules")]


def test_unreadable_configuration(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"model_type": "phi4mm"})
    with pytest.raises(ConfigError, match="embd_layer.image_embd_layer.use_hd_transform is missing"):
        load_config(tmp_path)
