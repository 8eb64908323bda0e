"""`PeftConfig` against PEFT's own interpretation of the same keys."""

import dataclasses
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as PeftMapping

from mmlora.errors import AdapterMismatch, AdapterNotFound
from mmlora.lora.loading import peft_config
from mmlora.lora.loading.files import read_adapter
from mmlora.lora.loading.peft_config import PeftConfig

NAME = "model.layers.1.self_attn.q_proj"


def config(**content: Any) -> PeftConfig:
    return PeftConfig.from_dict({"peft_type": "LORA", "r": 4, "lora_alpha": 8, **content})


def test_every_key_of_the_installed_peft_is_classified() -> None:
    assert {field.name for field in dataclasses.fields(LoraConfig)} <= peft_config._KNOWN


def test_a_default_config_of_peft_is_accepted(tmp_path: Path) -> None:
    LoraConfig(r=5, lora_alpha=3, target_modules=["q_proj"]).save_pretrained(tmp_path)
    loaded = PeftConfig.from_dict(json.loads((tmp_path / "adapter_config.json").read_text()))
    assert loaded == PeftConfig(r=5, lora_alpha=3, target_modules=("q_proj",))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layer_replication", [[0, 2]]),
        ("megatron_config", {"x": 1}),
        ("use_qalora", True),
        ("kasa_config", {"beta": 1}),
        ("arrow_config", {"top_k": 3}),
        *(("init_lora_weights", init) for init in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga")),
        ("r", 0),
        ("r", -8),
        ("r", 4.0),
        ("r", True),
        ("lora_alpha", "8"),
        ("lora_alpha", float("nan")),
        ("use_rslora", "yes"),
        ("rank_pattern", [4]),
        ("layers_to_transform", ["1"]),
        ("target_modules", [1]),
        ("bias", "some"),
        ("use_dora", 1),
        ("modules_to_save", "lm_head"),
        ("target_parameters", [1]),
        ("trainable_token_indices", [-1]),
        ("trainable_token_indices", ["a"]),
        ("alora_invocation_tokens", [1.5]),
    ],
    ids=str,
)
def test_unsupported_values_are_refused_with_key_and_value(key: str, value: object) -> None:
    with pytest.raises(AdapterMismatch) as refused:
        config(**{key: value})
    assert key in str(refused.value) and repr(value) in str(refused.value)


OFF = [None, False, 0, 0.0, -0.0, "", [], {}, {"enabled": False, "alpha": 3}, {"enable": False}]
ON = [
    *(True, 1, -1, 1e-9, "none", "false", "0", " ", "0.5", "bfloat16", [0], [None], [False], {"alpha": 0}),
    *(
        {"enabled": True},
        {"enabled": None},
        {"a": {"enabled": False}},
        float("nan"),
        "2026",
        "1.2.3",
        "2026-01-01 or so",
    ),
]


@pytest.mark.parametrize("value", OFF, ids=repr)
def test_an_unknown_feature_that_is_off_is_ignored(value: object) -> None:
    content = {"feature_of_next_year": value, "Another-1": value}
    assert config(**content) == config()
    named = tuple(f"{key}={value!r}" for key in content)
    assert peft_config.ignored_keys({"peft_type": "LORA", "r": 4, "eva_config": value, **content}) == named


@pytest.mark.parametrize("value", ON, ids=repr)
def test_an_unknown_feature_that_is_on_is_refused_by_name(value: object) -> None:
    with pytest.raises(AdapterMismatch) as refused:
        config(feature_of_next_year=value)
    assert f"the key feature_of_next_year={value!r} is unknown" in str(refused.value)
    assert peft_config.ignored_keys({"feature_of_next_year": value}) == ()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("transformers_version", "5.30"),
        ("Unsloth_Version", "2026.1.1"),
        ("version", "1"),
        ("_name_or_path", "/home/x"),
        ("output_dir", "out/run-3"),
        ("torch_dtype", "bfloat16"),
        ("dtype", "float16"),
        ("git_commit", "0a1b2c"),
        ("wandb_url", "https://example.com/run"),
        ("created_at", "last Monday"),
        ("save_timestamp", 1767225600.5),
        ("training_time", 3600),
        ("saved", "2026-11-30"),
        ("saved", "2026-11-30T12:30:01.5+01:00"),
        ("saved", "2026-11-30 12:30:01Z"),
    ],
)
def test_provenance_is_ignored(key: str, value: object) -> None:
    assert config(**{key: value}) == config()
    assert peft_config.ignored_keys({key: value}) == (f"{key}={value!r}",)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("conversion", "x"), ("path_dropout", 0.1), ("version_scale", "2"), ("projection_path", ["a"])),
        *(("transformers_version", 5), ("learning_rate_time_scale", 2.0), ("training_time", True), ("updates", "x")),
    ],
)
def test_keys_that_only_look_like_provenance_are_refused(key: str, value: object) -> None:
    with pytest.raises(AdapterMismatch, match=f"the key {key}="):
        config(**{key: value})


