"""`OutputParser`: splits an output into reasoning, content and tool calls; and the reasoning formats of model families.

Reasoning is the text between two markers at the start of an output. The prompt may contain the first marker.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Final

from mmlora.server.openai.tools.parser import Piece, ReasoningDelta, TextParser, num_held_back
from mmlora.structured_outputs import ReasoningMarks

THINK: Final = ReasoningMarks("<think>", "</think>")
# By vLLM's name. Templates of the last ones have no marker that identifies them.
FORMATS: Final[Mapping[str, ReasoningMarks]] = {
    "qwen3": THINK,
    "deepseek_v3": THINK,
    "glm45": THINK,
    "olmo3": THINK,
    "deepseek_r1": ReasoningMarks("<think>", "</think>", starts_open=True),
    "mistral": ReasoningMarks("[THINK]", "[/THINK]"),
    "seed_oss": ReasoningMarks("<seed:think>", "</seed:think>"),
    "granite": ReasoningMarks("Here is my thought process:", "Here is my response:"),
}
PARSER_NAMES: Final = tuple(FORMATS)


def find_marks(name: str, template: str) -> ReasoningMarks | None:
    """Return the markers of a format; with `auto`, those that a chat template contains; None with `none`."""
    if name == "auto":
        return next((marks for marks in FORMATS.values() if marks.end in template), None)
    return FORMATS.get(name)


class OutputParser:
    """Splits the text of one choice into reasoning, content and tool calls. Blanks around reasoning are dropped.

    Attributes:
        num_reasoning_tokens: tokens of the reasoning, with its markers.

    Args:
        marks: markers of reasoning; None for a model that has none.
        is_open: the prompt ends inside the reasoning.
        content: parser of the output after the reasoning; None if it is all content.
        hidden: markers that are not shown to clients.
    """

    def __init__(
        self,
        marks: ReasoningMarks | None,
        *,
        is_open: bool = False,
        content: TextParser | None = None,
        hidden: Collection[str] = (),
    ) -> None:
        self.num_reasoning_tokens = 0
        self._marks = marks or ReasoningMarks("", "")
        self._is_open = is_open
        self._content = content
        self._hidden = hidden
        self._pending = ""  # text not returned yet
        self._state = "start" if marks is not None else "content"  # or "reasoning"
        self._is_blank = False  # there were only blanks since the last marker

    def feed(self, text: str, num_tokens: int = 0) -> list[Piece]:
        """Feed a text delta and the number of its tokens, and return the completed pieces."""
        if self._state == "content":
            return list(self._read_content(text))
        self._pending += text
        self.num_reasoning_tokens += num_tokens
        return list(self._advance(is_last=False))

    def finish(self) -> list[Piece]:
        """Flush the buffer and return the remaining pieces. Without the end marker, all text is reasoning."""
        pieces = [] if self._state == "content" else list(self._advance(is_last=True))
        if self._state == "reasoning" or self._content is None:
            return pieces
        return pieces + self._content.finish()

    def _advance(self, *, is_last: bool) -> Iterator[Piece]:
        if self._state == "start":
            self._read_start(is_last)
        if self._state == "reasoning":
            yield from self._read_reasoning(is_last)
        if self._state == "content":
            text, self._pending = self._pending, ""
            yield from self._read_content(text)

    def _read_start(self, is_last: bool) -> None:
        """Find out whether the output starts with reasoning; it may repeat the marker of the prompt."""
        text = self._pending.lstrip()
        if text.startswith(self._marks.start):
            self._pending, self._state, self._is_blank = text[len(self._marks.start) :], "reasoning", True
        elif is_last or not self._marks.start.startswith(text):
            self._state, self._is_blank = ("reasoning", True) if self._is_open else ("content", False)
            self.num_reasoning_tokens *= self._is_open

    def _read_reasoning(self, is_last: bool) -> Iterator[Piece]:
        if self._is_blank:
            self._pending = self._pending.lstrip()
        end = self._pending.find(self._marks.end)
        if end >= 0:
            text, self._pending = self._pending[:end].rstrip(), self._pending[end + len(self._marks.end) :]
            self._state, self._is_blank = "content", True
        else:
            held = 0 if is_last else num_held_back(self._pending, [self._marks.end])
            text = self._pending[: len(self._pending) - held].rstrip()
            self._pending = self._pending[len(text) :]
            self._is_blank &= not text
        if text:
            yield ReasoningDelta(text)

    def _read_content(self, text: str) -> Iterator[Piece]:
        for mark in self._hidden:
            text = text.replace(mark, "")
        if self._is_blank:
            text = text.lstrip()
            self._is_blank = not text
        if self._content is not None:
            yield from self._content.feed(text)
        elif text:
            yield text
