"""`mmlora serve`: flags, environment, option file, the bundled assistant, and one message per problem."""

from __future__ import annotations

import dataclasses
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from mmlora.assets.models import assistant_default_mm_loras, assistant_path
from mmlora.cli import commands as cli
from mmlora.cli.options import ENV_PREFIX, flags_of
from mmlora.config import EngineArgs
from mmlora.server.args import LoRAModule, ServerArgs
from mmlora.server.http.listener import listen_tcp
from tests.checkpoints import AdapterSpec, save_adapter, save_text_model
from tests.server_process import run_serve

Served = tuple[EngineArgs, ServerArgs]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Served]:
    """Run `mmlora serve` until it would load the model, and return the parsed options."""
    for name in os.environ:
        if name.startswith(ENV_PREFIX):
            monkeypatch.delenv(name)

    def run(*arguments: str) -> Served:
        calls: list[Served] = []
        monkeypatch.setattr("mmlora.server.launch.serve", lambda *args: calls.append(args))
        assert cli.main(["serve", *arguments]) == 0
        return calls[0]

    return run


def message_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the single error line of a refused command."""
    try:
        code: object = cli.main(["serve", *arguments])
    except SystemExit as exit_:
        code = exit_.code
    (line,) = lines_of(capsys, code)
    return line


def lines_of(capsys: pytest.CaptureFixture[str], code: object) -> list[str]:
    """Return the error lines of a refused command."""
    assert code == 2
    return [line for line in capsys.readouterr().err.splitlines() if "error: " in line]


def test_lists_take_several_values(
    served: Callable[..., Served], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    networks = ["--allowed-media-networks", "10.0.0.0/8", "--allowed-media-networks", "::1"]
    engine, _ = served("m", "--allowed-media-domains", "a.example", "*.b.example", *networks)
    assert engine.allowed_media_domains == ["a.example", "*.b.example"]
    assert engine.allowed_media_networks == ["10.0.0.0/8", "::1"]
    assert served("m", "--allowed-media-domains", "")[0].allowed_media_domains == [""]
    file = tmp_path / "options.yaml"
    file.write_text("allowed-media-domains: [a.example, b.example]\nallowed-media-networks: 10.0.0.0/8\n")
    engine, _ = served("m", "--config", str(file))
    assert engine.allowed_media_domains == ["a.example", "b.example"]
    assert engine.allowed_media_networks == ["10.0.0.0/8"]
    monkeypatch.setenv("MMLORA_ALLOWED_MEDIA_DOMAINS", "a.example")
    assert served("m")[0].allowed_media_domains == ["a.example"]


def test_flags_of_the_reference_document(served: Callable[..., Served]) -> None:
    engine, server = served(
        *("some/model", "--max-model-len", "2048", "--enable-lora", "--max-lora-rank", "64", "--max_loras=3"),
        *("--default-mm-loras", '{"audio": "some/adapter"}', "--limit-mm-per-prompt", '{"audio": 1}'),
        *("--no-enable-prefix-caching", "--no-enable-tower-connector-lora", "--served-model-name", "m"),
        *("--host", "0.0.0.0", "--port", "80", "--dtype", "float32", "--kv-cache-memory-bytes", "1000"),
        *("--lora-modules", "a=path=x", '{"name": "b", "path": "p", "base_model_name": "c"}'),
    )
    expected = EngineArgs(
        model="some/model",
        max_model_len=2048,
        enable_lora=True,
        max_lora_rank=64,
        max_loras=3,
        default_mm_loras={"audio": "some/adapter"},
        limit_mm_per_prompt={"audio": 1},
        enable_prefix_caching=False,
        enable_tower_connector_lora=False,
        served_model_name="m",
        dtype="float32",
        kv_cache_memory_bytes=1000,
    )
    assert engine == expected
    assert (server.host, server.port) == ("0.0.0.0", 80)
    assert server.lora_modules == [LoRAModule("a", "path=x"), LoRAModule("b", "p", "c")]


def test_without_a_model_the_bundled_assistant_is_served(served: Callable[..., Served]) -> None:
    engine, server = served()
    assert (engine.model, engine.model_name, engine.enable_lora) == (assistant_path(), "assistant", True)
    assert engine.default_mm_loras == assistant_default_mm_loras()
    assert [module.name for module in server.lora_modules] == ["spanish-lora"]

    engine, server = served("--no-enable-lora")
    assert (engine.enable_lora, engine.default_mm_loras, server.lora_modules) == (False, None, ())
    assert served("--default-mm-loras", "{}")[0].default_mm_loras == {}


def test_adapters_that_are_named_enable_lora(served: Callable[..., Served]) -> None:
    assert served("m", "--lora-modules", "a=b")[0].uses_lora
    assert served("m", "--default-mm-loras", '{"audio": "a"}')[0].uses_lora
    assert not served("m", "--max-cpu-loras", "2")[0].uses_lora
    assert not served("m", "--no-enable-lora", "--lora-modules", "a=b")[0].uses_lora, "refused when they are loaded"
    engine, server = served("--max-cpu-loras", "2")
    assert (engine.num_slots, engine.num_host_loras, len(server.lora_modules)) == (2, 2, 1)


def test_command_line_wins_over_environment(served: Callable[..., Served], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMLORA_MAX_LORAS", "5")
    monkeypatch.setenv("MMLORA_SEED", "6")
    monkeypatch.setenv("MMLORA_ENABLE_LORA", "TRUE")
    monkeypatch.setenv("MMLORA_ENABLE_PREFIX_CACHING", "0")
    monkeypatch.setenv("MMLORA_API_KEY", "secret")
    monkeypatch.setenv("MMLORA_LORA_MODULES", "a=b c=d")
    engine, server = served("model", "--max-loras", "7", "--enable-prefix-caching")
    assert (engine.max_loras, engine.seed, engine.enable_lora, engine.enable_prefix_caching) == (7, 6, True, True)
    assert server.api_key == "secret"
    assert [module.name for module in server.lora_modules] == ["a", "c"]


def test_adapters_may_come_in_several_flags_and_as_json_in_the_environment(
    served: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, server = served("model", "--lora-modules", "a=b", "c=d", "--lora-modules", "e=f")
    assert [module.name for module in server.lora_modules] == ["a", "c", "e"]
    entries = 'a=b {"name": "c", "path": "d e", "base_model_name": null} f=g'
    monkeypatch.setenv("MMLORA_LORA_MODULES", entries)
    _, server = served("model")
    assert server.lora_modules == [LoRAModule("a", "b"), LoRAModule("c", "d e"), LoRAModule("f", "g")]


def test_the_model_may_come_from_the_environment(
    served: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMLORA_MODEL", "theirs")
    assert served()[0].model == "theirs" and served("mine")[0].model == "mine"


def test_a_file_provides_options_that_are_not_set_elsewhere(
    served: Callable[..., Served], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(
        "model: theirs\nmax-loras: 3\nseed: 4\nmax_num_seqs: 5\nenable-lora: true\ngpu-memory-utilization: 1\n"
        "default-mm-loras: {audio: some/where}\nlimit_mm_per_prompt: '{\"image\": 2}'\n"
        "lora-modules:\n  - a=b\n  - {name: c, path: d}\n"
    )
    monkeypatch.setenv("MMLORA_SEED", "6")
    engine, server = served("--config", str(file), "--max-loras", "7")
    assert (engine.model, engine.max_loras, engine.seed, engine.max_num_seqs) == ("theirs", 7, 6, 5)
    assert (engine.enable_lora, engine.gpu_memory_utilization) == (True, 1.0)
    assert (engine.default_mm_loras, engine.limit_mm_per_prompt) == ({"audio": "some/where"}, {"image": 2})
    assert server.lora_modules == [LoRAModule("a", "b"), LoRAModule("c", "d")]
    monkeypatch.setenv("MMLORA_CONFIG", str(file))
    assert served("mine")[0].model == "mine" and served()[0].max_loras == 3


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (
            "max-lorass: 3\nseed: x\nport: [1]\n",
            ["max-lorass: unknown option; did you mean max-loras?", "seed: ", "port: [1] is not"],
        ),
        ("enable-lora: 3\n", ["enable-lora: "]),
        ("api-key:\n", ["api-key: None is not allowed"]),
        ("default-mm-loras: [audio]\n", ["default-mm-loras: ['audio'] is not allowed"]),
        ("max-loras: 3\nmax_loras: 4\n", ["max_loras: duplicate option"]),
        ("- a\n", ["holds a list; it must map options to values"]),
        ("a: [", ["cannot be read"]),
        ("a: !!python/object/apply:os.getcwd []", ["cannot be read"]),
    ],
)
def test_all_problems_of_a_file_are_reported(
    text: str, named: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(text)
    lines = lines_of(capsys, cli.main(["serve", "--config", str(file)]))
    assert len(lines) == len(named)
    assert all(part in line for part, line in zip(named, lines, strict=True)), lines


def test_every_option_has_a_flag_and_a_help_text() -> None:
    flags = [*flags_of(EngineArgs), *flags_of(ServerArgs)]
    names = {f.name for cls in (EngineArgs, ServerArgs) for f in dataclasses.fields(cls)} - {"model"}
    assert {flag.name for flag in flags} == names
    assert not [flag.name for flag in flags if not flag.help.partition(" (default:")[0]]
    defaults = {flag.name: flag.help.partition(" (default: ")[2] for flag in flags}
    expected = {
        "port": "8000)",
        "block_size": "16)",
        "allowed_methods": "*)",
        "max_loras": "",
        "log_requests": "off)",
        "uds": "",
        "root_path": "",
    }
    assert {name: defaults[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--no-such-option"], "--no-such-option"),
        (["--max-lora", "3"], "--max-lora"),
        (["--max-loras", "three"], "'three'"),
        (["--max-loras", "0"], "max_loras=0"),
        (["--default-mm-loras", "{"], "not JSON"),
        (["--default-mm-loras", '{"a":' * 10**5], "not JSON"),
        (["--api-key", "[" * 10**5], "not JSON"),
        (["--lora-modules", '{"a":' * 10**5], "not JSON"),
        (["--default-mm-loras", "[]"], "JSON object"),
        (["m", "--no-enable-lora", "--default-mm-loras", '{"audio": "x"}'], "needs enable_lora=True"),
        (["--lora-modules", "nameonly"], "name=path"),
        (["--lora-modules", '{"name": "a"}'], "a name and a path"),
        (["--lora-modules", '{"name": "a", "path": "b", "rank": 3}'], "base_model_name"),
        (["--lora-modules", "[1]"], "name=path"),
        (["--api-key", " "], "api_key is empty"),
        (["--port", "70000"], "port=70000"),
        (["--uvicorn-log-level", "loud"], "'loud'"),
        (["--log-format", "xml"], "text, json"),
        (["--dtype", "int3"], "int3"),
        (["--request-timeout", "0"], "request_timeout=0: must be a positive number of seconds"),
        (["--body-timeout", "nan"], "body_timeout=nan"),
        (["--max-queued-requests", "-1"], "max_queued_requests=-1"),
        (["--max-connections", "0"], "max_connections=0"),
        (["--api-key", "a", "--api-key", ""], "api_key is empty"),
        (["--api-key", "[]"], "api_key is empty"),
        (["--api-key", "[1]"], "must be a list of strings"),
        (["--allow-credentials"], "allow_credentials=True: needs allowed_origins"),
        (["--allowed-origins", "*", "--allow-credentials"], "needs explicit origins"),
        (["--allowed-methods", "GET"], "needs allowed_origins"),
        (["--uds", "s", "--port", "80"], "leave them out"),
        (["--root-path", "llm"], "must begin with a slash"),
        (["--ssl-cert-reqs", "3"], "must be 0, 1 or 2"),
        (["--ssl-certfile", "c", "--ssl-cert-reqs", "2"], "needs ssl_ca_certs"),
        (["m", "--served-model-name", "x", "x"], "several different ones"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_option_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], text: str
) -> None:
    assert text in message_of(capsys, *arguments)


def test_all_problems_are_reported_at_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("max-num-seq: 3\nblock-size: 0\n")
    monkeypatch.setenv("MMLORA_MAX_LORAS", "many")
    arguments = ["some/model", "--max-lora", "3", "--hots=x", "stray", "--port", "70000", "--dtype", "int3"]
    arguments += ["--seed", "x", "--ssl-keyfile", "key", "--default-mm-loras", "[]", "--config", str(file)]
    lines = lines_of(capsys, cli.main(["serve", *arguments]))
    reported = [
        "--max-lora: unknown option; did you mean --max-loras?",
        "--hots: unknown option; did you mean --host?",
        "'stray': unexpected argument",
        "max-num-seq: unknown option; did you mean max-num-seqs?",
        "--seed='x': must be an integer",
        "MMLORA_MAX_LORAS='many': must be an integer",
        "--default-mm-loras='[]': must be a JSON object",
        "dtype='int3'",
        "block_size=0",
        "port=70000",
        "ssl_keyfile='key': needs ssl_certfile",
    ]
    assert all(any(part in line for line in lines) for part in reported), lines
    assert len(lines) == len(reported)
    assert all(line.startswith("mmlora serve: error: ") for line in lines)


def test_options_of_several_values(
    served: Callable[..., Served], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine, server = served("m", "--api-key", "a", "b,c", "--api-key", "d", "--served-model-name", "x", "y")
    assert (server.api_keys, engine.model_names) == (("a", "b,c", "d"), ("x", "y"))
    origins = '["https://a.example", "https://b.example"]'
    _, server = served("m", "--allowed-origins", origins, "--allowed-methods", "GET", "POST")
    assert server.allowed_origins == ["https://a.example", "https://b.example"]
    assert server.allowed_methods == ["GET", "POST"]
    monkeypatch.setenv("MMLORA_API_KEY", "e, f")
    assert served("m")[1].api_keys == ("e", "f")
    monkeypatch.setenv("MMLORA_API_KEY", '["g,h", "i"]')
    assert served("m")[1].api_keys == ("g,h", "i")
    monkeypatch.delenv("MMLORA_API_KEY")
    (tmp_path / "options.yaml").write_text("api-key: [j, 5]\nserved-model-name: z\n")
    engine, server = served("m", "--config", str(tmp_path / "options.yaml"))
    assert (server.api_keys, engine.model_name) == (("j", "5"), "z")


def test_api_keys_are_not_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--api-key=***: not JSON" in message_of(capsys, "m", "--api-key", "[secret")
    monkeypatch.setenv("MMLORA_API_KEY", '["secret", 5]')
    message = message_of(capsys, "m")
    assert "MMLORA_API_KEY=***: must be a list of strings" in message and "secret" not in message


def test_a_list_does_not_swallow_the_model(capsys: pytest.CaptureFixture[str], served: Callable[..., Served]) -> None:
    assert "--served-model-name: its last value may be meant as MODEL" in message_of(
        capsys, "--served-model-name", "m", "some/model"
    )
    assert served("--api-key", "a", "--api-key", "b")[1].api_keys == ("a", "b")


def test_the_help_has_a_group_for_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    for cls in (EngineArgs, ServerArgs):
        listed = [name for names in cls.GROUPS.values() for name in names.split()]
        flags = {flag.name for flag in flags_of(cls)}
        assert sorted(listed) == sorted(flags), "each option is in one group"
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    page = capsys.readouterr().out
    titles = [line.removesuffix(":") for line in page.splitlines() if line.endswith(":") and line[0] != " "]
    of_server = ["network", "security", "server limits", "logging"]
    assert titles[2:] == [*of_server, "LoRA", "tools", "model", "media", "memory", "scheduling"]
    assert "--request-timeout SECONDS" in page and page.startswith("usage: mmlora serve [MODEL] [OPTION ...]\n")


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"], ["doctor", "--help"]], ids=" ".join)
def test_the_help_does_not_wait_for_torch(arguments: list[str]) -> None:
    code = f"""