@pytest.mark.parametrize("key", peft_config._UNSUPPORTED)
def test_an_unsupported_feature_may_be_off(key: str) -> None:
    for value in OFF:
        assert config(**{key: value}) == config()
    with pytest.raises(AdapterMismatch, match=f"{key}={{'beta': 0}} is not supported: .*allowed: null, false or empty"):
        config(**{key: {"beta": 0}})


def test_known_features_may_be_off_in_any_spelling() -> None:
    flags = ["use_rslora", "use_dora", "lora_bias", "use_bdlora", "ensure_weight_tying", "init_lora_weights"]
    mappings = ["rank_pattern", "alpha_pattern", "trainable_token_indices"]
    lists = ["modules_to_save", "target_parameters", "alora_invocation_tokens", "layer_replication"]
    for value in (None, False, 0, "", [], {}):
        assert config(**dict.fromkeys([*flags, *mappings, *lists, "bias"], value)) == config()
    assert config(alpha_pattern={"q_proj": 0}).scaling_of("q_proj") == 0


def test_unknown_keys_are_shortened_and_escaped() -> None:
    with pytest.raises(AdapterMismatch) as refused:
        config(**{"a\nb" + "c" * 1000: [1] * 10_000})
    assert len(str(refused.value)) < 300 and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("method", "shown"),
    [
        *((method.value, method.value) for method in PeftType if method is not PeftType.LORA),
        ("BETTER_THAN_LORA", "BETTER_THAN_LORA"),
        ("vera", "vera"),
        (None, "None"),
        ("", "''"),
        ("a\nb", r"'a\nb'"),
        (["LORA"], "['LORA']"),
        ("X" * 1000, "X" * 77 + "..."),
    ],
)
def test_another_method_is_the_only_reason(method: object, shown: str) -> None:
    content = {"a_key_of_the_method": 3, "r": -1, "peft_type": method}
    assert list(peft_config.refusals(content)) == [f"peft_type {shown} is not supported; allowed: LORA"]


@pytest.mark.parametrize("method", ["lora", "Lora"])
def test_the_method_is_upper_case_as_in_peft(method: str) -> None:
    with pytest.raises(KeyError, match=method):
        PeftMapping[method]
    with pytest.raises(AdapterMismatch, match=rf"peft_type {method} is not supported; allowed: LORA \(in upper case\)"):
        config(peft_type=method)


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_bad_patterns_are_named(key: str) -> None:
    with pytest.raises(AdapterMismatch, match=rf"{key} has '\*x'"):
        config(**{key: {"*x": 2}})
    with pytest.raises(AdapterMismatch, match=rf"{key}\['q_proj'\] is"):
        config(**{key: {"q_proj": 0 if key == "rank_pattern" else None}})


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "mica"], ids=str)
def test_initializations_that_keep_the_base_weights_are_accepted(init: object) -> None:
    assert config(init_lora_weights=init).r == 4


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("q_proj", NAME),
        ("proj", NAME),
        ("self_attn.q_proj", NAME),
        ("layers.1.self_attn.q_proj", NAME),
        (r"layers\.[01]\..*", NAME),
        ("^model.layers.1.self_attn.q_proj", NAME),
        ("^layers.1.self_attn.q_proj", NAME),
        ("^q_proj", NAME),
        ("k_proj|q_proj", NAME),
        ("q_proj$", NAME),
        ("q", NAME),
        (NAME, NAME),
        ("lm_head", "lm_head"),
        ("^lm_head", "lm_head"),
    ],
)
def test_patterns_match_as_in_peft(pattern: str, name: str) -> None:
    from peft.utils.other import get_pattern_key

    expected = {pattern: 9}.get(get_pattern_key([pattern], name), 4)
    assert config(rank_pattern={pattern: 9}).rank_of(name) == expected


def test_the_first_pattern_and_the_first_name_decide() -> None:
    patterned = config(rank_pattern={"q_proj": 2, "self_attn.q_proj": 3, "^old.q": 5})
    assert patterned.rank_of(NAME) == 2
    assert patterned.rank_of("old.q", NAME) == 5
    assert patterned.rank_of("other", NAME) == 2


