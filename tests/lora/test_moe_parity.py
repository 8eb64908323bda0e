"""Adapters of mixture-of-experts models saved with transformers 4, which had one Linear per expert and projection.

The reference adds `scaling · B A` by hand to the rows of each expert in the fused parameters of transformers 5. PEFT
converts such adapters for some families and configurations, and then equals this reference, too.
"""

import copy
import json
import math
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from mmlora import LLM, LoRAMix, LoRARequest
from mmlora.errors import AdapterMismatch, RequestError
from mmlora.lora.adapter import Adapter
from mmlora.lora.layers.slots import LoRASlots
from mmlora.lora.loading.files import read_adapter
from mmlora.lora.loading.load import load_adapter
from mmlora.lora.loading.module_index import ModuleIndex
from mmlora.lora.mix import mix_adapters
from tests.checkpoints import load_reference, save_text_model
from tests.equality import check_equal, greedy, recorded_logits
from tests.lora.test_peft_parity import PROMPTS, continue_greedily

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2}
SMALL = {"moe_intermediate_size": 16}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}


@dataclass(frozen=True)
class Family:
    """A family of transformers, with the names of its experts' projections and router in transformers 4."""

    model: str
    options: Mapping[str, Any]
    block: str
    gate: str
    up: str
    down: str
    router: str = ""

    @property
    def projections(self) -> list[str]:
        return [self.gate, self.up, self.down]


QWEN = ("mlp", "gate_proj", "up_proj", "down_proj", "gate")
MIXTRAL = ("block_sparse_moe", "w1", "w3", "w2", "gate")
FAMILIES = {
    "qwen2_moe": Family("Qwen2Moe", {**EXPERTS, **SMALL, "shared_expert_intermediate_size": 20}, *QWEN),
    "qwen3_moe": Family("Qwen3Moe", {**EXPERTS, **SMALL, "head_dim": 8}, *QWEN),
    "olmoe": Family("Olmoe", EXPERTS, *QWEN),
    "mixtral": Family("Mixtral", {"num_local_experts": 3}, *MIXTRAL),
    "phimoe": Family("Phimoe", {"num_local_experts": 3}, *MIXTRAL),
    "deepseek_v3": Family(
        "DeepseekV3",
        {
            **SMALL,
            **LATENT,
            **ROUTED,
        },
        *QWEN[:-1],
    ),
    "lfm2_moe": Family(
        "Lfm2Moe",
        {**EXPERTS, **SMALL, "num_dense_layers": 1, "layer_types": ["full_attention"] * 2},
        *("feed_forward", "w1", "w3", "w2", "gate"),
    ),
    "jamba": Family(
        "Jamba",
        {**EXPERTS, "attn_layer_period": 1, "attn_layer_offset": 0, "expert_layer_period": 1, "expert_layer_offset": 0},
        *("feed_forward", "gate_proj", "up_proj", "down_proj", "router"),
    ),
}
GRANITE = Family("GraniteMoe", {"num_local_experts": 3, "num_experts_per_tok": 2}, "block_sparse_moe", "", "", "")
IDS = torch.tensor([[5, 9, 13, 21, 7, 33, 2, 50]])
Rank = Callable[[str], int]
Scaling = Callable[[str], float]


@dataclass(frozen=True)
class Case:
    """An adapter: which Linears of transformers 4 it changes, and its configuration.

    Attributes:
        select: regular expression on their names.
        config: keys of its configuration.
        rank, scaling: of each Linear.
        peft: families of which PEFT 0.21 converts such an adapter without loss.
    """

    select: str
    config: Mapping[str, Any]
    rank: Rank = lambda name: 4
    scaling: Scaling = lambda name: 2.0
    peft: tuple[str, ...] = ()


CONVERTED = ("qwen3_moe", "olmoe", "mixtral", "deepseek_v3")
EXPERT = r"\.experts\.\d+\."


