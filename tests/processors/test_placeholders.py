"""Expansion of placeholders: one per item, in order; other counts are errors that name both."""

import pytest

from mmlora.errors import MediaError
from mmlora.processors.base import ProcessedMedia
from mmlora.processors.placeholders import PlaceholderRange, expand_placeholders

AUDIO, IMAGE = 91, 92


class Processor:
    modalities = frozenset({"audio", "image"})

    def placeholder_token(self, modality):
        return f"<|{modality}|>"

    def placeholder_token_id(self, modality):
        return {"audio": AUDIO, "image": IMAGE}[modality]


def media(*sizes):
    return [ProcessedMedia(modality, "", {}, num_tokens) for modality, num_tokens in sizes]


def test_placeholders_are_expanded_in_order():
    items = media(("image", 2), ("audio", 3), ("image", 1))
    ids, ranges = expand_placeholders([1, AUDIO, 2, IMAGE, IMAGE, 3], items, Processor())
    assert ids == [1, AUDIO, AUDIO, AUDIO, 2, IMAGE, IMAGE, IMAGE, 3]
    assert ranges == [PlaceholderRange(1, 3, 1), PlaceholderRange(5, 2, 0), PlaceholderRange(7, 1, 2)]


def test_text_is_unchanged():
    assert expand_placeholders([1, 2, 3], [], Processor()) == ([1, 2, 3], [])


@pytest.mark.parametrize(
    "ids, items, named",
    [
        ([1, AUDIO], [], r"1 audio placeholder.*0 audio item"),
        ([1, 2], media(("image", 4)), r"0 image placeholder.*1 image item"),
        ([AUDIO, AUDIO, IMAGE], media(("audio", 4), ("image", 1)), r"2 audio placeholder.*1 audio item"),
        ([IMAGE], media(("audio", 4)), r"0 audio placeholder.*1 audio item"),
        ([1], media(("video", 4)), r"1 video item.*audio, image"),
    ],
)
def test_mismatched_counts_are_errors_with_both_counts(ids, items, named):
    with pytest.raises(MediaError, match=named):
        expand_placeholders(ids, items, Processor())
