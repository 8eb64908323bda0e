"""Every field of `LoraConfig` equals PEFT (greedy tokens, logits within 1e-4, alone and mixed) or is refused by name.

PEFT saves the adapter and loads the reference, which runs one prompt at a time without a cache. Adapters that PEFT
cannot batch (DoRA, fused experts, replaced modules) are part of the mixed batch like all others.
"""

import dataclasses
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from mmlora import LLM, LoRAMix, LoRARequest
from mmlora.errors import AdapterError, AdapterMismatch, RequestError
from mmlora.lora.layers.uniform import LoRAWholeModule
from mmlora.lora.loading.files import read_adapter
from mmlora.lora.loading.load import load_adapter
from mmlora.lora.loading.module_index import ModuleIndex
from tests.checkpoints import build_tokenizer, load_reference, save_text_model
from tests.equality import Case, check_equal, greedy, recorded_logits
from tests.reference import NUM_TOKENS, ReferenceOutput

MODELS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("llama", {"attention_bias": True}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "gemma": ("gemma3_text", {}),
    "mixtral": ("mixtral", {}),
    "gpt2": ("gpt2", {}),
    "llama4": ("llama4_text", {}),
    "opt": ("opt", {}),
    "phi": ("phi", {}),
}
INVOCATION = build_tokenizer()("ou").input_ids  # twice in the first prompt, not in the second
PROMPTS = ("<|user|>How many dogs can you count?<|end|><|assistant|>", "<|user|>abc abc to and fro<|end|><|assistant|>")


@dataclass(frozen=True)
class Spec:
    """An adapter to save with PEFT: its model and the arguments of `LoraConfig`."""

    model: str = "llama"
    options: Mapping[str, Any] = field(default_factory=dict)


def spec(model: str = "llama", **options: Any) -> Spec:
    return Spec(model, {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **options})


EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
EQUAL: dict[str, list[Spec]] = {
    "r": [spec(r=1), spec(r=33)],
    "lora_alpha": [spec(lora_alpha=3)],
    "use_rslora": [spec(use_rslora=True, r=9)],
    "rank_pattern": [spec(rank_pattern={r"layers\.0\.self_attn\.q_proj": 1, "down_proj": 24})],
    "alpha_pattern": [spec(alpha_pattern={r"^model\.layers\.1\.mlp\.down_proj": 20, "q_proj": 1})],
    "target_modules": [
        spec(target_modules=r".*layers\.[12]\..*(k_proj|up_proj)"),
        spec(target_modules="all-linear"),
        spec(target_modules=["embed_tokens", "lm_head", "q_proj"]),
        spec("tied", target_modules=["embed_tokens", "v_proj"]),
        spec("tied", target_modules=["lm_head"]),
        spec("gemma", target_modules=["embed_tokens", "o_proj"]),
        spec("qwen3", target_modules=["q_proj", "k_proj"]),
    ],
    "exclude_modules": [spec(exclude_modules=["layers.1.self_attn.q_proj"])],
    "layers_to_transform": [spec(layers_to_transform=[0, 2])],
    "layers_pattern": [spec(layers_to_transform=1, layers_pattern="layers")],
    "fan_in_fan_out": [
        spec("gpt2", target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True),
        spec("gpt2", target_modules=["c_attn", "wte"], fan_in_fan_out=True, use_dora=True),
    ],
    "bias": [
        spec(bias="all", modules_to_save=["o_proj"]),
        spec(bias="all"),
        spec(bias="lora_only"),
        spec("gpt2", target_modules=["c_attn"], bias="all"),
    ],
    "lora_bias": [
        spec(lora_bias=True, target_modules=["q_proj"]),
        spec(lora_bias=True),
        spec(lora_bias=True, bias="all", target_modules=["q_proj", "lm_head"]),
    ],
    "use_dora": [
        spec(use_dora=True),
        spec(use_dora=True, bias="lora_only", use_rslora=True, target_modules=["q_proj", "o_proj", "lm_head"]),
        spec("gemma", use_dora=True, target_modules=["embed_tokens", "gate_proj"]),
    ],
    "modules_to_save": [
        spec(modules_to_save=["lm_head"]),
        spec(modules_to_save=["embed_tokens", "norm"]),
        spec(modules_to_save=["layers.1.mlp"], target_modules=["q_proj"]),
        spec("tied", modules_to_save=["embed_tokens"]),
        spec("tied", modules_to_save=["lm_head"]),
        spec("qwen3", modules_to_save=["q_norm", "k_norm"]),
        spec("gemma", modules_to_save=["embed_tokens"]),
        spec("mixtral", modules_to_save=["mlp.experts", "gate"], target_modules=["v_proj"]),
        spec("gemma", modules_to_save=["norm"], target_modules=["v_proj"]),  # norms of heads, which get rows transposed
        spec("llama4", modules_to_save=["router"], target_modules=["v_proj"]),
        spec("opt", modules_to_save=["embed_positions"], target_modules=["v_proj"]),
    ],
    "ensure_weight_tying": [
        spec("tied", modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        spec("tied", target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True),
        spec("tied", trainable_token_indices=[9, 70, 71], ensure_weight_tying=True),
    ],
    "trainable_token_indices": [
        spec(trainable_token_indices=[104, 3, 70, 71]),
        spec(trainable_token_indices={"embed_tokens": [80, 70], "lm_head": [72, 75, 73]}),
        spec("tied", trainable_token_indices=[104, 3, 70, 71, 72]),
        spec("tied", trainable_token_indices={"embed_tokens": [104, 70], "lm_head": [72]}),
        spec("gemma", trainable_token_indices=[104, 3, 70, 71]),
        spec("phi", trainable_token_indices={"embed_tokens": [80, 70], "lm_head": [72, 75]}),
    ],
    "target_parameters": [
        spec("mixtral", target_modules=[], target_parameters=EXPERTS),
        spec("mixtral", target_modules=["q_proj"], target_parameters=["experts.down_proj", "gate.weight"]),
        spec("mixtral", target_modules=[], target_parameters=EXPERTS, rank_pattern={"experts.gate_up_proj": 7}),
        spec(target_modules=[], target_parameters=["q_proj.weight"], alpha_pattern={"q_proj.weight": 30, "q_proj": 1}),
        spec(target_modules=[], target_parameters=["v_proj.weight"], rank_pattern={"v_proj.weight": 7}),
        spec("gpt2", target_modules=[], target_parameters=["attn.c_proj.weight", "c_attn.weight"]),
        spec(target_modules=[], target_parameters=["embed_tokens.weight"]),
        spec("llama4", target_modules=[], target_parameters=[*EXPERTS, "router.weight"]),
    ],
    "use_bdlora": [
        spec(
            target_modules=["q_proj", "o_proj"],
            use_bdlora={"target_modules_bd_a": ["o_proj"], "target_modules_bd_b": ["q_proj"], "nblocks": 2},
        )
    ],
    "alora_invocation_tokens": [spec(alora_invocation_tokens=INVOCATION, task_type="CAUSAL_LM")],
    "init_lora_weights": [spec(init_lora_weights=init) for init in (False, "gaussian", "eva", "orthogonal", "mica")],
    "velora_config": [spec(velora_config={"num_groups": 4})],
    "monteclora_config": [spec(monteclora_config={})],
}
# Values without effect on inference.
IRRELEVANT: dict[str, Any] = {
    "peft_version": "0.0.1",
    "base_model_name_or_path": "another/model",
    "revision": "main",
    "task_type": "SEQ_CLS",
    "inference_mode": False,
    "auto_mapping": {"base_model_class": "X"},
    "lora_dropout": 0.5,
    "megatron_core": "megatron.core",
    "qalora_group_size": 8,
    "runtime_config": {"ephemeral_gpu_offload": True},
    "loftq_config": {"loftq_bits": 4},
    "eva_config": {"rho": 2.0},
    "corda_config": {"corda_method": "ipm"},
    "lora_ga_config": {"direction": "ArB2r"},
}
REFUSED: dict[str, list[Any]] = {
    "peft_type": ["IA3", "ADALORA"],
    "init_lora_weights": ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "unheard_of"],
    "layer_replication": [[[0, 2], [1, 3]]],
    "use_qalora": [True],
    "arrow_config": [{"top_k": 2}],
    "kasa_config": [{"beta": 0.1}],
    "megatron_config": [{"hidden_size": 8}],
}
SPECS = {f"{name}-{index}": found for name, specs in EQUAL.items() for index, found in enumerate(specs)}


