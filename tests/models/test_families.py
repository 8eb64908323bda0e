"""Each multimodal family equals transformers, and PEFT with adapters on each of its parts, alone and in batches."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mmlora import LLM
from tests.checkpoints import save_adapter
from tests.equality import STATISTICS, Case, Checkpoint, check_cases, run_cases
from tests.families.reference import FamilyReference
from tests.families.table import FAMILIES, adapter_of, parts_of, save_family
from tests.media import clip, picture
from tests.reference import NUM_TOKENS, Media

HALF_NOISE = 1.25  # few prompts, and another order of sums
TWINS = {  # of equal shapes, so that a tower encodes them in one batch
    "image": Media(images=[picture(50, 50, 11), picture(50, 50, 12), picture(50, 50, 13)]),
    "audio": Media(audios=[clip(0.6, 14), clip(0.6, 15), clip(0.6, 16)]),
}
ONE = {"image": Media(images=[picture(60, 44, 2)]), "audio": Media(audios=[clip(0.7, 1)])}
OTHER = {"image": Media(images=[picture(33, 90, 3)]), "audio": Media(audios=[clip(1.2, 4)])}
TWO = {
    "image": Media(images=[picture(40, 40, 5), picture(70, 30, 6)]),
    "audio": Media(audios=[clip(0.5, 7), clip(0.5, 8)]),
}


@pytest.fixture(scope="module")
def family_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    known: dict[str, Checkpoint] = {}

    def build(family: str) -> Checkpoint:
        if family not in known:
            folder = tmp_path_factory.mktemp(family)
            path = save_family(folder / "model", family)
            adapters = {
                part: save_adapter(path, folder / part, adapter_of(family, part, seed=seed, r=3))
                for seed, part in enumerate(parts_of(family), start=1)
            }
            adapters["all"] = save_adapter(path, folder / "all", adapter_of(family, seed=9, r=2))
            known[family] = Checkpoint(path, adapters, FamilyReference(path, FAMILIES[family]))
        return known[family]

    return build


def cases_of(family: str, adapters: dict[str, Path]) -> list[Case]:
    spec = FAMILIES[family]
    mark, modality = spec.placeholder, spec.modality
    one, two = f"<|user|>{mark}What is it?<|end|><|assistant|>", f"<|user|>First{mark}then {mark}!<|end|><|assistant|>"
    text = "<|user|>How many dogs?<|end|><|assistant|>"
    cases = [Case(f"text, {adapter}", text, adapter=adapter) for adapter in (None, "language_model", "all")]
    for adapter in (None, *adapters):
        cases.append(Case(f"one, {adapter}", one, ONE[modality], adapter))
        cases.append(Case(f"two, {adapter}", two, TWO[modality], adapter))
    if spec.other_placeholder is not None:
        other, other_mark = spec.other_placeholder
        both = f"<|user|>Here {other_mark} and {mark}, {other_mark}?<|end|><|assistant|>"
        alone = f"<|user|>Just {other_mark}?<|end|><|assistant|>"
        media = {**vars(ONE[modality]), **{k: v for k, v in vars(TWO[other]).items() if v}}
        cases += [Case(f"both, {adapter}", both, Media(**media), adapter) for adapter in (None, *adapters)]
        cases += [Case(f"other, {adapter}", alone, OTHER[other], adapter) for adapter in (None, *adapters)]
    three = f"<|user|>{mark}, {mark} or {mark}?<|end|><|assistant|>"
    cases += [Case(f"twins, {adapter}", three, TWINS[modality], adapter) for adapter in (None, "all")]
    return [*cases, Case("another, base", one, OTHER[modality]), Case("another, all", one, OTHER[modality], "all")]


def load(checkpoint: Checkpoint, **options: Any) -> LLM:
    defaults = {"enable_lora": True, "max_logprobs": -1, "max_num_batched_tokens": 16, "max_model_len": 512}
    return LLM(str(checkpoint.path), **{**defaults, "dtype": "float32", "device": "cpu", **options})


@pytest.mark.parametrize("family", FAMILIES)
def test_alone_and_mixed(family: str, family_checkpoint: Callable[[str], Checkpoint]) -> None:
    checkpoint = family_checkpoint(family)
    cases, llm = cases_of(family, checkpoint.adapters), load(checkpoint)
    for case in cases:
        check_cases(llm, checkpoint, [case])
    check_cases(load(checkpoint, max_loras=2, max_cpu_loras=8), checkpoint, cases[::-1])
    check_cases(load(checkpoint, max_num_batched_tokens=2048), checkpoint, cases)


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_and_preempted(family: str, family_checkpoint: Callable[[str], Checkpoint]) -> None:
    """Without prompt logits, prefixes come from the cache; with few blocks, sequences are preempted."""
    checkpoint = family_checkpoint(family)
    cases = cases_of(family, checkpoint.adapters)
    longest = max(len(checkpoint.expected(case).prompt_ids) for case in cases) + NUM_TOKENS
    llm = load(checkpoint, max_model_len=longest + 1, block_size=4, max_num_batched_tokens=48)
    check_cases(llm, checkpoint, cases, prompt_logprobs=None)
    outputs = check_cases(llm, checkpoint, cases, prompt_logprobs=None)
    assert all((output.num_cached_tokens or 0) > len(output.prompt_token_ids) / 2 for output in outputs)
    block_bytes = llm.llm_engine.runner.kv_cache.keys[:, :4].nbytes * 2
    few = -(-(longest + 1) // 4) + 4
    llm = load(
        checkpoint,
        max_model_len=longest + 1,
        block_size=4,
        max_num_batched_tokens=48,
        kv_cache_memory_bytes=few * block_bytes,
        max_num_seqs=4,
    )
    check_cases(llm, checkpoint, cases, prompt_logprobs=None)
    check_cases(llm, checkpoint, cases[::-1], prompt_logprobs=None)
    assert llm.llm_engine.metrics.total_preemptions > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision(family: str, dtype: str, family_checkpoint: Callable[[str], Checkpoint]) -> None:
    """The mean error of logits against float32 equals that of transformers + PEFT in the same dtype, up to noise."""
    checkpoint = family_checkpoint(family)
    cases = [case for case in cases_of(family, checkpoint.adapters) if case.adapter in (None, "all")]
    reference = FamilyReference(checkpoint.path, FAMILIES[family], getattr(torch, dtype))
    ours, theirs = [], []
    llm = load(checkpoint, dtype=dtype, max_num_batched_tokens=64)
    for case, (output, logits) in zip(cases, run_cases(llm, checkpoint, cases, max_tokens=1), strict=True):
        assert output.error is None, case.name
        exact, length = checkpoint.expected(case).logits, len(output.prompt_token_ids)
        adapter = checkpoint.adapters[case.adapter] if case.adapter is not None else None
        in_type = reference.generate(case.prompt, case.media, adapter, max_tokens=1).logits
        ours.append((torch.stack([logits[i] for i in range(length)]) - exact[:length]).abs())
        theirs.append((in_type[:length] - exact[:length]).abs())
    mean, their_mean = float(torch.cat(ours).mean()), float(torch.cat(theirs).mean())
    STATISTICS.half_errors[f"{dtype} {family}"] = f"engine mean {mean:.3e}, PEFT {their_mean:.3e}"
    assert mean <= HALF_NOISE * their_mean


@pytest.mark.parametrize("family", FAMILIES)
def test_every_adapter_changes_its_part(family: str, family_checkpoint: Callable[[str], Checkpoint]) -> None:
    checkpoint = family_checkpoint(family)
    cases = {case.name: case for case in cases_of(family, checkpoint.adapters)}
    with_media = "one" if FAMILIES[family].other_placeholder is None else "both"
    base = checkpoint.expected(cases[f"{with_media}, None"])
    host_cache = load(checkpoint).llm_engine.host_cache
    assert host_cache is not None
    for name in checkpoint.adapters:
        changed = checkpoint.expected(cases[f"{with_media}, {name}"])
        length = len(base.prompt_ids)
        assert (changed.logits[:length] - base.logits[:length]).abs().max() > 1e-2, name
        parts = host_cache.get(checkpoint.lora_request(name)).report.parts
        assert {part for part, count in parts.items() if count} == ({name} if name != "all" else {*parts_of(family)})
