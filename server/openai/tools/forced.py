"""Parsers of forced tool calls, whose form a constraint guarantees. Arguments are returned as they are generated."""

import re
from collections.abc import Collection

from mmlora.server.openai.tools.parser import Piece, ToolCallDelta


class NamedToolParser:
    """Parser of an output that consists of the arguments of one tool."""

    def __init__(self, name: str) -> None:
        self._name: str | None = name

    def feed(self, text: str) -> list[Piece]:
        """Return the text delta as arguments."""
        name, self._name = self._name, None
        return [ToolCallDelta(0, text, name)] if text or name is not None else []

    def finish(self) -> list[Piece]:
        """Return the call if there was no text at all."""
        return self.feed("")


class RequiredToolParser:
    """Parser of a list of calls in JSON, each an object with `name` and `arguments` in this order.

    An output that ends early is an incomplete call, too: no part of it is content.

    Args:
        names: names of the tools that may be called.
    """

    _NAME = re.compile(r'\{\s*"name"\s*:\s*"([^"]*)')
    _HEAD = re.compile(_NAME.pattern + r'"\s*,\s*"arguments"\s*:\s*(?=\S)')
    _MARK = re.compile(r'\\.|["\[\]{}]', re.DOTALL)

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._pending = ""  # text not returned yet
        self._num_calls = 0
        self._in_arguments = False
        self._position = 0  # in the arguments in `_pending`; the text before it was scanned
        self._depth = 0
        self._in_string = False

    def feed(self, text: str) -> list[Piece]:
        """Feed a text delta and return at most one piece for each call."""
        self._pending += text
        pieces: list[Piece] = []
        while True:
            name = None
            if not self._in_arguments:
                name = self._read_head()
                if name is None:
                    return pieces
            arguments, is_last = self._read_arguments()
            if arguments or name is not None or is_last:
                pieces.append(ToolCallDelta(self._num_calls, arguments, name, is_last=is_last))
            if not is_last:
                return pieces
            self._num_calls += 1

    def finish(self) -> list[Piece]:
        """Return the call whose name is incomplete or missing, if the output ended there."""
        if self._in_arguments or (self._num_calls and not self._pending):
            return []
        return [ToolCallDelta(self._num_calls, "", self._likely_name())]

    def _read_head(self) -> str | None:
        """Drop the text before the arguments of the next call and return the name; None if it is incomplete."""
        self._pending = self._pending[_find(self._pending, "{") :]
        head = self._HEAD.match(self._pending)
        if head is None:
            return None
        self._pending, self._in_arguments, self._position = self._pending[head.end() :], True, 0
        return head[1]

    def _read_arguments(self) -> tuple[str, bool]:
        """Return the arguments up to their end or to the last text, and whether they are complete."""
        last = self._position
        for match in self._MARK.finditer(self._pending, self._position):
            last = match.end()
            if match[0] == '"':
                self._in_string = not self._in_string
            elif not self._in_string and match[0] in "[{":
                self._depth += 1
            elif not self._in_string and match[0] in "]}":
                self._depth -= 1
                if self._depth <= 0:  # the end of the arguments or, if they have no brackets, of the call
                    end = last if self._depth == 0 else match.start()
                    arguments, self._pending = self._pending[:end].rstrip(), self._pending[last:]
                    self._in_arguments, self._depth = False, 0
                    return arguments, True
        # A backslash escapes the next character, which may not have arrived; blanks may be after the arguments.
        end = max(last, len(self._pending) - self._pending.endswith("\\"))
        arguments = self._pending[:end] if self._in_string else self._pending[:end].rstrip()
        self._pending, self._position = self._pending[len(arguments) :], end - len(arguments)
        return arguments, False

    def _likely_name(self) -> str:
        """Return the name that the incomplete call begins with: all of it if only one tool has this name."""
        found = self._NAME.match(self._pending)
        start = found[1] if found is not None else ""
        matching = [name for name in self._names if name.startswith(start)]
        return matching[0] if len(matching) == 1 else start


def _find(text: str, mark: str) -> int:
    """Return where a mark begins in a text, or the end of the text."""
    position = text.find(mark)
    return position if position >= 0 else len(text)
