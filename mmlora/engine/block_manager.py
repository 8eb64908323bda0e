"""`BlockManager`: allocates KV blocks to sequences, and shares full blocks as a prefix cache.

A full block is hashed over everything that its keys and values depend on: all tokens up to its end, the media behind
placeholders, and the identity of the adapter. The request's cache salt is hashed, too, which prevents timing attacks:
clients cannot find out from latencies what prompts were sent with another salt. Freed blocks stay cached until they
are reused.
"""

import hashlib
from collections import OrderedDict

from mmlora.engine.sequence import Sequence
from mmlora.towers.base import BidirectionalSpan


class BlockManager:
    """Allocates KV blocks of `block_size` tokens, and matches cached prefixes."""

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._ref_counts = [0] * num_blocks
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # least recently freed first

    @property
    def num_free_blocks(self) -> int:
        """Number of blocks without a sequence; some of them are still cached."""
        return len(self._free)

    def uses_prefix_cache(self, seq: Sequence) -> bool:
        """Return whether the prefix cache is queried for a sequence."""
        return self.enable_prefix_caching and not seq.wants_prompt_logprobs

    def match_prefix(self, seq: Sequence) -> int:
        """Assign the blocks of the longest cached prefix to a sequence without blocks.

        At least one token is left to compute, since its logits are needed.

        Returns:
            The number of cached tokens, a multiple of the block size.
        """
        if not self.uses_prefix_cache(seq):
            return 0
        for index in range((len(seq.token_ids) - 1) // self.block_size):
            block = self._block_of.get(self._block_hash(seq, index))
            if block is None:
                break
            self._retain(block)
            seq.block_table.append(block)
        return len(seq.block_table) * self.block_size

    def can_allocate(self, seq: Sequence, num_tokens: int) -> bool:
        """Return whether enough blocks are free for the first `num_tokens` tokens of a sequence."""
        return self._num_missing(seq, num_tokens) <= len(self._free)

    def allocate(self, seq: Sequence, num_tokens: int) -> None:
        """Extend the block table to the first `num_tokens` tokens; `can_allocate` must be true."""
        for _ in range(self._num_missing(seq, num_tokens)):
            block = next(iter(self._free))
            self._forget(block)
            self._retain(block)
            seq.block_table.append(block)

    def mark_computed(self, seq: Sequence) -> None:
        """Add the blocks that became full to the prefix cache."""
        if not self.enable_prefix_caching:
            return
        for index in range(seq.num_computed_tokens // self.block_size):
            block = seq.block_table[index]
            if block in self._hash_of:
                continue
            digest = self._block_hash(seq, index)
            if digest not in self._block_of:
                self._hash_of[block] = digest
                self._block_of[digest] = block

    def free(self, seq: Sequence) -> None:
        """Free all blocks of a sequence; they stay cached until they are reused."""
        for block in reversed(seq.block_table):  # the start of a prefix is evicted after its end
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                self._free[block] = None
        seq.block_table.clear()

    def _num_missing(self, seq: Sequence, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size) - len(seq.block_table)

    def _retain(self, block: int) -> None:
        if self._ref_counts[block] == 0:
            del self._free[block]
        self._ref_counts[block] += 1

    def _forget(self, block: int) -> None:
        digest = self._hash_of.pop(block, None)
        if digest is not None:
            del self._block_of[digest]

    def _block_hash(self, seq: Sequence, index: int) -> bytes:
        while len(seq.block_hashes) <= index:
            seq.block_hashes.append(self._hash_next(seq))
        return seq.block_hashes[index]

    def _hash_next(self, seq: Sequence) -> bytes:
        index = len(seq.block_hashes)
        start, end = index * self.block_size, (index + 1) * self.block_size
        root = (("long", seq.uses_long_rope_factors), ("salt", seq.request.input.cache_salt))
        parent = seq.block_hashes[-1] if index else root
        spans = seq.bidirectional_spans_between(start, end)
        attended_end = max([end, *(span.end for span in spans)])
        adapter = None  # blocks before an activated LoRA starts are the base model's and shared with it
        if seq.adapter is not None and attended_end > seq.adapter_start:
            adapter = ("adapter", seq.adapter.identity, max(0, seq.adapter_start - start))
        media = [("media", item.encoder_key, item.start - start) for _, item in seq.media_between(start, end)]
        content = (
            parent,
            adapter,
            ("tokens", seq.token_ids[start:end]),
            media,
            ("positions", [row[start:end] for row in seq.layout.positions or ()]),
            # Bidirectional tokens may attend beyond the block, so it depends on the whole span.
            ("two-way", [(span.start - start, _span_digest(seq, span)) for span in spans]),
        )
        return hashlib.sha256(repr(content).encode()).digest()


def _span_digest(seq: Sequence, span: BidirectionalSpan) -> bytes:
    if span not in seq.span_digests:
        media = [(item.encoder_key, item.start - span.start) for _, item in seq.media_between(span.start, span.end)]
        seq.span_digests[span] = hashlib.sha256(repr((seq.token_ids[span.start : span.end], media)).encode()).digest()
    return seq.span_digests[span]