import sys
from mmlora.cli import main
try:
    main({arguments!r})
finally:
    print(sorted({{"torch", "transformers", "librosa", "fastapi"}} & set(sys.modules)))
"""
    page = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True).stdout
    assert page.startswith("usage: mmlora") and page.splitlines()[-1] == "[]"


def test_a_bad_environment_variable_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("MMLORA_ENABLE_LORA", "yes")
        assert "MMLORA_ENABLE_LORA='yes'" in message_of(capsys)
    monkeypatch.setenv("MMLORA_LORA_MODULES", '{"name": "a"')
    message = message_of(capsys)
    assert "MMLORA_LORA_MODULES=" in message and "not JSON" in message


@pytest.fixture(scope="module")
def models(tiny_phi4: Path, tiny_adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A multimodal model, a text model, and an adapter of each."""
    folder = tmp_path_factory.mktemp("models")
    llama = save_text_model(folder / "llama", "llama")
    other = save_adapter(llama, folder / "other", AdapterSpec(("q_proj",), seed=1))
    paths = {"phi4": tiny_phi4, "llama": llama, "speech": tiny_adapters["everything"], "other": other}
    return {name: str(path) for name, path in paths.items()}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["{phi4}", "--enable-lora", "--max-lora-rank", "8", "--lora-modules", "a={speech}"], "rank"),
        (["{phi4}", "--enable-lora", "--lora-modules", "a={other}"], "q_proj"),
        (["{phi4}", "--enable-lora", "--lora-modules", "a=b/no-such-adapter"], "no-such-adapter"),
        (["{phi4}", "--no-enable-lora", "--lora-modules", "a={speech}"], "needs enable_lora=True"),
        (["{phi4}", "--enable-lora", "--default-mm-loras", '{{"video": "{speech}"}}'], "must be one of audio, image"),
        (["{llama}", "--enable-lora", "--default-mm-loras", '{{"audio": "{speech}"}}'], "takes text only"),
        (
            [
                "{phi4}",
                "--enable-lora",
                "--default-mm-loras",
                '{{"audio": "{speech}"}}',
                "--lora-modules",
                "audio={speech}",
            ],
            "'audio' is taken",
        ),
        (
            [
                "{phi4}",
                "--enable-lora",
                "--default-mm-loras",
                '{{"audio": "{speech}"}}',
                "--served-model-name",
                "audio",
            ],
            "served_model_name='audio' is the key of a default adapter",
        ),
        (["{phi4}", "--enable-lora", "--lora-modules", "a={speech}", "a={speech}"], "'a' is taken"),
        (["{phi4}", "--chat-template", "no-such-file.jinja"], "no-such-file.jinja"),
        (["/no/such/model"], "/no/such/model"),
    ],
)
def test_a_problem_found_when_loading_the_model_is_one_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    models: dict[str, str],
    arguments: list[str],
    text: str,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    filled = [argument.format(**models) for argument in arguments]
    assert text in message_of(capsys, *filled, "--port", "0", "--device", "cpu")


