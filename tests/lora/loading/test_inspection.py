"""`mmlora inspect`: report on an adapter from its files and the model's configuration, without model weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mmlora.cli import commands as cli
from tests.checkpoints import PHI4_ADAPTERS, AdapterSpec, save_adapter, save_phi4, save_text_model


@pytest.fixture(scope="module")
def phi4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory without weights, so that reading them would fail."""
    path = save_phi4(tmp_path_factory.mktemp("inspect") / "phi4")
    for name in PHI4_ADAPTERS:
        save_adapter(path, path.parent / name, PHI4_ADAPTERS[name])
    for file in path.glob("*.safetensors"):
        file.unlink()
    return path


def inspect(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any]:
    code = cli.main(["inspect", "--json", *map(str, arguments)])
    return code, json.loads(capsys.readouterr().out)


def test_parts_ranks_and_bytes(phi4: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = inspect(capsys, phi4.parent / "everything", "--model", phi4)
    assert code == 0 and found["refusals"] == [] and found["unmatched"] == []
    assert all(0 < part["changed"] <= part["modules"] for part in found["parts"].values())
    assert found["max_rank"] == 11 and found["ranks"]["11"] == 3 and found["kinds"]["dora"] == 0
    assert found["num_bytes"] > 0 and len(found["digest"]) == 64
    _, text_only = inspect(capsys, phi4.parent / "text", "--model", phi4)
    assert text_only["parts"]["vision_tower"]["changed"] == 0 < text_only["parts"]["language_model"]["changed"]


def test_the_digest_equals_the_engines(phi4_checkpoint: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from mmlora import LLM, LoRARequest

    path = phi4_checkpoint.adapters["everything"]
    _, found = inspect(capsys, path, "--model", phi4_checkpoint.path)
    llm = LLM(str(phi4_checkpoint.path), enable_lora=True, max_model_len=64, device="cpu")
    (output,) = llm.generate("a", lora_request=LoRARequest("x", 1, str(path)), use_tqdm=False)
    assert output.lora.digest == found["digest"]


def test_every_reason_is_reported(phi4: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_text_model(tmp_path / "llama", "llama")
    path = save_adapter(model, tmp_path / "a", AdapterSpec(("q_proj",), 1))
    code, found = inspect(capsys, path, "--model", phi4)
    assert code == 1 and found["digest"] is None
    assert "nothing matches a module of this model" in found["refusals"][0]
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, "use_qalora": True, "brand_new": 1}))
    code, found = inspect(capsys, path, "--model", model)
    assert code == 1 and len(found["refusals"]) == 2
    assert "use_qalora=True" in found["refusals"][0] and "brand_new=1 is unknown" in found["refusals"][1]
    assert cli.main(["inspect", str(path), "--model", str(model)]) == 1
    page = capsys.readouterr().out
    assert "REFUSED" in page and "use_qalora" in page and "brand_new" in page


def test_unreadable_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(tmp_path)]) == 2
    assert "adapter_config.json" in capsys.readouterr().err


def test_control_characters_of_a_file_are_escaped(
    tmp_path: Path, phi4: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(shutil.copytree(phi4.parent / "text", tmp_path / "hostile"))
    config = json.loads((path / "adapter_config.json").read_text())
    hostile = {"base_model_name_or_path": "\x1b[2J\nforged: line \ud800", "\ud800\x07": 1}
    (path / "adapter_config.json").write_text(json.dumps({**config, **hostile}))
    for options in ([], ["--json"]):
        assert cli.main(["inspect", str(path), "--model", str(phi4), *options]) == 1
        page = capsys.readouterr().out
        assert "\x1b" not in page and "\x07" not in page and "\nforged" not in page


def test_ignored_keys_of_the_configuration_are_listed(
    tmp_path: Path, phi4: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(shutil.copytree(phi4.parent / "text", tmp_path / "a"))
    config = json.loads((path / "adapter_config.json").read_text())
    notes = {"next_feature": {}, "transformers_version": "5.30\n"}
    (path / "adapter_config.json").write_text(json.dumps({**config, **notes}))
    code, found = inspect(capsys, path, "--model", phi4)
    assert code == 0 and found["ignored"] == ["next_feature={}", r"transformers_version='5.30\n'"]
    assert cli.main(["inspect", str(path), "--model", str(phi4)]) == 0
    assert "ignored: unknown key next_feature={}" in capsys.readouterr().out
    (path / "adapter_config.json").write_text(json.dumps({**config, **notes, "peft_type": "VERA"}))
    code, found = inspect(capsys, path, "--model", phi4)
    assert code == 1 and found["ignored"] == []
    assert found["refusals"] == ["peft_type VERA is not supported; allowed: LORA"]
