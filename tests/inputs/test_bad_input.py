"""Bad input, offline: each is refused with an error that names the problem, and the engine keeps serving."""

import base64
import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mmlora import LLM, LoRARequest, SamplingParams
from mmlora.errors import AdapterError, AdapterMismatch, AdapterNotFound, ConfigError, MediaError, RequestError
from tests.checkpoints import AdapterSpec, save_adapter, save_text_model

PARAMS = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
AUDIO = (np.sin(np.arange(6000) / 15).astype(np.float32), 16000)
IMAGE = Image.new("RGB", (42, 42), "green")


@pytest.fixture(scope="module")
def llm(tiny_phi4):
    return LLM(str(tiny_phi4), enable_lora=True, max_loras=1, max_lora_rank=8, max_model_len=256)


@pytest.fixture
def serves_on(llm, tiny_adapters):
    """Check, after the bad request, that the engine serves good ones and has freed everything."""
    good = ["hello", {"prompt": "<|audio|><|image|>", "multi_modal_data": {"audio": AUDIO, "image": IMAGE}}]
    lora = LoRARequest("good", 1, str(tiny_adapters["a"]))
    before = llm.generate(good, PARAMS, lora, use_tqdm=False)
    yield
    after = llm.generate(good, PARAMS, lora, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in after] == [o.outputs[0].token_ids for o in before]
    engine = llm.llm_engine
    assert not engine.has_unfinished_requests
    assert engine.block_manager.num_free_blocks == engine.block_manager.num_blocks
    assert engine.slots.num_users(0) == 0


def png(size=(80, 60)):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def with_image(content, prompt="<|image|>x"):
    return {"prompt": prompt, "multi_modal_data": {"image": content}}


def with_audio(content, prompt="<|audio|>x"):
    return {"prompt": prompt, "multi_modal_data": {"audio": content}}


MEDIA = {
    "truncated PNG": (with_image(png()[:3000]), r"cannot decode the PNG image of 60x80 px: .*truncated"),
    "0-byte audio": (with_audio(b""), "0 bytes"),
    "no samples": (with_audio((np.zeros(0, np.float32), 16000)), "sample"),
    "text as image": (with_image(b"dear picture,\nthis is a letter"), "text beginning with 'dear picture"),
    "audio as image": (with_image(AUDIO), "is audio, but image was expected"),
    "image as audio": (with_audio(png()), "is image, but audio was expected"),
    "array without a rate": (with_audio(AUDIO[0]), r"\(array, sample_rate\)"),
    "path": (with_image("picture.png"), "media content is a str"),
    "a clip of 1 ms": (with_audio((AUDIO[0][:16], 16000)), "too short"),
    "NaN samples": (with_audio((np.full(6000, np.nan, np.float32), 16000)), "finite|NaN"),
    "more items than placeholders": (
        with_image([IMAGE, IMAGE]),
        r"1 image placeholder\(s\) '<\|image\|>' but 2 image item\(s\)",
    ),
    "fewer items than placeholders": (
        with_image([IMAGE], "<|image|><|image|>"),
        r"2 image placeholder\(s\) '<\|image\|>' but 1 image item\(s\)",
    ),
    "no item at all": ("<|audio|>x", r"1 audio placeholder\(s\) '<\|audio\|>' but 0 audio item\(s\)"),
    "no placeholder at all": (with_audio(AUDIO, "x"), r"0 audio placeholder\(s\) '<\|audio\|>' but 1 audio item\(s\)"),
}


@pytest.mark.parametrize("name", MEDIA)
def test_bad_media_are_refused(llm, serves_on, name):
    prompt, message = MEDIA[name]
    with pytest.raises(MediaError, match=message):
        llm.generate(["fine", prompt], PARAMS, use_tqdm=False)


def chat_with(part):
    return [{"role": "user", "content": [part]}]


def as_url(content, mime):
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


PARTS = {
    "truncated PNG": ({"type": "image_url", "image_url": {"url": as_url(png()[:3000], "image/png")}}, "truncated"),
    "text as image": ({"type": "image_url", "image_url": as_url(b"hello there", "image/png")}, "text beginning"),
    "0-byte audio": ({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}, "0 bytes"),
    "no base64": ({"type": "input_audio", "input_audio": {"data": "%%%", "format": "wav"}}, "malformed base64"),
    "a file": ({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}, "file: URLs are not allowed"),
}


