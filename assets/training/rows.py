"""Pack conversations into rows: blocks that share a prefix (the media) but do not see each other.

Packing several questions behind one picture trains several answers for the price of one set of image tokens.
"""

import random
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedTokenizerFast

from mmlora.assets.training.tokenizer import ASSISTANT, END, USER


@dataclass(frozen=True)
class Tokens:
    """Token ids with labels of the same length; a label of -1 is not trained on.

    `looks`, if not empty, holds for each position the picture cell that it should attend to, or -1.
    """

    ids: list[int]
    labels: list[int]
    looks: list[int] = field(default_factory=list)

    def __add__(self, other: "Tokens") -> "Tokens":
        return Tokens(self.ids + other.ids, self.labels + other.labels, self._looks() + other._looks())

    def _looks(self) -> list[int]:
        return self.looks or [-1] * len(self.ids)


@dataclass
class Row:
    """A prefix that every block sees, and the blocks."""

    prefix: Tokens = field(default_factory=lambda: Tokens([], []))
    blocks: list[Tokens] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return len(self.prefix.ids) + sum(len(block.ids) for block in self.blocks)


@dataclass(frozen=True)
class Batch:
    """Rows padded to one length; `labels` are shifted, so position i holds the token that follows it.

    Shapes: ids, labels, positions and looks `[num_rows, num_tokens]`, mask
    `[num_rows, 1, num_tokens, num_tokens]` bool.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    looks: torch.Tensor
    mask: torch.Tensor


class Encoder:
    """Turns questions and answers into `Tokens` with the chat markers of the assistant."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.user, self.assistant, self.end = (int(tokenizer.convert_tokens_to_ids(t)) for t in (USER, ASSISTANT, END))
        self._cache: dict[str, list[int]] = {}

    def text(self, text: str) -> list[int]:
        """Encode text without adding special tokens; short texts are cached."""
        if text not in self._cache:
            if len(self._cache) > 200_000:
                self._cache.clear()
            self._cache[text] = self.tokenizer.encode(text, add_special_tokens=False)
        return self._cache[text]

    def prompt(self, ids: list[int]) -> Tokens:
        return Tokens(ids, [-1] * len(ids))

    def answer(self, answer: str, cells: tuple[int, ...] = ()) -> Tokens:
        """End the user's turn and answer it; the assistant marker is trained on too, so prompts may lack it.

        Args:
            answer: The answer.
            cells: For each of its tokens the picture cell that shows it, or -1; may be empty.
        """
        ids = self.text(answer)
        looks = [-1, *cells, -1, -1] if len(cells) == len(ids) else []
        return Tokens([self.end, self.assistant, *ids, self.end], [-1, self.assistant, *ids, self.end], looks)

    def exchange(self, question: str, answer: str) -> Tokens:
        """Encode one turn of the user and its answer."""
        return self.prompt([self.user, *self.text(question)]) + self.answer(answer)


def pack(exchanges: list[Tokens], num_tokens: int) -> list[Row]:
    """Pack text exchanges greedily, in their order, into rows of at most `num_tokens`."""
    rows = [Row()]
    for exchange in exchanges:
        if rows[-1].num_tokens + len(exchange.ids) > num_tokens:
            rows.append(Row())
        rows[-1].blocks.append(exchange)
    return rows


def collate(rows: list[Row]) -> Batch:
    """Build the tensors of a batch; every block's positions go on from the end of its row's prefix."""
    length = max(row.num_tokens for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full((len(rows), length), -1)
    positions = torch.zeros(len(rows), length, dtype=torch.long)
    block_ids, looks = torch.full((len(rows), length), -1), torch.full((len(rows), length), -1)
    for i, row in enumerate(rows):
        start, shared = 0, len(row.prefix.ids)
        for k, part in enumerate([row.prefix, *row.blocks]):
            if not part.ids:
                continue
            stop = start + len(part.ids)
            ids[i, start:stop] = torch.tensor(part.ids)
            labels[i, start : stop - 1] = torch.tensor(part.labels[1:])
            first = shared if k else 0
            positions[i, start:stop] = torch.arange(first, first + len(part.ids))
            block_ids[i, start:stop] = k
            if part.looks:
                looks[i, start:stop] = torch.tensor(part.looks)
            start = stop
    return Batch(ids, labels, positions, looks, _mask(block_ids))


def _mask(block_ids: torch.Tensor) -> torch.Tensor:
    query, key = block_ids[:, :, None], block_ids[:, None, :]
    causal = torch.ones(block_ids.shape[1], block_ids.shape[1], dtype=torch.bool).tril()
    return (((query == key) | (key == 0)) & causal)[:, None]


def join_turns(exchanges: list[Tokens], rng: random.Random, share: float = 0.15) -> list[Tokens]:
    """Join some neighbours into conversations of two turns."""
    joined: list[Tokens] = []
    for exchange in exchanges:
        if joined and rng.random() < share and len(joined[-1].ids) < 60:
            joined[-1] = joined[-1] + exchange
        else:
            joined.append(exchange)
    return joined
