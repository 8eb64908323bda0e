"""Streaming parsers that split generated text into content and tool calls.

Text that is not a valid call of an offered tool is content, markers included unless they are special tokens.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from mmlora.server.openai.tools.blocks import Block, Call, JSONBlock, Tools, XMLBlock
from mmlora.server.openai.tools.formats import ToolCallFormat

MAX_FAILED = (
    100  # blocks that are not calls; each may be as long as the output, so parsing many would take quadratic time
)


@dataclass(frozen=True)
class ToolCallDelta:
    """The start of a call, or more arguments of the call at this index.

    Attributes:
        index: number of the call in its choice.
        arguments: JSON text, or the next part of it.
        name: name of the tool at the start of a call; None afterwards.
        is_last: the call is complete. False if more follows, or the end is known only at the end of the output.
    """

    index: int
    arguments: str
    name: str | None = None
    is_last: bool = False


@dataclass(frozen=True)
class ReasoningDelta:
    """Text of the reasoning before content and calls."""

    text: str


Piece = str | ReasoningDelta | ToolCallDelta  # content, reasoning, or part of a call


class TextParser(Protocol):
    """Splits the text of one choice into content and tool calls."""

    def feed(self, text: str) -> list[Piece]:
        """Feed a text delta and return the completed pieces."""
        ...

    def finish(self) -> list[Piece]:
        """Flush the buffer and return the remaining pieces."""
        ...


def join_calls(pieces: Iterable[Piece]) -> list[ToolCallDelta]:
    """Return one delta per call with its name and all its arguments."""
    calls: dict[int, ToolCallDelta] = {}
    for piece in pieces:
        if isinstance(piece, ToolCallDelta):
            call = calls.get(piece.index)
            arguments = piece.arguments if call is None else call.arguments + piece.arguments
            calls[piece.index] = replace(call or piece, arguments=arguments, is_last=piece.is_last)
    return list(calls.values())


class ToolCallParser:
    """Parser of calls in a format. Content is returned immediately, a call when it is complete.

    Args:
        format: tool call format of the model.
        tools: the tools that may be called.
        hidden: markers that are not shown to clients.
        is_exclusive: content is followed by no calls; markers in it are part of it.
    """

    def __init__(
        self, format: ToolCallFormat, tools: Tools, hidden: Collection[str] = (), *, is_exclusive: bool = False
    ) -> None:
        self._format = format
        self._is_exclusive = is_exclusive
        self._starts = format.starts
        self._marks = {*format.starts, *hidden}
        self._hidden = re.compile("|".join(map(re.escape, hidden))) if hidden else None
        self._new_block: Callable[[int], Block] = XMLBlock if format.is_xml else JSONBlock
        self._tools = tools
        self._pending = ""  # text not returned yet
        self._blanks = ""  # whitespace at the end of the content so far; dropped if a call follows
        self._num_calls = 0
        self._state: Callable[[bool], Iterator[Piece]] = self._begin
        self._must_wait = False
        self._num_failed = 0  # complete blocks that are not calls
        self._block: Block = self._new_block(0)  # the possible call at the start of `_pending`

    def feed(self, text: str) -> list[Piece]:
        """Feed a text delta and return the completed pieces."""
        self._pending += text
        return self._advance(is_last=False)

    def finish(self) -> list[Piece]:
        """Flush the buffer and return the remaining pieces; an incomplete call is content."""
        pieces = self._advance(is_last=True)
        return pieces if self._num_calls or not self._blanks else [*pieces, self._blanks]

    def _advance(self, *, is_last: bool) -> list[Piece]:
        pieces: list[Piece] = []
        self._must_wait = False
        while self._pending and not self._must_wait:
            pieces += self._state(is_last)
        return pieces

    def _begin(self, is_last: bool) -> Iterator[Piece]:
        """State at the start of the output or after a call and its end marker, where a call may need no marker."""
        start = len(self._pending) - len(self._pending.lstrip())
        if self._format.bare and start == len(self._pending) and not is_last:
            self._must_wait = True
        elif self._format.bare and self._pending[start : start + 1] in tuple(self._format.bare):
            yield from self._open(start, 0)
        else:
            self._state = self._read_content

    def _read_content(self, is_last: bool) -> Iterator[Piece]:
        """State in content, up to the next marker."""
        found = [(self._pending.find(mark), mark) for mark in self._starts if mark in self._pending]
        if found:
            position, mark = min(found)
            yield from self._open(position, len(mark))
            return
        held = 0 if is_last else num_held_back(self._pending, self._marks)
        yield from self._emit_content(len(self._pending) - held)
        self._must_wait = True

    def _open(self, position: int, head: int) -> Iterator[Piece]:
        yield from self._emit_content(position)
        if self._starts or not self._is_exclusive:
            self._block, self._state = self._new_block(head), self._read_call

    def _read_call(self, is_last: bool) -> Iterator[Piece]:
        """State at a marker, or at a bracket that needs none."""
        self._block.scan(self._pending)
        is_open = self._block.end is None and not self._block.is_broken
        if is_open and not is_last:
            self._must_wait = True
            return
        calls = self._calls()
        if not calls:
            self._num_failed += not self._block.is_broken
            if self._num_failed == MAX_FAILED:
                self._starts = ()  # the rest is content
            self._state = self._read_content
            yield from self._emit_content(max(1, self._block.head))
            return
        self._pending, self._blanks, self._state = self._pending[self._block.end :], "", self._end
        for name, arguments in calls:
            yield ToolCallDelta(self._num_calls, self._without_hidden(arguments), name, is_last=True)
            self._num_calls += 1

    def _calls(self) -> list[Call]:
        """Return the calls of the block; empty if anything in it is not a call of an offered tool."""
        if self._block.is_broken or self._block.end is None:
            return []
        try:
            return self._block.calls(self._pending, self._tools)
        except (ValueError, RecursionError):
            return []

    def _end(self, is_last: bool) -> Iterator[Piece]:
        """State after a call: drop whitespace, separators and end markers."""
        self._pending = self._pending.lstrip(f"{self._format.separators} \t\r\n")
        ended = [mark for mark in self._format.ends if self._pending.startswith(mark)]
        if ended:
            self._pending = self._pending[len(ended[0]) :]
        elif not is_last and any(mark.startswith(self._pending) for mark in self._format.ends):
            self._must_wait = True
        else:
            self._state = self._begin
        yield from ()

    def _emit_content(self, length: int) -> Iterator[Piece]:
        text, self._pending = self._pending[:length], self._pending[length:]
        text = self._blanks + self._without_hidden(text)
        shown = text.rstrip()
        self._blanks = text[len(shown) :]
        if shown:
            self._starts = () if self._is_exclusive else self._starts
            yield shown

    def _without_hidden(self, text: str) -> str:
        return self._hidden.sub("", text) if self._hidden is not None else text


def num_held_back(text: str, marks: Collection[str]) -> int:
    """Return the length of the longest suffix of the text that is a prefix of a marker."""
    longest = max(map(len, marks), default=1)
    ends = (text[-length:] for length in range(min(longest - 1, len(text)), 0, -1))
    return next((len(end) for end in ends if any(mark.startswith(end) for mark in marks)), 0)
