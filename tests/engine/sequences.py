"""Sequences for unit tests of the engine, built without a model, a tokenizer or files."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from mmlora import LoRAChoice, SamplingParams
from mmlora.engine.detokenizer import Detokenizer
from mmlora.engine.sequence import Request, Sequence
from mmlora.inputs.engine_input import EngineInput, MediaInput
from mmlora.lora.adapter import Adapter, AdapterReport
from mmlora.processors.base import ProcessedMedia
from mmlora.towers.base import PromptLayout
from mmlora.towers.encoder import encoder_key


class SpellingTokenizer:
    """Decodes a token id to a letter; enough for tests that ignore text."""

    def decode(self, token_ids: list[int], **_: object) -> str:
        return "".join(chr(97 + token % 26) for token in token_ids)


def make_sequence(
    prompt: Collection[int] = (1, 2, 3),
    *,
    params: SamplingParams | None = None,
    adapter: Adapter | None = None,
    media: tuple[MediaInput, ...] = (),
    output: Collection[int] = (),
    seed: int = 0,
    layout: PromptLayout = PromptLayout(),  # noqa: B008  frozen
    adapter_start: int = 0,
    **others: Any,
) -> Sequence:
    """Return a sequence of a new request, with `output` as the tokens generated so far.

    `others` are fields of its `EngineInput`.
    """
    params = params or SamplingParams()
    reason = "explicit" if adapter else "none"
    choice = LoRAChoice(adapter.name if adapter else None, adapter.digest if adapter else None, reason)
    limit = params.max_tokens or 16
    request_input = EngineInput(
        "r", None, list(prompt), params, media, adapter, choice, None, limit, adapter_start, layout, **others
    )
    request = Request(request_input, arrival_s=0.0)
    generator = torch.Generator().manual_seed(params.seed if params.seed is not None else seed)
    seq = Sequence(request, 0, [*prompt, *output], Detokenizer(SpellingTokenizer(), list(prompt)), generator)
    request.sequences.append(seq)
    return seq


def make_group(
    length: int = 3, n: int = 1, adapter: Adapter | None = None, max_tokens: int = 4, **others: Any
) -> list[Sequence]:
    """Return the `n` sequences of one request, or `n` requests if `others` has the name of their `group`."""
    params = SamplingParams(max_tokens=max_tokens)
    seqs = [make_sequence(range(length), params=params, adapter=adapter, **others) for _ in range(n)]
    for index, seq in enumerate(seqs):
        if others.get("group") is None:
            seq.request, seq.index = seqs[0].request, index
    return seqs


def make_adapter(name: str, uid: int = 1, generation: int = 0) -> Adapter:
    """Return an adapter without matrices."""
    return Adapter(name, f"digest of {name}", None, Path("/nowhere"), {}, AdapterReport(0, {}), uid, generation)


def make_media(content: str, start: int, num_tokens: int, *, mode: str = "speech", digest: str | None = None):
    """Return a media item without tensors, whose placeholders start at `start`."""
    processed = ProcessedMedia("audio", content, {}, num_tokens)
    return MediaInput(processed, start, start + processed.num_tokens, mode, encoder_key(processed, mode, digest))