@pytest.mark.parametrize("name", PARTS)
def test_bad_parts_of_a_message_are_refused(llm, serves_on, name):
    part, message = PARTS[name]
    with pytest.raises(MediaError, match=message):
        llm.chat(chat_with(part), PARAMS, use_tqdm=False)


class ClaimedText(str):
    """A data: URL that reports a length of 4 GB of base64 without the memory; decoding it fails the test."""

    def __len__(self):
        return 4 * 2**30

    def find(self, text, *_):
        return str(self)[:1024].find(text)

    def count(self, *_):
        return 0


def test_a_data_url_of_3_gb_is_refused_before_decoding(llm, serves_on, monkeypatch):
    def decode(*_, **__):
        raise AssertionError("it was decoded")

    monkeypatch.setattr(base64, "b64decode", decode)
    url = ClaimedText("data:image/png;base64,AAAA")
    with pytest.raises(MediaError, match=r"claims about 32\d{8} bytes, more than the allowed 67108864"):
        llm.chat(chat_with({"type": "image_url", "image_url": {"url": url}}), PARAMS, use_tqdm=False)
    monkeypatch.undo()


def test_an_adapter_above_the_rank_limit_is_refused(llm, serves_on, tiny_adapters):
    with pytest.raises(AdapterMismatch, match="adapter 'wide' .*rank 11 of .*down_proj exceeds max_lora_rank=8"):
        llm.generate("x", PARAMS, LoRARequest("wide", 50, str(tiny_adapters["everything"])), use_tqdm=False)


def edited(source, path, config=None, tensors=None):
    """Copy an adapter with another config or other tensors."""
    shutil.copytree(source, path)
    file = path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **(config or {})}))
    if tensors is not None:
        weights = load_file(path / "adapter_model.safetensors")
        save_file({name: t.clone() for name, t in tensors(weights).items()}, path / "adapter_model.safetensors")
    return LoRARequest("bad", 51, str(path))


