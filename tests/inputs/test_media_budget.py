"""Media that do not fit into a prompt are refused before their features fill the memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image

from mmlora import LLM, SamplingParams
from mmlora.config import EngineArgs
from mmlora.errors import ContextLengthExceeded, MediaError
from mmlora.models import families
from mmlora.models.config import load_config
from mmlora.models.loader import load_tokenizer
from mmlora.processors.media.audio import AudioItem
from mmlora.processors.media.image import ImageItem
from tests.families.table import FAMILIES, save_family

PARAMS = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
PICTURE_TOKENS = 16  # of the tiny LLaVA, for a picture of any size
PICTURE_BYTES = 3 * 28 * 28 * 4  # of its pixel values


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(tmp_path_factory.mktemp("budget") / "llava", "llava")


def load(path: Path, **options: Any) -> LLM:
    return LLM(str(path), device="cpu", dtype="float32", **{"max_model_len": 128, **options})


@contextmanager
def counted(llm: LLM) -> Iterator[list[Any]]:
    """Collect the items that the model's processor has computed."""
    processor, computed = llm.llm_engine.input_processor.processor, []
    assert processor is not None
    compute = processor.process

    def process(item: Any, options: Any = None) -> Any:
        computed.append(item)
        return compute(item, options)

    with patch.object(processor, "process", process):
        yield computed


def prompt(pictures: list[Image.Image], text: str = "") -> dict[str, Any]:
    return {"prompt": "<|image|>" * len(pictures) + text, "multi_modal_data": {"image": pictures}}


def run(llm: LLM, *prompts: Any) -> Any:
    return llm.generate(*prompts, PARAMS, use_tqdm=False)


def test_pictures_of_one_size_are_counted_by_the_first(llava: Path) -> None:
    llm = load(llava)
    for num_pictures in (8, 400):
        pictures = [Image.new("RGB", (1, 1), (i % 256, i // 256, 7)) for i in range(num_pictures)]
        with counted(llm) as computed:
            message = f"has {num_pictures * PICTURE_TOKENS} tokens or more.*maximum context length is 128 tokens"
            with pytest.raises(ContextLengthExceeded, match=message) as caught:
                run(llm, prompt(pictures))
        assert len(computed) == 1 and caught.value.param == "prompt"


def test_pictures_of_many_sizes_are_counted_one_by_one(llava: Path) -> None:
    llm = load(llava)
    pictures = [Image.new("RGB", (1 + i % 20, 1 + i // 20)) for i in range(400)]
    with counted(llm) as computed, pytest.raises(ContextLengthExceeded, match="has 128 tokens or more"):
        run(llm, prompt(pictures))
    assert len(computed) == 128 // PICTURE_TOKENS


def test_a_chat_names_its_messages(llava: Path) -> None:
    parts = [{"type": "image", "image": Image.new("RGB", (2, 2))}] * 9
    with pytest.raises(ContextLengthExceeded) as caught:
        load(llava).chat([{"role": "user", "content": parts}], PARAMS, use_tqdm=False)
    assert caught.value.param == "messages"


def test_what_fits_exactly_is_served(llava: Path) -> None:
    llm = load(llava)
    pictures = [Image.new("RGB", (9, 9), (i, 0, 0)) for i in range(7)]
    words = llm.get_tokenizer()("word " * 99, add_special_tokens=False).input_ids
    image_id = llm.get_tokenizer().convert_tokens_to_ids("<|image|>")
    num_words = 127 - 7 * PICTURE_TOKENS
    fitting = {"prompt_token_ids": [*[image_id] * 7, *words[:num_words]], "multi_modal_data": {"image": pictures}}
    assert len(run(llm, fitting)[0].prompt_token_ids) == 127
    longer = {**fitting, "prompt_token_ids": [*fitting["prompt_token_ids"], words[0]]}
    with counted(llm) as computed, pytest.raises(ContextLengthExceeded, match="has 128 tokens or more"):
        run(llm, longer)
    assert len(computed) == 1


def test_bytes_are_those_of_pictures_and_features(llava: Path) -> None:
    pictures = [Image.new("RGB", (10, 10), (i, 0, 0)) for i in range(4)]
    num_bytes = 4 * (PICTURE_BYTES + 300)
    assert run(load(llava, max_decoded_media_bytes=num_bytes), prompt(pictures))[0].error is None
    llm = load(llava, max_decoded_media_bytes=num_bytes - 1)
    message = f"take {num_bytes} bytes or more, decoded and as features; max_decoded_media_bytes allows {num_bytes - 1}"
    with counted(llm) as computed, pytest.raises(MediaError, match=message):
        run(llm, prompt(pictures))
    assert len(computed) == 1


def test_audio_and_images_share_the_context(tiny_phi4: Path) -> None:
    llm = load(tiny_phi4, max_model_len=512)
    picture, tone = Image.new("RGB", (42, 42), "red"), np.sin(np.arange(16000) / 9).astype(np.float32)
    media = {"image": [picture] * 2, "audio": [(tone * (i + 1) / 200, 16000) for i in range(200)]}
    with counted(llm) as computed, pytest.raises(ContextLengthExceeded):
        run(llm, {"prompt": "<|audio|>" * 200 + "<|image|>" * 2, "multi_modal_data": media})
    assert len(computed) == 1


SHAPES = {"image": [(1, 1), (3, 90), (64, 33), (200, 200)], "audio": [(4000, 16000), (17000, 16000), (24000, 44100)]}


def items(modality: str, shape: tuple[int, int]) -> list[Any]:
    """Return noise and silence, or black, of one shape."""
    rng = np.random.default_rng(1)
    if modality == "audio":
        clips = (rng.standard_normal(shape[0]) / 4, np.zeros(shape[0]))
        return [AudioItem.from_samples(clip.astype(np.float32), shape[1]) for clip in clips]
    pixels = rng.integers(0, 256, (*shape[::-1], 3), dtype=np.uint8)
    return [ImageItem.from_rgb(Image.fromarray(array)) for array in (pixels, pixels * 0)]


@pytest.mark.parametrize("family", FAMILIES)
def test_items_of_one_shape_take_the_same(family: str, tmp_path: Path) -> None:
    path = save_family(tmp_path / "model", family)
    processor = families.get_processor(load_config(path), path, load_tokenizer(EngineArgs(str(path)), path))
    assert processor is not None
    for modality in processor.modalities:
        for shape in SHAPES[modality]:
            noise, blank = items(modality, shape)
            assert tuple(noise.dimensions.values()) == tuple(blank.dimensions.values()) == shape
            found = [processor.process(item) for item in (noise, blank)]
            assert found[0].content_hash != found[1].content_hash
            assert found[0].num_tokens == found[1].num_tokens
            assert found[0].num_bytes == found[1].num_bytes > 0
