"""In bfloat16 and float16 the engine is as close to float32 as transformers + PEFT are in the same dtype.

The error is the mean of |logits - float32 logits| over the vocabulary and all positions of six fixed prompts, so that
sampled tokens have no influence. Both dtypes represent all weights exactly, so only the arithmetic differs. PEFT runs
with adapters in that dtype and in float32 (its default). The largest error of a single logit is printed as well.
"""

from typing import Any

import pytest
import torch

from mmlora import LLM
from tests.equality import STATISTICS, Checkpoint, greedy, recorded_logits
from tests.media import clip, picture
from tests.reference import Media, Reference

# Until transformers 5.23, rounded patch positions dominate the error of both sides.
TIE = 1.005
NOISE = 1.02  # with fp32 adapters the arithmetic is the same up to the order of sums, which changes means by 1 %
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
TEXT = " and the fleece of it was white as snow, so it went to school one day"
KINDS: dict[str, tuple[str, list[Media], str | None]] = {
    "text": ("<|user|>{}What is it?<|end|><|assistant|>", [Media()] * 6, "text"),
    "audio": ("<|user|>{}<|audio|><|end|><|assistant|>", [Media([clip(0.6, 30 + i)]) for i in range(6)], "everything"),
    "image": (
        "<|user|>{}<|image|>?<|end|><|assistant|>",
        [Media((), [picture(40 + 12 * i, 44, 40 + i)]) for i in range(6)],
        "everything",
    ),
}


@pytest.fixture(scope="module")
def references(phi4_checkpoint: Checkpoint) -> dict[str, tuple[Reference, Reference]]:
    return {
        name: (
            Reference(phi4_checkpoint.path, dtype),
            Reference(phi4_checkpoint.path, dtype, is_adapter_upcast=True),
        )
        for name, dtype in DTYPES.items()
    }


def engine_logits(llm: LLM, prompts: list[dict[str, Any]], lora: object) -> list[tuple[list[int], torch.Tensor]]:
    with recorded_logits(llm) as found:
        outputs = llm.generate(prompts, greedy(max_tokens=1, prompt_logprobs=0), lora, use_tqdm=False)
    return [
        (output.prompt_token_ids, torch.stack([row for _, row in sorted(found[output.request_id].items())]))
        for output in outputs
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_error(
    phi4_checkpoint: Checkpoint, references: dict[str, tuple[Reference, Reference]], dtype: str, kind: str
) -> None:
    template, media, adapter = KINDS[kind]
    llm = LLM(str(phi4_checkpoint.path), dtype=dtype, device="cpu", enable_lora=True, max_num_batched_tokens=64)
    prompts = [
        {"prompt": template.format(index) + TEXT, "multi_modal_data": item.as_prompt_data}
        for index, item in enumerate(media)
    ]
    path = phi4_checkpoint.adapters[adapter]
    found: dict[str, list[torch.Tensor]] = {"engine": [], "PEFT": [], "PEFT, fp32 adapters": []}
    results = engine_logits(llm, prompts, phi4_checkpoint.lora_request(adapter))
    for item, (token_ids, logits) in zip(media, results, strict=True):
        exact = phi4_checkpoint.reference.logits(token_ids, item, path)
        in_type, upcast = (reference.logits(token_ids, item, path) for reference in references[dtype])
        for errors, rows in zip(found.values(), (logits, in_type, upcast), strict=True):
            errors.append((rows - exact).abs())
    errors = {name: torch.cat(rows) for name, rows in found.items()}
    STATISTICS.half_errors[f"{dtype} {kind}"] = "; ".join(
        f"{name} mean {rows.mean():.3e}, largest {rows.max():.3e}" for name, rows in errors.items()
    )
    ours, in_type, upcast = (rows.mean() for rows in errors.values())
    assert ours <= in_type * TIE
    assert ours <= upcast * NOISE