def test_every_field_of_the_installed_peft_is_here() -> None:
    fields = {item.name for item in dataclasses.fields(LoraConfig)}
    assert fields <= EQUAL.keys() | IRRELEVANT.keys() | REFUSED.keys()


def test_the_documentation_has_every_field() -> None:
    rows = re.findall(r"^\| (`.*?) \|", (Path(__file__).parents[2] / "docs/adapters.md").read_text(), re.MULTILINE)
    documented = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert {item.name for item in dataclasses.fields(LoraConfig)} <= documented


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("parity")
    return {name: save_text_model(folder / name, family, **changes) for name, (family, changes) in MODELS.items()}


@pytest.fixture(scope="session")
def adapters(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: save_peft(models[found.model], folder / name, seed, **found.options)
        for seed, (name, found) in enumerate(SPECS.items())
    }


def save_peft(model: Path, path: Path, seed: int, **options: Any) -> Path:
    """Save an adapter with PEFT, with random values as after training."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(load_reference(model), LoraConfig(**options)).save_pretrained(path)
    generator = torch.Generator().manual_seed(seed)
    file = path / "adapter_model.safetensors"
    tensors = {key: _trained(key, tensor, generator) for key, tensor in load_file(file).items()}
    if options.get("ensure_weight_tying"):  # one tensor in PEFT, saved as two copies
        _tie(tensors)
    for key in tensors:  # saved twice by PEFT
        if ".modules_to_save." in key:
            tensors[key] = tensors[key.replace(".modules_to_save.", ".")].clone()
    save_file(tensors, file)
    return path


def _trained(key: str, tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(tensor.shape, generator=generator)
    if key.endswith("base_layer.weight") or not tensor.is_floating_point():
        return tensor
    if ".lora_A" in key or ".lora_embedding_A" in key:
        return noise * tensor.shape[-1] ** -0.5 * (4.0 if "embedding" in key else 1.0)
    if ".lora_B.weight" in key or ".lora_embedding_B" in key:
        return noise * 0.3
    if "magnitude" in key:
        return tensor * (1 + 0.2 * noise)
    return tensor + 0.3 * noise * max(0.3, float(tensor.float().std(correction=0)))


def _tie(tensors: dict[str, torch.Tensor]) -> None:
    head, embed = "base_model.model.lm_head.", "base_model.model.model.embed_tokens."
    if f"{head}weight" in tensors:
        tensors[f"{head}weight"] = tensors[f"{embed}weight"].clone()
    if f"{head}lora_A.weight" in tensors:
        tensors[f"{head}lora_A.weight"] = tensors[f"{embed}lora_embedding_B"].T.contiguous()
        tensors[f"{head}lora_B.weight"] = tensors[f"{embed}lora_embedding_A"].T.contiguous()


def reference(model: Path, adapter: Path | None, prompt: str, tokenizer: Any) -> ReferenceOutput:
    """Continue a prompt greedily with PEFT, without a KV cache."""
    net = load_reference(model)
    if adapter is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            net = PeftModel.from_pretrained(net, adapter).eval()
            found = get_peft_model_state_dict(net)
        tensors = load_file(adapter / "adapter_model.safetensors")
        assert found.keys() == tensors.keys() and all(torch.equal(found[key], tensors[key]) for key in tensors)
    return continue_greedily(net, tokenizer(prompt).input_ids)


@torch.inference_mode()
def continue_greedily(net: Any, prompt_ids: list[int]) -> ReferenceOutput:
    ids = list(prompt_ids)
    for _ in range(NUM_TOKENS):
        logits = net(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        ids.append(int(logits[-1].argmax()))
    return ReferenceOutput(prompt_ids, ids[len(prompt_ids) :], logits)


@pytest.fixture(scope="session")
def engines(models: dict[str, Path]) -> dict[str, LLM]:
    options: dict[str, Any] = {"enable_lora": True, "max_logprobs": -1, "max_model_len": 128, "device": "cpu"}
    return {
        name: LLM(str(path), dtype="float32", max_num_batched_tokens=24, max_loras=4, max_cpu_loras=64, **options)
        for name, path in models.items()
    }


_answers: dict[tuple[str, str], ReferenceOutput] = {}


def compare(llm: LLM, model: Path, cases: list[tuple[str, Path | None, str]], **options: Any) -> None:
    """Run `(name, adapter, prompt)` as one batch and compare each with the reference."""
    ids = {name: index for index, name in enumerate(SPECS, start=1)}
    loras = [LoRARequest(name, ids[name], str(path)) if path else None for name, path, _ in cases]
    with recorded_logits(llm) as logits:
        outputs = llm.generate([prompt for *_, prompt in cases], greedy(**options), loras, use_tqdm=False)
    for (name, path, prompt), output in zip(cases, outputs, strict=True):
        key = (f"{model} {path}", prompt)
        if key not in _answers:
            _answers[key] = reference(model, path, prompt, llm.get_tokenizer())
        check_equal(output, logits[output.request_id], _answers[key], Case(name, prompt).name)


@pytest.mark.parametrize("name", SPECS)
def test_alone(name: str, models: dict[str, Path], adapters: dict[str, Path], engines: dict[str, LLM]) -> None:
    model = SPECS[name].model
    compare(engines[model], models[model], [(name, adapters[name], PROMPTS[0])], prompt_logprobs=0)
    base = reference(models[model], None, PROMPTS[0], engines[model].get_tokenizer())
    changed = _answers[f"{models[model]} {adapters[name]}", PROMPTS[0]]
    assert (changed.logits[: len(base.prompt_ids)] - base.logits[: len(base.prompt_ids)]).abs().max() > 1e-2


@pytest.mark.parametrize("model", MODELS)
def test_mixed(model: str, models: dict[str, Path], adapters: dict[str, Path], engines: dict[str, LLM]) -> None:
    names = [name for name, found in SPECS.items() if found.model == model]
    cases: list[tuple[str, Path | None, str]] = [("base", None, prompt) for prompt in PROMPTS]
    for index, name in enumerate(names):
        cases.append((name, adapters[name], PROMPTS[index % 2]))
    compare(engines[model], models[model], cases, prompt_logprobs=0)
    compare(engines[model], models[model], cases)  # the output layer then gets fewer rows than other layers


def load(path: Path, model: Path) -> Any:
    return load_adapter(read_adapter(path), "a", ModuleIndex(load_reference(model)), dtype=torch.float32)


def edit_config(path: Path, **changes: Any) -> None:
    file = path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("name", IRRELEVANT)
def test_training_options_change_nothing(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    path = save_peft(models["llama"], tmp_path / "a", 1, **spec().options)
    before = load(path, models["llama"]).digest
    edit_config(path, **{name: IRRELEVANT[name]})
    assert load(path, models["llama"]).digest == before


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values])
def test_unsupported_options_are_refused_by_name(
    name: str, value: Any, models: dict[str, Path], tmp_path: Path
) -> None:
    path = save_peft(models["llama"], tmp_path / "a", 1, **spec().options)
    edit_config(path, **{name: value})
    shown = f"{name} {value}" if name == "peft_type" else f"{name}={value!r}"
    with pytest.raises(AdapterMismatch, match=f"{re.escape(shown)} is not supported"):
        load(path, models["llama"])


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_initialisation_that_changed_the_base_is_accepted_after_conversion(
    init: str, models: dict[str, Path], engines: dict[str, LLM], tmp_path: Path
) -> None:
    """PEFT converts such an adapter given the path of the untrained one; the result fits the unchanged base."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = get_peft_model(load_reference(models["llama"]), LoraConfig(**spec(init_lora_weights=init).options))
        net.peft_config["default"].init_lora_weights = True  # as documented by PEFT
        net.save_pretrained(tmp_path / "untrained")
        net.peft_config["default"].init_lora_weights = init
        generator = torch.Generator().manual_seed(1)
        for name, parameter in net.named_parameters():
            if "lora_" in name:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        net.save_pretrained(tmp_path / "plain")
        net.save_pretrained(
            tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "untrained")
        )
    llm = engines["llama"]
    with pytest.raises(AdapterMismatch, match=f"init_lora_weights='{init}' is not supported: this initialisation also"):
        llm.generate(
            PROMPTS[0], lora_request=LoRARequest(f"{init}-plain", 900 + sum(init.encode()), str(tmp_path / "plain"))
        )
    with recorded_logits(llm) as logits:
        request = LoRARequest(init, 901 + sum(init.encode()), str(tmp_path / "converted"))
        (output,) = llm.generate(PROMPTS[0], greedy(prompt_logprobs=0), request, use_tqdm=False)
    tuned = continue_greedily(net.eval(), llm.get_tokenizer()(PROMPTS[0]).input_ids)
    check_equal(output, logits[output.request_id], tuned, init)


