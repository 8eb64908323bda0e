"""`EngineArgs`: invalid options are refused by name, all in one message."""

from dataclasses import fields

import pytest
import torch

from mmlora import EngineArgs
from mmlora.errors import ConfigError

WRONG = [
    ("model", ""),
    ("model", 5),
    ("dtype", "int8"),
    ("dtype", torch.int8),
    ("dtype", ["float32"]),
    ("device", "tpu"),
    ("device", None),
    ("seed", "1"),
    ("seed", True),
    ("max_model_len", 0),
    ("max_num_seqs", 0),
    ("max_num_batched_tokens", -1),
    ("max_num_batched_tokens", 1.5),
    ("block_size", 0),
    ("kv_cache_memory_bytes", 0),
    ("encoder_cache_memory_bytes", 0),
    ("gpu_memory_utilization", 0),
    ("gpu_memory_utilization", 1.1),
    ("gpu_memory_utilization", "all"),
    ("max_loras", 0),
    ("max_loras", "8"),
    ("max_lora_rank", 0),
    ("max_cpu_loras", 0),
    ("max_cpu_loras", "9"),
    ("default_mm_loras", ["audio"]),
    ("limit_mm_per_prompt", {"video": 1}),
    ("limit_mm_per_prompt", {"audio": -1}),
    ("limit_mm_per_prompt", {"audio": True}),
    ("limit_mm_per_prompt", ["audio"]),
    ("mm_processor_kwargs", ["dynamic_hd"]),
    ("max_media_bytes", 0),
    ("max_image_pixels", 1.5),
    ("max_audio_seconds", 0),
    ("max_audio_seconds", float("inf")),
    ("max_audio_samples", -1),
    ("max_decoded_media_bytes", None),
    ("media_fetch_timeout", True),
    ("media_fetch_timeout", "1"),
    ("media_cache_memory_bytes", -1),
    ("allowed_local_media_path", "/no/such/directory"),
    ("allowed_local_media_path", 5),
    ("allowed_media_domains", "example.org"),
    ("allowed_media_domains", 5),
    ("allowed_media_domains", ["https://example.org"]),
    ("allowed_media_domains", ["example.org:80"]),
    ("allowed_media_domains", ["a.*.org"]),
    ("allowed_media_networks", ["10.0.0.0/33"]),
    ("allowed_media_networks", [5]),
    ("max_logprobs", -2),
    ("generation_config", "some/path"),
    ("scheduling_policy", "lifo"),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=lambda value: repr(value))
def test_an_invalid_option_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=rf"{name}="):
        EngineArgs(**{"model": "m", name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dtype", "bfloat16"),
        ("dtype", torch.float16),
        ("device", "cuda:1"),
        ("max_model_len", 2048),
        ("max_cpu_loras", 8),
        ("default_mm_loras", {}),
        ("limit_mm_per_prompt", {"audio": 0, "image": 3}),
        ("max_logprobs", -1),
        ("allowed_media_domains", ["*.example.org", "example.org", ""]),
        ("allowed_media_networks", ["10.0.0.0/8", "::1"]),
        ("allowed_local_media_path", "/"),
        ("max_audio_seconds", 1),
        ("media_cache_memory_bytes", 0),
        ("enforce_eager", True),
        ("gpu_memory_utilization", 1),
    ],
    ids=lambda value: repr(value),
)
def test_valid_options_are_accepted(name, value):
    assert getattr(EngineArgs(model="m", **{name: value}), name) == value


def test_all_problems_are_in_one_message():
    with pytest.raises(ConfigError) as error:
        EngineArgs(model="m", max_num_seqs=0, dtype="int8", device="tpu", default_mm_loras=["audio"])
    for name in ("max_num_seqs=0", "dtype='int8'", "device='tpu'", "default_mm_loras="):
        assert name in str(error.value)


