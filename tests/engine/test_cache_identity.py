"""Prefix cache and encoder cache never mix adapters: every output equals that of a fresh engine."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from mmlora import BASE, LLM, LoRARequest, RequestOutput
from tests.checkpoints import randomize_adapter
from tests.equality import Checkpoint, Logits, check_equal, greedy, recorded_logits
from tests.media import clip, picture
from tests.reference import Media, Reference

PROMPT = "<|user|>Please see<|image|>and hear <|audio|>! Well?<|end|><|assistant|>"
MEDIA = Media(audios=[clip(0.6, 21)], images=[picture(50, 42, 22)])
OTHER_MEDIA = Media(audios=[clip(0.6, 23)], images=[picture(50, 42, 24)])
BLOCK_SIZE = 8


def load(checkpoint: Checkpoint, **options: Any) -> LLM:
    defaults = {"enable_lora": True, "block_size": BLOCK_SIZE, "max_num_batched_tokens": 32, "max_model_len": 128}
    return LLM(str(checkpoint.path), **{**defaults, "dtype": "float32", "device": "cpu", **options})


def ask(llm: LLM, lora: object, media: Media = MEDIA, prompt: str = PROMPT) -> tuple[RequestOutput, Logits]:
    """Run one request; return its output, and the logits that predict its tokens."""
    with recorded_logits(llm) as logits:
        (output,) = llm.generate([{"prompt": prompt, "multi_modal_data": media.as_prompt_data}], greedy(), lora, False)
    return output, logits[output.request_id]


def num_encoded(llm: LLM) -> int:
    encoder = llm.llm_engine.runner.encoder
    assert encoder is not None
    return encoder.num_encoded


@pytest.mark.parametrize("name", ["text", "connector", "everything"])
def test_reload_with_other_bytes(phi4_checkpoint: Checkpoint, tmp_path: Path, name: str) -> None:
    """Run A, B and base twice each, then A with other tensors: no output is of another version."""
    path = Path(shutil.copytree(phi4_checkpoint.adapters[name], tmp_path / "a"))
    other = "rslora" if name == "text" else "audio"
    reference = phi4_checkpoint.reference
    llm = load(phi4_checkpoint)
    steps: list[tuple[object, Path | None]] = [
        (LoRARequest("a", 1, str(path)), path),
        (LoRARequest("b", 2, str(phi4_checkpoint.adapters[other])), phi4_checkpoint.adapters[other]),
        (BASE, None),
    ]
    answers = []
    for lora, adapter in steps:
        expected = reference.generate(PROMPT, MEDIA, adapter)
        for is_hit in (False, True):
            output, logits = ask(llm, lora)
            check_equal(output, logits, expected, f"{lora}")
            assert (output.num_cached_tokens > 0) is is_hit
        answers.append(output.outputs[0].token_ids)

    randomize_adapter(path, seed=99)
    reload = LoRARequest("a", 1, str(path), load_inplace=True)
    expected = Reference(phi4_checkpoint.path).generate(PROMPT, MEDIA, path)  # not affected by the old tensors
    for is_hit in (False, True):
        output, logits = ask(llm, reload)
        check_equal(output, logits, expected, "reloaded")
        assert (output.num_cached_tokens > 0) is is_hit
    answers.append(output.outputs[0].token_ids)
    assert all(a != b for i, a in enumerate(answers) for b in answers[:i])

    output, logits = ask(llm, BASE)
    check_equal(output, logits, reference.generate(PROMPT, MEDIA), "base after the reload")
    fresh, _ = ask(load(phi4_checkpoint), LoRARequest("a", 1, str(path)))
    assert fresh.outputs[0].token_ids == answers[-1] and fresh.num_cached_tokens == 0


def test_same_bytes_under_another_name_share_media_only(phi4_checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = shutil.copytree(phi4_checkpoint.adapters["everything"], tmp_path / "twin")
    llm = load(phi4_checkpoint)
    first, _ = ask(llm, phi4_checkpoint.lora_request("everything"))
    count = num_encoded(llm)
    twin, _ = ask(llm, LoRARequest("twin", 77, str(path)))
    assert twin.outputs[0].token_ids == first.outputs[0].token_ids
    assert twin.num_cached_tokens == 0 and num_encoded(llm) == count


def test_encoder_cache_by_tower_part(phi4_checkpoint: Checkpoint) -> None:
    """Adapters of only the language model share the base's embeddings; those with tower or connector parts do not."""
    llm = load(phi4_checkpoint, enable_prefix_caching=False)
    counts = {}
    for name in (None, "text", "rslora", "connector", "vision", "audio", "everything", None, "text", "vision"):
        before = num_encoded(llm)
        output, logits = ask(llm, phi4_checkpoint.lora_request(name))
        adapter = phi4_checkpoint.adapters[name] if name is not None else None
        check_equal(output, logits, phi4_checkpoint.reference.generate(PROMPT, MEDIA, adapter), f"{name}")
        counts.setdefault(name, []).append(num_encoded(llm) - before)
    assert counts == {
        None: [2, 0], "text": [0, 0], "rslora": [0], "connector": [2], "vision": [2, 0], "audio": [2], "everything": [2]
    }  # fmt: skip


def test_encoder_cache_reload(phi4_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """With the prefix cache off, a reload encodes media again only if the tower part changed."""
    llm = load(phi4_checkpoint, enable_prefix_caching=False)
    for number, (name, num_new) in enumerate((("text", 0), ("everything", 2)), start=1):
        path = Path(shutil.copytree(phi4_checkpoint.adapters[name], tmp_path / name))
        ask(llm, LoRARequest(name, number, str(path)))
        randomize_adapter(path, seed=98)
        before = num_encoded(llm)
        output, logits = ask(llm, LoRARequest(name, number, str(path), load_inplace=True))
        check_equal(output, logits, Reference(phi4_checkpoint.path).generate(PROMPT, MEDIA, path), name)
        assert num_encoded(llm) - before == num_new, name


def test_projection_mode(phi4_checkpoint: Checkpoint) -> None:
    """The same clip uses different projections alone and together with an image, also from the cache."""
    llm = load(phi4_checkpoint)
    alone = Media(audios=MEDIA.audios)
    for prompt, media in ((PROMPT, MEDIA), ("<|user|><|audio|><|assistant|>", alone), (PROMPT, MEDIA)):
        output, logits = ask(llm, BASE, media, prompt)
        check_equal(output, logits, phi4_checkpoint.reference.generate(prompt, media), prompt)
    assert num_encoded(llm) == 3


@pytest.mark.parametrize("name", [None, "text", "everything"])
def test_other_media_behind_equal_tokens(phi4_checkpoint: Checkpoint, name: str | None) -> None:
    """Placeholder tokens are equal for all media, so a changed item must change all blocks from there on."""
    llm = load(phi4_checkpoint)
    adapter = phi4_checkpoint.adapters[name] if name is not None else None
    mixed = Media(audios=OTHER_MEDIA.audios, images=MEDIA.images)
    for media in (MEDIA, OTHER_MEDIA, mixed, MEDIA):
        output, logits = ask(llm, phi4_checkpoint.lora_request(name), media)
        check_equal(output, logits, phi4_checkpoint.reference.generate(PROMPT, media, adapter), f"{name}")
    first_audio = output.prompt_token_ids.index(5)
    output, _ = ask(llm, phi4_checkpoint.lora_request(name), mixed)
    assert output.num_cached_tokens > first_audio - BLOCK_SIZE