MIXES = [(("r-0", 1.0), ("lora_bias-0", 0.5)), (("r-1", -0.7), ("target_modules-2", 0.4), ("use_rslora-0", 1.2))]


@pytest.mark.parametrize("parts", MIXES, ids=str)
def test_a_mix_is_the_weighted_sum_of_peft(
    parts: Any, models: dict[str, Path], adapters: dict[str, Path], engines: dict[str, LLM]
) -> None:
    llm, model = engines["llama"], models["llama"]
    ids = {name: index for index, name in enumerate(SPECS, start=1)}
    requests = [(LoRARequest(name, ids[name], str(adapters[name])), scale) for name, scale in parts]
    prompt_ids = llm.get_tokenizer()(PROMPTS[0]).input_ids
    with recorded_logits(llm) as logits:
        outputs = llm.generate(
            [PROMPTS[0]] * 3, greedy(prompt_logprobs=0), [LoRAMix(requests), None, requests[0][0]], use_tqdm=False
        )
    expected = continue_greedily(_weighted(model, [(adapters[name], scale) for name, scale in parts]), prompt_ids)
    check_equal(outputs[0], logits[outputs[0].request_id], expected, str(parts))
    assert outputs[0].lora.reason == "explicit" and outputs[0].lora.adapter == LoRAMix(requests).lora_name
    assert len({output.lora.digest for output in outputs}) == 3


