"""Adapters for modalities in a model's directory are found; `auto` applies them, otherwise the log suggests them."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from transformers import GraniteSpeechConfig, LlamaConfig

from mmlora import LLM, AsyncLLM, SamplingParams
from mmlora.assets.models import assistant_default_mm_loras, assistant_path
from mmlora.cli import commands as cli
from mmlora.cli.options import parse_options
from mmlora.config import EngineArgs
from mmlora.errors import ConfigError
from mmlora.models.config import load_config
from mmlora.models.default_adapters import find_default_adapters
from mmlora.models.loader import MODEL_FILES
from mmlora.server.launch import load_served_models
from tests.checkpoints import phi4_config, save_adapter
from tests.families.table import adapter_of, save_family

PARAMS = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
CLIP = (np.sin(np.arange(6000) / 15).astype(np.float32), 16000)
SPOKEN = {"prompt": "<|audio|>what?", "multi_modal_data": {"audio": CLIP}}
BOTH = {
    "prompt": "<|audio|><|image|>?",
    "multi_modal_data": {"audio": CLIP, "image": [Image.new("RGB", (42, 42), "blue")]},
}
OPTIONS: dict[str, Any] = {"enable_lora": True, "max_loras": 1, "max_model_len": 256, "device": "cpu"}
SUGGESTION = "found adapters for audio, image, audio+image in the model directory; --default-mm-loras auto applies them"


@pytest.fixture(scope="module")
def phi4(tiny_phi4: Path, tiny_adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory like Microsoft's, with a third adapter that is not for a modality."""
    path = Path(shutil.copytree(tiny_phi4, tmp_path_factory.mktemp("auto") / "phi4"))
    for name, adapter in (("speech-lora", "a"), ("vision-lora", "b"), ("spanish-lora", "c")):
        shutil.copytree(tiny_adapters[adapter], path / name)
    return path


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record for record in caplog.records if record.name == "mmlora.models.default_adapters"]
    assert all(record.levelno == logging.WARNING for record in found)
    return [record.getMessage() for record in found]