def cases(family: Family) -> dict[str, Case]:
    gate, up, down = family.projections
    router = family.router
    attention = r"\.(q_proj|q_a_proj)$"
    return {
        "all-projections": Case(EXPERT, {"target_modules": [gate, up, down]}, peft=CONVERTED),
        "pattern": Case(EXPERT, {"target_modules": rf".*{EXPERT}({gate}|{up}|{down})"}),
        "all-linear": Case(
            rf"{EXPERT}|{attention}|\.{router}$",
            {"target_modules": "all-linear"},
            peft=("qwen3_moe", "olmoe", "mixtral"),
        ),
        "attention": Case(
            f"{EXPERT}|{attention}", {"target_modules": [gate, up, down, "q_proj", "q_a_proj"]}, peft=CONVERTED
        ),
        "router": Case(
            rf"{EXPERT}|\.{router}$",
            {"target_modules": [gate, up, down, router]},
            peft=("qwen3_moe", "olmoe", "mixtral"),
        ),
        "only-the-router": Case(rf"\.{router}$", {"target_modules": [router]}, peft=("qwen3_moe", "olmoe", "mixtral")),
        "only-down": Case(rf"{EXPERT}{down}", {"target_modules": [down]}, peft=CONVERTED),
        "only-gate": Case(rf"{EXPERT}{gate}", {"target_modules": [gate]}),
        "only-up": Case(rf"{EXPERT}{up}", {"target_modules": [up]}),
        "one-expert": Case(r"\.experts\.1\.", {"target_modules": [gate, up, down]}),
        "other-projections-by-expert": Case(
            rf"\.experts\.(0\.{gate}|1\.{up}|2\.{down})$", {"target_modules": [gate, up, down]}
        ),
        "one-layer": Case(rf"layers\.1\..*{EXPERT}", {"target_modules": [gate, up, down]}, peft=CONVERTED),
        "layers-to-transform": Case(
            rf"layers\.1\..*{EXPERT}", {"target_modules": [gate, up, down], "layers_to_transform": [1]}
        ),
        "shared-and-dense": Case(
            rf"{EXPERT}|(shared_experts?|mlp|feed_forward)\.({gate}|{up}|{down})$", {"target_modules": [gate, up, down]}
        ),
        # PEFT scales the fused gate_up_proj by alpha / √(2 r), and ignores patterns with the names of transformers 4.
        "rslora": Case(
            EXPERT, {"target_modules": [gate, up, down], "use_rslora": True}, scaling=lambda name: 8 / math.sqrt(4)
        ),
        "rank-pattern": Case(
            EXPERT,
            {"target_modules": [gate, up, down], "rank_pattern": {up: 2, f"experts.1.{down}": 6}},
            rank=lambda name: 2 if name.endswith(up) else 6 if name.endswith(f"experts.1.{down}") else 4,
            scaling=lambda name: 8 / (2 if name.endswith(up) else 6 if name.endswith(f"experts.1.{down}") else 4),
        ),
        "alpha-pattern": Case(
            EXPERT,
            {"target_modules": [gate, up, down], "alpha_pattern": {gate: 3, rf"layers\.1\..*experts\.2\.{down}": 0}},
            scaling=lambda name: (
                0.75 if name.endswith(gate) else 0 if re.search(rf"layers\.1\..*experts\.2\.{down}", name) else 2.0
            ),
        ),
    }


CASES = [
    (name, case) for name, family in FAMILIES.items() for case in cases(family) if family.router or "router" not in case
]


