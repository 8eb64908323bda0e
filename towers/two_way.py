"""Families whose pictures, or whole prompts, are seen both ways: by the tokens before them, too."""

from collections.abc import Sequence

from mmlora.processors.base import ProcessedMedia
from mmlora.towers.base import PromptLayout, TwoWaySpan
from mmlora.towers.general import GeneralTowers, places_of


class Gemma3Towers(GeneralTowers):
    """The tokens of a picture see each other, within the sliding window."""

    def layout(self, token_ids: Sequence[int], media: Sequence[tuple[int, ProcessedMedia]]) -> PromptLayout:
        """See `Towers.layout`."""
        spans: list[TwoWaySpan] = []
        for place in (start + place for start, item in media for place in places_of(item)):
            if spans and spans[-1].end == place:
                spans[-1] = TwoWaySpan(spans[-1].start, place + 1)
            else:
                spans.append(TwoWaySpan(place, place + 1))
        return PromptLayout(two_way=tuple(spans))


class PaliGemmaTowers(GeneralTowers):
    """A prompt with a picture sees itself as a whole, and positions count up from 1."""

    def layout(self, token_ids: Sequence[int], media: Sequence[tuple[int, ProcessedMedia]]) -> PromptLayout:
        """See `Towers.layout`."""
        num_tokens = len(token_ids)
        two_way = (TwoWaySpan(0, num_tokens, ignores_window=True),) if media else ()
        return PromptLayout((tuple(range(1, num_tokens + 1)),), 1, two_way)
