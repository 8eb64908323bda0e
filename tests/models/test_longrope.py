"""longrope: each token equals transformers' forward over the whole sequence so far, in any batch."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mmlora import LLM
from tests.checkpoints import load_reference, save_text_model
from tests.equality import FAMILIES, LOGIT_TOLERANCE, greedy, model_type_of, recorded_logits

ORIGINAL = 240
LENGTHS = {"short": 200, "long": 360, "crossing": ORIGINAL - 3}


@pytest.fixture(scope="module", params=["phi3", "llama"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with rotary dimension 10, whose long factors are far from the short ones."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4],
        "long_factor": [1.0, 3.0, 5.0, 7.0, 9.0],
        "original_max_position_embeddings": ORIGINAL,
        "factor": 2.0,
    }
    options: dict[str, Any] = {"rope_parameters": rope, "original_max_position_embeddings": ORIGINAL}
    if request.param == "phi3":
        options["sliding_window"] = None
    return save_text_model(tmp_path_factory.mktemp("longrope") / request.param, request.param, **options)


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> LLM:
    return LLM(str(checkpoint), dtype="float32", device="cpu", max_num_batched_tokens=64, max_logprobs=-1)


def prompt(length: int) -> list[int]:
    return [7 + (i * i + 3 * i) % 200 for i in range(length)]


@torch.inference_mode()
def whole_forward(model: Any, ids: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]


def test_short_long_and_crossing_sequences_in_one_batch(checkpoint: Path, llm: LLM) -> None:
    model = load_reference(checkpoint)
    prompts = [prompt(length) for length in LENGTHS.values()]
    with recorded_logits(llm) as logits:
        outputs = llm.generate(prompts, greedy(), use_tqdm=False)
    for name, output in zip(LENGTHS, outputs, strict=True):
        assert output.error is None
        ids, errors = list(output.prompt_token_ids), []
        for token in output.outputs[0].token_ids:
            expected = whole_forward(model, ids)
            errors.append(float((logits[output.request_id][len(ids) - 1] - expected).abs().max()))
            assert errors[-1] <= LOGIT_TOLERANCE, (name, len(ids))
            ids.append(token)
        FAMILIES[model_type_of(checkpoint)].add(len(errors), max(errors))
    assert llm.llm_engine.scheduler.num_preemptions == 0


def test_the_prefix_cache_keeps_both_kinds_apart(checkpoint: Path, llm: LLM) -> None:
    """A long prompt must not reuse the keys of a short prompt that is its prefix."""
    model = load_reference(checkpoint)
    for length in (200, 360, 200, 360):
        with recorded_logits(llm) as logits:
            (output,) = llm.generate([prompt(length)], greedy(max_tokens=1), use_tqdm=False)
        expected = whole_forward(model, prompt(length))
        assert float((logits[output.request_id][length - 1] - expected).abs().max()) <= LOGIT_TOLERANCE


def test_the_factors_matter(checkpoint: Path) -> None:
    model = load_reference(checkpoint)
    with torch.inference_mode():
        first = model(input_ids=torch.tensor([prompt(200)]), use_cache=False).logits[0]
        whole = model(input_ids=torch.tensor([prompt(360)]), use_cache=False).logits[0, :200]
    assert (first - whole).abs().max() > 0.1
