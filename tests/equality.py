"""Compare outputs of the engine with the reference.

Tokens must be equal up to the first near-tie: a token at which the reference's top two logits differ by less than
`NEAR_TIE`. Logits must be within `LOGIT_TOLERANCE` up to there.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mmlora import BASE, LLM, LoRARequest, RequestOutput, SamplingParams
from mmlora.engine.model_input import logit_positions
from mmlora.engine.sampler import StepResult
from mmlora.engine.scheduler import ScheduledSequence
from tests.reference import NUM_TOKENS, Media, Reference, ReferenceOutput

LOGIT_TOLERANCE = 1e-4  # fp32
NEAR_TIE = 1e-3  # fp32: between the reference's top two logits


@dataclass(frozen=True)
class Case:
    """A request to engine and reference; `adapter` is a key of the checkpoint's adapters."""

    name: str
    prompt: str
    media: Media = field(default_factory=Media)
    adapter: str | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk with its adapters and its float32 reference."""

    path: Any
    adapters: dict[str, Any]
    reference: Reference
    _known: dict[tuple[object, ...], ReferenceOutput] = field(default_factory=dict)

    @property
    def model_type(self) -> str:
        """The key of its family in `mmlora.models.families.FAMILIES`."""
        return model_type_of(self.path)

    def lora_request(self, name: str | None) -> object:
        """Return the `lora_request` of an adapter; `BASE` for None, so that no default adapter applies."""
        if name is None:
            return BASE
        return LoRARequest(name, 1 + list(self.adapters).index(name), str(self.adapters[name]))

    def expected(self, case: Case) -> ReferenceOutput:
        """Return the reference's output, computed once per case."""
        key = (case.name, case.prompt, case.adapter)
        if key not in self._known:
            adapter = self.adapters[case.adapter] if case.adapter is not None else None
            self._known[key] = self.reference.generate(case.prompt, case.media, adapter)
        return self._known[key]