def test_a_port_in_use_is_reported_before_the_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        assert "in use" in message_of(capsys, "/no/such/model", "--port", str(listener.getsockname()[1]))


def test_a_listening_port_is_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    with listen_tcp("127.0.0.1", 0) as listener:
        assert "in use" in message_of(capsys, "/no/such/model", "--port", str(listener.getsockname()[1]))


def test_the_process_reports_when_it_is_ready_and_stops_on_a_signal(models: dict[str, str]) -> None:
    with run_serve(models["phi4"], "--served-model-name", "m", "--device", "cpu") as server:
        assert server.line.startswith("mmlora is ready: http://127.0.0.1:") and server.line.endswith("serves m\n")
        assert httpx.get(f"{server.address}/v1/models", timeout=30).json()["data"][0]["id"] == "m"
        assert server.stop(signal.SIGINT)[0] == 0


def test_inspecting_downloads_no_weights(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fetched: list[tuple[str, list[str]]] = []

    def download(model: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        fetched.append((model, allow_patterns))
        return models["phi4"]

    monkeypatch.setattr("mmlora.models.loader.snapshot_download", download)
    assert cli.main(["inspect", models["speech"], "--model", "org/no-such-directory"]) == 0, capsys.readouterr().err
    assert fetched == [("org/no-such-directory", ["*.json"])]


@pytest.mark.parametrize(
    "error", [RuntimeError("boom"), RecursionError("deep"), MemoryError("all"), OverflowError("far")], ids=repr
)
def test_a_file_that_makes_a_library_fail_is_one_line(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("mmlora.cli.doctor.inspect_adapter", fail)
    assert cli.main(["inspect", models["speech"], "--model", models["phi4"]]) == 2
    message = f"cannot be inspected for model '{models['phi4']}': {type(error).__name__}: {error}"
    assert capsys.readouterr().err.splitlines()[-1].endswith(message)


def test_a_report_that_the_terminal_cannot_encode_is_one_line(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = shutil.copytree(models["speech"], tmp_path / "Ärger")
    with io.TextIOWrapper(io.BytesIO(), encoding="ascii") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        assert cli.main(["inspect", str(adapter), "--model", models["phi4"]]) == 2
    assert "UnicodeEncodeError" in capsys.readouterr().err
