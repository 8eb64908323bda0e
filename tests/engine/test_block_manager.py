"""`BlockManager`: blocks are shared exactly when everything that their content depends on is equal."""

import pytest

from mmlora import SamplingParams
from mmlora.engine.block_manager import BlockManager
from mmlora.towers.base import BidirectionalSpan, PromptLayout
from tests.engine.sequences import make_adapter, make_media, make_sequence

BLOCK = 4


def run(manager, seq):
    """Start a sequence, compute all its tokens, and return how many came from the cache."""
    num_cached = manager.match_prefix(seq)
    assert manager.can_allocate(seq, len(seq.token_ids))
    manager.allocate(seq, len(seq.token_ids))
    seq.num_computed_tokens = len(seq.token_ids)
    manager.mark_computed(seq)
    return num_cached


def num_shared(first, second, num_blocks=16):
    """Return how many tokens of `second` are cached after `first` has run."""
    manager = BlockManager(num_blocks, BLOCK)
    assert run(manager, first) == 0
    return run(manager, second)


def test_equal_prefixes_share_full_blocks():
    assert num_shared(make_sequence(range(10)), make_sequence(range(10))) == 8
    assert num_shared(make_sequence(range(10)), make_sequence([*range(8), 99, 100])) == 8
    assert num_shared(make_sequence(range(10)), make_sequence([*range(7), 99, 100])) == 4
    assert num_shared(make_sequence(range(10)), make_sequence([99, *range(1, 10)])) == 0


def test_one_token_is_left_to_compute():
    assert num_shared(make_sequence(range(8)), make_sequence(range(8))) == 4
    assert num_shared(make_sequence(range(8)), make_sequence(range(9))) == 8
    assert num_shared(make_sequence(range(4)), make_sequence(range(4))) == 0


def test_generated_tokens_are_cached_too():
    assert num_shared(make_sequence(range(5), output=[7, 8, 9, 10]), make_sequence([*range(5), 7, 8, 9, 10])) == 8


@pytest.mark.parametrize(
    ("first", "second", "is_shared"),
    [
        (make_adapter("a"), make_adapter("a"), True),
        (None, make_adapter("a"), False),
        (make_adapter("a"), None, False),
        (make_adapter("a"), make_adapter("b"), False),
        (make_adapter("a", uid=1), make_adapter("a", uid=2), False),
        (make_adapter("a", generation=0), make_adapter("a", generation=1), False),
    ],
)
def test_the_adapter_identity_is_part_of_the_hash(first, second, is_shared):
    found = num_shared(make_sequence(range(10), adapter=first), make_sequence(range(10), adapter=second))
    assert found == (8 if is_shared else 0)


@pytest.mark.parametrize(
    ("first", "second", "num_cached"),
    [
        (make_media("x", 5, 6), make_media("x", 5, 6), 12),
        (make_media("x", 5, 6), make_media("y", 5, 6), 4),
        (make_media("x", 5, 6), make_media("x", 6, 6), 4),
        (make_media("x", 5, 6), make_media("x", 5, 6, mode="vision"), 4),
        (make_media("x", 5, 6), make_media("x", 5, 6, digest="tower"), 4),
    ],
)
def test_the_media_behind_placeholders_are_part_of_the_hash(first, second, num_cached):
    ids = [0] * 14
    assert num_shared(make_sequence(ids, media=(first,)), make_sequence(ids, media=(second,))) == num_cached


@pytest.mark.parametrize(
    ("first", "second", "num_cached"),
    [("a", "a", 8), ("a", "b", 0), ("a", None, 0), (None, "a", 0), (None, "None", 0), (None, None, 8)],
)
def test_the_salt_is_part_of_the_hash(first, second, num_cached):
    sequences = (make_sequence(range(10), cache_salt=salt) for salt in (first, second))
    assert num_shared(*sequences) == num_cached


def test_a_shared_block_is_free_after_both_sequences_are():
    manager = BlockManager(8, BLOCK)
    first, second = make_sequence(range(9)), make_sequence(range(9))
    run(manager, first)
    run(manager, second)
    assert first.block_table[:2] == second.block_table[:2] and first.block_table[2] != second.block_table[2]
    assert manager.num_free_blocks == 4
    manager.free(first)
    assert manager.num_free_blocks == 5
    manager.free(second)
    assert manager.num_free_blocks == 8


