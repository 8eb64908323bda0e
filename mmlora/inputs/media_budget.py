"""`MediaBudget`: what the media of one prompt may take, counted before most of them are computed."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmlora.errors import ContextLengthExceeded, MediaError
from mmlora.processors.base import MultiModalProcessor, ProcessedMedia
from mmlora.processors.media.items import MediaItem


@dataclass
class MediaBudget:
    """The tokens and bytes of one prompt, which grow with its media, and their limits.

    Attributes:
        num_tokens: of the text, and of the media that are counted; text that a processor adds is not.
        max_model_len: prompt and output tokens.
        max_bytes: decoded media and their features together.
        field: of the request, for errors.
        num_bytes: of the media that are counted.
    """

    num_tokens: int
    max_model_len: int
    max_bytes: int
    field: str
    num_bytes: int = 0

    def process(
        self, items: Sequence[MediaItem], processor: MultiModalProcessor, options: Mapping[str, Any]
    ) -> list[ProcessedMedia]:
        """Compute the tensors of a prompt's media, as long as they fit.

        The first item of each shape shows what all items of this shape take: these are counted before the second one
        is computed. Memory is thus bounded by the limits and one item, however many there are.

        Raises:
            ContextLengthExceeded: their tokens do not fit into the context.
            MediaError: they take too many bytes, or an item cannot be used with the model.
            RequestError: an option is not allowed.
        """
        self._take(0, sum(item.num_bytes for item in items))
        waiting = Counter(map(_shape, items))
        processed = []
        for item in items:
            found = processor.process(item, options)
            num_equal = waiting.pop(_shape(item), 0)  # counted once
            self._take(num_equal * found.num_tokens, num_equal * found.num_bytes)
            processed.append(found)
        return processed

    def _take(self, num_tokens: int, num_bytes: int) -> None:
        self.num_tokens += num_tokens
        self.num_bytes += num_bytes
        if self.num_tokens >= self.max_model_len:
            raise too_long(f"{self.num_tokens} tokens or more", self.max_model_len, self.field)
        if self.num_bytes > self.max_bytes:
            raise MediaError(
                f"the media of the prompt take {self.num_bytes} bytes or more, decoded and as features; "
                f"max_decoded_media_bytes allows {self.max_bytes}"
            )


def _shape(item: MediaItem) -> tuple[object, ...]:
    """Return what the number of tokens and the size of the features depend on, for a model and its options."""
    return (item.modality, *item.dimensions.values())


def too_long(size: str, max_model_len: int, field: str) -> ContextLengthExceeded:
    """Return the error for a prompt of a size, in the words that clients recognize; `field` is that of the request."""
    return ContextLengthExceeded(
        f"the prompt is too long: it has {size}; this model's maximum context length is {max_model_len} tokens, "
        f"max_model_len={max_model_len}, and the output needs at least one",
        field,
    )