@dataclass
class Statistics:
    """Results of comparisons."""

    num_outputs: int = 0
    num_logit_rows: int = 0
    num_near_ties: int = 0
    max_logit_error: float = 0.0
    half_errors: dict[str, str] = field(default_factory=dict)
    parts: set[str] = field(default_factory=set)  # parts of the model that adapters changed

    def add(self, num_logit_rows: int, logit_error: float, is_near_tie: bool = False) -> None:
        """Count one output."""
        self.num_outputs += 1
        self.num_logit_rows += num_logit_rows
        self.max_logit_error = max(self.max_logit_error, logit_error)
        self.num_near_ties += is_near_tie

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, which a worker of pytest-xdist can send."""
        return {**vars(self), "parts": sorted(self.parts)}

    def merge(self, other: dict[str, Any]) -> None:
        """Add the statistics of another process, in the form of `as_dict`."""
        self.num_outputs += other["num_outputs"]
        self.num_logit_rows += other["num_logit_rows"]
        self.num_near_ties += other["num_near_ties"]
        self.max_logit_error = max(self.max_logit_error, other["max_logit_error"])
        self.half_errors.update(other["half_errors"])
        self.parts.update(other["parts"])

    def __str__(self) -> str:
        return (
            f"{self.num_outputs} outputs, {self.num_logit_rows} rows of logits against transformers + PEFT: largest "
            f"difference {self.max_logit_error:.1e}, {self.num_near_ties} outputs differ after a near-tie"
        )


STATISTICS = Statistics()  # of the session
FAMILIES: defaultdict[str, Statistics] = defaultdict(Statistics)  # by model_type
Logits = dict[int, torch.Tensor]


def model_type_of(path: Path | str) -> str:
    """Return the `model_type` of a checkpoint."""
    return str(json.loads((Path(path) / "config.json").read_text())["model_type"])


@contextmanager
def recorded_logits(llm: LLM) -> Iterator[dict[str, Logits]]:
    """Record raw logits `[vocab_size]` by request id and position, for the first sequence of each request."""
    sampler: Any = llm.llm_engine.sampler
    run, found = sampler.run, defaultdict(dict)

    def record(items: list[ScheduledSequence], logits: torch.Tensor, result: StepResult) -> None:
        rows = [(item, position) for item in items for position in logit_positions(item)]
        for (item, position), values in zip(rows, logits, strict=True):
            if item.seq.index == 0:
                found[item.seq.request.request_id][position] = values.to("cpu", copy=True)
        run(items, logits, result)

    sampler.run = record
    try:
        yield found
    finally:
        del sampler.run


def greedy(**options: Any) -> SamplingParams:
    """Return parameters of greedy decoding by `NUM_TOKENS` tokens."""
    return SamplingParams(**{"temperature": 0.0, "max_tokens": NUM_TOKENS, "ignore_eos": True, **options})


def run_cases(
    llm: LLM, checkpoint: Checkpoint, cases: Sequence[Case], *, is_automatic: bool = False, **options: Any
) -> list[tuple[RequestOutput, Logits]]:
    """Run all cases as one batch, by default with logits of all prompt tokens.

    Args:
        is_automatic: do not name adapters, so that the engine chooses them.
    """
    prompts = [{"prompt": case.prompt, "multi_modal_data": case.media.as_prompt_data} for case in cases]
    loras = None if is_automatic else [checkpoint.lora_request(case.adapter) for case in cases]
    with recorded_logits(llm) as logits:
        outputs = llm.generate(prompts, greedy(**{"prompt_logprobs": 0, **options}), loras, use_tqdm=False)
    return [(output, logits[output.request_id]) for output in outputs]


def check_cases(llm: LLM, checkpoint: Checkpoint, cases: Sequence[Case], **options: Any) -> list[RequestOutput]:
    """Run all cases as one batch and compare tokens and logits of each with the reference."""
    results = run_cases(llm, checkpoint, cases, **options)
    for case, (output, logits) in zip(cases, results, strict=True):
        check_equal(output, logits, checkpoint.expected(case), case.name, checkpoint.model_type)
        FAMILIES[checkpoint.model_type].parts |= _changed_parts(llm, output)
    return [output for output, _ in results]


def _changed_parts(llm: LLM, output: RequestOutput) -> set[str]:
    host_cache = llm.llm_engine.host_cache
    if host_cache is None or not isinstance(output.lora_request, LoRARequest):
        return set()
    return {part for part, count in host_cache.get(output.lora_request).report.parts.items() if count}


def check_equal(
    output: RequestOutput,
    logits: Logits,
    expected: ReferenceOutput,
    name: str = "",
    model_type: str | None = None,
) -> None:
    """Compare an output with the reference, up to the first near-tie at which their tokens differ."""
    assert output.error is None, f"{name}: {output.error}"
    assert output.prompt_token_ids == expected.prompt_ids, name
    tokens = output.outputs[0].token_ids
    assert len(tokens) == len(expected.token_ids), name
    num_equal = num_equal_tokens(tokens, expected.token_ids)
    last = len(expected.prompt_ids) - 1 + min(num_equal, len(tokens) - 1)  # the last row with an equal context
    compared = [position for position in sorted(logits) if position <= last]
    assert compared and compared[-1] == last, name
    error = max(float((logits[position] - expected.logits[position]).abs().max()) for position in compared)
    for statistics in (STATISTICS, *([FAMILIES[model_type]] if model_type is not None else [])):
        statistics.add(len(compared), error, num_equal < len(tokens))
    assert error <= LOGIT_TOLERANCE, f"{name}: logits differ by {error:.2e}"
    if num_equal < len(tokens):
        top = expected.logits[last].topk(2).values
        assert float(top[0] - top[1]) < NEAR_TIE, f"{name}: {tokens} instead of {expected.token_ids}"


def num_equal_tokens(tokens: Sequence[int], others: Sequence[int]) -> int:
    """Return the length of the common prefix."""
    pairs = enumerate(zip(tokens, others, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(tokens), len(others)))