@cache
def build(name: str) -> Any:
    family = {**FAMILIES, "granitemoe": GRANITE}[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family.model}Config")(**{**SIZES, **family.options})
    model = getattr(transformers, f"{family.model}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15)
    return model.requires_grad_(False)


def old_linears(family: Family, model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weight of each Linear by its name in transformers 4, as a view of the fused parameters."""
    found = {name: module.weight for name, module in model.named_modules() if type(module) is nn.Linear}
    for name, parameter in model.named_parameters():
        if match := re.fullmatch(r"(.*\.)\w+\.experts\.gate_up_proj", name):
            for expert, rows in enumerate(parameter):
                gate, up = rows.chunk(2)
                prefix = f"{match[1]}{family.block}.experts.{expert}"
                found |= {f"{prefix}.{family.gate}": gate, f"{prefix}.{family.up}": up}
        elif match := re.fullmatch(r"(.*\.)\w+\.experts\.down_proj", name):
            for expert, rows in enumerate(parameter):
                found[f"{match[1]}{family.block}.experts.{expert}.{family.down}"] = rows
        elif (match := re.fullmatch(r"(.*layers\.\d+\.)\w+\.(gate|router)\.weight", name)) and family.router:
            found[f"{match[1]}{family.block}.{family.router}"] = parameter
    return found


def save(path: Path, family: Family, model: nn.Module, case: Case, seed: int = 1) -> nn.Module:
    """Save an adapter in the format of transformers 4, and return a model with its changes added by hand."""
    path.mkdir(parents=True, exist_ok=True)
    generator, changed = torch.Generator().manual_seed(seed), copy.deepcopy(model)
    tensors = {}
    for name, weight in old_linears(family, changed).items():
        if re.search(case.select, name):
            rank = case.rank(name)
            lora_A = torch.randn(rank, weight.shape[1], generator=generator) * weight.shape[1] ** -0.5
            lora_B = torch.randn(weight.shape[0], rank, generator=generator) * 0.3
            weight += case.scaling(name) * (lora_B @ lora_A)
            tensors[f"base_model.model.{name}.lora_A.weight"] = lora_A
            tensors[f"base_model.model.{name}.lora_B.weight"] = lora_B
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, **case.config}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return changed


def load(path: Path, model: nn.Module, **options: Any) -> Adapter:
    return load_adapter(read_adapter(path), "a", ModuleIndex(model), **{"dtype": torch.float32, **options})


@torch.inference_mode()
def apply(path: Path, model: nn.Module) -> torch.Tensor:
    """Return the logits of a model with an adapter in a slot."""
    model = copy.deepcopy(model)
    slots = LoRASlots(model, 1, "cpu")
    slot = slots.activate(load(path, model))
    with slots.state.uniform(slot):
        logits: torch.Tensor = model(input_ids=IDS).logits
    return logits


@torch.inference_mode()
def logits_of(model: nn.Module) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=IDS).logits
    return logits


def with_peft(path: Path, model: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(copy.deepcopy(model), path).eval()


@pytest.mark.parametrize(("name", "case"), CASES)
def test_experts_equal_the_changes_added_by_hand(name: str, case: str, tmp_path: Path) -> None:
    family, model = FAMILIES[name], build(name)
    found = cases(family)[case]
    expected = logits_of(save(tmp_path, family, model, found))
    assert (expected - logits_of(model)).abs().max() > 0.1
    torch.testing.assert_close(apply(tmp_path, model), expected, rtol=0, atol=1e-5)
    if name in found.peft:
        torch.testing.assert_close(logits_of(with_peft(tmp_path, model)), expected, rtol=0, atol=1e-5)


def test_the_representation_stays_low_rank(tmp_path: Path) -> None:
    family, model = FAMILIES["qwen3_moe"], build("qwen3_moe")
    save(tmp_path, family, model, cases(family)["all-projections"])
    adapter = load(tmp_path, model, max_lora_rank=4)
    experts = adapter.modules["model.layers.0.mlp.experts"].expert_loras
    assert {(rows.parameter, rows.start, rows.stop) for rows in experts} == {
        ("gate_up_proj", 0, 16),
        ("gate_up_proj", 16, 32),
        ("down_proj", 0, 32),
    }
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(experts) == 9 and adapter.num_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert adapter.report.max_rank == 4 and adapter.report.matched == 2 and adapter.needs_own_pass
    with pytest.raises(
        AdapterMismatch, match=r"rank 4 of model\.layers\.0\.mlp\.experts\.0\.\w+ exceeds max_lora_rank=3"
    ):
        load(tmp_path, model, max_lora_rank=3)


def test_an_adapter_saved_again_by_peft_is_the_same(tmp_path: Path) -> None:
    family, model = FAMILIES["mixtral"], build("mixtral")
    expected = logits_of(save(tmp_path / "old", family, model, cases(family)["router"]))
    with_peft(tmp_path / "old", model).save_pretrained(tmp_path / "new")
    assert not load_file(tmp_path / "new/adapter_model.safetensors").keys() & load_file(
        tmp_path / "old/adapter_model.safetensors"
    )
    torch.testing.assert_close(apply(tmp_path / "new", model), expected, rtol=0, atol=1e-5)


GRANITE_CASES: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "router": ({"router.layer": "router.weight"}, {"target_modules": ["layer"]}),
    "all-linear": ({"router.layer": "router.weight"}, {"target_modules": "all-linear"}),
    "experts": (
        {"input_linear": "experts.gate_up_proj", "output_linear": "experts.down_proj"},
        {
            "target_parameters": ["input_linear.weight", "output_linear.weight"],
            "rank_pattern": {"input_linear.weight": 2},
        },
    ),
    "both": (
        {"output_linear": "experts.down_proj", "router.layer": "router.weight"},
        {"target_modules": ["router.layer"], "target_parameters": ["block_sparse_moe.output_linear.weight"]},
    ),
}


@pytest.mark.parametrize("is_old", [False, True], ids=["peft-0.19", "peft-0.18"])
@pytest.mark.parametrize("case", GRANITE_CASES)
def test_parameters_that_granite_renamed_equal_the_changes_added_by_hand(
    case: str, is_old: bool, tmp_path: Path
) -> None:
    """PEFT before 0.19 read the parameter of experts as `[num_experts, in_features, out_features]`."""
    model, (names, config) = build("granitemoe"), GRANITE_CASES[case]
    changed, tensors = copy.deepcopy(model), {}
    parameters = dict(changed.named_parameters())
    for layer in range(2):
        prefix = f"model.layers.{layer}.block_sparse_moe"
        for old, new in names.items():
            rank = 2 if old == "input_linear" and "rank_pattern" in config else 4
            weight = parameters[f"{prefix}.{new}"]
            experts = weight.shape[0] if weight.ndim == 3 else 1
            is_swapped = is_old and weight.ndim == 3
            height, width = reversed(weight.shape[-2:]) if is_swapped else weight.shape[-2:]
            lora_A = torch.randn(rank * experts, width) * width**-0.5
            lora_B = torch.randn(height, rank * experts) * 0.3
            stacked_B, stacked_A = lora_B.view(-1, rank, experts), lora_A.view(experts, rank, -1)
            delta = torch.einsum("ore,eri->eio" if is_swapped else "ore,eri->eoi", stacked_B, stacked_A)
            weight += 8 / rank * (delta if weight.ndim == 3 else delta[0])
            tensors[f"base_model.model.{prefix}.{old}.lora_A.weight"] = lora_A
            tensors[f"base_model.model.{prefix}.{old}.lora_B.weight"] = lora_B
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    content = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": [], **config}
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    assert (logits_of(changed) - logits_of(model)).abs().max() > 0.1
    torch.testing.assert_close(apply(tmp_path, model), logits_of(changed), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "case", ["all-projections", "router", "only-up", "other-projections-by-expert", "rank-pattern"]
)
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_dora_scales_the_rows_of_each_expert(name: str, case: str, tmp_path: Path) -> None:
    """PEFT has no DoRA for parameters; the reference is its formula for Linears, `m · W' / ‖W'‖`, by hand."""
    family, model = FAMILIES[name], build(name)
    found = cases(family)[case]
    changed = save(tmp_path, family, model, replace(found, config={**found.config, "use_dora": True}))
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    for linear, weight in old_linears(family, changed).items():
        if f"base_model.model.{linear}.lora_A.weight" in tensors:
            magnitude = torch.rand(len(weight)) + 0.5
            weight *= (magnitude / weight.norm(dim=1))[:, None]
            tensors[f"base_model.model.{linear}.lora_magnitude_vector"] = magnitude
    save_file(tensors, file)
    torch.testing.assert_close(apply(tmp_path, model), logits_of(changed), rtol=0, atol=1e-5)
    adapter = load(tmp_path, model)
    mix = LoRAMix([(LoRARequest("a", 1, str(tmp_path)), 0.5)])
    with pytest.raises(RequestError, match="uses DoRA, whose magnitudes cannot be added up"):
        mix_adapters(mix, [adapter])


@pytest.mark.parametrize("entry", ["experts", "mlp", "block"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_replaced_experts_have_their_old_names(name: str, entry: str, tmp_path: Path) -> None:
    family, model = FAMILIES[name], build(name)
    entry = {"mlp": f"{family.block}.experts", "block": family.block}.get(entry, entry)
    changed, tensors = copy.deepcopy(model), {}
    for linear, weight in old_linears(family, changed).items():
        if ".experts." in linear or (entry == family.block and linear.endswith(f".{family.router}")):
            weight += torch.randn(weight.shape) * 0.1
            tensors[f"base_model.model.{linear}.weight"] = weight.clone()
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    content = {"peft_type": "LORA", "r": 4, "target_modules": [], "modules_to_save": [entry]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    torch.testing.assert_close(apply(tmp_path, model), logits_of(changed), rtol=0, atol=1e-5)
    missing = sorted(tensors)[0]
    save_file(
        {key: tensor for key, tensor in tensors.items() if key != missing}, tmp_path / "adapter_model.safetensors"
    )
    with pytest.raises(
        AdapterMismatch, match=r"there are \d weights for \w+ of model\.layers\.0\.mlp\.experts; it has \d"
    ):
        load(tmp_path, model)
    save_file({**tensors, missing: torch.ones(2, 2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterMismatch, match=rf"tensor {missing} is \[2, 2\]; model\.layers\.0\.mlp\.experts has"):
        load(tmp_path, model)


def test_replaced_modules_have_their_old_names(tmp_path: Path) -> None:
    """The router and the fused experts of Granite, and the router of Mixtral, under `modules_to_save`."""
    olds = {"router.layer": "router.weight", "input_linear": "experts.gate_up_proj"}
    for name, replacements in {"granitemoe": olds, "mixtral": {"gate": "gate.weight"}}.items():
        model = build(name)
        changed, tensors = copy.deepcopy(model), {}
        for old, new in replacements.items():
            prefix = "model.layers.1." + ("mlp" if name == "mixtral" else "block_sparse_moe")
            parameter = changed.get_parameter(f"{prefix}.{new}")
            parameter += torch.randn(parameter.shape)
            for layer in range(2):
                weight = changed.get_parameter(f"{prefix.replace('layers.1', f'layers.{layer}')}.{new}")
                tensors[f"base_model.model.model.layers.{layer}.block_sparse_moe.{old}.weight"] = weight
        save_file({key: tensor.clone() for key, tensor in tensors.items()}, tmp_path / "adapter_model.safetensors")
        content = {"peft_type": "LORA", "r": 4, "target_modules": [], "modules_to_save": list(replacements)}
        (tmp_path / "adapter_config.json").write_text(json.dumps(content))
        torch.testing.assert_close(apply(tmp_path, model), logits_of(changed), rtol=0, atol=1e-5)


Tensors = dict[str, torch.Tensor]
E0 = "base_model.model.model.layers.0.block_sparse_moe.experts.0"


def rename(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {re.sub(old, new, key): tensor for key, tensor in tensors.items()}


BROKEN: dict[str, tuple[Callable[[Tensors], Tensors], dict[str, Any], str]] = {
    "expert-out-of-range": (
        rename(r"experts\.2", "experts.3"),
        {},
        r"12 of 36 tensors match no module of this model: .*layers\.0\.block_sparse_moe\.experts\.3\.w1\.lora_A",
    ),
    "no-number": (rename(r"experts\.1\.w2", "experts.x.w2"), {}, r"4 of 36 tensors .*experts\.x\.w2\.lora_A"),
    "no-such-projection": (rename(r"experts\.1\.w2", "experts.1.w4"), {}, r"4 of 36 tensors .*experts\.1\.w4\.lora_A"),
    "nested-too-deep": (rename(r"experts\.1\.w2", "experts.1.w2.w2"), {}, r"4 of 36 tensors .*1\.w2\.w2\.lora_A"),
    "half-a-pair": (
        lambda found: {key: tensor for key, tensor in found.items() if key != f"{E0}.w3.lora_B.weight"},
        {},
        r"experts\.0\.w3\.lora_A\.weight has no partner lora_B for model\.layers\.0\.block_sparse_moe\.experts\.0\.w3",
    ),
    "other-width": (
        lambda found: {**found, f"{E0}.w1.lora_A.weight": torch.ones(4, 31)},
        {},
        r"another model: .*experts\.0\.w1 is Linear\(32, 24\), but lora_A is \[4, 31\] and lora_B is \[24, 4\]",
    ),
    "fused-width": (
        lambda found: {**found, f"{E0}.w1.lora_B.weight": torch.ones(48, 4)},
        {},
        r"experts\.0\.w1 is Linear\(32, 24\), but .*lora_B is \[48, 4\]",
    ),
    "other-rank": (lambda found: found, {"r": 5}, r"says rank 5 for .*experts\.0\.w1, but lora_A is \[4, 32\]"),
    "nan": (
        lambda found: {**found, f"{E0}.w2.lora_B.weight": torch.full((32, 4), torch.nan)},
        {},
        r"lora_B of .*experts\.0\.w2 contains NaN",
    ),
    "not-selected": (lambda found: found, {"target_modules": ["w1", "w3"]}, r"does not select .*experts\.0\.w2"),
    "excluded": (lambda found: found, {"exclude_modules": ["experts.1.w1"]}, r"does not select .*experts\.1\.w1"),
    "twice": (
        lambda found: {
            **found,
            **{k.replace("block_sparse_moe", "mlp"): t * 1 for k, t in found.items() if "0.w1" in k},
        },
        {},
        r"several sets of tensors match one weight: model\.layers\.\d\.mlp\.experts\.0\.w1",
    ),
    "fused-too": (
        lambda found: {
            **found,
            "base_model.model.model.layers.0.mlp.experts.lora_A.weight": torch.ones(12, 32),
            "base_model.model.model.layers.0.mlp.experts.lora_B.weight": torch.ones(48, 12),
        },
        {"target_parameters": ["experts.gate_up_proj"]},
        r"several sets of tensors match one weight: model\.layers\.0\.mlp\.experts\.gate_up_proj",
    ),
    "lora-bias": (
        lambda found: {
            **found,
            **{
                key.replace("lora_B.weight", "lora_B.bias"): torch.ones(len(tensor))
                for key, tensor in found.items()
                if "lora_B" in key
            },
        },
        {"lora_bias": True},
        r"lora_bias is not supported for .*experts\.0\.w1: the fused experts have no biases",
    ),
    "router-bias": (
        lambda found: {
            "base_model.model.model.layers.0.mlp.gate.lora_A.weight": torch.ones(4, 32),
            "base_model.model.model.layers.0.mlp.gate.lora_B.weight": torch.ones(3, 4),
            "base_model.model.model.layers.0.mlp.gate.lora_B.bias": torch.ones(3),
        },
        {"lora_bias": True, "target_modules": ["gate"]},
        r"weight of model\.layers\.0\.mlp\.gate is \[3, 32\]; only matrices take lora_A and lora_B and magnitude",
    ),
    "router-of-no-dimension": (
        lambda found: {
            "base_model.model.model.layers.0.mlp.gate.lora_A.weight": torch.ones(4, 32),
            "base_model.model.model.layers.0.mlp.gate.lora_B.weight": torch.tensor(1.0),
        },
        {"target_modules": ["gate"]},
        r"model\.layers\.0\.mlp\.gate is weight \[3, 32\], but lora_A is \[4, 32\] and lora_B is \[\]",
    ),
    "replaced-expert": (
        lambda found: {**found, f"{E0}.w1.weight": torch.ones(24, 32)},
        {"modules_to_save": ["experts.0.w1"]},
        r"there are 1 weights for gate_up_proj of model\.layers\.0\.mlp\.experts; it has 6",
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_tensors_of_experts_that_do_not_fit_are_named(broken: str, tmp_path: Path) -> None:
    family, model = FAMILIES["mixtral"], build("mixtral")
    change, config, message = BROKEN[broken]
    found = cases(family)["all-projections"]
    save(tmp_path, family, model, Case(found.select, {**found.config, **config}))
    file = tmp_path / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    with pytest.raises(AdapterMismatch, match=message):
        load(tmp_path, model)


def test_the_base_model_and_the_adapter_stay_as_they_are(tmp_path: Path) -> None:
    """A slot holds a copy: neither the weights of the model nor replaced weights on the host are changed in place."""
    family, model = FAMILIES["mixtral"], copy.deepcopy(build("mixtral"))
    save(tmp_path, family, model, cases(family)["all-projections"])
    before, expected = copy.deepcopy(model.state_dict()), apply(tmp_path, model)
    adapter = load(tmp_path, model)
    name = "model.layers.0.mlp.experts"
    weights = replace(adapter.modules[name], parameters={"down_proj": before[f"{name}.down_proj"].clone()})
    kept = weights.parameters["down_proj"].clone()
    slots = LoRASlots(model, 1, "cpu")
    slot = slots.activate(replace(adapter, modules={**adapter.modules, name: weights}))
    with slots.state.uniform(slot), torch.inference_mode():
        assert torch.equal(model(input_ids=IDS).logits, expected)
    with slots.state.uniform(None), torch.inference_mode():
        assert torch.equal(model(input_ids=IDS).logits, logits_of(build("mixtral")))
    assert torch.equal(weights.parameters["down_proj"], kept)


def test_names_of_experts_mean_nothing_to_a_dense_model(tmp_path: Path) -> None:
    family, model = FAMILIES["qwen3_moe"], build("qwen3_moe")
    save(tmp_path, family, model, cases(family)["all-projections"])
    dense = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**{**SIZES, "head_dim": 8}))
    with pytest.raises(AdapterMismatch, match="nothing matches a module of this model: 36 tensors"):
        load(tmp_path, dense)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("moe")
    return {name: save_text_model(folder / name, name) for name in ("mixtral", "qwen3_moe")}


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_the_engine_generates_what_the_changed_model_does(
    name: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Alone, in a batch with the base model and another adapter, and after a reload in place."""
    family, model = FAMILIES[name], load_reference(checkpoints[name])
    every = cases(family)
    nets = {
        case: save(tmp_path / case, family, model, every[case], seed)
        for seed, case in enumerate(("all-projections", "router", "attention"))
    }
    options: dict[str, Any] = {"enable_lora": True, "max_logprobs": -1, "max_model_len": 128, "device": "cpu"}
    llm = LLM(str(checkpoints[name]), dtype="float32", max_num_batched_tokens=24, max_loras=3, **options)
    requests = [None, *(LoRARequest(case, 1 + index, str(tmp_path / case)) for index, case in enumerate(nets))]
    with recorded_logits(llm) as logits:
        outputs = llm.generate([PROMPTS[0]] * 4, greedy(prompt_logprobs=0), requests, use_tqdm=False)
    ids = llm.get_tokenizer()(PROMPTS[0]).input_ids
    expected = [continue_greedily(net, ids) for net in (model, *nets.values())]
    assert len({str(found.token_ids) for found in expected}) > 1
    for output, found in zip(outputs, expected, strict=True):
        check_equal(output, logits[output.request_id], found, name)
    net = save(tmp_path / "router", family, model, every["one-expert"], 7)
    reloaded = LoRARequest("router", 2, str(tmp_path / "router"), load_inplace=True)
    with recorded_logits(llm) as logits:
        (output,) = llm.generate([PROMPTS[0]], greedy(prompt_logprobs=0), reloaded, use_tqdm=False)
    check_equal(output, logits[output.request_id], continue_greedily(net, ids), name)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_a_mix_is_the_weighted_sum_of_the_changes(name: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Experts, router, attention and fused experts, where one adapter lacks what another has."""
    family, model = FAMILIES[name], load_reference(checkpoints[name])
    every = cases(family)
    chosen = {"rank-pattern": 0.5, "router": -0.7, "one-expert": 1.3, "attention": 0.4}
    total = copy.deepcopy(model)
    for seed, (case, scale) in enumerate(chosen.items()):
        changed = dict(save(tmp_path / case, family, model, every[case], seed).named_parameters())
        for key, parameter in total.named_parameters():
            parameter += scale * (changed[key] - model.get_parameter(key))
    with_peft(tmp_path / "router", model).save_pretrained(tmp_path / "router")  # in the format of transformers 5
    options: dict[str, Any] = {"enable_lora": True, "max_logprobs": -1, "max_model_len": 128, "device": "cpu"}
    llm = LLM(str(checkpoints[name]), dtype="float32", max_loras=2, **options)
    parts = [
        (LoRARequest(case, 1 + index, str(tmp_path / case)), scale)
        for index, (case, scale) in enumerate(chosen.items())
    ]
    with recorded_logits(llm) as logits:
        outputs = llm.generate([PROMPTS[0]] * 2, greedy(prompt_logprobs=0), [LoRAMix(parts), None], use_tqdm=False)
    ids = llm.get_tokenizer()(PROMPTS[0]).input_ids
    for output, net in zip(outputs, (total, model), strict=True):
        check_equal(output, logits[output.request_id], continue_greedily(net, ids), name)