def test_freed_blocks_stay_cached_until_they_are_reused():
    manager = BlockManager(4, BLOCK)
    first = make_sequence(range(9))
    run(manager, first)
    manager.free(first)
    assert run(manager, seq := make_sequence(range(9))) == 8
    manager.free(seq)
    run(manager, other := make_sequence(range(100, 116)))  # takes all four blocks
    manager.free(other)
    assert run(manager, make_sequence(range(9))) == 0


def test_the_end_of_a_prefix_is_evicted_before_its_start():
    manager = BlockManager(4, BLOCK)
    first = make_sequence(range(12))
    run(manager, first)
    manager.free(first)
    run(manager, other := make_sequence(range(100, 107)))  # two blocks: the unused one, and the last of the prefix
    manager.free(other)
    assert run(manager, make_sequence(range(13))) == 8


def test_can_allocate_counts_the_blocks_that_a_sequence_has():
    manager = BlockManager(2, BLOCK)
    seq = make_sequence(range(20))
    assert manager.can_allocate(seq, 8)
    assert not manager.can_allocate(seq, 9)
    manager.allocate(seq, 5)
    assert len(seq.block_table) == 2 and manager.num_free_blocks == 0
    assert manager.can_allocate(seq, 8)  # fits into the block that it has


def test_blocks_are_not_cached_before_they_are_computed():
    manager = BlockManager(8, BLOCK)
    seq = make_sequence(range(12))
    manager.allocate(seq, 12)
    seq.num_computed_tokens = 7
    manager.mark_computed(seq)
    assert manager.match_prefix(make_sequence(range(12))) == 4


def test_prompt_logprobs_skip_the_prefix_cache():
    manager = BlockManager(8, BLOCK)
    run(manager, make_sequence(range(9)))
    assert manager.match_prefix(make_sequence(range(9), params=SamplingParams(prompt_logprobs=1))) == 0


def test_without_prefix_caching_nothing_is_shared():
    manager = BlockManager(8, BLOCK, enable_prefix_caching=False)
    run(manager, make_sequence(range(9)))
    assert run(manager, make_sequence(range(9))) == 0


def test_bidirectional_tokens_depend_on_the_whole_span():
    def shared(second, layout, other_layout=None):
        return num_shared(make_sequence(range(12), layout=layout), make_sequence(second, layout=other_layout or layout))

    both = PromptLayout(bidirectional_spans=(BidirectionalSpan(2, 9),))
    assert shared(range(12), both) == 8
    assert shared([*range(8), 77, *range(9, 12)], both) == 0
    assert shared([*range(9), 77, 78], both) == 8  # beyond the span
    assert shared(range(12), both, PromptLayout(bidirectional_spans=(BidirectionalSpan(2, 10),))) == 0
    assert shared(range(12), both, PromptLayout()) == 0
    assert shared(range(12), PromptLayout(bidirectional_spans=(BidirectionalSpan(4, 9),)), PromptLayout()) == 4


def test_media_later_in_a_span_are_part_of_the_hash():
    def shared(content, start):
        layout = PromptLayout(bidirectional_spans=(BidirectionalSpan(0, 12),))
        first = make_sequence(range(12), layout=layout, media=(make_media("x", 9, 2),))
        return num_shared(first, make_sequence(range(12), layout=layout, media=(make_media(content, start, 2),)))

    assert (shared("x", 9), shared("y", 9), shared("x", 8)) == (8, 0, 0)


def test_an_activated_lora_affects_earlier_tokens_of_a_span():
    def shared(layout):
        base = [make_sequence(range(12), layout=layout) for _ in range(2)]
        adapter = make_adapter("a")
        activated = [make_sequence(range(12), adapter=adapter, adapter_start=8, layout=layout) for _ in range(2)]
        return num_shared(base[0], activated[0]), num_shared(activated[1], base[1])

    assert shared(PromptLayout()) == (8, 8)
    assert shared(PromptLayout(bidirectional_spans=(BidirectionalSpan(0, 10),))) == (0, 0)


def test_positions_are_part_of_the_hash():
    plain, shifted = tuple(range(12)), (*range(6), *range(7, 13))

    def shared(*rows):
        first = make_sequence(range(12), layout=PromptLayout((plain, plain, shifted), 1))
        return num_shared(first, make_sequence(range(12), layout=PromptLayout(rows)))

    assert shared(plain, plain, shifted) == 8
    assert shared(plain, plain, plain) == 4