def _weighted(model: Path, parts: list[tuple[Path, float]]) -> Any:
    """Return the base model plus the weighted changes of each adapter, computed with PEFT's merge."""
    net = load_reference(model)
    base = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    total = {name: tensor.double() for name, tensor in base.items()}
    for path, scale in parts:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged = PeftModel.from_pretrained(load_reference(model), path).merge_and_unload().state_dict()
        for name in total:
            total[name] += scale * (merged[name].double() - base[name].double())
    net.load_state_dict({name: tensor.float() for name, tensor in total.items()})
    return net.eval()


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("use_dora-0", "uses DoRA"),
        ("modules_to_save-0", "parameters of lm_head"),
        ("trainable_token_indices-0", "parameters of model.embed_tokens"),
        ("alora_invocation_tokens-0", "waits for its invocation tokens"),
    ],
)
def test_adapters_that_cannot_be_added_up_are_refused_in_a_mix(
    name: str, cause: str, adapters: dict[str, Path], engines: dict[str, LLM]
) -> None:
    ids = {name: index for index, name in enumerate(SPECS, start=1)}
    mix = LoRAMix([(LoRARequest(key, ids[key], str(adapters[key])), 0.5) for key in (name, "r-0")])
    with pytest.raises(RequestError, match=f"adapter '{name}' .*{cause}.* in a mix"):
        engines["llama"].generate(PROMPTS[0], lora_request=mix)


