"""vLLM's documented Granite Speech example, offline and on the command line, with only names changed."""

import base64
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from openai import OpenAI
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from mmlora import LLM, SamplingParams
from mmlora.assets.audio import AudioAsset
from tests.checkpoints import save_adapter
from tests.equality import check_equal, greedy, recorded_logits
from tests.families.reference import FamilyReference
from tests.families.table import FAMILIES, adapter_of, save_family
from tests.reference import NUM_TOKENS, Media
from tests.server_process import run_serve

QUESTION = "can you transcribe the speech into a written format?"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save_family(tmp_path_factory.mktemp("granite") / "plain", "granite_speech")
    return save_adapter(path, path.parent / "lora", adapter_of("granite_speech", seed=9, r=2))


@pytest.fixture(scope="module")
def reference(adapter: Path) -> FamilyReference:
    return FamilyReference(adapter.parent / "plain", FAMILIES["granite_speech"])


@pytest.fixture(scope="module")
def model_id(adapter: Path) -> str:
    """A model with its adapter in the same directory and keys without PEFT's prefix, like the published one."""
    path = Path(shutil.copytree(adapter.parent / "plain", adapter.parent / "granite-speech-3.3-2b"))
    for file in adapter.iterdir():
        shutil.copy(file, path)
    weights = path / "adapter_model.safetensors"
    save_file({key.removeprefix("base_model.model."): t for key, t in load_file(weights).items()}, weights)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "has_lora_adapter": True}))
    return str(path)


def test_offline(model_id: str, adapter: Path, reference: FamilyReference) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_id)

    def get_prompt(question: str, has_audio: bool) -> str:
        if has_audio:
            question = f"<|audio|>{question}"
        chat = [
            {"role": "user", "content": question},
        ]
        return str(tokenizer.apply_chat_template(chat, tokenize=False))

    llm = LLM(
        model=model_id,
        enable_lora=True,
        max_lora_rank=64,
        max_model_len=2048,
        limit_mm_per_prompt={"audio": 1},
        default_mm_loras={"audio": model_id},
        enforce_eager=True,
    )
    prompt_with_audio = get_prompt(question=QUESTION, has_audio=True)
    audio = AudioAsset("mary_had_lamb").audio_and_sample_rate
    inputs = {"prompt": prompt_with_audio, "multi_modal_data": {"audio": audio}}
    outputs = llm.generate(inputs, sampling_params=SamplingParams(temperature=0.2, max_tokens=64), use_tqdm=False)
    assert outputs[0].error is None and outputs[0].lora.reason == "default:audio"

    text = {"prompt": get_prompt(question=QUESTION, has_audio=False)}
    for prompt, media, path in ((inputs, Media(audios=[audio]), adapter), (text, Media(), None)):
        with recorded_logits(llm) as logits:
            (output,) = llm.generate(prompt, greedy(), use_tqdm=False)
        expected = reference.generate(prompt["prompt"], media, path)
        check_equal(output, logits[output.request_id], expected, prompt["prompt"])
        assert output.lora.reason == ("default:audio" if media.audios else "none")


@contextmanager
def serve(*arguments: str) -> Iterator[OpenAI]:
    with (
        run_serve(*arguments) as server,
        OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


@pytest.mark.parametrize("defaults", ["as documented", "auto"])
def test_command(defaults: str, model_id: str, adapter: Path, reference: FamilyReference) -> None:
    flag = json.dumps({"audio": model_id}) if defaults == "as documented" else "auto"
    options = ("--max-model-len", "2048", "--enable-lora", "--default-mm-loras", flag, "--max-lora-rank", "64")
    asset = AudioAsset("mary_had_lamb")
    data = base64.b64encode(asset.path.read_bytes()).decode()
    part = {"type": "input_audio", "input_audio": {"data": data, "format": "flac"}}
    with serve(model_id, *options) as client:
        for parts, media, path in (([part], Media(audios=[asset.audio_and_sample_rate]), adapter), ([], Media(), None)):
            answer = client.chat.completions.create(
                model=model_id,
                messages=[{"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]}],  # type: ignore[misc,list-item]
                temperature=0,
                max_tokens=NUM_TOKENS,
                extra_body={"ignore_eos": True},
            )
            prompt = f"<|user|>{'<|audio|>' if parts else ''}{QUESTION}<|end|><|assistant|>"
            expected = reference.generate(prompt, media, path)
            assert answer.choices[0].message.content == reference.tokenizer.decode(
                expected.token_ids, skip_special_tokens=True
            )
            assert answer.to_dict()["lora"]["reason"] == ("default:audio" if parts else "none")  # type: ignore[index,call-overload]
