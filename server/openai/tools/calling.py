"""`ToolCalling`: how the model calls tools, for every endpoint that offers it some."""

import secrets
import string

from mmlora.server.openai.protocol import FieldError
from mmlora.server.openai.tools.choice import ToolChoice
from mmlora.server.openai.tools.formats import find_format
from mmlora.server.openai.tools.parser import TextParser

LETTERS = string.ascii_letters + string.digits


class ToolCalling:
    """What a choice of tools needs of the engine, and what reads the calls.

    Args:
        parser: name of the format in which the model writes tool calls, `auto` for the one that its chat template
            speaks of, None where it is not to choose by itself whether to call a tool.
        chat_template: its text.
    """

    def __init__(self, parser: str | None, chat_template: str) -> None:
        self._can_choose = parser is not None
        self._format = find_format(parser or "auto", chat_template)

    def sampling_options(self, choice: ToolChoice) -> dict[str, bool]:
        """What a free choice of tools needs: the marks of calls, which may be special tokens, in the text.

        Raises:
            FieldError: nothing is known that could read the calls.
        """
        if not choice.tools or choice.is_forced:
            return {}
        if self._format is None or not self._can_choose:
            reason = "was started without automatic tool choice"
            if self._can_choose:
                reason = "knows no parser for the tool calls of this model (--tool-call-parser names one)"
            text = f"tool_choice='auto' cannot be served: the server {reason}; allowed: none, required, or a named tool"
            raise FieldError(text, "tool_choice")
        return {"skip_special_tokens": False}

    def new_parser(self, choice: ToolChoice) -> TextParser | None:
        """What reads the calls of one answer; None where there are none."""
        return choice.new_parser(self._format)

    def new_call_id(self) -> str:
        """An id as the model's chat template takes it."""
        if self._format is not None and self._format.has_short_ids:
            return "".join(secrets.choice(LETTERS) for _ in range(9))
        return f"call_{secrets.token_hex(12)}"
