"""Command lines written for vLLM: units, dotted flags, and options that change nothing here."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmlora import EngineArgs, cli
from mmlora.cli.arguments import normalize, parse_int, parse_value
from mmlora.cli.options import vllm_flags
from mmlora.errors import ConfigError
from mmlora.utils.vllm_options import SHORT_FLAGS, VLLM_OPTIONS, remove_vllm_options
from tests.cli.test_cli import Served, lines_of, message_of, served

__all__ = ["served"]  # the fixture


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4096", 4096),
        ("-1", -1),
        ("4k", 4000),
        ("4K", 4096),
        ("25.6k", 25600),
        ("0.5k", 500),
        ("1.001k", 1001),
        ("2m", 2_000_000),
        ("1M", 2**20),
        ("3g", 3 * 10**9),
        ("2G", 2**31),
        ("1t", 10**12),
        ("1T", 2**40),
        (" 8k ", 8000),
    ],
)
def test_integers_may_have_a_unit(text: str, value: int) -> None:
    assert parse_int(text) == value


@pytest.mark.parametrize("text", ["", "k", "4.5K", "1.0005k", "4kb", "4 k", "1e3", "0x10", "-4k", "four", "4.0", "inf"])
def test_other_integers_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be an integer"):
        parse_int(text)


def test_untyped_values() -> None:
    texts = ["1", "0.5", "true", '{"a": [1]}', "none", "None", "null", "mp", "nan?", "a/b"]
    assert [parse_value(text) for text in texts] == [1, 0.5, True, {"a": [1]}, None, None, None, "mp", "nan?", "a/b"]


JSON = {"--limit-mm-per-prompt", "--mm-processor-kwargs", "--default-mm-loras"}


@pytest.mark.parametrize(
    ("arguments", "option", "value"),
    [
        ("--limit-mm-per-prompt.image 2", "--limit-mm-per-prompt", {"image": 2}),
        (
            "--limit_mm_per_prompt.image=2 --limit-mm-per-prompt.audio 0",
            "--limit-mm-per-prompt",
            {"image": 2, "audio": 0},
        ),
        ("--default-mm-loras.audio+image a/b@c", "--default-mm-loras", {"audio+image": "a/b@c"}),
        ("--mm-processor-kwargs.num_crops 4", "--mm-processor-kwargs", {"num_crops": 4}),
        (
            "--mm-processor-kwargs.a.b 1.5 --mm-processor-kwargs.a.c=true",
            "--mm-processor-kwargs",
            {"a": {"b": 1.5, "c": True}},
        ),
        ("--mm-processor-kwargs.a+ 1 --mm-processor-kwargs.a+=x,2", "--mm-processor-kwargs", {"a": [1, "x", 2]}),
    ],
)
def test_dotted_flags_become_one_json_object(arguments: str, option: str, value: Any) -> None:
    *rest, last = normalize(["serve", "m", *arguments.split(), "--max_loras=3"], JSON)
    assert rest == ["serve", "m", "--max-loras=3"]
    assert last.partition("=")[0] == option and json.loads(last.partition("=")[2]) == value


def test_other_arguments_stay_as_they_are() -> None:
    arguments = [
        "serve",
        "a_b.c",
        "--lora-modules",
        "x_y=./p.q",
        "--api-key=k_1.2=",
        "-tp",
        "1",
        "--seed",
        "-1",
        "--x.y",
        "z",
    ]
    assert normalize(arguments, JSON) == arguments


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("--limit-mm-per-prompt.image", "a value must follow"),
        ("--limit-mm-per-prompt.image 1 --limit-mm-per-prompt {}", "not both"),
        ("--mm-processor-kwargs.a 1 --mm-processor-kwargs.a.b 2", "'a' has another value"),
        ("--mm-processor-kwargs.a 1 --mm-processor-kwargs.a+ 2", "'a' has another value"),
    ],
)
def test_dotted_flags_that_cannot_be_combined_are_refused(arguments: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        normalize(arguments.split(), JSON)


def test_a_command_line_of_vllm(served: Callable[..., Served], caplog: pytest.LogCaptureFixture) -> None:
    """Everyday flags, half of them without an effect here, one of them a switch before MODEL."""
    engine, server = served(
        *("--disable-log-requests", "some/model", "-tp", "1", "-pp=1", "--max-model-len", "25.6k"),
        *("--max-num-batched-tokens", "4K", "--swap-space", "4", "--load-format", "safetensors", "-q", "none"),
        *("--kv-cache-dtype", "auto", "--lora-dtype=auto", "--pipeline-parallel-size", "1", "--no-trust-remote-code"),
        *("--enable-chunked-prefill", "--distributed-executor-backend", "mp", "--fully-sharded-loras", "-O3"),
        *("--tokenizer_mode", "auto", "--compilation-config.level", "3", "--speculative-config", "null"),
        *("--limit-mm-per-prompt.image", "2", "--limit-mm-per-prompt.video", "0", "--generation-config", "vllm"),
        *("--default-mm-loras.audio", "some/adapter", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
        *("--uvicorn-log-level", "warning", "--gpu-memory-utilization", "0.5", "--enforce-eager", "--block-size", "32"),
        *("--chat-template-content-format", "auto", "--no-enable-prefix-caching", "--max-seq-len-to-capture", "8192"),
    )
    assert engine == EngineArgs(
        model="some/model",
        max_model_len=25600,
        max_num_batched_tokens=4096,
        limit_mm_per_prompt={"image": 2, "video": 0},
        generation_config="none",
        default_mm_loras={"audio": "some/adapter"},
        gpu_memory_utilization=0.5,
        enforce_eager=True,
        block_size=32,
        enable_prefix_caching=False,
    )
    assert (server.tool_call_parser, server.uvicorn_log_level) == ("hermes", "warning")
    (line,) = [record.getMessage() for record in caplog.records if "ignored options" in record.getMessage()]
    ignored = "disable_log_requests tensor_parallel_size swap_space load_format trust_remote_code compilation_config"
    assert all(f"{name} (" in line for name in ignored.split()) and "max_model_len" not in line


def test_no_line_without_options_of_vllm(served: Callable[..., Served], caplog: pytest.LogCaptureFixture) -> None:
    served("m")
    assert "ignored" not in caplog.text


@pytest.mark.parametrize("value", ["auto", "-1"])
def test_the_length_may_be_automatic(served: Callable[..., Served], value: str, tmp_path: Path) -> None:
    assert served("m", "--max-model-len", value)[0].max_model_len is None
    file = tmp_path / "options.yaml"
    file.write_text(f"max-model-len: {value}\nswap-space: 4\ndisable_log_requests: true\n")
    assert served("m", "--config", str(file))[0].max_model_len is None


def test_doctor_reads_the_same_spellings(capsys: pytest.CaptureFixture[str]) -> None:
    for value, context in (("1K", "1024"), ("auto", "2048"), ("1.5k", "1500")):
        assert cli.main(["doctor", "--device", "cpu", "--max_model_len", value]) == 0
        assert f"{context} of 2048 tokens" in capsys.readouterr().out


def test_the_model_may_be_an_option(served: Callable[..., Served], capsys: pytest.CaptureFixture[str]) -> None:
    assert served("--model", "a/b", "--api-key", "x", "y")[0].model == "a/b"
    assert served("a/b", "--model=a/b")[0].model == "a/b"
    assert "--model c/d: another MODEL is given: a/b" in message_of(capsys, "a/b", "--model", "c/d")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["-tp", "2"], "tensor_parallel_size=2: 1 is the only supported value; one process serves one device"),
        (["--quantization", "awq"], "quantization='awq': None is the only"),
        (["--trust-remote-code"], "trust_remote_code=True: False is the only supported value; code of checkpoints is"),
        (
            ["--load-format", "gguf"],
            "load_format='gguf': 'auto', 'hf' and 'safetensors' are the only supported values; weights are read",
        ),
        (["--kv-cache-dtype", "fp8"], "kv_cache_dtype='fp8'"),
        (["--speculative-config", '{"model": "x"}'], "speculative_config={'model': 'x'}: None is the only"),
        (["--hf-overrides.a.b", "1"], "hf_overrides={'a': {'b': 1}}"),
        (["--hf-token", "hf_secret"], "hf_token=***: "),
        (["--download-dir", "/data"], "set HF_HUB_CACHE in the environment"),
        (["--max-model-len", "4.5K"], "--max-model-len='4.5K': must be an integer, optionally with a unit"),
    ],
)
def test_values_that_would_change_something_are_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], text: str
) -> None:
    message = message_of(capsys, "m", *arguments)
    assert text in message and "hf_secret" not in message


def test_all_problems_with_options_of_vllm_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(["serve", "m", "-tp", "4", "--quantization", "awq", "--max-loras", "0", "--no-such"])
    assert [line.split(": ")[2].split("=")[0] for line in lines_of(capsys, code)] == [
        "--no-such",
        "tensor_parallel_size",
        "quantization",
        "max_loras",
    ]


def test_every_option_of_vllm_can_be_ignored_and_says_why() -> None:
    assert all(option.reason and option.accepts(None) for option in VLLM_OPTIONS.values())
    assert set(SHORT_FLAGS) <= set(VLLM_OPTIONS) and len({flag.option for flag in vllm_flags()}) == len(VLLM_OPTIONS)
    for name, option in VLLM_OPTIONS.items():
        values = [True, False] if option.is_switch else ["x", 7]
        accepted = [option.accepts(value) for value in values]
        assert accepted == ([True, True] if option.allowed is None else [False, option.is_switch]), name


def test_arguments_of_an_llm_for_vllm(caplog: pytest.LogCaptureFixture) -> None:
    options = {
        "tensor_parallel_size": 1,
        "swap_space": 4,
        "trust_remote_code": False,
        "hf_overrides": {},
        "max_loras": 2,
    }
    with caplog.at_level(logging.WARNING):
        assert EngineArgs.from_kwargs("m", **options, max_model_len=-1) == EngineArgs("m", max_loras=2)
    (record,) = caplog.records
    assert "swap_space (there is no swap space" in record.getMessage() and "max_loras" not in record.getMessage()
    with pytest.raises(ConfigError) as caught:
        EngineArgs.from_kwargs("m", tensor_parallel_size=2, cpu_offload_gb=3, max_loras=0)
    assert [problem.split("=")[0] for problem in caught.value.problems] == [
        "tensor_parallel_size",
        "cpu_offload_gb",
        "max_loras",
    ]


def test_unhashable_values_of_other_options_pass() -> None:
    assert remove_vllm_options({"default_mm_loras": {"audio": "x"}})[0] == {"default_mm_loras": {"audio": "x"}}
