"""`ModelFormat`: how a model writes reasoning and tool calls, for the endpoints with tools."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from mmlora.errors import RequestError
from mmlora.server.openai.chat.protocol import ToolRequest
from mmlora.server.openai.reasoning import OutputParser
from mmlora.server.openai.tools.choice import ToolCalling, find_special_tokens
from mmlora.structured_outputs import ReasoningMarks, added_tokens

# Variables by which chat templates take a reasoning effort: as it is, or as true or false.
EFFORT: Final = "reasoning_effort"
SWITCHES: Final = ("enable_thinking", "thinking")


class ModelFormat:
    """How the model writes reasoning and tool calls.

    Args:
        tool_calling: how it calls tools.
        reasoning: markers of its reasoning; None if it has none.
        tokenizer: the model's tokenizer.
        variables: variables of its chat template.
    """

    def __init__(
        self,
        tool_calling: ToolCalling,
        reasoning: ReasoningMarks | None,
        tokenizer: Any,
        variables: Collection[str] = (),
    ) -> None:
        self.variables = variables
        self.tool_calling = tool_calling
        self.reasoning = reasoning
        marks = () if reasoning is None else (reasoning.start, reasoning.end)
        self.special_marks: Mapping[str, int] = find_special_tokens(added_tokens(tokenizer), marks)

    def read(self, request: ToolRequest) -> "OutputFormat":
        """Return the form of the outputs of a request.

        Raises:
            RequestError: a field is malformed, or fields contradict each other.
        """
        options = request.sampling_options()
        answer = options["structured_outputs"]
        if request.tooling is not None:
            options |= self.tool_calling.sampling_options(request.tooling, answer)
        if self.reasoning is not None:
            kept = {*options.get("kept_special_token_ids", ()), *self.special_marks.values()}
            constraint = options["structured_outputs"]
            after = None if constraint is None else replace(constraint, reasoning=self.reasoning)
            options |= {"kept_special_token_ids": sorted(kept), "structured_outputs": after}
        variables = {**self._effort_variables(request), **(request.chat_template_kwargs or {})}
        return OutputFormat(self, request, options, variables, is_exclusive=answer is not None)

    def _effort_variables(self, request: ToolRequest) -> dict[str, Any]:
        """Return the reasoning effort as variables of the chat template.

        Raises:
            RequestError: the template has none of these variables; only `none` is then possible.
        """
        effort = request.effort
        if effort is None:
            return {}
        known: dict[str, Any] = {name: effort != "none" for name in SWITCHES if name in self.variables}
        if EFFORT in self.variables:
            known[EFFORT] = effort
        if not known and effort != "none":
            is_flat = request.reasoning_effort is not None
            name, shown = (EFFORT, EFFORT) if is_flat else ("reasoning", "reasoning.effort")
            text = f"the chat template of this model has none of the variables {EFFORT}, {', '.join(SWITCHES)}"
            raise RequestError(f'{shown}="{effort}" is not supported: {text}; allowed: "none"', name)
        return known


@dataclass(frozen=True, eq=False)
class OutputFormat:
    """Form of the outputs of one request.

    Attributes:
        model: how the model writes.
        request: the request.
        sampling_options: fields of `SamplingParams`.
        template_variables: variables of the chat template.
        is_exclusive: an output has either calls or content.
    """

    model: ModelFormat
    request: ToolRequest
    sampling_options: Mapping[str, Any]
    template_variables: Mapping[str, Any]
    is_exclusive: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether all text is content: there are no tools, and the model has no reasoning."""
        return self.request.tooling is None and self.model.reasoning is None

    @property
    def tools(self) -> list[Mapping[str, Any]] | None:
        """The tools for the chat template; None without any."""
        return None if self.request.tooling is None else list(self.request.tooling.tools.values())

    def new_parser(self, prompt: str | None) -> OutputParser:
        """Return a parser of one output.

        Args:
            prompt: the rendered prompt, which may open the reasoning.
        """
        skips, content, reasoning = self.request.skip_special_tokens is not False, None, self.model.reasoning
        if self.request.tooling is not None:
            content = self.model.tool_calling.new_parser(
                self.request.tooling, skips_special_tokens=skips, is_exclusive=self.is_exclusive
            )
        is_open = reasoning is not None and reasoning.is_open(prompt or "")
        hidden = self.model.special_marks if skips else ()
        return OutputParser(reasoning, is_open=is_open, content=content, hidden=hidden)

    def new_call_id(self) -> str:
        """Return a new call id in the form that the model's chat template requires."""
        return self.model.tool_calling.new_call_id()
