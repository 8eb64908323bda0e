"""`EngineInput`: a processed request, the only form that the engine accepts.

`InputProcessor` creates it outside the engine thread; it is immutable.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

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
    """One media item of a prompt, processed and placed.

    Attributes:
        media: its tensors.
        start, end: its placeholder tokens are `[start, end)` of the prompt.
        mode: encoding mode, see `Towers.joint_modes`.
        encoder_key: key in the encoder cache. It consists of everything that the embeddings depend on (content,
            processor options, encoding mode, the adapter's tower part) and the request's cache salt.
    """

    media: ProcessedMedia
    start: int
    end: int
    mode: str
    encoder_key: tuple[tuple[str, object], ...]


@dataclass(frozen=True)
class EngineInput:
    """A request that is ready to be scheduled: tokenized, its media processed, its adapter chosen and loaded."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    media: tuple[MediaInput, ...]
    adapter: Adapter | None
    lora: LoRAChoice
    lora_request: LoRARequest | LoRAMix | None
    max_tokens: int
    adapter_start: int = 0  # first token with the adapter applied; above 0 for an activated LoRA (aLoRA)
    layout: PromptLayout = PromptLayout()
    priority: int = 0  # lower runs earlier
    group: str | None = None  # requests of a group share the turns of one request; None: the request has its own
    cache_salt: str | None = None  # only requests with the same salt share cached prefixes and encoded media
    matchers: tuple[Matcher, ...] = ()  # one per output at its start state; empty without a constraint
    bad_words: tuple[tuple[int, ...], ...] = ()  # tokens that may not be generated in this order
    num_media_tokens: Mapping[str, int] = field(default_factory=dict)  # placeholder tokens in the prompt, by modality
