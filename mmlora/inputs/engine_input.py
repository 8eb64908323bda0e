"""`EngineInput`: a request as the engine takes it, with its `MediaInput`s.

The input processor makes them outside the engine thread; nothing in them changes afterwards.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from mmlora.lora.adapter import Adapter
from mmlora.lora.mix import LoRAMix
from mmlora.lora.request import LoRARequest
from mmlora.outputs import LoRAChoice
from mmlora.processors.base import ProcessedMedia
from mmlora.sampling_params import SamplingParams
from mmlora.structured_outputs import Matcher
from mmlora.towers.base import PromptLayout


@dataclass(frozen=True)
class MediaInput:
    """One media item of a prompt: its tensors, where it goes, and the identity of its embeddings.

    `encoder_key` names everything that the embeddings depend on: content, processor options, projection mode and
    the tower part of the adapter; and the salt of the request.
    """

    media: ProcessedMedia
    start: int  # first placeholder in the prompt
    mode: str
    encoder_key: tuple[tuple[str, object], ...]

    @property
    def end(self) -> int:
        """One past the last placeholder."""
        return self.start + self.media.num_tokens


@dataclass(frozen=True)
class EngineInput:
    """A request made ready outside the engine thread: tokenized, its media processed, its adapter chosen and loaded."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    media: tuple[MediaInput, ...]
    adapter: Adapter | None
    lora: LoRAChoice
    lora_request: LoRARequest | LoRAMix | None
    max_tokens: int
    adapter_start: int = 0  # first token that the adapter changes; later than 0 for an activated LoRA
    layout: PromptLayout = PromptLayout()
    priority: int = 0  # lower is served earlier
    cache_salt: str | None = None  # prefixes and encoded media are shared among requests with the same one
    matchers: tuple[Matcher, ...] = ()  # at the start of each answer, where they are under a constraint

    @cached_property
    def num_media_tokens(self) -> Mapping[str, int]:
        """Tokens of the prompt that stand for media, by modality."""
        counts: Counter[str] = Counter()
        for item in self.media:
            counts[item.media.modality] += item.media.num_tokens
        return counts