ADAPTERS = {
    "wrong rank": ({"r": 6}, None, "says rank 6 for .* but lora_A is"),
    "unknown option": ({"use_dora": True}, None, "use_dora"),
    "matches nothing": (None, lambda w: {f"other.{n}": t for n, t in w.items()}, "nothing matches a module"),
    "one stray tensor": (None, lambda w: {**w, "extra.lora_A.weight": next(iter(w.values()))}, "extra.lora_A.weight"),
    "another width": (
        None,
        lambda w: {n: t[:, :-1] if ".lora_A." in n else t for n, t in w.items()},
        "it was made for another model",
    ),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_that_does_not_fit_is_refused(llm, serves_on, tiny_adapters, tmp_path, name):
    config, tensors, message = ADAPTERS[name]
    bad = edited(tiny_adapters["a"], tmp_path / "bad", config, tensors)
    with pytest.raises(AdapterMismatch, match=message):
        llm.generate("x", PARAMS, bad, use_tqdm=False)


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    return save_text_model(tmp_path_factory.mktemp("text") / "llama", "llama")


def test_an_adapter_for_another_model_is_refused(llm, serves_on, text_model, tmp_path):
    path = save_adapter(text_model, tmp_path / "llama-lora", AdapterSpec(r".*mlp\.(gate|down)_proj", 1))
    with pytest.raises(AdapterMismatch, match=r"match no module of this model: .*gate_proj|made for another model"):
        llm.generate("x", PARAMS, LoRARequest("llama", 52, str(path)), use_tqdm=False)


def test_adapter_files_that_are_missing_or_broken_are_named(llm, serves_on, tiny_adapters, tmp_path):
    with pytest.raises(AdapterNotFound, match="/no/such/adapter"):
        llm.generate("x", PARAMS, LoRARequest("gone", 53, "/no/such/adapter"), use_tqdm=False)
    broken = edited(tiny_adapters["a"], tmp_path / "broken")
    file = tmp_path / "broken" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(AdapterError, match=r"100 bytes\) is not a valid safetensors"):
        llm.generate("x", PARAMS, broken, use_tqdm=False)
    shutil.copy(tiny_adapters["a"] / "adapter_model.safetensors", file)
    assert llm.generate("x", PARAMS, broken, use_tqdm=False)[0].lora.adapter == "bad", "a failed load left nothing"


def test_one_name_cannot_refer_to_two_adapters(llm, serves_on, tiny_adapters):
    with pytest.raises(AdapterError, match="'good' .* load_inplace=True replaces it"):
        llm.generate("x", PARAMS, LoRARequest("good", 1, str(tiny_adapters["b"])), use_tqdm=False)


def test_a_wrong_processor_option_is_refused(llm, serves_on):
    with pytest.raises(RequestError, match="dynamic_hd is 0"):
        llm.generate({**with_image(IMAGE), "mm_processor_kwargs": {"dynamic_hd": 0}}, PARAMS, use_tqdm=False)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (
            {"multi_modal_data": {"image_embeds": torch.zeros(4, 8)}},
            "holds image_embeds; precomputed embeddings are not",
        ),
        (
            {"multi_modal_data": {"audio_embeds": [torch.zeros(4, 8)]}},
            "holds audio_embeds; precomputed embeddings are not",
        ),
        (
            {"multi_modal_data": {"image": torch.zeros(4, 8)}},
            r"shape \(4, 8\) is not supported: .* precomputed embeddings are not",
        ),
        (
            {"multi_modal_data": {"video": [IMAGE]}},
            "holds video; videos are not supported: send their frames as images",
        ),
        ({"prompt_embeds": torch.zeros(4, 8)}, r"key\(s\) prompt_embeds; precomputed embeddings are not"),
    ],
    ids=["image_embeds", "audio_embeds", "embeddings as an image", "video", "prompt_embeds"],
)
def test_embeddings_and_videos_are_refused_by_name(llm, serves_on, fields, text):
    with pytest.raises(RequestError, match=text):
        llm.generate({"prompt": "<|user|><|image|>?<|end|>", **fields}, PARAMS, use_tqdm=False)


def test_defaults_that_cannot_apply_are_a_config_error(tiny_phi4, tiny_adapters, text_model):
    adapter = str(tiny_adapters["a"])
    with pytest.raises(ConfigError, match=r"\['video'\]: the key must be one of audio, image"):
        LLM(str(tiny_phi4), enable_lora=True, default_mm_loras={"video": adapter})
    with pytest.raises(ConfigError, match="the model takes text only"):
        LLM(str(text_model), enable_lora=True, default_mm_loras={"audio": adapter})
    with pytest.raises(ConfigError, match="default_mm_loras=.*needs enable_lora=True"):
        LLM(str(tiny_phi4), enable_lora=False, default_mm_loras={"audio": adapter})
    with pytest.raises(AdapterNotFound, match="/no/such/adapter"):
        LLM(str(tiny_phi4), enable_lora=True, default_mm_loras={"audio": "/no/such/adapter"})
    with pytest.raises(AdapterMismatch, match="rank 5 .* exceeds max_lora_rank=2"):
        LLM(str(tiny_phi4), enable_lora=True, max_lora_rank=2, default_mm_loras={"audio": adapter})


def test_a_text_model_refuses_media(text_model):
    llm = LLM(str(text_model), max_model_len=64)
    for prompt in (with_image(IMAGE), with_audio(AUDIO)):
        with pytest.raises(RequestError, match="the model takes text only"):
            llm.generate(prompt, PARAMS, use_tqdm=False)
    with pytest.raises(RequestError, match="the prompt holds image; the model takes text only"):
        llm.chat(chat_with({"type": "image", "image": IMAGE}), PARAMS, use_tqdm=False)
    with pytest.raises(ConfigError, match="limit_mm_per_prompt names audio; the model takes text only"):
        LLM(str(text_model), limit_mm_per_prompt={"audio": 1})
    assert len(llm.generate("fine", PARAMS, use_tqdm=False)[0].outputs[0].token_ids) == 4