def test_folders_of_phi4_are_found(tmp_path: Path) -> None:
    assert find_default_adapters(phi4_config(), tmp_path) == {}
    for name in ("speech-lora", "vision-lora", "other-lora"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").touch()
    speech, vision = str(tmp_path / "speech-lora"), str(tmp_path / "vision-lora")
    assert find_default_adapters(phi4_config(), tmp_path) == {"audio": speech, "image": vision, "audio+image": vision}
    (tmp_path / "vision-lora" / "adapter_config.json").unlink()
    assert find_default_adapters(phi4_config(), tmp_path) == {"audio": speech}


def test_the_adapter_of_granite_speech_is_found_if_its_configuration_declares_it(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").touch()
    assert find_default_adapters(GraniteSpeechConfig(has_lora_adapter=True), tmp_path) == {"audio": str(tmp_path)}
    assert find_default_adapters(GraniteSpeechConfig(has_lora_adapter=False), tmp_path) == {}
    assert find_default_adapters(LlamaConfig(), tmp_path) == {}, "an adapter without a modality"


def test_adapters_of_the_bundled_assistant_are_found() -> None:
    path = Path(assistant_path())
    assert find_default_adapters(load_config(path), path) == assistant_default_mm_loras()


def test_the_files_of_adapters_in_subfolders_are_downloaded() -> None:
    files = [
        f"{folder}/adapter_{name}" for folder in ("a-lora", "b/c") for name in ("config.json", "model.safetensors")
    ]
    assert list(filter_repo_objects(files, allow_patterns=MODEL_FILES)) == files


def test_auto_applies_and_logs_them(phi4: Path, caplog: pytest.LogCaptureFixture) -> None:
    llm = LLM(str(phi4), default_mm_loras="auto", **OPTIONS)
    (message,) = messages(caplog)
    assert message.startswith("default_mm_loras=auto: audio uses ") and str(phi4 / "vision-lora") in message
    outputs = llm.generate([SPOKEN, BOTH, "text"], PARAMS, use_tqdm=False)
    assert [output.lora.reason for output in outputs] == ["default:audio", "default:audio+image", "none"]
    given = {key: str(phi4 / f"{name}-lora") for key, name in (("audio", "speech"), ("audio+image", "vision"))}
    expected = LLM(str(phi4), default_mm_loras=given, **OPTIONS).generate([SPOKEN, BOTH], PARAMS, use_tqdm=False)
    for output, wanted in zip(outputs, expected, strict=False):
        assert output.outputs[0].token_ids == wanted.outputs[0].token_ids
        assert output.lora.digest == wanted.lora.digest is not None


def test_auto_accepts_a_model_without_adapters(tiny_phi4: Path, caplog: pytest.LogCaptureFixture) -> None:
    llm = LLM(str(tiny_phi4), default_mm_loras="auto", **OPTIONS)
    assert messages(caplog) == [f"default_mm_loras=auto: {tiny_phi4} has no adapters for modalities"]
    (output,) = llm.generate(SPOKEN, PARAMS, use_tqdm=False)
    assert output.lora.reason == "none"


def test_without_the_option_they_are_suggested(phi4: Path, tiny_phi4: Path, caplog: pytest.LogCaptureFixture) -> None:
    llm = LLM(str(phi4), **OPTIONS)
    assert messages(caplog) == [SUGGESTION] and llm.llm_engine.default_loras == {}
    caplog.clear()
    LLM(str(phi4), default_mm_loras={}, **OPTIONS)  # explicitly none
    LLM(str(phi4), **{**OPTIONS, "enable_lora": False})
    LLM(str(tiny_phi4), **OPTIONS)
    assert messages(caplog) == []


def test_the_server_lists_and_names_them(phi4: Path) -> None:
    llm = AsyncLLM(EngineArgs(str(phi4), default_mm_loras="auto", served_model_name="m", **OPTIONS))
    try:
        assert load_served_models(llm).names == ["m", "audio", "image", "audio+image"]
    finally:
        llm.shutdown()


def test_a_granite_speech_directory_is_its_own_adapter(tmp_path: Path) -> None:
    path = save_family(tmp_path / "granite", "granite_speech")
    adapter = save_adapter(path, tmp_path / "adapter", adapter_of("granite_speech", seed=1, r=2))
    for file in adapter.glob("adapter_*"):
        shutil.copy(file, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "has_lora_adapter": True}))
    llm = LLM(str(path), default_mm_loras="auto", **OPTIONS)
    (output,) = llm.generate({"prompt": "<|audio|>?", "multi_modal_data": {"audio": CLIP}}, PARAMS, use_tqdm=False)
    assert output.lora.reason == "default:audio" and output.lora_request.lora_path == str(path)


@pytest.mark.parametrize(("value", "reason"), [("always", "or be 'auto'"), (["audio"], "or be 'auto'")])
def test_other_values_are_refused(value: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        EngineArgs("m", enable_lora=True, default_mm_loras=value)
    with pytest.raises(ConfigError, match="default_mm_loras='auto': needs enable_lora=True"):
        EngineArgs("m", enable_lora=False, default_mm_loras="auto")


def test_auto_on_the_command_line_and_in_the_environment(capsys: pytest.CaptureFixture[str]) -> None:
    options = {"model": "m", "enable_lora": True}
    engine, *_ = parse_options(options, {"MMLORA_DEFAULT_MM_LORAS": "auto"})
    assert engine.default_mm_loras == "auto"
    engine, *_ = parse_options({**options, "default_mm_loras": "auto"}, {"MMLORA_DEFAULT_MM_LORAS": "{}"})
    assert engine.default_mm_loras == "auto"
    assert cli.main(["serve", "m", "--enable-lora", "--default-mm-loras", "always"]) == 2
    assert "auto is also allowed" in capsys.readouterr().err


def test_serve_prints_the_suggestion_at_its_start(
    phi4: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("mmlora.server.http.server.HTTPServer.run", lambda *_, **__: None)
    assert cli.main(["serve", str(phi4), "--enable-lora", "--port", "0", "--device", "cpu"]) == 0
    assert messages(caplog) == [SUGGESTION]
