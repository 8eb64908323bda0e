"""A processor that does not fit the model's towers is refused at load, and no client's media are blamed for it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mmlora import LLM, SamplingParams
from mmlora.cli import commands as cli
from mmlora.errors import ConfigError
from mmlora.towers.general import GeneralTowers
from tests.families.table import save_family
from tests.media import picture

PROCESSOR, PARTS = "processor_config.json", "preprocessor_config.json"
WRONG = {
    "patch_size": ("llava", PROCESSOR, {"patch_size": 14}, "blank image has 4 placeholders.*returned 16 embeddings"),
    "strategy": (
        "llava",
        PROCESSOR,
        {"vision_feature_select_strategy": "full"},
        "blank image has 17 placeholders .*pixel_values .1, 3, 28, 28.*returned 16 embeddings for 17 placeholders; "
        "settings of the processor: patch_size=7, vision_feature_select_strategy='full', num_additional_image_tokens=1",
    ),
    "class token": ("llava", PROCESSOR, {"num_additional_image_tokens": 0}, "blank image has 15 placeholders"),
    "size": (
        "llava",
        PARTS,
        {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}},
        r"does not fit its image tower: .*pixel_values \[1, 3, 56, 56\], but Input image size",
    ),
    "token": (
        "llava",
        PROCESSOR,
        {"image_token": "<picture>"},
        "image_token='<picture>', which the tokenizer lacks",
    ),
    "crops": ("llava_next", PARTS, {"image_grid_pinpoints": [[28, 84]]}, "does not fit its image tower"),
    "image_seq_length": ("gemma3", PROCESSOR, {"image_seq_length": 24}, "returned 25 embeddings for 24 placeholders"),
    "crop of InternVL": ("internvl", PROCESSOR, {"image_seq_length": 5}, "embeddings for 5 placeholders"),
    "crop of Idefics3": ("idefics3", PROCESSOR, {"image_seq_len": 9}, "returned 20 embeddings for 45 placeholders"),
    "merge_size": ("qwen2_vl", PARTS, {"merge_size": 1}, "does not fit its image tower"),
    "patches of Qwen": ("qwen2_5_vl", PARTS, {"patch_size": 14}, "does not fit its image tower"),
    "prefix": ("paligemma", PARTS, {"image_seq_length": 9}, "returned 16 embeddings for 9 placeholders"),
    "audio_token": ("qwen2_audio", PROCESSOR, {"audio_token": "<|end|>"}, "cannot process blank audio"),
    "mel bins": ("qwen2_audio", PARTS, {"feature_size": 128}, "does not fit its audio tower"),
    "mel bins of Voxtral": ("voxtral", PARTS, {"feature_size": 40}, "does not fit its audio tower"),
}


def load(path: Path, **options: Any) -> LLM:
    return LLM(str(path), device="cpu", dtype="float32", max_model_len=256, **options)


def change(path: Path, file: str, changes: dict[str, Any]) -> None:
    (path / file).write_text(json.dumps({**json.loads((path / file).read_text()), **changes}))


@pytest.mark.parametrize("case", WRONG)
def test_settings_that_do_not_fit_are_refused(case: str, tmp_path: Path) -> None:
    family, file, changes, message = WRONG[case]
    path = save_family(tmp_path / "model", family)
    change(path, file, changes)
    with pytest.raises(ConfigError, match=message):
        load(path)


def test_a_checkpoint_without_settings_gives_the_same_tokens(tmp_path: Path) -> None:
    path = save_family(tmp_path / "model", "llava")
    prompt = {"prompt": "<|image|>hello", "multi_modal_data": {"image": picture(40, 30, 1)}}
    greedy = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    expected = load(path).generate(prompt, greedy, use_tqdm=False)[0].outputs[0].token_ids
    (path / PROCESSOR).write_text(json.dumps({"processor_class": "LlavaProcessor"}))
    assert load(path).generate(prompt, greedy, use_tqdm=False)[0].outputs[0].token_ids == expected


def test_options_of_all_requests_are_checked_at_load(tmp_path: Path) -> None:
    path = save_family(tmp_path / "model", "idefics3")
    with pytest.raises(ConfigError, match="cannot process blank image: unknown processor option do_magic"):
        load(path, mm_processor_kwargs={"do_magic": True})
    options = {"do_image_splitting": False}
    prompt = {"prompt": "<image>", "multi_modal_data": {"image": Image.new("RGB", (50, 40))}}
    llm, plain = load(path, mm_processor_kwargs=options), load(path)
    params = SamplingParams(max_tokens=1)
    lengths = [len(one.generate(prompt, params, use_tqdm=False)[0].prompt_token_ids) for one in (llm, plain)]
    assert lengths[0] < lengths[1]


def test_doctor_and_serve_refuse_a_processor_that_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_family(tmp_path / "model", "llava")
    change(path, PROCESSOR, {"image_token": "<|end|>"})
    reason = "cannot process blank image: the image is too small or too short for a single embedding"
    for command in ("doctor", "serve"):
        assert cli.main([command, str(path), "--device", "cpu"]) == 2
        assert reason in "".join(capsys.readouterr())


def test_doctor_compares_the_numbers_without_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_family(tmp_path / "model", "gemma3")
    change(path, PROCESSOR, {"image_seq_length": 24})
    for command in ("doctor", "serve"):
        assert cli.main([command, str(path), "--device", "cpu"]) == 2
        reason = "the tower returned 25 embeddings for 24 placeholders; settings of the processor: "
        assert reason in "".join(capsys.readouterr())


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_towers_are_run_with_weights_only_where_they_depend_on_values(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = []
    encode = GeneralTowers.encode

    def counted(towers: Any, *arguments: Any) -> Any:
        devices.append(towers.model.device.type)
        return encode(towers, *arguments)

    monkeypatch.setattr(GeneralTowers, "encode", counted)
    load(save_family(tmp_path / "model", family))
    assert devices == (["meta"] if family == "llava" else ["meta", "cpu"])


def test_a_tower_that_runs_out_of_memory_is_not_a_wrong_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(GeneralTowers, "encode", fail)
    with pytest.raises(torch.OutOfMemoryError):
        load(save_family(tmp_path / "model", "llava"))