def test_scales_that_overflow_are_refused(adapters: dict[str, Path], engines: dict[str, LLM]) -> None:
    mix = LoRAMix([(LoRARequest("r-0", 1, str(adapters["r-0"])), 1e308)])
    with pytest.raises(RequestError, match="the scales .* are too large"):
        engines["llama"].generate(PROMPTS[0], lora_request=mix)
    with pytest.raises(AdapterError) as refused:
        LoRAMix([(LoRARequest(f"a{i}", i + 1, "/secret/place"), 1.0) for i in range(17)])
    assert "it contains 17" in str(refused.value) and "secret" not in str(refused.value)


def test_an_activated_lora_shares_the_base_models_cache(
    models: dict[str, Path], adapters: dict[str, Path], engines: dict[str, LLM]
) -> None:
    llm, name = engines["llama"], "alora_invocation_tokens-0"
    ids = {name: index for index, name in enumerate(SPECS, start=1)}
    before = "<|user|>" + "A long common prefix of both. " * 2
    prompt = f"{before}ou and more words than one block holds<|end|>"
    request = LoRARequest(name, ids[name], str(adapters[name]))
    llm.generate(prompt, greedy(), use_tqdm=False)
    (activated,) = llm.generate(prompt, greedy(), request, use_tqdm=False)
    start = len(llm.get_tokenizer()(before).input_ids)
    assert start % 16 and start - 16 < activated.num_cached_tokens <= start
    expected = reference(models["llama"], adapters[name], prompt, llm.get_tokenizer())
    assert activated.outputs[0].token_ids == expected.token_ids
    (idle,) = llm.generate(PROMPTS[1], greedy(), request, use_tqdm=False)
    assert idle.lora.adapter is None and "lacks the tokens" in idle.lora.warning


def test_a_failure_in_the_pass_of_one_adapter_fails_its_requests_only(
    adapters: dict[str, Path], engines: dict[str, LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, name = engines["mixtral"], "target_parameters-0"
    ids = {name: index for index, name in enumerate(SPECS, start=1)}
    request = LoRARequest(name, ids[name], str(adapters[name]))
    before = llm.generate([PROMPTS[0]] * 2, greedy(), [None, request], use_tqdm=False)
    forward = LoRAWholeModule.forward

    def fail(layer: LoRAWholeModule, *arguments: Any, **options: Any) -> Any:
        if layer.state.uniform_slot is not None:
            raise RuntimeError("boom")
        return forward(layer, *arguments, **options)

    monkeypatch.setattr(LoRAWholeModule, "forward", fail)
    base, failed = llm.generate([PROMPTS[0]] * 2, greedy(), [None, request], use_tqdm=False)
    assert base.outputs[0].token_ids == before[0].outputs[0].token_ids and base.error is None
    assert isinstance(failed.error, AdapterError) and "boom" in str(failed.error)
    monkeypatch.undo()
    after = llm.generate([PROMPTS[0]] * 2, greedy(), [None, request], use_tqdm=False)
    assert [output.outputs[0].token_ids for output in after] == [output.outputs[0].token_ids for output in before]