def test_default_adapters_need_enable_lora():
    with pytest.raises(ConfigError, match=r"default_mm_loras=.*needs enable_lora=True"):
        EngineArgs(model="m", default_mm_loras={"audio": "p"}, enable_lora=False)
    assert EngineArgs(model="m", default_mm_loras={"audio": "p"}, enable_lora=True).default_mm_loras == {"audio": "p"}


@pytest.mark.parametrize(
    ("given", "seqs", "tokens", "slots", "host"),
    [
        ({}, 64, 2048, 8, 32),
        ({"max_cpu_loras": 2}, 64, 2048, 2, 2),
        ({"max_cpu_loras": 1}, 64, 2048, 1, 1),
        ({"max_cpu_loras": 20}, 64, 2048, 8, 20),
        ({"max_loras": 12}, 64, 2048, 12, 48),
        ({"max_loras": 3, "max_cpu_loras": 3}, 64, 2048, 3, 3),
        ({"max_num_seqs": 5000}, 5000, 5000, 8, 32),
        ({"max_num_batched_tokens": 24}, 24, 24, 8, 32),
        ({"max_num_batched_tokens": 100}, 64, 100, 8, 32),
        ({"max_num_seqs": 3, "max_num_batched_tokens": 3}, 3, 3, 8, 32),
    ],
    ids=str,
)
def test_defaults_follow_the_options_that_are_given(given, seqs, tokens, slots, host):
    args = EngineArgs("m", **given)
    assert (args.num_seqs, args.num_batched_tokens, args.num_slots, args.num_host_loras) == (seqs, tokens, slots, host)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_cpu_loras": 2, "max_loras": 3}, "max_cpu_loras=2: must be at least max_loras=3"),
        ({"max_num_batched_tokens": 8, "max_num_seqs": 9}, "max_num_batched_tokens=8: must be at least max_num_seqs=9"),
    ],
    ids=str,
)
def test_options_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        EngineArgs("m", **options)


@pytest.mark.parametrize(
    "option", [{"default_mm_loras": "auto"}, {"default_mm_loras": {"audio": "p"}}, {"lora_registry": "f"}]
)
def test_options_that_name_adapters_enable_lora_unless_it_is_off(option):
    assert EngineArgs("m", **option).uses_lora and not EngineArgs("m", max_loras=2).uses_lora
    with pytest.raises(ConfigError, match="needs enable_lora=True"):
        EngineArgs("m", enable_lora=False, **option)


def test_an_unknown_option_is_refused_with_the_allowed_ones():
    with pytest.raises(ConfigError, match=r"unknown option\(s\) max_lora, no_such; allowed: .*max_loras"):
        EngineArgs.from_kwargs("m", no_such=4, max_lora=2)


@pytest.mark.parametrize(
    ("name", "only", "other"),
    [("tensor_parallel_size", 1, 2), ("trust_remote_code", False, True), ("quantization", None, "awq")],
)
def test_options_of_other_engines_are_accepted_at_their_only_value(name: str, only: object, other: object) -> None:
    assert EngineArgs.from_kwargs("m", **{name: only}) == EngineArgs("m")
    with pytest.raises(ConfigError, match=rf"{name}={other!r}: {only!r} is the only supported value"):
        EngineArgs.from_kwargs("m", **{name: other})
    assert name not in {option.name for option in fields(EngineArgs)}
    with pytest.raises(ConfigError) as refusal:
        EngineArgs.from_kwargs("m", **{name: other, "max_loras": 0})
    assert len(refusal.value.problems) == 2


def test_private_names_cannot_be_passed():
    with pytest.raises(ConfigError, match="_problems"):
        EngineArgs.from_kwargs("m", _problems=[])


def test_the_number_of_host_adapters_defaults_to_four_per_slot():
    assert EngineArgs(model="m", max_loras=3).num_host_loras == 12
    assert EngineArgs(model="m", max_loras=3, max_cpu_loras=5).num_host_loras == 5


def test_clients_use_the_served_name():
    assert EngineArgs(model="m").model_name == "m"
    assert EngineArgs(model="m", served_model_name="assistant").model_name == "assistant"
