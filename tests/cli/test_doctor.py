"""`mmlora doctor`: its report agrees with what loading does, and it reads no weights."""

import json
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from mmlora import LLM
from mmlora.cli import commands as cli
from mmlora.config import EngineArgs
from mmlora.models.weights import read_headers
from tests.checkpoints import save_text_model
from tests.models.test_refused_models import HOSTILE, REFUSED, save_config

CPU = ["--device", "cpu"]


@pytest.fixture(scope="module")
def phi4(tiny_phi4: Path, tiny_adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory like Microsoft's, with two default adapters and one for no modality."""
    path = Path(shutil.copytree(tiny_phi4, tmp_path_factory.mktemp("doctor") / "phi4"))
    for name in ("speech-lora", "vision-lora", "more/spanish-lora"):
        shutil.copytree(tiny_adapters["a"], path / name)
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text_model(tmp_path_factory.mktemp("doctor") / "llama", "llama")


def doctor(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any]:
    capsys.readouterr()
    code = cli.main(["doctor", "--json", *CPU, *map(str, arguments)])
    return code, json.loads(capsys.readouterr().out)


def without_weights(path: Path, folder: Path) -> Path:
    """Return a copy whose weights are a header and sparse files; 8 GiB of them are of a module that the model lacks."""
    copy = Path(shutil.copytree(path, folder / "sparse"))
    file = copy / "model.safetensors"
    whole = file.read_bytes()
    header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    end = max(tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__")
    header["v_head.weight"] = {"dtype": "F16", "shape": [2**32], "data_offsets": [end, end + 2**33]}
    encoded = json.dumps(header).encode()
    with file.open("wb") as content:
        content.write(len(encoded).to_bytes(8, "little") + encoded)
        content.truncate(8 + len(encoded) + end + 2**33)
    return copy


def test_all_facts_without_reading_weights(phi4: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = without_weights(phi4, tmp_path)
    code, found = doctor(capsys, path, "--max-model-len", 100)
    assert code == 0 and found["problem"] is None
    assert (found["model_class"], found["family"]) == ("Phi4MultimodalForCausalLM", "Phi-4-multimodal")
    assert "logits within" in found["proof"]
    assert found["modalities"] == ["audio", "image"] and min(found["parts"].values()) > 0
    assert found["adapters"] == {
        "more/spanish-lora": [],
        "speech-lora": ["audio"],
        "vision-lora": ["image", "audio+image"],
    }
    stored = doctor(capsys, phi4)[1]["stored_bytes"]
    assert found["stored_bytes"] == {**stored, "F16": 2**33} and sum(stored.values()) > 0
    assert (found["context_length"], found["max_model_len"]) == (512, 100)


def test_memory_equals_that_of_the_engine(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for dtype in ("float32", "bfloat16"):
        _, found = doctor(capsys, llama, "--dtype", dtype, "--max-model-len", 64)
        llm = LLM(str(llama), dtype=dtype, max_model_len=64, max_num_seqs=1, device="cpu", enable_lora=True)
        engine = llm.llm_engine
        assert found["weight_bytes"] == sum(p.nbytes for p in engine.runner.model.parameters())
        cache = engine.runner.kv_cache
        num_tokens = engine.block_manager.num_blocks * engine.args.block_size
        assert found["kv_token_bytes"] * num_tokens == cache.keys.nbytes + cache.values.nbytes
        assert found["kv_bytes"] == 64 * found["kv_token_bytes"]
        assert found["stored_bytes"] == {"F32": sum(p.numel() * 4 for p in engine.runner.model.parameters())}


def test_the_command_can_be_pasted(
    phi4: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, found = doctor(capsys, phi4, "--max-model-len", 100, "--dtype", "bfloat16")
    served: list[EngineArgs] = []
    monkeypatch.setattr("mmlora.server.launch.serve", lambda engine, _: served.append(engine))
    program, *arguments = shlex.split(found["command"])
    assert program == "mmlora" and cli.main(arguments) == 0
    speech, vision = str(phi4 / "speech-lora"), str(phi4 / "vision-lora")
    assert served == [
        EngineArgs(
            str(phi4),
            max_model_len=100,
            dtype="bfloat16",
            device="cpu",
            enable_lora=True,
            default_mm_loras={"audio": speech, "image": vision, "audio+image": vision},
        )
    ]
    assert served[0].default_mm_loras == found["default_mm_loras"]


def test_the_page(phi4: Path, llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", str(phi4), *CPU]) == 0
    page = capsys.readouterr().out
    assert page.startswith(f"{phi4} can be served\n")
    assert "text, audio, image" in page and "speech-lora (for audio), vision-lora (for image, audio+image)" in page
    assert cli.main(["doctor", str(llama), *CPU, "--max-model-len", "513"]) == 2
    page = capsys.readouterr().out
    assert page.startswith(
        f"{llama} CANNOT be served\n  reason: max_model_len=513 exceeds this model's limit of 512 tokens"
    )
    assert "none in the directory" in page and "mmlora serve" not in page


def messages(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[str, str]:
    """Return the messages of `doctor` and `serve` about a model that cannot be served."""
    assert cli.main(["doctor", "--json", *map(str, arguments), *CPU]) == 2
    out, err = capsys.readouterr()
    reported = json.loads(out)["problem"] if out else err.strip().removeprefix("mmlora doctor: error: ")
    assert cli.main(["serve", *map(str, arguments), *CPU, "--port", "0"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return reported, line.removeprefix("mmlora serve: error: ")


@pytest.mark.parametrize("case", REFUSED)
def test_refused_configurations_get_the_message_of_loading(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reported, served = messages(capsys, save_config(tmp_path, REFUSED[case][0]()))
    assert reported == served


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_configurations_get_the_message_of_loading(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_config(tmp_path, HOSTILE[case])
    reported, served = messages(capsys, path)
    assert reported == served
    cli.main(["doctor", str(path)])
    assert all(line.isprintable() for text in capsys.readouterr() for line in text.splitlines())


@pytest.mark.parametrize("option", [("--max-model-len", 513), ("--kv-cache-memory-bytes", 100)], ids=str)
def test_options_get_the_message_of_loading(
    option: tuple[object, ...], llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reported, served = messages(capsys, llama, *option)
    assert reported == served


def test_a_missing_tokenizer_gets_the_message_of_loading(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(shutil.copytree(llama, tmp_path / "llama"))
    for file in path.glob("tokenizer*"):
        file.unlink()
    reported, served = messages(capsys, path)
    assert reported == served and "tokenizer=" in reported


def test_a_broken_processor_gets_the_message_of_loading(
    phi4: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(shutil.copytree(phi4, tmp_path / "phi4"))
    for content in ("{", "[1]", "[" * 100_000):
        (path / "preprocessor_config.json").write_text(content)
        reported, served = messages(capsys, path)
        assert reported == served and "processor" in reported


@pytest.mark.parametrize("content", [None, b"", b"\xff" * 100, b"cut"], ids=["none", "empty", "noise", "cut"])
def test_weights_that_cannot_be_loaded(
    content: bytes | None, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(shutil.copytree(llama, tmp_path / "llama"))
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").unlink()
    if content is not None:
        (path / "model.safetensors").write_bytes(whole[:-9] if content == b"cut" else content)
    reported, served = messages(capsys, path)
    start = f"the weights of {str(path)!r} cannot be loaded"
    assert reported.startswith(start) and served.startswith(start)


def test_tensors_that_do_not_fit_get_the_message_of_loading(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(shutil.copytree(llama, tmp_path / "llama"))
    file = path / "model.safetensors"
    save_file({f"_orig_mod.{name}": tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    reported, served = messages(capsys, path)
    assert reported == served and "have '_orig_mod.' in their names" in reported


def test_shards(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(shutil.copytree(llama, tmp_path / "llama"))
    (path / "model.safetensors").rename(path / "model-00001-of-00001.safetensors")
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "model-00001-of-00001.safetensors"}}))
    assert doctor(capsys, path)[1]["stored_bytes"] == doctor(capsys, llama)[1]["stored_bytes"]
    index.write_text(json.dumps({"weight_map": {"w": "../llama/secret.safetensors"}}))
    assert "outside the directory" in doctor(capsys, path)[1]["problem"]


def test_directory_names_are_escaped(phi4: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(shutil.copytree(phi4, tmp_path / "phi4"))
    shutil.copytree(path / "speech-lora", path / "\x1b[2J\nforged")
    for options in ([], ["--json"]):
        assert cli.main(["doctor", str(path), *CPU, *options]) == 0
        page = capsys.readouterr().out
        assert "\x1b" not in page and "\nforged" not in page and "forged" in page


def test_for_a_hub_id_only_configurations_and_headers_are_downloaded(
    phi4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    snapshot = Path(shutil.copytree(phi4, tmp_path / "snapshot"))
    headers = read_headers(str(phi4), None, phi4)
    for file in snapshot.rglob("*.safetensors"):
        file.unlink()
    fetched: list[object] = []

    def download(model: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        fetched.append((model, revision, "*.safetensors" in allow_patterns))
        return str(snapshot)

    def metadata(model: str, *, revision: str | None) -> SimpleNamespace:
        fetched.append((model, revision))
        tensors = {
            name: SimpleNamespace(dtype="BF16", shape=list(tensor.shape), data_offsets=(10, 40))
            for name, tensor in headers.items()
        }
        return SimpleNamespace(files_metadata={"model.safetensors": SimpleNamespace(tensors=tensors)})

    monkeypatch.setattr("mmlora.models.loader.snapshot_download", download)
    monkeypatch.setattr("mmlora.models.weights.get_safetensors_metadata", metadata)
    code, found = doctor(capsys, "org/phi4", "--revision", "v1")
    assert code == 0 and fetched == [("org/phi4", "v1", False), ("org/phi4", "v1")]
    assert found["stored_bytes"] == {"BF16": 30 * len(headers)}
    assert found["default_mm_loras"]["audio"] == "org/phi4/speech-lora@v1"
    assert "--revision v1" in found["command"]
    monkeypatch.setattr("mmlora.models.weights.get_safetensors_metadata", lambda *_, **__: 1 / 0)
    code, found = doctor(capsys, "org/phi4")
    assert code == 2 and "the Hub does not provide their headers" in found["problem"]