@pytest.mark.parametrize(
    "patterns",
    [
        ("q_proj", "self_attn.q_proj", NAME),
        ("q.proj", "q_proj"),
        ("q_proj", "q.proj"),
        ("roj", "attn.q_proj", ".*"),
        (".*k_proj", "1.self.attn.q_proj", "[kq]_proj"),
        ("[kq]_proj", "q_proj"),
        ("^q_proj", "(q|k)_proj", "q_proj"),
        ("layers.1.self_attn.q_proj", "layers.1", "layers.+q_proj"),
        ("elayers.1.self_attn.q_proj", "model.layers.2.self_attn.q_proj"),
        ("model-layers.1.self_attn.q_proj", "proj", "q-proj"),
    ],
)
def test_the_first_of_plain_and_other_patterns_decides(patterns: tuple[str, ...]) -> None:
    expected = next((i for i, p in enumerate(patterns, 5) if re.fullmatch(rf"(?:.*\.)?(?:{p})", NAME)), 4)
    assert config(rank_pattern={pattern: i for i, pattern in enumerate(patterns, 5)}).rank_of(NAME) == expected


def test_a_pattern_for_each_of_many_experts_takes_no_quadratic_time() -> None:
    names = [f"model.layers.{i}.mlp.experts.{j}.up_proj" for i in range(40) for j in range(100)]
    start = time.monotonic()
    patterned = config(rank_pattern={name: index + 1 for index, name in enumerate(names)})
    assert [patterned.rank_of(name) for name in names] == [index + 1 for index in range(len(names))]
    assert time.monotonic() - start < 60  # it took minutes


def test_scaling_uses_each_modules_own_rank_and_alpha() -> None:
    patterns = {"rank_pattern": {"q_proj": 16}, "alpha_pattern": {"q_proj": 2, "v_proj": 6}}
    assert config(**patterns).scaling_of(NAME) == 2 / 16
    assert config(**patterns).scaling_of("v_proj") == 6 / 4
    assert config(**patterns).scaling_of("k_proj") == 8 / 4
    assert config(**patterns, use_rslora=True).scaling_of(NAME) == 2 / 4


@pytest.mark.parametrize(
    "selection",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["proj"]},
        {"target_modules": r".*layers\.1\..*proj"},
        {"target_modules": "q_proj"},
        {"target_modules": ["q_proj"], "exclude_modules": ["self_attn.q_proj"]},
        {"target_modules": ["q_proj"], "exclude_modules": r".*layers\.0.*"},
        {"target_modules": ["q_proj"], "layers_to_transform": [0]},
        {"target_modules": ["q_proj"], "layers_to_transform": 1},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "blocks"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", [NAME, "model.layers.0.self_attn.q_proj", "q_proj", "blocks.1.experts.0.q_proj"])
def test_selection_is_as_in_peft(selection: dict[str, Any], name: str) -> None:
    from peft.tuners.tuners_utils import check_target_module_exists

    assert config(**selection).selects(name) == bool(check_target_module_exists(LoraConfig(**selection), name))


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    file = tmp_path / "adapter_config.json"
    with pytest.raises(AdapterNotFound, match=re.escape(str(tmp_path))):
        read_adapter(tmp_path)
    for content, named in (("{", "JSON"), ("[1]", "list"), ("[" * 100_000, "JSON")):
        file.write_text(content)
        with pytest.raises(AdapterMismatch, match=named):
            read_adapter(tmp_path)
    with pytest.raises(AdapterMismatch, match="there is no peft_type; allowed: LORA"):
        PeftConfig.from_dict({"r": 4, "a_key": 1})


@pytest.mark.parametrize(
    "content",
    [
        {"rank_pattern": {"(?i)q": 4}},
        {"target_modules": ["q_proj"], "layers_pattern": ["(?i)layers"], "layers_to_transform": [0]},
        {"target_modules": "a{99999999999}"},
        {"target_modules": "(" * 5000 + ")" * 5000},
        {"target_modules": "x" * 200_000},
        {"exclude_modules": "("},
    ],
    ids=lambda content: str(content)[:40],
)
def test_invalid_patterns_are_refused_with_a_short_error(content: dict[str, Any]) -> None:
    with pytest.raises(AdapterMismatch) as refused:
        config(**content)
    assert next(iter(content)) in str(refused.value) or "layers_pattern" in str(refused.value)
    assert len(str(refused.value)) < 1000


def test_catastrophic_backtracking_is_stopped_by_the_time_limit() -> None:
    endless = config(target_modules=r"(?:(?:a|aa)+)+[bc]")
    start_s = time.monotonic()
    with pytest.raises(AdapterMismatch, match="takes more than 1 s"):
        endless.selects("a" * 60)
    assert time.monotonic() - start_s < 10
